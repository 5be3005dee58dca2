"The instruments, taken to all networks of a study."
import copy
import math

import pandas as pd
import pytest
import torch
from torch import nn

import tiny
from efcn_nb.experiments.measures import MEASURES, first_rows, measured, one_seed, over_networks, slowed
from efcn_nb.instruments.subspaces import shares
from efcn_nb.ladder.embedding import convert, embed


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
    def open_run(self, network, seed, relax_time=None):
        run = right(self, network, seed, relax_time)
        if (network, relax_time) == ("efcn", 1):
            monkeypatch.setattr(type(run), "diverged", property(lambda r: "at step 3" if r.path == run.path else None),
                                raising=False)
        return run
    monkeypatch.setattr(type(study), "open_run", open_run)
    assert over_networks(study, lambda m: shares(m).loc[["all"]]).relax.tolist() == [0, 2]
    assert "eFCN 1" not in one_seed(study, 0)


def test_a_cnn_that_diverged_early_spoils_no_measure(study, monkeypatch):
    "As if the CNN had diverged before it could be relaxed at 1 or later: those networks never were."
    monkeypatch.setattr(type(study), "lost", lambda self, network, seed, relax_time=None, begin=False: bool(relax_time))
    assert over_networks(study, lambda m: shares(m).loc[["all"]]).relax.tolist() == [0]
    assert over_networks(study, lambda m: shares(m).loc[["all"]], begin=True).relax.tolist() == [0]
    assert MEASURES["control"](study).relax.unique().tolist() == [0]
    assert MEASURES["paths"](study).relax.unique().tolist() == [0]


@pytest.mark.parametrize("conv", [nn.Conv2d(1, 3, 5, padding=2, stride=2), nn.ConvTranspose2d(1, 2, 2, stride=2),
                                  nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")])
def test_a_slowed_cnn_with_padding(conv):
    conv = copy.deepcopy(conv)
    conv.reset_parameters()                                                       # it was drawn when this file was read
    cnn = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.LazyLinear(10)).double()
    x, y = tiny.DATA.train.batch(range(20))
    cnn(x.double())
    efcn = embed(cnn, (1, 16, 16))
    for model, optimizer in ((cnn, slowed(cnn, (1, 16, 16), .3, .9, .01)),
                             (efcn, torch.optim.SGD(efcn.parameters(), .3, .9, weight_decay=.01))):
        nn.functional.cross_entropy(model(x.double()), y).backward()
        optimizer.step()
    for p, q in zip(convert(efcn, "cnn").parameters(), cnn.parameters()): assert torch.allclose(p, q, atol=1e-12)


class Moduli(nn.Module):
    def forward(self, x): return x.abs().flatten(1)


def complex_net():
    return embed(nn.Sequential(nn.Conv2d(1, 2, 3, dtype=torch.complex128), Moduli(), nn.Linear(392, 10).double()),
                 (1, 16, 16))


def test_pictures_of_complex_rows_are_refused(study, monkeypatch):
    monkeypatch.setattr(type(study), "start", lambda *args: complex_net())
    monkeypatch.setattr(type(study), "network", lambda *args: complex_net())
    with pytest.raises(ValueError, match="rows are shown as images of real numbers"): first_rows(study)
