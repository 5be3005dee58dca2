"The study of distillation: cells by hand, searches, and made-up tables whose gaps are known."
import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import efcn_nb.studies.distillation as study
from efcn_nb.experiments.runs import run_id
from efcn_nb.instruments.students import MLPS, STUDENTS, student
from efcn_nb.instruments.transfer_sets import distil, standardised, teach, transfer_set
from efcn_nb.ladder.embedding import embed
from efcn_nb.materials.data import Data, load_data
from efcn_nb.studies.distillation import (
    DistillationSettings, distillation_claims, distillation_grid, distillation_study, embedded_students, gaps,
    split_validation, start_or_architecture)
from efcn_nb.training.loop import Diverged, evaluate
from lessons import noise, taught

FAST = dict(lrs=[1e-2], epochs=2, search_epochs=1, seeds=[0, 1], label_budgets=[])


def fast(**more): return DistillationSettings(**(FAST | more))


def searching(lrs, seeds=(0,), search_epochs=1, epochs=1):
    "Settings of a search whose students are made up."
    return DistillationSettings(lrs=lrs, seeds=seeds, search_epochs=search_epochs, epochs=epochs)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small():
    "Splits of a few digits, and a transfer set that two teachers have answered."
    data = load_data("digits")
    splits = split_validation(Data(data.train.thinned(250), data.test.thinned(60)))
    transfer, table = teach(splits, transfer_set(splits.train, 2, 1, fill="constant"), teachers=2, width=4, epochs=2)
    return splits, transfer, table


# The grid
def test_training_of_a_broken_last_step(small, monkeypatch):
    "Weights that are not finite are no result, though every loss was."
    net = student(0, 1, 2_000, (1, 16, 16), 10)
    with torch.no_grad(): net[-1].weight.fill_(math.nan)
    monkeypatch.setattr(study, "distil", lambda *_: None)
    assert all(math.isnan(v) for v in study._score(net, small[1], small[0], ["validation", "test"]).values())


def test_images_that_differ(small):
    for grid in (distillation_grid, embedded_students):
        with pytest.raises(ValueError,
                           match=r"images of shape \(1, 8, 8\) and 3 classes, the splits have \(1, 16, 16\) and 10"):
            grid(small[0], taught(noise(20)), fast())


def test_grid_where_no_folder_can_be(small, tmp_path):
    (tmp_path/"file").write_text("in the way")
    with pytest.raises(OSError, match="nothing can be written to .*choose another folder"):
        distillation_grid(*small[:2], fast(students=["mlp1"], budgets=[2_000]), tmp_path/"file")


def test_learning_rates_are_chosen_without_test_images(small):
    "Other test images, the same rates; and every search asks for validation images alone."
    splits, transfer, _ = small
    asked = []
    def run(cell, lr, seed, epochs, parts, **_):
        asked.append((epochs, seed, tuple(parts)))
        return [dict.fromkeys(parts, 1 - (math.log10(lr) + 2)**2 + .1*seed*("test" in parts))]
    table = study._tuned(run, [dict(cell=1), dict(cell=2)], searching([1e-3, 1e-2, 1e-1], [0, 1], 3, 7), {})
    assert [a for a in asked if a[0] == 3] == [(3, study.SEARCH_SEED, ("validation",))]*6
    assert {a for a in asked if a[0] == 7} == {(7, s, ("validation", "test")) for s in (0, 1)}
    assert (table.lr == 1e-2).all() and not table.at_edge.any()
    assert [*table.columns] == ["cell", "seed", "lr", "at_edge", "validation", "accuracy"]
    other = splits._replace(test=standardised(noise(50, (1, 16, 16), 10)))
    settings = fast(students=["mlp1"], budgets=[2_000], lrs=[1e-5, 1e-2])
    rates = [distillation_grid(s, transfer, settings) for s in (splits, other)]
    assert rates[0].lr.equals(rates[1].lr) and rates[0].at_edge.all()
    assert not rates[0].accuracy.equals(rates[1].accuracy)


def test_divergence_loses_the_search():
    def run(cell, lr, seed, epochs, parts, **_): return [dict.fromkeys(parts, math.nan if lr > limit else lr)]
    limit = .05
    assert (study._tuned(run, [dict(cell=1)], searching([.01, .03, .1]), {}).lr == .03).all()
    limit = 0
    with pytest.raises(Diverged, match="cell 1: every learning rate diverged; try smaller ones than 0.01"):
        study._tuned(run, [dict(cell=1)], searching([.01, .1]), {})


