"Learning rates are chosen by other seeds on other images."
import math

import pandas as pd
import pytest
import torch

from efcn_nb.experiments.search import (
    SEARCH_SEED, best_rates, candidates, reported_seeds, validation_split, write_tables)
from efcn_nb.materials.data import load_data
from efcn_nb.training.loop import Diverged


def search(*rows): return pd.DataFrame(rows, columns=["network", "size", "lr", "seed", "accuracy"])


def two_seeds(lr, *values): return [("a", 1, lr, seed, value) for seed, value in enumerate(values)]


CASES = {  # rows, what a lost network counts as: rate and whether it lies at an edge
    "one rate": ([("a", 1, .1, 0, .5)], math.nan, .1, False),
    "inside": ([("a", 1, lr, 0, value) for lr, value in ((1., .2), (.1, .5), (.01, .4))], math.nan, .1, False),
    "at the lower edge": ([("a", 1, lr, 0, value) for lr, value in ((.1, .5), (.01, .6))], math.nan, .01, True),
    "of equals the smallest": ([("a", 1, lr, 0, .5) for lr in (.1, .01, 1.)], math.nan, .01, True),
    "means over seeds": (two_seeds(.1, .9, .1) + two_seeds(.2, .6, .6), math.nan, .2, True),
    "lost rules out": (two_seeds(.1, .9, math.nan) + two_seeds(.2, .1, .1), math.nan, .2, True),
    "lost counts nothing": (two_seeds(.1, .9, math.nan) + two_seeds(.2, .1, .1), 0., .1, True)}


@pytest.mark.parametrize("case", CASES)
def test_the_best_rate(case):
    rows, lost, lr, at_edge = CASES[case]
    found = best_rates(search(*rows), ["network", "size"], lost=lost)
    assert found.index.tolist() == [("a", 1)]
    assert found.lr.tolist() == [lr] and found.at_edge.tolist() == [at_edge]


def test_each_cell_has_a_rate_of_its_own():
    table = search(("b", 1, .1, 0, .5), ("b", 1, .2, 0, .6), ("a", 2, .1, 0, .5), ("a", 2, .2, 0, .4))
    assert best_rates(table, ["network", "size"]).lr.to_dict() == {("b", 1): .2, ("a", 2): .1}
    assert best_rates(table, ["network"]).lr.to_dict() == {("b",): .2, ("a",): .1}
    wrong = table.assign(error=1 - table.accuracy)
    assert best_rates(wrong, ["network"], "error").lr.to_dict() == {("b",): .1, ("a",): .2}


def test_no_rate_is_left():
    lost = search(("a", 1, .1, 0, math.nan), ("a", 1, .2, 0, math.nan))
    with pytest.raises(Diverged, match="network a, size 1: every learning rate diverged; try smaller ones than 0.1"):
        best_rates(lost, ["network", "size"])
    assert best_rates(lost, ["network"], lost=0.).lr.tolist() == [.1]


def test_validation_images_are_training_images_of_every_class():
    data = load_data("digits")
    halves = validation_split(data, .25, seed=1)
    both = torch.cat([halves.train.x, halves.test.x]).flatten(1).unique(dim=0)
    assert both.equal(data.train.x.flatten(1).unique(dim=0))
    counts = [part.y.bincount() for part in (halves.train, halves.test)]
    assert torch.allclose(counts[1]/(counts[0] + counts[1]), torch.tensor(.25), atol=.01)
    again, other = validation_split(data, .25, seed=1), validation_split(data, .25, seed=2)
    assert again.test.fingerprint == halves.test.fingerprint != other.test.fingerprint


@pytest.mark.parametrize("seeds, says", [
    (3, "must be a list"), ([], "at least one"), ([1, 1], "twice"), ([.5], "whole number"), ([-1], "0 or more"),
    ([SEARCH_SEED], f"seed {SEARCH_SEED} chooses the learning rates")])
def test_seeds_that_cannot_be_reported(seeds, says):
    with pytest.raises(ValueError, match=says): reported_seeds(seeds)


@pytest.mark.parametrize("lrs, says", [
    (.1, "must be a list"), ([], "at least one"), ([.1, .1], "twice"), ([0], "positive"), ([math.inf], "positive"),
    ("fast", "must be a list")])
def test_rates_that_cannot_be_tried(lrs, says):
    with pytest.raises(ValueError, match=says): candidates(lrs)


def test_seeds_and_rates(): assert (reported_seeds(range(3)), candidates((1, .1))) == ([0, 1, 2], [.1, 1.])


def test_tables_are_written(tmp_path):
    table = search(("a", 1, .1, 0, .5))
    write_tables(tmp_path, dict(one=table, two=table[:0]))
    assert pd.read_csv(tmp_path / "one.csv").equals(table) and not len(pd.read_csv(tmp_path / "two.csv"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.csv", "two.csv"]


def test_a_cell_may_have_missing_values():
    table = search(("a", math.nan, .1, 0, .5), ("a", math.nan, .2, 0, .6), ("a", 1, .1, 0, .7), ("a", 1, .2, 0, .4))
    found = best_rates(table, ["network", "size"])
    assert found.lr.tolist() == [.2, .1] and found.at_edge.tolist() == [True, True]
