"""A run's directory: what goes in comes out, what breaks is noticed."""
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from efcn_nb.experiments import runs
from efcn_nb.service import files as service_files
from efcn_nb.experiments.runs import Run, environment, run_id
from efcn_nb.experiments.sweeps import sweep
from efcn_nb.service.files import held, write_atomic
from efcn_nb.service.tables import read_table, table_text

repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=200)
CONFIG = dict(epochs=2, lr=.1, names=["a", "b"], width=None)


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def table(*values): return pd.DataFrame([dict(seed=0, phase="cnn", relax=None, epoch=i, metric="accuracy", value=v) for i, v in enumerate(values)])


def equal_weights(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) and v.dtype == b[k].dtype for k, v in a.items())


@pytest.fixture
def run(tmp_path): return Run(tmp_path, CONFIG, "cnn")


DAMAGE = {"truncated": lambda content: content[:-3], "altered": lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:], "empty": lambda content: b""}
damaged = pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)


def spoil(path, damage): path.write_bytes(damage(path.read_bytes()))


# Identity

plain = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), lambda inner: st.lists(inner, max_size=3), max_leaves=4)


@repeatable
@given(st.dictionaries(st.text(max_size=4), plain, max_size=4), st.randoms(use_true_random=False))
def test_id_ignores_order_alone(config, random):
    items = list(config.items())
    random.shuffle(items)
    assert run_id(dict(items)) == run_id(config) and len(run_id(config)) == 12
    for key in config: assert run_id(config | {key: [config[key], 0]}) != run_id(config)
    assert run_id(config | {"a new key": None}) != run_id(config)


def test_name_and_config(tmp_path, run):
    assert not run.path.exists()  # naming a run writes nothing
    run.begin()
    assert run.path == tmp_path/f"cnn-{run_id(CONFIG)}" and json.loads((run.path/"config.json").read_text()) == CONFIG
    assert Run(tmp_path, dict(reversed(CONFIG.items())), "cnn").path == run.path
    assert Run(tmp_path, CONFIG | dict(lr=.2), "cnn").path != run.path
    assert run.environments == [environment()] and {"date", "hardware", "python", "torch", "efcn_nb"} <= set(run.environments[0])
    run.begin()
    assert len(run.environments) == 2


# Weights and tables

@repeatable
@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=5))
def test_tables_keep_every_digit(tmp_path_factory, values):
    run = Run(tmp_path_factory.mktemp("run"), CONFIG)
    run.save(1, net(), table(*values))
    run.finish(table(*values))
    assert run.load()[2].value.tolist() == values == run.table.value.tolist()


