"Tables as CSV: text is text, numbers keep every digit, gaps stay."
import io
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efcn_nb.service.tables import read_table, table_text

repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=200)


def table(*values):
    return pd.DataFrame([dict(seed=0, phase="cnn", relax=None, epoch=i, metric="accuracy", value=v)
                         for i, v in enumerate(values)])


# Text is text

TEXTS = ["007", "1e5", "true", "True", "FALSE", "NA", "None", "nan", "null", "inf", "-Infinity", "", " ", " 7", "inf ",
         "1_000", "0x10", "+5", ".5", "1" * 30, "a,b", 'say "x"', '"', '""', "two\nlines", "a\rb", "\r\n",
         "#", "ä", "٣", "2020-01-01", "(1+2j)", "1,5", "epoch"]
COLUMNS = {
    **{f"text {text!r}": [text] for text in TEXTS}, **{f"text {text!r}, missing": [None, text, text] for text in TEXTS},
    "all texts": TEXTS, "numbers as text": ["1", "2", "03"], "truths as text": ["True", "false"],
    "numbers": [.1, 1/3, 5e-324, 1.7976931348623157e308, -0., 123456789.123456789],
    "numbers with gaps": [.1, None, math.inf], "whole numbers": [2**60 + 1, -7], "large whole numbers": [10**30, 1],
    "truths": [True, False], "truths with gaps": [True, None, False],
    "mixed": [1, "1", None, .1, "0.1", True, "True", False, "", math.inf, "inf"], "numbers and words": [8, "all"],
    "truths and words": [True, "both"], "truths and numbers": [True, 1, 0., False],
    "large and broken": [2**60 + 1, .5], "large with gaps": [2**60 + 1, None], "whole with gaps": [1, None],
    "nothing": [None, None], "none at all": []}


@pytest.mark.parametrize("cells", [["a", "b"], ["007", "1"], [1.5, 2.], ["a", None]])
@pytest.mark.parametrize("more", [{}, dict(z=[1, 2])])
def test_a_column_without_a_name_stays_without(cells, more):
    back = read_table(table_text(pd.DataFrame({"": cells} | more)))
    assert [*back.columns] == ["", *more] and same_cells(back[""], pd.Series(cells))


def as_cells(column): return [None if pd.isna(c) else bool(c) if isinstance(c, (bool, np.bool_)) else c for c in column]


def same_cells(a, b):
    "Text for text, number for number (a column of whole numbers with gaps is one of floats), gap for gap."
    kind = lambda c: type(c) if isinstance(c, (str, bool, type(None))) else float
    return len(a) == len(b) and all(kind(x) is kind(y) and x == y for x, y in zip(as_cells(a), as_cells(b)))


@pytest.mark.parametrize("case", COLUMNS)
def test_what_a_table_holds_comes_back(case):
    "Alone and beside other columns, whatever their name."
    values = pd.Series(COLUMNS[case], dtype=None if case == "numbers" else object)
    for name, table in [(name, pd.DataFrame(more | {name: values})) for name in ("v", "a,b", 'x"y')
                        for more in ({}, {"i": range(len(values)), "other": "x"})]:
        read = read_table(table_text(table))
        assert read.columns.tolist() == table.columns.tolist(), table_text(table)
        assert same_cells(table[name], read[name]), table_text(table)
        pairs = [(x, y) for x, y in zip(as_cells(table[name]), as_cells(read[name])) if isinstance(y, float)]
        assert [str(y) for x, y in pairs] == [str(float(x)) for x, y in pairs]  # -0, too


@repeatable
@given(st.lists(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
                | st.text(st.characters(codec="utf-8")) | st.sampled_from(TEXTS), min_size=1, max_size=5))
def test_any_column_comes_back(cells):
    table = pd.DataFrame(dict(i=range(len(cells)), v=pd.Series(cells, dtype=object)))
    assert same_cells(read_table(table_text(table)).v, table.v), table_text(table)


RECORDS = sorted((Path(__file__).parents[1]/"efcn_nb/records").rglob("*.csv"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_records_are_read_as_ever(path):
    "Tables without marks: pandas guesses the types, as it always did."
    text = path.read_text()
    ever = pd.read_csv(io.StringIO(text), engine="python", keep_default_na=False, na_values=[""],
                       skip_blank_lines=False)
    pd.testing.assert_frame_equal(read_table(text), ever, check_exact=True)


@pytest.mark.parametrize("text", ['"a,b",c\n1,x\n2,y\n', '"a,b"\nx\n7\n', '"a ""b""",c\n"1,5",.1\nx,\n', 'c\n""\n1.5\n',
                                  "a,b\r\n1,x\r\n", '"a,b",c\r\n1,x\r\n'])
def test_other_tables_are_read_as_ever(text):
    "A name in quotation marks because it has a comma is no mark."
    ever = pd.read_csv(io.StringIO(text), engine="python", keep_default_na=False, na_values=[""],
                       skip_blank_lines=False)
    pd.testing.assert_frame_equal(read_table(text), ever, check_exact=True)


@pytest.mark.parametrize("table",
                         [table(.5, 1/3),
                          pd.DataFrame(dict(name=["digits", "7"], note=[None, "a,b"], ok=[True, None], n=[1, 2]))],
                         ids=["measured", "words"])
def test_usual_tables_are_written_as_ever(table): assert table_text(table) == table.to_csv(index=False)
