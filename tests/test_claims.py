"Claims and summary on numbers whose answer is known, and on tables and folders of version 0.0.1."
import math
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import tiny
from efcn_nb.experiments import relaxation
from efcn_nb.experiments.claims import (best_rows, check_table, choose_rates, claim_intervals, claims, diverged_runs,
                                        final_values, gains, needed_rows, protocol_epochs, summary)
from efcn_nb.experiments.measures import MEASURES, measured
from efcn_nb.experiments.plots import (
    plot_ablation, plot_accuracy_deviation, plot_claims, plot_curve_panels, plot_curves, plot_deviation, plot_gains,
    plot_growth, plot_matrix, plot_parts, plot_paths, plot_profile, plot_relax_times, plot_rows, plot_sharpness,
    plot_slice, plot_steps, plot_study)
from efcn_nb.experiments.relaxation import read_protocol, with_networks

RECORDS = Path(__file__).resolve().parents[1]/"efcn_nb"/"records"


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


@pytest.mark.parametrize("fcn, cnn, off, verdicts", [(.5, .7, .01, {"1": "holds", "2a": "holds", "3a": "holds"}),
                                                     (.9, .7, .01, {"1": "fails", "2a": "holds"}),
                                                     (.5, .95, .5, {"1": "holds", "2a": "fails", "3a": "fails"})])
def test_verdicts(fcn, cnn, off, verdicts):
    table = made_up({("cnn", None): cnn, ("fcn", None): fcn, ("efcn", 0): .6, ("efcn", 2): .8, ("efcn", 4): .7},
                    off=off)
    found = claims(table).assign(claim=lambda t: t.claim.str.split().str[0]).set_index("claim")
    assert {k: found.verdict[k] for k in verdicts} == verdicts and found.n["1"] == 4
    not_judged = [claim for claim in found.index if found.verdict[claim] == "not judged"]
    assert not_judged == ["P", "Pb", "2c", "2d", "3b", "4a", "4b"]


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
    ends = final_values(table, chance=.2).query("network == 'efcn' and relax == 0").set_index("seed").value
    assert [ends[1], ends[3]] == [.2, .2] and ends[[0, 2]].min() > .5
    assert summary(table).query("network == 'efcn'")[["n", "diverged"]].values.tolist() == [[4, 2], [4, 0]]
    assert "; 2 relaxed networks diverged" in claims(table).effect[2]


def test_a_run_that_diverged_counts_as_guessing():
    table = made_up({("cnn", None): .5, ("fcn", None): .4, ("efcn", 0): .6, ("efcn", 2): .7})
    assert claims(table).verdict[2] == "holds"
    found = claims(with_lost(table, ("efcn", 1, 2))).iloc[2]
    assert "at relax time 2" in found.effect and (found.n, found.verdict) == (4, "undecided")


def test_a_cnn_that_diverged_counts_as_guessing_from_then_on():
    table = made_up({("cnn", None): .5, ("fcn", None): .4, ("efcn", 0): .6, ("efcn", 2): .7}).assign(protocol_epochs=4)
    late = (table.network == "cnn") & (table.seed == 1) & (table.epoch >= 5)
    end = table[late].head(1).assign(metric="diverged", split="train", value=1.)
    ends = final_values(pd.concat([table[~late], end])).query("seed == 1").set_index("network").value
    assert ends["cnn"] > .5 and ends["cnn+"] == .1
    over = gains(pd.concat([table[~late], end]), "cnn+").set_index("relax")["mean"]
    assert math.isclose(over[0], .1015, abs_tol=.002) and over[2] > .29


def test_outcomes_are_means_of_the_last_epochs():
    table = made_up({("cnn", None): .5, ("fcn", None): .4, ("efcn", 2): .6}, seeds=1).assign(protocol_epochs=4)
    rising = table.assign(value=table.value + .01*table.epoch*(table.metric == "accuracy"))
    ends = final_values(rising).set_index("network").value                   # the first epoch is before training
    assert math.isclose(ends["cnn"], .5 + .01*2.5) and math.isclose(ends["cnn+"], .5 + .01*6)
    assert math.isclose(ends["efcn"], .6 + .01*4.5) and math.isclose(final_values(rising, last=1).value.iloc[-1], .66)


