"Effects: intervals against SciPy and against what they promise, verdicts against the rule written out."
import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from efcn_nb.experiments.effects import claim_row, interval, judge, judged, not_judged, verdict


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("tries", [1, 4])
def test_interval_is_scipys(n, tries):
    d = pd.Series(np.random.default_rng(n).normal(.2, .1, n))
    mean, spread, half = interval(d, tries)
    low, high = stats.ttest_1samp(d, 0).confidence_interval(1 - .05/tries)
    assert (mean - half, mean + half) == pytest.approx((low, high)) and spread == pytest.approx(np.std(d, ddof=1))
    assert interval(d.tolist(), tries) == interval(pd.concat([d, pd.Series([math.nan])]), tries) == (mean, spread, half)


@pytest.mark.parametrize("n", [2, 3, 7, 10])
@pytest.mark.parametrize("value", [0., .1, .3, 1/3, .7, .9, -.1])
def test_what_does_not_vary_has_no_interval(n, value):
    "Neither equal numbers, whose standard deviation is rounded to 1e-17, nor numbers that are equal but for rounding."
    for d in [value]*n, [value]*(n-1) + [value + .1 - .1]:
        assert interval(pd.Series(d))[2] == math.inf and judged("c", pd.Series(d))["verdict"] == "undecided"


@pytest.mark.parametrize("d", [[], [.1], [math.nan]*3, [.1, math.nan]])
def test_too_few(d): assert interval(pd.Series(d, dtype=float))[2] == math.inf


def test_small_effects_count(): assert judged("c", pd.Series([1e-9, 1.1e-9, .9e-9]))["verdict"] == "holds"


CASES = dict(high=[.10, .12, .11], low=[-.10, -.12, -.11], around=[-.1, .1, .05], near=[-.10, -.13, -.04], unknown=[math.nan]*3)


def by_the_rule(cases, every):
    "Each case by itself, with Bonferroni's correction where one of many is enough."
    def one(values, tries):
        values = np.array(values)
        if np.isnan(values).any(): return "undecided"
        half = stats.t.ppf(1 - .025/tries, 2)*values.std(ddof=1)/3**.5
        return "holds" if values.mean() > half else "fails" if values.mean() < -half else "undecided"
    alone, among = ([one(CASES[c], tries) for c in cases] for tries in (1, len(cases)))
    strict, lax = ("holds", "fails") if every else ("fails", "holds")
    return strict if set(alone) == {strict} else lax if lax in among else "undecided"


@pytest.mark.parametrize("every", [True, False])
def test_verdicts_by_the_rule_in_any_order(every):
    found = set()
    for count in (1, 2, 3):
        for cases in itertools.permutations(CASES, count):
            said = judge(pd.DataFrame({c: CASES[c] for c in cases}), every)
            assert said[4] == by_the_rule(cases, every), cases
            found.add(said[4])
    assert found == {"holds", "fails", "undecided"}


def test_the_case_that_decides():
    table = pd.DataFrame(CASES)
    assert judge(table, every=True)[0] == "unknown" and judge(table, every=False)[0] == "high"
    case, mean, spread, half, _ = judge(table[["high", "low"]], every=True)
    assert case == "low" and (mean, spread, half) == interval(table.low)
    assert judge(table[["high", "low"]], every=False)[3] == interval(table.high, 2)[2]
    with pytest.raises(ValueError, match="no case to judge"): judge(pd.DataFrame(), every=True)


def test_verdict(): assert [verdict(*ends) for ends in [(.1, .2), (0, .2), (-.2, 0), (-.2, -.1), (math.nan, math.nan)]] == ["holds", "undecided", "undecided", "fails", "undecided"]


def test_rows():
    assert judged("c", pd.Series([.10, .12, .11, math.nan])) == dict(claim="c", effect="+11.0 points", spread="1.0 points", interval="±2.5", n=3, verdict="holds")
    assert judged("c", pd.Series([-.1]), "said") == dict(claim="c", effect="said", spread="", interval="", n=1, verdict="undecided")
    assert not_judged("c", "why") == claim_row("c", "why", math.nan, math.nan, 0, "not judged")