def test_rates_and_seeds_go_with_their_cells():
    "Every cell has another best rate, and the rates come in any order; of equals, the smallest."
    best = dict(a=1e-3, b=1e-1, c=1e-2, d=1e-3)
    def run(cell, lr, seed, epochs, parts, **_):
        return [{part: -abs(math.log10(lr / best[cell])) + (seed if part == "test" else 0) for part in parts}]
    table = study._tuned(run, [dict(cell=c) for c in "abcd"], searching([1e-1, 1e-3, 1e-2], np.arange(2), 3, 7), {})
    assert [*table.cell] == [*"aabbccdd"] and [*table.seed] == [0, 1]*4 and [*table.lr] == [best[c] for c in table.cell]
    assert [*table.at_edge] == [c != "c" for c in table.cell]
    assert (table.validation == 0).all() and (table.accuracy == table.seed).all()
    level = lambda cell, lr, seed, epochs, parts, **_: [dict.fromkeys(parts, .5)]
    assert (study._tuned(level, [dict(cell=1)], searching([.1, .01, .03]), {}).lr == .01).all()


def test_cells_are_known_by_all_that_determines_them(small):
    splits, transfer, _ = small
    def common(s=splits, t=transfer, **more): return run_id(study._common(s, t, fast(**more)))
    other = replace(splits.test, x=splits.test.x + 1)
    names = {common(), common(splits._replace(test=other)), common(splits._replace(validation=other)),
             common(t=replace(transfer, seed=7)), common(batch_size=7), common(precision="bf16")}
    assert len(names) == 6


def test_diverged_seed_is_missing(small, monkeypatch):
    def broken(model, *rest): raise Diverged("the loss was not finite")
    monkeypatch.setattr(study, "distil", broken)
    table = distillation_grid(*small[:2], fast(students=["mlp1"], budgets=[2_000]))
    assert table.accuracy.isna().all() and len(table) == 2


def test_grid_resumes(small, tmp_path, monkeypatch):
    splits, transfer, _ = small
    one = dict(students=["mlp1"], budgets=[2_000])
    def grid(**more): return distillation_grid(splits, transfer, fast(**one, **more), tmp_path)
    first, trained, real = grid(), [], study.distil
    monkeypatch.setattr(study, "distil", lambda *a: (trained.append(a), real(*a)))
    assert grid().equals(first) and not trained
    assert grid(seeds=[0, 1, 2]).iloc[:2].equals(first) and len(trained) == 1
    logits = transfer.logits.clone()
    logits[0, 0] += 1
    distillation_grid(splits, replace(transfer, logits=logits), fast(**one), tmp_path)
    assert len(trained) == 3, "another teacher is another cell"


@pytest.mark.parametrize("settings, words",
                         [(dict(students=["mlp1", "mlp6"]), "unknown student 'mlp6'"),
                          (dict(students=["mlp1", "conv1", "mlp1"]), "students must differ .* 'mlp1' is there twice"),
                          (dict(budgets=[2_000.5]), "each of budgets must be a whole number"),
                          (dict(larger_mlps=[10_000]),
                           "budgets and larger_mlps must differ from each other, but 10000"),
                          (dict(seeds=[study.SEARCH_SEED]), "chooses the learning rates"),
                          (dict(lrs=[0.1, 0]), "must be a positive number, not 0"),
                          (dict(epochs=0), "epochs must be a whole number, 1 or more"),
                          (dict(batch_size=2.5), "batch_size must be a whole number"),
                          (dict(precision="fp8"), "unknown precision 'fp8'"),
                          (dict(embedded="mlp3"), "unknown convolutional student 'mlp3'; known are conv1"),
                          (dict(relax_times=[-2]), "each of relax_times must be a whole number, 0 or more"),
                          (dict(networks=["conv", "vit"]), "unknown network 'vit'"),
                          (dict(networks=["fcn"] * 2), "'fcn' is there twice")])
def test_impossible_settings(settings, words):
    with pytest.raises(ValueError, match=words): DistillationSettings(**settings)


def test_budgets_that_are_too_small_cost_nothing(small, tmp_path):
    for make, settings in ((distillation_grid, dict(budgets=[10])), (embedded_students, dict(embedded_budget=5))):
        with pytest.raises(ValueError, match="no width meets a budget"): make(*small[:2], fast(**settings), tmp_path)
    assert not list(tmp_path.iterdir())


# Embedded students