def test_the_number_of_epochs():
    table = made_up({("cnn", None): .5, ("fcn", None): .4, ("efcn", 0): .6, ("efcn", 2): .7})
    told = table.assign(protocol_epochs=4)
    assert protocol_epochs(table) == protocol_epochs(told) == 4 and final_values(told).equals(final_values(table))
    assert set(final_values(told[told.network != "fcn"]).network) == {"cnn", "cnn+", "efcn"}
    with pytest.raises(ValueError, match="no FCN baseline"): final_values(table[table.network != "fcn"])
    with pytest.raises(ValueError, match="read it with read_protocol"):
        final_values(table.rename(columns=dict(network="phase")))


def test_without_an_fcn_what_needs_it_is_not_judged():
    table = made_up({("cnn", None): .7, ("efcn", 0): .6, ("efcn", 2): .8}).assign(protocol_epochs=4)
    found = claims(table).assign(claim=lambda t: t.claim.str.split().str[0]).set_index("claim")
    assert found.effect[["1", "5"]].tolist() == ["not in these numbers; needs the FCN"]*2
    assert found.verdict["2a"] == "holds" and "5" not in claim_intervals(table).claim.str[0].tolist()
    assert plot_study(table) and set(summary(table).network) == {"cnn", "cnn+", "efcn"}


def held_out(table, shift=0):
    "`table` with accuracies on images held out, which are those of the test set `shift` epochs later."
    t = table[table.metric == "accuracy"].assign(split="validation", epoch=lambda t: t.epoch - shift)
    return pd.concat([table, t], ignore_index=True)


def test_best_epochs_are_chosen_on_images_held_out():
    "Of a run whose test accuracy peaks at 3, validation accuracy at 2, that at 2 counts; of the CNN within its epochs."
    table = made_up({("cnn", None): .5, ("fcn", None): .4, ("efcn", 0): .6}, seeds=2).assign(protocol_epochs=4)
    peak = table.value - .1*(table.epoch - 3).abs()*(table.metric == "accuracy")
    table = held_out(table.assign(value=peak), shift=1)
    found = final_values(table, "best_accuracy").query("seed == 0").set_index("network").value
    assert found.round(9).to_dict() == {"cnn": .4, "cnn+": .4, "fcn": .3, "efcn": .5}
    late = (table.network == "cnn") & (table.epoch == 8)
    later = table.assign(value=table.value.where(~late, .9))
    found = final_values(later, "best_accuracy").query("seed == 0").set_index("network").value
    assert round(found["cnn"], 9) == .4 and found["cnn+"] < .9
    assert best_rows(table[table.split != "validation"]).empty
    pd.testing.assert_frame_equal(best_rows(best_rows(table)), best_rows(table))


def test_a_run_that_diverged_has_no_best_epoch():
    table = with_lost(held_out(made_up({("cnn", None): .5, ("fcn", None): .4, ("efcn", 0): .6})), ("efcn", 1, 0))
    found = final_values(table, "best_accuracy", chance=.2).query("network == 'efcn'").set_index("seed").value
    assert found[1] == .2 and found.drop(1).min() > .5


def test_intervals_are_those_of_the_claims():
    table = made_up({("cnn", None): .7, ("fcn", None): .5, ("efcn", 0): .6, ("efcn", 2): .8, ("efcn", 4): .7})
    said, found = claims(table), claim_intervals(table)
    assert found.claim.tolist() == said[said.verdict != "not judged"].claim.tolist()
    assert found.verdict.tolist() == said[said.verdict != "not judged"].verdict.tolist()
    for row in found.itertuples():
        half = said.set_index("claim").interval[row.claim]
        assert half == f"±{50*(row.high - row.low):.1f}"
    assert said.effect[2] == f"{100*found['mean'][0]:+.1f} points at relax time {found.relax[0]:g}"


# A table that is none of the protocol's

GOOD = made_up({("cnn", None): .7, ("fcn", None): .5, ("efcn", 0): .6, ("efcn", 2): .8, ("efcn", 4): .7})
OF_THE_PROTOCOL = [check_table, diverged_runs, protocol_epochs, final_values, summary, claims, claim_intervals,
                   plot_curves, plot_curve_panels, plot_relax_times, plot_deviation, plot_accuracy_deviation,
                   plot_study]
