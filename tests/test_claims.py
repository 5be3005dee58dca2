"Claims and summary on numbers whose answer is known, and on tables and folders of version 0.0.1."
import math
import types
from pathlib import Path

import pandas as pd
import pytest

import tiny
from efcn_nb.experiments import relaxation
from efcn_nb.experiments.claims import claim_intervals, claims, diverged_runs, final_values, protocol_epochs, summary
from efcn_nb.experiments.measures import MEASURES, measured
from efcn_nb.experiments.relaxation import read_protocol, with_networks

RECORDS = Path(__file__).resolve().parents[1]/"nbs"/"records"


def made_up(accuracy, seeds=4, off=.01):
    "A table of four epochs with the given accuracies; a little noise over seeds."
    rows = []
    for seed in range(seeds):
        for (network, time), value in accuracy.items():
            first = time or 0
            for epoch in range(first, 9 if network == "cnn" else first+5):
                rows.append((network, time, epoch, "test", "accuracy",
                             value + .001*seed*(1 + first/10 + (network == "efcn")), seed))
                if network == "cnn": continue
                rows.append((network, time, epoch, "weights", "off_local",
                             (off if network == "efcn" else .9) + 1e-6*seed, seed))
                rows.append((network, time, epoch, "weights", "unshared", .01, seed))
    return pd.DataFrame(rows, columns="network relax epoch split metric value seed".split())


@pytest.mark.parametrize("fcn, cnn, off, verdicts", [(.5, .7, .01, {"1": "holds", "2a": "holds", "3": "holds"}),
                                                     (.9, .7, .01, {"1": "fails", "2a": "holds"}),
                                                     (.5, .95, .5, {"1": "holds", "2a": "fails", "3": "fails"})])
def test_verdicts(fcn, cnn, off, verdicts):
    table = made_up({("cnn", None): cnn, ("fcn", None): fcn, ("efcn", 0): .6, ("efcn", 2): .8, ("efcn", 4): .7},
                    off=off)
    found = claims(table).assign(claim=lambda t: t.claim.str.split().str[0]).set_index("claim")
    assert {k: found.verdict[k] for k in verdicts} == verdicts and found.n["1"] == 4
    assert found.verdict["4"] == "not judged"


def test_one_seed_decides_nothing():
    table = made_up({("cnn", None): .5, ("fcn", None): .5, ("efcn", 0): .6, ("efcn", 2): .8}, seeds=1)
    assert not set(claims(table).verdict) & {"holds", "fails"}


def test_summary_is_mean_spread_and_number():
    table = made_up({("cnn", None): .5, ("fcn", None): .4, ("efcn", 0): .6}, seeds=3)
    row = summary(table).set_index("network").loc["efcn"]
    assert math.isclose(row.accuracy, .602) and math.isclose(row.spread, .002) and row.n == 3
    assert math.isclose(row.off_local, .010001)


def with_lost(table, *runs):
    "`table`, in which the `runs` (network, seed, relax) diverged in their last epoch."
    for network, seed, relax in runs:
        one = (table.network == network) & (table.seed == seed) & (table.relax == relax)
        end = one & (table.epoch == table.epoch[one].max())
        table = pd.concat([table[~end], table[end].head(1).assign(metric="diverged", split="train", value=1.)],
                          ignore_index=True)
    return table


def test_runs_that_diverged_are_told_in_one_way():
    table = with_lost(made_up({("cnn", None): .5, ("fcn", None): .4, ("efcn", 0): .6, ("efcn", 2): .7}), ("efcn", 1, 0),
                      ("efcn", 3, 0))
    assert diverged_runs(table)[["network", "seed", "relax", "epoch"]].values.tolist() == [
        ["efcn", 1, 0, 4], ["efcn", 3, 0, 4]]
    assert final_values(table).query("network == 'efcn' and relax == 0").seed.tolist() == [0, 2]
    assert summary(table).query("network == 'efcn'")[["n", "diverged"]].values.tolist() == [[2, 2], [4, 0]]
    assert "; 2 relaxed networks diverged" in claims(table).effect[0]


def test_a_relax_time_counts_though_a_seed_was_lost():
    table = made_up({("cnn", None): .5, ("fcn", None): .4, ("efcn", 0): .6, ("efcn", 2): .55})
    found = claims(with_lost(table, ("efcn", 1, 2))).iloc[0]
    assert "at relax time 2" in found.effect and found.n == 3


