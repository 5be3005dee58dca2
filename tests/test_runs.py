"A run's directory: what goes in comes out, what breaks is noticed."
import json
import pickle

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from efcn_nb.experiments.runs import Run, environment, run_id
from efcn_nb.experiments.sweeps import sweep
from test_tables import COLUMNS, same_cells, table

repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=200)
CONFIG = dict(epochs=2, lr=.1, names=["a", "b"], width=None)


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def equal_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) and v.dtype == b[k].dtype for k, v in a.items())


@pytest.fixture
def run(tmp_path): return Run(tmp_path, CONFIG, "cnn")


DAMAGE = {"truncated": lambda content: content[:-3],
          "altered": lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
          "empty": lambda content: b""}
damaged = pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)


def spoil(path, damage): path.write_bytes(damage(path.read_bytes()))


# Identity

plain = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                     lambda inner: st.lists(inner, max_size=3), max_leaves=4)


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
    assert run.environments == [environment()]
    assert {"date", "hardware", "python", "torch", "efcn_nb"} <= set(run.environments[0])
    run.begin()
    assert len(run.environments) == 2


# Weights and tables

@settings(repeatable, max_examples=40)  # of many values: a file takes longer than its content
@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=30))
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
    assert run.load(9) is None and run.load()[0] == 4 and [run.load(until=e).epoch for e in (2, 9)] == [2, 4]
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
    for owner, name in (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"):
        monkeypatch.setattr(owner, name, refuse)
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
    # which of the two was altered cannot be known
    with pytest.warns(UserWarning, match=rf"{name}|metrics\.csv"): assert not run.finished
    run.finish(table(.5, .6))
    assert run.finished


def test_an_altered_reason_is_noticed(run):
    run.finish(table(.5), diverged="at step 3")
    mark = run.path/"finished.json"
    mark.write_text(mark.read_text().replace("step 3", "step 4"))
    with pytest.warns(UserWarning, match="finished.json"): assert not run.finished


@pytest.mark.parametrize("content", [b"[]", b"{}", b"null", b"\xff\xfe"])
def test_a_mark_that_is_no_mark_is_no_end(run, content):
    run.finish(table(.5))
    (run.path/"finished.json").write_bytes(content)
    with pytest.warns(UserWarning, match="finished.json"): assert not run.finished


@pytest.mark.parametrize("damage", [*DAMAGE.values(), lambda content: b"\xff\xfe"], ids=[*DAMAGE, "not text"])
def test_damaged_config_is_refused(run, damage):
    run.begin()
    spoil(run.path/"config.json", damage)
    with pytest.raises(ValueError, match=r"config\.json was altered.*delete") as error:
        Run(run.path.parent, CONFIG, "cnn")
    assert len(str(error.value).splitlines()) == 1


def test_lost_table_is_an_unfinished_run(run):
    run.finish(table(.5))
    (run.path/"metrics.csv").unlink()
    with pytest.warns(UserWarning, match="metrics.csv"): assert not run.finished


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Run("~/s", {}).path.parent == tmp_path/"s"


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
    # pandas puts rows below each other as floats; without rows there are no columns
    if case.startswith("large ") or not values: return
    for folder in (tmp_path, tmp_path, None):
        assert same_cells(sweep(lambda case: found, [dict(case=case)], folder).v, found.v)