def test_embedded_students(small, tmp_path):
    splits, transfer, _ = small
    run = lambda: embedded_students(splits, transfer, fast(embedded_budget=1_200, relax_times=[1]), tmp_path)
    table = run()
    cells = [*itertools.product(("conv", "efcn", "elcn"), (0, 1)), ("fcn", 0), ("lcn", 0), ("mlp", 0)]
    assert run().equals(table) and table.groupby(["network", "relax"]).size().to_dict() == dict.fromkeys(cells, 2)
    at = table.set_index(["network", "relax", "seed"]).sort_index()
    for n in ("efcn", "elcn"):
        for t in (0, 1): np.testing.assert_allclose(at.start[n, t], at.start["conv", t], atol=1.01/60)
    conv = student(2, 1, 1_200, (1, 16, 16), 10, seed=1)
    distil(conv, transfer, 1, 1e-2)
    net = embed(conv, (1, 16, 16))
    distil(net, transfer, 2, 1e-2)
    assert at.accuracy["efcn", 1, 1] == evaluate(net, splits.test)["accuracy"]


def test_relax_times_of_fresh_networks(small):
    def run(**more): return embedded_students(*small[:2], fast(embedded_budget=900, **more))
    table = run(relax_times=np.array([1]), networks=["fcn"])
    assert set(zip(table.network, table.relax)) == {("conv", 0), ("fcn", 0)}
    assert [*run(networks=["conv"], relax_times=[0]).network] == ["conv"]*2


def test_diverged_convolution_is_missing(small, monkeypatch):
    "It diverges with one seed, when taught for three epochs; nothing else is lost."
    real = study.distil
    def broken(model, transfer, epochs, *rest):
        if epochs == 3 and model[0].weight.equal(second): raise Diverged("the loss was not finite")
        return real(model, transfer, epochs, *rest)
    second = student(2, 1, 900, (1, 16, 16), 10, seed=1)[0].weight.detach().clone()
    monkeypatch.setattr(study, "distil", broken)
    settings = fast(embedded_budget=900, relax_times=[3], networks=["conv", "efcn", "fcn"])
    table = embedded_students(*small[:2], settings)
    lost = (table.relax == 3) & (table.seed == 1)
    assert table.accuracy.isna().equals(lost) and table.start.isna().equals(lost) and (table.weights > 0).all()
    parts = start_or_architecture(table).set_index(["relax", "part"])
    assert [*parts.n[0]] == [2]*3 and [*parts.n[3]] == [1]*3
    assert abs(parts.gap[3, "whole"] - parts.gap[3, "start"] - parts.gap[3, "constraint"]) < 1e-12


# Tables

def made_grid(accuracy, seeds=4, budgets=(1_000, 10_000), spread=.004):
    "A grid whose accuracies are a function of (convs, hidden, budget, target), plus noise."
    draw = np.random.default_rng(0)
    return pd.DataFrame([dict(student=name, convs=c, hidden=h, budget=b, target=target, seed=seed, validation=a,
                              accuracy=a + spread * draw.standard_normal()) for name, (c, h) in STUDENTS.items()
                         for b in budgets for target in ("teacher", "labels") for seed in range(seeds)
                         for a in [accuracy(c, h, b, target)]])


def test_seed_that_is_missing_is_left_out():
    table = made_grid(lambda c, h, b, t: .3 + .2*(c > 0))
    table.loc[(table.student == "mlp1") & (table.seed == 0), "accuracy"] = math.nan
    assert distillation_claims(table).n[0] in (3, 4) and distillation_claims(table).verdict[0] == "holds"


def test_missing_seeds_are_not_counted():
    "Of the larger student one seed is missing; of those that are averaged, one."
    table = made_grid(lambda c, h, b, t: .3 + .2*(c > 0) - .1*(h > 1) + .05*(t == "teacher"))
    lost = (table.target == "teacher") & (table.seed == 2) & (table.student == "mlp1") & (table.budget == 10_000)
    table.loc[lost, "accuracy"] = math.nan
    found = distillation_claims(table).set_index("claim")
    assert [*found.n.iloc[[4, 6, 7]]][:2] == [3, 3] and "over mlp1 of 10,000" in found.effect.iloc[4]