OF_MEASURES = [plot_ablation, plot_profile]
NO_TABLES = dict(
    old=(GOOD.rename(columns=dict(network="phase")), "does not name the networks; read it with read_protocol"),
    bare=(pd.DataFrame(), "does not name the networks; read it with read_protocol"),
    without_relax=(GOOD.drop(columns="relax"), "has no column relax; it must be as .* returns it"),
    nothing=(None, "must be a DataFrame as .* returns it, not NoneType"), rows=([{}], "must be a DataFrame"),
    summary=(summary(GOOD), "has no column .*; it must be as .* returns it, and is one that summary returns"),
    claims=(claims(GOOD), "has no column .*, and is one that claims returns"),
    gains=(gains(GOOD), "has no column .*, and is one that gains returns"),
    foreign=(pd.DataFrame(dict(height=[1.7])), "does not name the networks; read it .*, or give one as .* returns it"),
    a_path=("metrics.csv", "not str; read_protocol reads one from a file"),
    another_path=(Path("metrics.csv"), "not PosixPath; read_protocol reads one from a file"),
    new=(SimpleNamespace(measured=pd.DataFrame), "the study has measured nothing yet; call its method run first"))


@pytest.mark.parametrize("case", NO_TABLES)
@pytest.mark.parametrize("function", OF_THE_PROTOCOL + OF_MEASURES, ids=lambda function: function.__name__)
def test_what_is_no_table_of_the_protocol(function, case):
    table, says = NO_TABLES[case]
    with pytest.raises(ValueError, match=says) as error: function(table)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("function", OF_THE_PROTOCOL, ids=lambda function: function.__name__)
def test_a_table_without_rows_is_refused(function):
    with pytest.raises(ValueError, match="the table has no rows; it must be as relax returns it"): function(GOOD[:0])


@pytest.mark.parametrize("function", [*OF_THE_PROTOCOL, plot_gains, plot_claims],
                         ids=lambda function: function.__name__)
def test_a_study_is_taken_for_its_table(function):
    "And plots of gains and claims judge a table first."
    found = function(SimpleNamespace(measured=lambda: GOOD))
    assert found.equals(function(GOOD)) if isinstance(found, pd.DataFrame) else found


OTHER_PLOTS = [
    (lambda: plot_curves(GOOD, "acuracy"), "unknown metric 'acuracy'; known are accuracy, off_local, unshared"),
    (lambda: plot_curves(GOOD, split="train"), "unknown split of accuracy 'train'; known are test"),
    (lambda: plot_curve_panels(GOOD[GOOD.network == "cnn"]), "no relaxed network, and there is a panel for each"),
    (lambda: plot_deviation(GOOD, "loss"), "unknown metric 'loss'; known are convolutional, unshared"),
    (lambda: plot_gains(summary(GOOD)), "no column mean; it must be as gains returns it, and is one that summary"),
    (lambda: plot_claims(claims(GOOD)), "no column relax; it must be as claim_intervals .*, and is one that claims"),
    (lambda: plot_parts(GOOD), "no column convolutional; it must be as shares returns it"),
    (lambda: plot_sharpness(GOOD, .1), "no column part; it must be as measure_curvature returns it"),
    (lambda: plot_matrix(GOOD), "matrix must be a square DataFrame of numbers, as barrier_matrix returns it"),
    (lambda: plot_matrix([[0, 1], [1, 0]]), "matrix must be a square DataFrame"),
    (lambda: plot_paths(GOOD), "no column path; it must be as measure_paths returns it"),
    (lambda: plot_paths(GOOD, "off_local"), "unknown value 'off_local'; known are loss, accuracy"),
    (lambda: plot_slice(GOOD), "no column x; it must be as loss_slice returns it"),
    (lambda: plot_steps(GOOD), "no column form; it must be as bench_train returns it"),
    (lambda: plot_growth(GOOD), "no column form; it must be as bench_train returns it"),
    (lambda: plot_rows(GOOD), "rows must be a dict, a name: array of shape"),
    (lambda: plot_rows({"a": np.zeros((2, 3))}), "rows must be a dict"),
    (lambda: gains(GOOD[GOOD.network != "cnn"]), r"unknown over 'cnn\+'; known are")]


