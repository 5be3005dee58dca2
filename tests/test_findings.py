"What a notebook says is checked where it is saved or tested; a reader who plays gets a note."
import math

import pytest

from efcn_nb.service.findings import findings, plus_minus


@pytest.fixture(params=["strict", "a reader's"])
def strict(request, monkeypatch):
    monkeypatch.setenv("EFCN_NB_STRICT", "1") if request.param == "strict" else monkeypatch.delenv(
        "EFCN_NB_STRICT", raising=False)
    return request.param == "strict"


def false():
    with findings() as holds:
        holds("one is two", 1 == 2)
        holds("two is three", 2 == 3)


def broken():
    with findings(): {}["a relax time that was not run"]


def test_nothing_is_noted_where_all_holds(strict, capsys):
    with findings() as holds: holds("one is one", True)
    assert capsys.readouterr().out == ""


def test_every_statement_that_does_not_hold_is_noted_or_the_first_is_an_error(strict, capsys):
    if strict:
        with pytest.raises(AssertionError, match="one is two"): false()
    else:
        false()
        said = capsys.readouterr().out
        assert "2 of 2 statements do not hold" in said and said.endswith("- one is two\n- two is three\n")


def test_what_cannot_be_said_is_noted_or_an_error(strict, capsys):
    if strict:
        with pytest.raises(KeyError): broken()
    else:
        broken()
        said = capsys.readouterr().out
        assert "A sentence about the original run could not be filled in" in said and "not checked" in said


def test_a_run_with_other_settings_is_noted_before_what_is_said_or_an_error(strict, capsys):
    def other():
        with findings(original=False) as holds:
            print("A sentence.")
            holds("one is two", 1 == 2)
    if strict:
        with pytest.raises(AssertionError, match="other settings"): other()
        assert capsys.readouterr().out == ""
    else:
        other()
        note, sentence, *rest = capsys.readouterr().out.splitlines()
        assert note.startswith("*This run has other settings") and sentence == "A sentence." and rest


def test_a_small_run_is_held_to_nothing(strict, capsys):
    with findings(small=True) as holds: holds("one is two", 1 == 2)
    with findings(small=True, original=False): {}["a relax time that was not run"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("mean, spread, text", [
    (1.25, .5, "1.2 ± 0.5"), (1.25, math.nan, "1.2"), (1.25, math.inf, "1.2"), (math.nan, math.nan, "")])
def test_a_spread_that_is_not_known_is_not_shown(mean, spread, text): assert plus_minus(mean, spread) == text