def test_effects_by_hand():
    "From the rows of a grid, without pivots: the pairs are those of equal seeds."
    table = made_grid(lambda c, h, b, t: 0.3 + 0.2 * (c > 0) + 0.01 * h + 0.03 * c + 0.05 * (t == "teacher")
                      + 0.01 * math.log10(b), spread=0.03).sample(frac=1, random_state=0)
    A = {(r.student, r.budget, r.target, r.seed): r.accuracy for r in table.itertuples()}
    found = distillation_claims(table).set_axis(VERDICTS)
    sides = dict(zip(VERDICTS, [("conv4", "mlp5"), ("conv1", "mlp5"), ("mlp5", "mlp1"), ("conv4", "conv1")]))
    for claim, (better, worse) in sides.items():
        d = {b: np.array([A[better, b, "teacher", s] - A[worse, b, "teacher", s] for s in range(4)])
             for b in (1_000, 10_000)}
        text = [f"{100*d[b].mean():+.1f} points at {b:,} weights, {better} over {worse}" for b in d]
        assert found.effect[claim] in text
        assert found.spread[claim] in [f"{100*x.std(ddof=1):.1f} points" for x in d.values()]
    small = [(np.mean([A["conv4", 1_000, "teacher", s] - A[k, 10_000, "teacher", s] for s in range(4)]), k)
             for k in MLPS]
    assert found.effect["3a"] in [f"{100*m:+.1f} points, conv4 of 1,000 over {k} of 10,000 weights" for m, k in small]
    each = [np.mean([A[k, b, "teacher", s] - A[k, b, "labels", s] for k in STUDENTS for b in (1_000, 10_000)])
            for s in range(4)]
    assert found.effect["4a"] == f"{100*np.mean(each):+.1f} points, mean of 18 students"
    assert found.spread["4a"] == f"{100*np.std(each, ddof=1):.1f} points"


def test_tables_without_rows():
    columns = gaps(made_grid(lambda c, h, b, t: .5).query("student == 'conv1'")).columns
    assert [*columns] == ["gap", "budget", "better", "worse", "seed", "difference"]
    cells = [("conv", 0), ("efcn", 0), ("efcn", 4), ("fcn", 0)]
    table = pd.DataFrame([dict(network=n, relax=t, seed=0, accuracy=.5) for n, t in cells])
    none = start_or_architecture(table[:1])
    assert {*start_or_architecture(table).relax} == {0} and not len(none) and "share" in none


VERDICTS = ["1a", "1b", "2a", "2b", "3a", "3b", "4a", "4b"]

def test_claims_of_a_gap_that_closes():
    "Those on which all students hold, or fail, stand in the notebook."
    accuracy = lambda c, h, b, t: .3 + .2*(c > 0)*(b < 5_000) - .02*(c > 1) - .03*h + .1*math.log10(b/1_000)
    found = distillation_claims(made_grid(accuracy))
    assert [*found.claim.str.split().str[0]] == VERDICTS
    assert {*found.verdict[:2]} <= {"undecided", "fails"} and [*found.verdict[[2, 3, 5]]] == ["fails", "fails", "holds"]


def test_claims_that_cannot_be_judged():
    table = made_grid(lambda c, h, b, t: .3 + .2*(c > 0)).query("target == 'teacher' and budget == 1000")
    found = distillation_claims(table).set_index("claim").verdict
    assert [*found.iloc[:2]] == ["holds"]*2 and [*found.iloc[4:]] == ["not judged"]*4
    assert (distillation_claims(table[table.student == "conv1"]).verdict == "not judged").all()
    assert set(distillation_claims(made_grid(lambda c, h, b, t: .3 + .2*(c > 0), seeds=1)).verdict) == {"undecided"}


def test_larger_mlps_only():
    "An MLP of the same size says nothing on whether a small student beats larger ones."
    table = made_grid(lambda c, h, b, t: .3 + .2*(c > 0) + .5*(b > 1_000)*(c == 0))
    row = distillation_claims(table[(table.convs == 0) | (table.budget == 1_000)]).iloc[4]
    assert row.verdict == "fails" and "of 1,000 over" in row.effect and "10,000 weights" in row.effect


# All of it


@pytest.mark.parametrize("settings, device, words", [
    (dict(budgets=[9]), "cpu", "no width meets"), (dict(larger_mlps=[9]), "cpu", "no width meets"),
    (dict(label_budgets=[9]), "cpu", "no width meets"), (dict(embedded_budget=2), "cpu", "no width meets"),
    (dict(), "nope", "no device 'nope'"), (dict(precision="tf32"), "cpu", "tf32 products need a GPU")])
def test_impossible_studies_cost_nothing(tmp_path, settings, device, words):
    with pytest.raises(ValueError, match=words):
        distillation_study(load_data("digits"), tmp_path/"new", fast(**settings), device)
    assert not (tmp_path/"new").exists()