@pytest.mark.parametrize("values", [[float("nan")], [1., float("nan"), 2.]])
def test_rows_without_a_value_stay(run, values):
    found = pd.DataFrame(dict(value=values))  # one column: its missing values are written as empty lines
    run.finish(found)
    assert run.table.equals(found) and sweep(lambda: found, [{}]).equals(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_come_back_bit_for_bit(run, dtype):
    model = net().to(dtype)
    model[0].weight.data = model[0].weight.data.transpose(2, 3)  # not contiguous
    run.save(3, model, table(.5))
    found = run.load()
    assert found.epoch == 3 and equal_weights(found.weights, model.state_dict())


def test_a_layer_with_two_names_can_be_stored(run):
    conv = nn.Conv2d(1, 1, 3)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    run.save(1, model, table(.5))
    model.load_state_dict(run.load()[1])


def test_checkpoints(run):
    for epoch in range(5): run.save(epoch, net(epoch), table(*range(epoch+1)))
    assert [p.name[:10] for p in run.checkpoints()] == [f"epoch-{e:04d}" for e in range(5)]
    assert equal_weights(run.load(2)[1], net(2).state_dict()) and len(run.load(2)[2]) == 3
    assert run.load(9) is None and run.load()[0] == 4
    run.save(5, net(5), table(*range(6)), keep=())
    assert [run.load(e) is None for e in range(6)] == [True, True, True, True, False, False]
    run.finish(table(1.), keep=())
    assert not run.checkpoints() and run.load() is None and run.finished and run.table.value.tolist() == [1]


def test_new_run_is_empty(run):
    assert run.load() is None and run.table.empty and not run.finished and "unfinished" in repr(run)


def test_reading_never_unpickles(run, monkeypatch):
    run.save(1, net(), table(.5))
    run.finish(table(.5))
    def refuse(*args, **kw): raise AssertionError("something was unpickled")
    for owner, name in (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"): monkeypatch.setattr(owner, name, refuse)
    again = Run(run.path.parent, CONFIG, "cnn")
    assert again.finished and len(again.table) == 1 and equal_weights(again.load()[1], net().state_dict())
    assert not [p for p in run.path.iterdir() if p.suffix not in (".json", ".csv", ".safetensors")]


# Damage

@damaged
def test_damaged_checkpoint_is_named_and_passed_over(run, damage):
    for epoch in 1, 2: run.save(epoch, net(epoch), table(epoch))
    spoil(run.checkpoints()[1], damage)
    with pytest.warns(UserWarning, match=run.checkpoints()[1].name): assert run.load()[0] == 1
    spoil(run.checkpoints()[0], damage)
    with pytest.warns(UserWarning, match=run.checkpoints()[0].name): assert run.load() is None


@damaged
@pytest.mark.parametrize("name", ["metrics.csv", "finished.json"])
def test_damaged_end_is_named_and_makes_the_run_unfinished(run, damage, name):
    run.finish(table(.5, .6))
    assert run.finished
    spoil(run.path/name, damage)
    with pytest.warns(UserWarning, match=rf"{name}|metrics\.csv"): assert not run.finished  # which of the two was altered cannot be known
    run.finish(table(.5, .6))
    assert run.finished


@pytest.mark.parametrize("content", [b"[]", b"{}", b"null", b"\xff\xfe"])
def test_a_mark_that_is_no_mark_is_no_end(run, content):
    run.finish(table(.5))
    (run.path/"finished.json").write_bytes(content)
    with pytest.warns(UserWarning, match="finished.json"): assert not run.finished


@pytest.mark.parametrize("damage", [*DAMAGE.values(), lambda content: b"\xff\xfe"], ids=[*DAMAGE, "not text"])
def test_damaged_config_is_refused(run, damage):
    run.begin()
    spoil(run.path/"config.json", damage)
    with pytest.raises(ValueError, match=r"config\.json was altered.*delete") as error: Run(run.path.parent, CONFIG, "cnn")
    assert len(str(error.value).splitlines()) == 1


def test_lost_table_is_an_unfinished_run(run):
    run.finish(table(.5))
    (run.path/"metrics.csv").unlink()
    with pytest.warns(UserWarning, match="metrics.csv"): assert not run.finished


# Atomic writing

@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    write_atomic(tmp_path/"a.csv", "old")
    def fail(*args): raise OSError("disk full")
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"): write_atomic(tmp_path/"a.csv", "new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.csv": "old"}


@pytest.mark.parametrize("content", ["täxt\n", b"\x00\xff"])
def test_written_as_it_is(tmp_path, content):
    write_atomic(tmp_path/"a", content)
    assert (tmp_path/"a").read_bytes() == (content if isinstance(content, bytes) else content.encode())


# Text is text

TEXTS = ["007", "1e5", "true", "True", "FALSE", "NA", "None", "nan", "null", "inf", "-Infinity", "", " ", " 7", "inf ", "1_000", "0x10", "+5", ".5", "1" * 30, "a,b", 'say "x"', '"', '""', "two\nlines", "a\rb", "\r\n",
         "#", "ä", "٣", "2020-01-01", "(1+2j)", "1,5", "epoch"]
COLUMNS = {
    **{f"text {text!r}": [text] for text in TEXTS}, **{f"text {text!r}, missing": [None, text, text] for text in TEXTS}, "all texts": TEXTS, "numbers as text": ["1", "2", "03"], "truths as text": ["True", "false"],
    "numbers": [.1, 1/3, 5e-324, 1.7976931348623157e308, -0., 123456789.123456789], "numbers with gaps": [.1, None, math.inf], "whole numbers": [2**60 + 1, -7], "large whole numbers": [10**30, 1], "truths": [True, False],
    "truths with gaps": [True, None, False], "mixed": [1, "1", None, .1, "0.1", True, "True", False, "", math.inf, "inf"], "numbers and words": [8, "all"], "truths and words": [True, "both"], "truths and numbers": [True, 1, 0., False],
    "large and broken": [2**60 + 1, .5], "large with gaps": [2**60 + 1, None], "whole with gaps": [1, None], "nothing": [None, None], "none at all": []}


@pytest.mark.parametrize("cells", [["a", "b"], ["007", "1"], [1.5, 2.], ["a", None]])
@pytest.mark.parametrize("more", [{}, dict(z=[1, 2])])
def test_a_column_without_a_name_stays_without(cells, more):
    back = read_table(table_text(pd.DataFrame({"": cells} | more)))
    assert [*back.columns] == ["", *more] and same_cells(back[""], pd.Series(cells))


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Run("~/s", {}).path.parent == tmp_path/"s"


def as_cells(column): return [None if pd.isna(c) else bool(c) if isinstance(c, (bool, np.bool_)) else c for c in column]


def same_cells(a, b):
    "Text for text, number for number (a column of whole numbers with gaps is one of floats), gap for gap."
    kind = lambda c: type(c) if isinstance(c, (str, bool, type(None))) else float
    return len(a) == len(b) and all(kind(x) is kind(y) and x == y for x, y in zip(as_cells(a), as_cells(b)))


@pytest.mark.parametrize("case", COLUMNS)
def test_what_a_table_holds_comes_back(case):
    "Alone and beside other columns, whatever their name."
    values = pd.Series(COLUMNS[case], dtype=None if case == "numbers" else object)
    for name, table in [(name, pd.DataFrame(more | {name: values})) for name in ("v", "a,b", 'x"y') for more in ({}, {"i": range(len(values)), "other": "x"})]:
        read = read_table(table_text(table))
        assert read.columns.tolist() == table.columns.tolist() and same_cells(table[name], read[name]), table_text(table)
        assert [str(x) for x in as_cells(read[name]) if isinstance(x, float)] == [str(float(x)) for x, y in zip(as_cells(table[name]), as_cells(read[name])) if isinstance(y, float)]  # -0, too


@pytest.mark.parametrize("case", COLUMNS)
def test_kept_tables_hold_what_they_held(tmp_path, case):
    "In a run that is finished, in a checkpoint, in sweeps that keep their tables or do not."
    values = COLUMNS[case]
    found = pd.DataFrame(dict(i=range(len(values)), v=pd.Series(values, dtype=object)))
    run = Run(tmp_path, CONFIG)
    run.save(1, nn.Linear(1, 1), found)
    assert same_cells(run.load().table.v, found.v) and same_cells(run.table.v, found.v)
    run.finish(found)
    assert run.finished and same_cells(run.table.v, found.v)
    if case.startswith("large ") or not values: return  # pandas puts rows below each other as floats; without rows there are no columns
    for folder in (tmp_path, tmp_path, None): assert same_cells(sweep(lambda case: found, [dict(case=case)], folder).v, found.v)


@repeatable
@given(st.lists(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")) | st.sampled_from(TEXTS), min_size=1, max_size=5))
def test_any_column_comes_back(cells):
    table = pd.DataFrame(dict(i=range(len(cells)), v=pd.Series(cells, dtype=object)))
    assert same_cells(read_table(table_text(table)).v, table.v), table_text(table)


RECORDS = sorted((Path(__file__).parents[1]/"nbs/records").rglob("*.csv"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_records_are_read_as_ever(path):
    "Tables without marks: pandas guesses the types, as it always did."
    text = path.read_text()
    ever = pd.read_csv(io.StringIO(text), engine="python", keep_default_na=False, na_values=[""], skip_blank_lines=False)
    pd.testing.assert_frame_equal(read_table(text), ever, check_exact=True)


@pytest.mark.parametrize("text", ['"a,b",c\n1,x\n2,y\n', '"a,b"\nx\n7\n', '"a ""b""",c\n"1,5",.1\nx,\n', 'c\n""\n1.5\n', "a,b\r\n1,x\r\n", '"a,b",c\r\n1,x\r\n'])
def test_other_tables_are_read_as_ever(text):
    "A name in quotation marks because it has a comma is no mark."
    ever = pd.read_csv(io.StringIO(text), engine="python", keep_default_na=False, na_values=[""], skip_blank_lines=False)
    pd.testing.assert_frame_equal(read_table(text), ever, check_exact=True)


@pytest.mark.parametrize("table", [table(.5, 1/3), pd.DataFrame(dict(name=["digits", "7"], note=[None, "a,b"], ok=[True, None], n=[1, 2]))], ids=["measured", "words"])
def test_usual_tables_are_written_as_ever(table): assert table_text(table) == table.to_csv(index=False)


# Where nothing can be written

def files(folder): return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*"))}


@pytest.fixture
def read_only(monkeypatch):
    "From the call of what this returns on, whatever would write fails, also for the superuser."
    def start():
        def fail(*args, **kw): raise OSError(30, "Read-only file system")
        for owner, name in ((runs, "publish"), (service_files, "publish"), (service_files, "FileLock"), (os, "replace"), (os, "mkdir"), (Path, "mkdir"), (Path, "write_bytes"), (Path, "unlink")): monkeypatch.setattr(owner, name, fail)
    return start


def test_a_finished_sweep_can_be_read_where_nothing_can_be_written(tmp_path, read_only):
    configs = [dict(n=1), dict(n=2)]
    first = sweep(lambda n: [dict(n=n, name="007")], configs, tmp_path/"store")
    before = files(tmp_path)
    read_only()
    again = sweep(lambda n: [dict(n=n, name="007")], configs, tmp_path/"store")
    assert again.equals(first) and again.attrs == first.attrs and files(tmp_path) == before
    with pytest.raises(OSError, match="nothing can be written to .*Read-only file system.*choose another folder"): sweep(lambda n: [dict(n=n)], [dict(n=3)], tmp_path/"store")


@pytest.mark.parametrize("spoil", [lambda folder: folder.write_text("a file"), lambda folder: (folder/"lock").mkdir(parents=True)], ids=["no folder", "no lock"])
def test_a_folder_that_cannot_be_held_is_one_sentence(tmp_path, spoil):
    spoil(tmp_path/"s")
    with pytest.raises(OSError, match="nothing can be written to .*choose another folder") as error:
        with held(tmp_path/"s"): pass
    assert len(str(error.value).splitlines()) == 1


# Sweeps

def awkward(n): return [dict(i=i, flag=i > 1, word=["None", "nan", "ä,\"x\"\n", "NA"][i], number=[.1, math.nan, math.inf, 1/3][i], hole=[True, None, False, True][i], big=2**60 + i) for i in range(n)]


def test_a_table_is_the_same_whether_computed_read_or_not_kept(tmp_path):
    first, again, unkept = (sweep(awkward, [dict(n=4)], folder) for folder in (tmp_path, tmp_path, None))
    for table in (first, again): pd.testing.assert_frame_equal(table, unkept)
    assert first.word.tolist() == ["None", "nan", "ä,\"x\"\n", "NA"] and first.big.tolist() == [2**60 + i for i in range(4)] and first.n.tolist() == [4]*4
    assert first.flag.dtype == bool and first.number.isna().tolist() == [False, True, False, False] and first.number[3] == 1/3


def test_nothing_made_is_kept_too(tmp_path):
    calls = []
    def none(n):
        calls.append(n)
        return []
    assert sweep(none, [dict(n=1)], tmp_path).empty and sweep(none, [dict(n=1)], tmp_path).empty and calls == [1]
    assert sweep(none, [], tmp_path).empty


def test_arguments_that_are_no_scalars_are_no_columns():
    "A tuple as long as the table would pass for a column."
    for value in ((8, 10), [8, 10], np.arange(2), dict(a=1)): assert sweep(lambda sizes, k: [dict(a=1), dict(a=2)], [dict(sizes=value, k=None)]).columns.tolist() == ["a", "k"]


def test_tables_are_known_by_all_arguments(tmp_path):
    "Defaults, whatever their kind, and what a `partial` gives, by name or by place."
    def of(kind, n, options={"a": 1}): return [dict(kind=kind, a=options["a"])]
    def other(kind, n, options={"a": 2}): return [dict(kind=kind, a=options["a"])]
    found = [sweep(f, [dict(n=1)], tmp_path).values.tolist()[0][:2] for f in (partial(of, "cnn"), partial(of, "fcn"), partial(of, kind="lcn"), partial(other, "cnn"))]
    assert found == [["cnn", 1], ["fcn", 1], ["lcn", 1], ["cnn", 2]]


@pytest.mark.parametrize("bad, said", [(dict(n=np.int64(3)), r"n = np.int64\(3\) cannot be stored: take Python's own"), (dict(n={1}), r"n = \{1\} cannot be stored"), (dict(m=1), "does not fit the function.*argument"), ("n", "does not fit the function")])
def test_bad_arguments_are_refused_before_anything_is_computed(tmp_path, bad, said):
    def never(n): raise AssertionError("computed")
    with pytest.raises(ValueError, match=said): sweep(never, [dict(n=1), bad], tmp_path/"store")
    assert not (tmp_path/"store").exists()


@pytest.mark.parametrize("found", [None, dict(a=1), 3.])
@pytest.mark.parametrize("kept", [True, False])
def test_what_is_no_table_is_not_stored(tmp_path, found, kept):
    for _ in range(2):
        with pytest.raises(ValueError, match="must return a DataFrame or a list of dicts"): sweep(lambda n: found, [dict(n=1)], tmp_path if kept else None)


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


def sweeping(folder, seconds): return subprocess.Popen([sys.executable, "-c", SWEEPING, folder, str(seconds)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such signals")
def test_a_sweep_that_was_killed_goes_on(tmp_path):
    log, killed = tmp_path/"log", sweeping(tmp_path, 3600)
    while not log.exists() or log.read_text().count("\n") < 3:
        assert killed.poll() is None, "it ended too early"
        time.sleep(.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert sweeping(tmp_path, 0).communicate()[0] == "[0, 1, 2, 3, 4]\n" and log.read_text().split() == ["0", "1", "2", "2", "3", "4"]


def test_two_processes_share_a_sweep(tmp_path):
    both = [sweeping(tmp_path, .5) for _ in range(2)]
    assert [p.communicate()[0] for p in both] == ["[0, 1, 2, 3, 4]\n"]*2 and sorted((tmp_path/"log").read_text().split()) == list("01234")