@pytest.mark.parametrize("call, says", OTHER_PLOTS)
def test_plots_say_what_they_want(call, says):
    with pytest.raises(ValueError, match=says) as error: call()
    assert len(str(error.value).splitlines()) == 1


NOT_COMPARABLE = dict(
    no_cnn=(GOOD[GOOD.network != "cnn"], "run both"), no_efcn=(GOOD[GOOD.network != "efcn"], "run both"),
    no_accuracy=(GOOD[GOOD.metric != "accuracy"], "the claims need accuracy|run both"),
    no_deviation=(GOOD[GOOD.metric == "accuracy"], "the claims need off_local of the relaxed networks"),
    no_unshared=(GOOD[GOOD.metric != "unshared"], "the claims need unshared of the relaxed networks"),
    two_studies=(pd.concat([GOOD, GOOD]), "several values for one run; judge one study at a time"))


@pytest.mark.parametrize("case", NOT_COMPARABLE)
@pytest.mark.parametrize("function", [claims, claim_intervals])
def test_tables_that_the_claims_cannot_compare(function, case):
    table, says = NOT_COMPARABLE[case]
    with pytest.raises(ValueError, match=says) as error: function(table)
    assert len(str(error.value).splitlines()) == 1


def test_categories_are_as_good_as_text():
    table = with_lost(GOOD, ("cnn", 0, math.nan), ("efcn", 1, 0))
    categories = table.assign(**{name: pd.Categorical(table[name]) for name in ("network", "split", "metric")})
    for function in OF_THE_PROTOCOL[1:7]:
        found, expected = function(categories), function(table)
        if isinstance(found, pd.DataFrame): pd.testing.assert_frame_equal(found, expected, check_dtype=False)
        else: assert found == expected
    assert plot_study(categories)


ABLATION = pd.DataFrame([dict(network="efcn", seed=seed, relax=relax, kept=kept, accuracy=.5 + .01*seed)
                         for seed in range(3) for relax in (0, 2)
                         for kept in ("convolutional + unshared + off_local", "convolutional + unshared", "off_local",
                                      "off_local noise", "all less noise")]).assign(readout=.5)
NO_SUPPLEMENTS = dict(
    old_ablation=(dict(ablation=ABLATION.rename(columns=dict(network="phase"))), "read it with read_protocol"),
    no_efcn=(dict(ablation=ABLATION.assign(network="elcn")), "ablation has no eFCN of which convolutional"),
    part=(dict(ablation=ABLATION[ABLATION.kept != "off_local"]), "ablation has no eFCN of which off_local is kept"),
    before_0_1=(dict(ablation=ABLATION.drop(columns="readout")), "no column readout; it must be as measure_ablation"),
    no_null=(dict(ablation=ABLATION[ABLATION.kept != "all less noise"]), "no eFCN of which all less noise is kept"),
    measured=(dict(ablation=GOOD), "no column kept; it must be as measure_ablation returns it"),
    a_path=(dict(ablation="ablation.csv"), "must be a DataFrame as measure_ablation returns it, not str"))


@pytest.mark.parametrize("case", NO_SUPPLEMENTS)
@pytest.mark.parametrize("function", [claims, claim_intervals])
def test_what_is_no_table_of_a_measure(function, case):
    given, says = NO_SUPPLEMENTS[case]
    assert len(function(GOOD, ABLATION)) == (12 if function is claims else 7)
    with pytest.raises(ValueError, match=says) as error: function(GOOD, **given)
    assert len(str(error.value).splitlines()) == 1


def test_measures_at_several_rates_are_taken_at_the_rates_chosen():
    "Of networks at .1, which are better on the images held out; a measure at one rate is taken as it is."
    both = [held_out(made_up({("cnn", None): .5, ("fcn", None): .4, ("efcn", 0): .5 + lr})).assign(lr=lr)
            for lr in (.1, .05)]
    table = pd.concat([both[0], both[1][both[1].network == "efcn"]]).assign(protocol_epochs=4)
    one = ABLATION[ABLATION.relax == 0]
    worse = one.assign(accuracy=one.accuracy + .3*(one.kept == "convolutional + unshared"))
    moved = pd.DataFrame([dict(network=n, seed=s, relax=t, off_local=o + .01*s)
                          for s in range(3) for n, t, o in (("efcn", 0, .3), ("fcn", None, .8))])
    far = moved.assign(off_local=.99)
    expected = claims(table, one, moved)
    two = [pd.concat([a.assign(lr=.1), b[b.network == "efcn"].assign(lr=.05)]) for a, b in ((one, worse), (moved, far))]
    pd.testing.assert_frame_equal(claims(table, *two), expected)
    pd.testing.assert_frame_equal(claims(table, one.assign(lr=.05), moved.assign(lr=.05)), expected)
    assert not claims(table, worse, far).equals(expected)


