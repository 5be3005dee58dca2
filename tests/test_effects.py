"Effects: intervals against SciPy and against what they promise, verdicts against the rule written out."
import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from efcn_nb.experiments.effects import above, claim_row, interval, judge, judged, not_judged, show_claims, verdict


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
        assert interval(pd.Series(d)).half == math.inf and judged("c", pd.Series(d))["verdict"] == "undecided"


@pytest.mark.parametrize("d", [[], [.1], [math.nan]*3, [.1, math.nan]])
def test_too_few(d): assert interval(pd.Series(d, dtype=float)).half == math.inf


def test_small_effects_count(): assert judged("c", pd.Series([1e-9, 1.1e-9, .9e-9]))["verdict"] == "holds"


CASES = dict(high=[.10, .12, .11], low=[-.10, -.12, -.11], around=[-.1, .1, .05], near=[-.10, -.13, -.04],
             unknown=[math.nan]*3)


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
            assert said.verdict == by_the_rule(cases, every), cases
            found.add(said.verdict)
    assert found == {"holds", "fails", "undecided"}


def test_the_case_that_decides():
    table = pd.DataFrame(CASES)
    assert judge(table[["high", "unknown"]], every=True).case == "unknown"
    assert judge(table, every=True).case == "low" and judge(table, every=False).case == "high"
    found = judge(table[["high", "low"]], every=True)
    assert (found.case, found.verdict) == ("low", "fails")                  # it refutes, picked from two
    assert (found.mean, found.spread, found.half) == interval(table.low, 2)
    assert judge(table[["high", "low"]], every=False).half == interval(table.high, 2).half
    with pytest.raises(ValueError, match="no case to judge"): judge(pd.DataFrame(), every=True)


@pytest.mark.parametrize("ends, said", [((.1, .2), "holds"), ((0, .2), "undecided"), ((-.2, 0), "undecided"),
                                        ((-.2, -.1), "fails"), ((math.nan, math.nan), "undecided")])
def test_verdict(ends, said): assert verdict(*ends) == said


def test_rows():
    three, one = pd.Series([.10, .12, .11, math.nan]), pd.Series([-.1])
    row = dict(claim="c", effect="+11.0 points", spread="1.0 points", interval="±2.5", n=3, verdict="holds")
    assert judged("c", three) == row
    row = dict(claim="c", effect="said", spread="", interval="", n=1, verdict="undecided")
    assert judged("c", one, "said") == row
    assert not_judged("c", "why") == claim_row("c", "why", math.nan, math.nan, 0, "not judged")


TWINS = pd.DataFrame([[.1, .2], [.2, .3]], columns=["a", "a"])
NOT_JUDGED = [
    (lambda: judge(None, True), "the cases must be a DataFrame with a column for each, not NoneType"),
    (lambda: judge([.1, .2], True), "the cases must be a DataFrame with a column for each, not list"),
    (lambda: judge(pd.DataFrame(), True), "there is no case to judge: the table has no columns"),
    (lambda: judge(TWINS, False), "each case must have a name of its own, but 'a' is there twice"),
    (lambda: above("c", TWINS), "each case must have a name of its own, but 'a' is there twice"),
    (lambda: judge(pd.DataFrame(CASES), True, tests=0), "tests must be a whole number, 1 or more, not 0"),
    (lambda: interval([.1, .2], tries=0), "tries must be a whole number, 1 or more, not 0"),
    (lambda: interval([.1, .2], tries=.5), "tries must be a whole number, 1 or more, not 0.5"),
    (lambda: interval([.1, .2], tests=-1), "tests must be a whole number, 1 or more, not -1")]


@pytest.mark.parametrize("call, said", NOT_JUDGED)
def test_what_cannot_be_judged(call, said):
    with pytest.raises(ValueError) as error: call()
    assert str(error.value) == said


@pytest.mark.parametrize("form", [list, tuple, np.array])
def test_effects_in_any_form(form):
    assert judged("c", form([.10, .12, math.nan])) == judged("c", pd.Series([.10, .12, math.nan]))


@pytest.mark.parametrize("gains", [[], [math.nan]*3, pd.Series(dtype=float)])
def test_an_effect_that_no_seed_has(gains):
    assert judged("c", gains, "said") == not_judged("c", "needs cases that are not there")


# Where every test input is answered rightly there is no spread: what is left are the inputs that were not tested

@pytest.mark.parametrize("seeds, tests, half", [(3, 1000, .001), (5, 60, .01), (1, 1000, math.inf)])
def test_known_tests_bound_what_does_not_vary(seeds, tests, half):
    assert interval(pd.Series([1.]*seeds), tests=tests).half == pytest.approx(half)


def test_an_interval_is_never_narrower_than_the_tests_allow():
    wide, narrow = pd.Series([.1, .2, .3]), pd.Series([.5, .5 + 1e-9, .5])
    assert interval(wide, tests=1000) == interval(wide)
    assert interval(narrow).half < 1e-7 < interval(narrow, tests=1000).half == .001
    assert interval(wide, 2, tests=1000).half == interval(wide, 2).half


def test_ends_of_an_interval():
    found = interval(pd.Series([.1, .2, .3]))
    assert (found.low, found.high) == (found.mean - found.half, found.mean + found.half)


# A claim that something is above something else

CLAIMS = [
    (dict(), "-11.0 points (low)", "fails"),
    (dict(every=False), "+11.0 points (high)", "holds"),
    (dict(margin=.2), "-11.0 points (low)", "holds"),
    (dict(say=lambda found: f"{found.case}: {found.mean:.2f}"), "low: -0.11", "fails"),
    (dict(say=lambda found: f"{found.mean:.2f}", margin=.2), "-0.11", "holds")]


@pytest.mark.parametrize("how, effect, said", CLAIMS)
def test_above(how, effect, said):
    row = above("c", {case: pd.Series(CASES[case]) for case in ("high", "low")}, **how)
    assert (row["effect"], row["verdict"], row["n"]) == (effect, said, 3)
    assert row["spread"] == "1.0 points" and row["interval"] in ("±2.5", "±3.6")  # of one case, or picked from two


@pytest.mark.parametrize("cases", [None, {}, pd.DataFrame(), {"a": pd.Series([math.nan])}])
def test_above_without_a_case_is_not_judged(cases):
    assert above("c", cases, needs="needs two") == not_judged("c", "needs two")


GROUNDS = {"holds": "#cfe8d3", "fails": "#f6cfcb", "undecided": "#f5e6b8"}


@pytest.mark.parametrize("word", GROUNDS)
def test_each_verdict_has_a_colour_of_its_own_with_dark_text(word):
    html = show_claims([dict(claim=f"it {word}", effect="", verdict=word)]).to_html()
    assert [ground for ground in GROUNDS.values() if ground in html] == [GROUNDS[word]]
    assert html.count("color: #1f1f1f") == 1, "the words in other columns are left alone"


@pytest.mark.parametrize("table", [[], pd.DataFrame(columns=["claim", "verdict"]), pd.DataFrame(dict(a=["holds"]))])
def test_tables_without_rows_and_tables_of_verdicts_are_shown(table): assert "<table" in show_claims(table).to_html()


def test_a_caption_and_missing_numbers():
    html = show_claims([dict(claim="a", p=None, verdict="not judged"), dict(claim="b", p=.00012, verdict="holds")],
                       "two").to_html()
    assert "<caption>two</caption>" in html and "nan" not in html and "0.00012" in html