def test_the_number_of_epochs():
    table = made_up({("cnn", None): .5, ("fcn", None): .4, ("efcn", 0): .6, ("efcn", 2): .7})
    told = table.assign(protocol_epochs=4)
    assert protocol_epochs(table) == protocol_epochs(told) == 4 and final_values(told).equals(final_values(table))
    assert set(final_values(told[told.network != "fcn"]).network) == {"cnn", "cnn+", "efcn"}
    with pytest.raises(ValueError, match="no FCN baseline"): final_values(table[table.network != "fcn"])
    with pytest.raises(ValueError, match="read it with read_protocol"):
        final_values(table.rename(columns=dict(network="phase")))


def test_intervals_are_those_of_the_claims():
    table = made_up({("cnn", None): .7, ("fcn", None): .5, ("efcn", 0): .6, ("efcn", 2): .8, ("efcn", 4): .7})
    said, found = claims(table), claim_intervals(table)
    assert found.claim.tolist() == said[said.verdict != "not judged"].claim.tolist()
    assert found.verdict.tolist() == said[said.verdict != "not judged"].verdict.tolist()
    for row in found.itertuples():
        half = said.set_index("claim").interval[row.claim]
        assert half == f"±{50*(row.high - row.low):.1f}"
    assert said.effect[0] == f"{100*found['mean'][0]:+.1f} points at relax time {found.relax[0]:g}"


# Of version 0.0.1: the column phase, eFCNs 'relaxed', eLCNs 'lcn'

@pytest.mark.parametrize("name", ["needle_digits", "cifar10_jpeg_skinny", "cifar10_jpeg_skinny16_10k"])
def test_an_old_record(name):
    "Its table is read with today's names, and gives the summary and the verdicts that were recorded."
    table, was = read_protocol(RECORDS/name/"metrics.csv"), read_protocol(RECORDS/name/"summary.csv")
    assert "phase" in (RECORDS/name/"metrics.csv").read_text()[:100]
    assert set(table.network) == {*was.network} - {"cnn+"} <= {"cnn", "fcn", "efcn", "elcn"}
    pd.testing.assert_frame_equal(summary(table)[list(was)], was, check_dtype=False, rtol=1e-4)
    more = {k: read_protocol(RECORDS/name/f"{k}.csv")
            for k in ("ablation", "control") if (RECORDS/name/f"{k}.csv").exists()}
    said = pd.read_csv(RECORDS/name/"claims.csv").set_index("claim").verdict
    found = claims(table, **more).set_index("claim").verdict
    assert found.to_dict() == {claim: said[claim] for claim in found.index}


def test_an_old_folder(tmp_path, monkeypatch):
    """A folder whose runs were stored with the old names, and whose last run was stopped on the way:
    it resumes, and ends as a new one."""
    new = tiny.study(tmp_path/"new")
    table, rows, stop = new.run(), relaxation._rows, iter(range(4))
    old_names = {new: old for new, old in relaxation._PHASES.items()}
    def old_rows(*args):
        t = rows(*args)
        return t.assign(network=t.network.replace(old_names)).rename(columns=dict(network="phase"))
    old = tiny.study(tmp_path/"old")
    clock = iter(range(0, 10**9, 31))                                                # every epoch is stored
    with monkeypatch.context() as m:
        m.setattr(relaxation, "_rows", old_rows)
        m.setattr(relaxation, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
        for run in old.plan()[:-1]: old.carry_out(run)
        with pytest.raises(StopIteration): old.carry_out(old.plan()[-1], lambda: next(stop))
    for run in old.plan():
        assert "phase" in old._store(run).table and old._store(run).path.name == new._store(run).path.name
    assert old._store(old.plan()[-1]).load().epoch == 2 and len(old.unfinished()) == 1
    assert tiny.study(tmp_path/"old").run().equals(table)
    assert (tmp_path/"old/metrics.csv").read_bytes() == (tmp_path/"new/metrics.csv").read_bytes()


def test_old_measures(tmp_path, monkeypatch):
    study = tiny.study(tmp_path/"s", keep_weights=True)
    study.run()
    before, (path,) = measured(study, "ablation"), (tmp_path/"s/measures").glob("ablation-*.csv")
    path.write_text(path.read_text().replace("efcn,", "relaxed,").replace("elcn,", "lcn,"))
    monkeypatch.setitem(MEASURES, "ablation", lambda study: pytest.fail("computed again"))
    assert measured(study, "ablation").equals(before) and set(before.network) == {"efcn", "elcn"}


def test_a_network_that_was_not_relaxed_keeps_its_name():
    table = pd.DataFrame(dict(network=["lcn", "lcn", "cnn+", "fresh"], relax=[math.nan, 3, math.nan, math.nan]))
    assert with_networks(table).network.tolist() == ["lcn", "elcn", "cnn+", "fresh"]