NAMES = ["cnn", "fcn", "relaxed", "lcn"]
OLD_AND_NEW = dict(
    old=dict(phase=NAMES), categories=dict(phase=pd.Categorical(NAMES)),
    new=dict(network=["cnn", "fcn", "efcn", "elcn"]),
    new_categories=dict(network=pd.Categorical(["cnn", "fcn", "efcn", "elcn"])),
    both=dict(phase=["cnn", "fcn", None, None], network=[None, None, "efcn", "elcn"]),
    both_the_same=dict(phase=NAMES, network=NAMES),
    both_in_categories=dict(phase=pd.Categorical(NAMES), network=pd.Categorical(["cnn", None, "efcn", None])))


@pytest.mark.parametrize("case", OLD_AND_NEW)
def test_old_and_new_names_of_the_networks(case):
    found = with_networks(pd.DataFrame(OLD_AND_NEW[case] | dict(relax=[None, None, 0, 4])))
    assert found.network.tolist() == ["cnn", "fcn", "efcn", "elcn"] and [*found].count("network") == 1
    assert "phase" not in found


# Of version 0.0.1: the column phase, eFCNs 'relaxed', eLCNs 'lcn'

OLD_NUMBERS = dict(cnn=[(0, .1), (1, .5), (2, .6), (3, .6)], fcn=[(0, .1), (2, .4)], relaxed=[(1, .5), (3, .7)],
                   lcn=[(1, .5), (3, .65)])


def test_an_old_table(tmp_path):
    "It is read with today's names, and can be judged."
    lines = ["data,model,seed,phase,relax,epoch,step,split,metric,value"]
    for seed in range(3):
        for phase, numbers in OLD_NUMBERS.items():
            run = f'"photographs, few",skinny16,{seed},{phase},{1 if phase in ("relaxed", "lcn") else ""}'
            gain = .02 if phase == "relaxed" else .01
            lines += [f"{run},{epoch},{epoch},test,accuracy,{value + gain*seed}" for epoch, value in numbers]
            if phase != "cnn": lines += [f"{run},{epoch},{epoch},weights,{share},.0{seed+1}"
                                         for epoch, _ in numbers for share in ("off_local", "unshared")]
    (tmp_path/"metrics.csv").write_text("\n".join(lines) + "\n")
    table = read_protocol(tmp_path/"metrics.csv")
    assert set(table.network) == {"cnn", "fcn", "efcn", "elcn"} and "phase" not in table
    assert set(summary(table).network) == {"cnn", "cnn+", "fcn", "efcn", "elcn"}
    verdicts = claims(table).set_index("claim").verdict
    assert verdicts.filter(like="1  every").tolist() == ["holds"]


@pytest.mark.parametrize("name", ["photographs_1k", "photographs_4k", "photographs_20k", "photographs_1k_width48",
                                  "photographs_1k_width96", "needle_digits", "needle_digits_rates"])
def test_a_record(name):
    "Its table gives the summary and the claims that were recorded."
    table = read_protocol(RECORDS/name/"metrics.csv")
    was, said = (pd.read_csv(RECORDS/name/f"{kind}.csv") for kind in ("summary", "claims"))
    pd.testing.assert_frame_equal(summary(table), was, check_dtype=False, rtol=1e-4)
    measures = [RECORDS/name/f"{measure}.csv" for measure in ("ablation", "displacement")]
    found = claims(table, *(read_protocol(path) if path.exists() else None for path in measures))
    assert found[["claim", "effect", "interval", "n", "verdict"]].fillna("").equals(
        said[["claim", "effect", "interval", "n", "verdict"]].fillna(""))


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
