"A function at many settings: each is computed once, whoever asks."
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import keep
from efcn_nb.experiments import runs
from efcn_nb.experiments.sweeps import sweep
from efcn_nb.service import files as service_files


# Where nothing can be written

def files(folder): return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*"))}


@pytest.fixture
def read_only(monkeypatch):
    "From the call of what this returns on, whatever would write fails, also for the superuser."
    def start():
        def fail(*args, **kw): raise OSError(30, "Read-only file system")
        for owner, name in ((runs, "publish"), (service_files, "publish"), (service_files, "FileLock"), (os, "replace"),
                            (os, "mkdir"), (Path, "mkdir"), (Path, "write_bytes"), (Path, "unlink")):
            monkeypatch.setattr(owner, name, fail)
    return start


def test_a_finished_sweep_can_be_read_where_nothing_can_be_written(tmp_path, read_only):
    configs = [dict(n=1), dict(n=2)]
    first = sweep(lambda n: [dict(n=n, name="007")], configs, tmp_path/"store")
    before = files(tmp_path)
    read_only()
    again = sweep(lambda n: [dict(n=n, name="007")], configs, tmp_path/"store")
    assert again.equals(first) and again.attrs == first.attrs and files(tmp_path) == before
    with pytest.raises(OSError, match="nothing can be written to .*Read-only file system.*choose another folder"):
        sweep(lambda n: [dict(n=n)], [dict(n=3)], tmp_path/"store")


# Sweeps

def awkward(n):
    return [dict(i=i, flag=i > 1, word=["None", "nan", "ä,\"x\"\n", "NA"][i], number=[.1, math.nan, math.inf, 1/3][i],
                 hole=[True, None, False, True][i], big=2**60 + i) for i in range(n)]


def test_a_table_is_the_same_whether_computed_read_or_not_kept(tmp_path):
    first, again, unkept = (sweep(awkward, [dict(n=4)], folder) for folder in (tmp_path, tmp_path, None))
    for table in (first, again): pd.testing.assert_frame_equal(table, unkept)
    assert first.word.tolist() == ["None", "nan", "ä,\"x\"\n", "NA"]
    assert first.big.tolist() == [2**60 + i for i in range(4)] and first.n.tolist() == [4]*4
    assert first.flag.dtype == bool and first.number.isna().tolist() == [False, True, False, False]
    assert first.number[3] == 1/3


def test_nothing_made_is_kept_too(tmp_path):
    calls = []
    def none(n):
        calls.append(n)
        return []
    assert sweep(none, [dict(n=1)], tmp_path).empty and sweep(none, [dict(n=1)], tmp_path).empty and calls == [1]
    assert sweep(none, [], tmp_path).empty


def test_arguments_that_are_no_scalars_are_no_columns():
    "A tuple as long as the table would pass for a column."
    for value in ((8, 10), [8, 10], np.arange(2), dict(a=1)):
        found = sweep(lambda sizes, k: [dict(a=1), dict(a=2)], [dict(sizes=value, k=None)])
        assert found.columns.tolist() == ["a", "k"]


OWN = dict(n=1)
LEFT_OUT = dict(
    a_number=([OWN, dict(n=1, lr=.5)], "lr", [.1, .5]), first=([dict(n=1, lr=.5), OWN], "lr", [.5, .1]),
    a_word=([OWN, dict(n=1, kind="fcn")], "kind", ["cnn", "fcn"]), whole=([OWN, dict(n=1, k=3)], "k", [2, 3]),
    nothing=([OWN, dict(n=1, order=3)], "order", [None, 3]),
    a_list=([dict(n=1, k=[1, 2]), dict(n=1, k=3)], "k", [None, 3]),
    its_own_column=([OWN, dict(n=1, value=3)], "value", [7, 7]))


@pytest.mark.parametrize("case", LEFT_OUT)
@pytest.mark.parametrize("kept", [True, False])
def test_an_argument_that_is_left_out_has_its_default(tmp_path, case, kept):
    "Where another setting gives it; else it is no column."
    def of(n, kind="cnn", lr=.1, k=2, order=None, value=5): return [dict(value=7)]
    configs, name, values = LEFT_OUT[case]
    found = sweep(of, configs, tmp_path if kept else None)
    assert found[name].astype(object).where(found[name].notna(), None).tolist() == values
    assert {*found} == {"value", "n", name} and found.columns[:2].tolist() == ["value", "n"]
    if case == "whole": assert found.k.dtype == int


def test_tables_are_known_by_all_arguments(tmp_path):
    "Defaults, whatever their kind, and what a `partial` gives, by name or by place."
    def of(kind, n, options={"a": 1}): return [dict(kind=kind, a=options["a"])]
    def other(kind, n, options={"a": 2}): return [dict(kind=kind, a=options["a"])]
    found = [sweep(f, [dict(n=1)], tmp_path).values.tolist()[0][:2]
             for f in (partial(of, "cnn"), partial(of, "fcn"), partial(of, kind="lcn"), partial(other, "cnn"))]
    assert found == [["cnn", 1], ["fcn", 1], ["lcn", 1], ["cnn", 2]]


@pytest.mark.parametrize("bad, said", [(dict(n=np.int64(3)), r"n = np.int64\(3\) cannot be stored: take Python's own"),
                                       (dict(n={1}), r"n = \{1\} cannot be stored"),
                                       (dict(m=1), "does not fit the function.*argument"),
                                       ("n", "does not fit the function")])
def test_bad_arguments_are_refused_before_anything_is_computed(tmp_path, bad, said):
    def never(n): raise AssertionError("computed")
    with pytest.raises(ValueError, match=said): sweep(never, [dict(n=1), bad], tmp_path/"store")
    assert not (tmp_path/"store").exists()


@pytest.mark.parametrize("found", [None, dict(a=1), 3.])
@pytest.mark.parametrize("kept", [True, False])
def test_what_is_no_table_is_not_stored(tmp_path, found, kept):
    for _ in range(2):
        with pytest.raises(ValueError, match="must return a DataFrame or a list of dicts"):
            sweep(lambda n: found, [dict(n=1)], tmp_path if kept else None)


SWEEPING = """
import sys, time
from pathlib import Path
from efcn_nb.experiments.sweeps import sweep
def wait(n):
    with open(sys.argv[1] + "/log", "a") as f: f.write(f"{n}\\n")
    time.sleep(float(sys.argv[2]) if n == 2 else 0)
    return [dict(i=n)]
print(sweep(wait, [dict(n=i) for i in range(5)], sys.argv[1] + "/store").i.tolist())
"""


def sweeping(folder, seconds):
    "A process that sweeps, and what receives the table that it prints."
    return keep.started(keep.printed, SWEEPING, str(folder), str(seconds))


@pytest.mark.skipif(sys.platform == "win32", reason="has no such signals")
def test_a_sweep_that_was_killed_goes_on(tmp_path):
    log, (killed, _) = tmp_path/"log", sweeping(tmp_path, 3600)
    while not log.exists() or log.read_text().count("\n") < 3:
        assert killed.is_alive(), "it ended too early"
        time.sleep(.05)
    killed.kill()
    killed.join()
    assert keep.result(*sweeping(tmp_path, 0)) == "[0, 1, 2, 3, 4]\n"
    assert log.read_text().split() == ["0", "1", "2", "2", "3", "4"]


def test_two_processes_share_a_sweep(tmp_path):
    both = [sweeping(tmp_path, .5) for _ in range(2)]
    assert [keep.result(*process) for process in both] == ["[0, 1, 2, 3, 4]\n"]*2
    assert sorted((tmp_path/"log").read_text().split()) == list("01234")
