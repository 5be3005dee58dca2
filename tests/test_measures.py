"The instruments, taken to all networks of a study."
import math

import pandas as pd
import pytest
import torch
from torch import nn

import tiny
from efcn_nb.experiments.measures import MEASURES, first_rows, measured, one_seed, over_networks
from efcn_nb.instruments.subspaces import shares
from efcn_nb.ladder.embedding import embed


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    found = tiny.study(tmp_path_factory.mktemp("measures")/"study", keep_weights=True)
    found.run(progress=False)
    return found


def test_each_measure_is_made_once(study, monkeypatch):
    first = measured(study, "ablation")
    monkeypatch.setitem(MEASURES, "ablation", lambda study: pytest.fail("computed again"))
    pd.testing.assert_frame_equal(first, measured(study, "ablation"))
    with pytest.raises(ValueError, match="unknown measure 'all'; known are ablation"): measured(study, "all")


def test_networks_of_a_seed(study):
    assert list(one_seed(study, 0)) == ["CNN", "FCN", "eFCN 0", "eFCN 1", "eFCN 2", "eLCN 1"]
    ends = over_networks(study, lambda m: shares(m).loc[["all"]], ["efcn", "elcn", "fcn"]).set_index(
        ["network", "relax"]).off_local
    table = study.measured().query("split == 'weights' and metric == 'off_local'").set_index(
        ["network", "relax", "epoch"]).value
    assert math.isclose(ends["efcn", 1], table["efcn", 1, 3], rel_tol=1e-9) and ends["elcn", 1] == 0


def test_without_kept_weights(tmp_path):
    study = tiny.study(tmp_path/"study")
    study.run(progress=False)
    with pytest.raises(ValueError, match="keep_weights=True"): over_networks(study, shares)


def test_a_diverged_network_is_left_out(study, monkeypatch):
    "As if the one relaxed at 1 had diverged."
    right = type(study).open_run
    def open_run(self, network, seed, relax_time=None, lr=None):
        run = right(self, network, seed, relax_time, lr)
        if (network, relax_time) == ("efcn", 1):
            monkeypatch.setattr(type(run), "diverged", property(lambda r: "at step 3" if r.path == run.path else None),
                                raising=False)
        return run
    monkeypatch.setattr(type(study), "open_run", open_run)
    assert over_networks(study, lambda m: shares(m).loc[["all"]]).relax.tolist() == [0, 2]
    assert "eFCN 1" not in one_seed(study, 0)


def test_a_cnn_that_diverged_early_spoils_no_measure(study, monkeypatch):
    "As if the CNN had diverged before it could be relaxed at 1 or later: those networks never were."
    monkeypatch.setattr(type(study), "lost",
                        lambda self, network, seed, relax_time=None, lr=None, begin=False: bool(relax_time))
    assert over_networks(study, lambda m: shares(m).loc[["all"]]).relax.tolist() == [0]
    assert over_networks(study, lambda m: shares(m).loc[["all"]], begin=True).relax.tolist() == [0]
    assert MEASURES["paths"](study).relax.unique().tolist() == [0]


class Moduli(nn.Module):
    def forward(self, x): return x.abs().flatten(1)


def complex_net():
    return embed(nn.Sequential(nn.Conv2d(1, 2, 3, dtype=torch.complex128), Moduli(), nn.Linear(392, 10).double()),
                 (1, 16, 16))


def test_pictures_of_complex_rows_are_refused(study, monkeypatch):
    monkeypatch.setattr(type(study), "start", lambda *args, **kw: complex_net())
    monkeypatch.setattr(type(study), "network", lambda *args, **kw: complex_net())
    with pytest.raises(ValueError, match="rows are shown as images of real numbers"): first_rows(study)
