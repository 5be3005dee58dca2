"""The protocol: repeatable to the last bit, whatever happens on the way; and what it refuses before any work."""
import copy
import dataclasses
import functools
import inspect
import itertools
import math
import os
import pickle
import random
import shutil
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

import tiny
from efcn_nb.experiments import acceptance, relaxation
from efcn_nb.service import files, memory
from efcn_nb.ladder.embedding import embed, nearest_cnn
from efcn_nb.service.files import Busy
from efcn_nb.service.tables import read_table
from efcn_nb.experiments.relaxation import PROTOCOLS, Study, relax
from efcn_nb.experiments.claims import claims, final_values, summary
from efcn_nb.materials.data import Data
from efcn_nb.materials.models import small
from efcn_nb.training.arms import ARMS, held_masks
from efcn_nb.training.cohorts import Cohort
from efcn_nb.training.loop import Diverged, evaluate, train

COLUMNS = "data model seed network relax lr protocol_epochs epoch step split metric value".split()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A study that was done at one go, with all weights."
    study = tiny.study(tmp_path_factory.mktemp("done")/"study", keep_weights=True)
    study.steps = 0
    def count(): study.steps += 1
    tables = [study.carry_out(r, count) for r in study.plan()]
    study.result = study.run()
    assert study.result.equals(pd.concat(tables, ignore_index=True))
    study.metrics, study.kept = (study.out/"metrics.csv").read_bytes(), weights(study)
    return study


@pytest.fixture
def copied(done, tmp_path):
    "The same study, finished, in a folder of the test's own."
    shutil.copytree(done.out, tmp_path/"study")
    return tiny.study(tmp_path/"study", keep_weights=True)


def metrics(study): return (study.out/"metrics.csv").read_bytes()


def weights(study):
    found = {}
    for r in study.plan():
        network = study.network(r["network"], r["seed"], r["relax"])
        found |= network.state_dict(prefix=f"{r['network']}{r['relax']}.")
    return found


def run_again(study):
    "Do what is left, by a study opened anew."
    again = tiny.study(study.out, keep_weights=study.keep_weights)
    again.run()
    return again


# What is measured

def test_table(done):
    t = done.result
    assert list(t.columns) == COLUMNS and set(t.network) == {"cnn", "fcn", "efcn", "elcn"}
    assert (t.protocol_epochs == 2).all()
    assert set(t.metric) == {"accuracy", "loss", "convolutional", "unshared", "off_local", "norm"}
    assert {"train", "test", "weights"} < set(t.split)
    assert all(s.startswith("weights of ") for s in set(t.split) - {"train", "test", "weights"})
    assert not t.duplicated(COLUMNS[:-1]).any() and t.value.notna().all()
    first = t.groupby(["network", "relax"], dropna=False).epoch.agg(["min", "max"])
    assert first.loc[("efcn", 1)].tolist() == [1, 3] and first.loc[("elcn", 1)].tolist() == [1, 3]
    assert first.loc["fcn"].values.tolist() == [[0, 2]]
    assert first.loc["cnn"].values.tolist() == [[0, 4]] and (t.step == 3*t.epoch).all()
    weights = t[t.split.str.startswith("weights")].pivot_table(index=["network", "relax", "epoch"],
                                                               columns=["split", "metric"], values="value",
                                                               dropna=False).dropna(how="all")
    for split, part in weights.T.groupby("split"):
        assert ((part.droplevel("split").drop("norm").sum() - 1).abs() < 1e-12).all(), split
    norms = weights.xs("norm", axis=1, level="metric")
    assert (((norms.drop(columns="weights")**2).sum(axis=1)**.5/norms["weights"] - 1).abs() < 1e-12).all()
    assert not (t[(t.network == "elcn") & (t.metric == "off_local")].value != 0).any()


def test_relaxing_starts_where_the_cnn_is(done):
    t = done.result[done.result.split == "test"].set_index(["network", "relax", "epoch", "metric"]).value
    nan = math.nan
    for network, time in [("efcn", 0), ("efcn", 1), ("efcn", 2), ("elcn", 1)]:
        assert t[network, time, time, "accuracy"] == t["cnn", nan, time, "accuracy"]
        assert math.isclose(t[network, time, time, "loss"], t["cnn", nan, time, "loss"], rel_tol=1e-5)
        assert t[network, time, time+2, "loss"] != t["cnn", nan, time+2, "loss"]


def test_the_written_table_is_the_returned_one(done):
    read = pd.read_csv(done.out/"metrics.csv")
    assert len(read) == len(done.result) and ((read.value - done.result.value).abs() <= 1e-15*read.value.abs()).all()


def test_zero_epochs_change_nothing(tmp_path):
    study = tiny.study(tmp_path/"zero", epochs=0, relax_times=[0], elcn_times=[0], keep_weights=True)
    table, cnn = study.run(), study.network("cnn", 0, epoch=0)
    assert all(torch.equal(v, cnn.state_dict()[k]) for k, v in study.cnn(0).state_dict().items())
    for name, to in ("efcn", "fcn"), ("elcn", "lcn"):
        network = study.network(name, 0, 0)
        assert all(torch.equal(v, network.state_dict()[k])
                   for k, v in embed(cnn, study.data.train.shape, to).state_dict().items())
        assert all(torch.equal(v, cnn.state_dict()[k]) for k, v in nearest_cnn(network).state_dict().items())
        assert evaluate(network, study.data.test)["accuracy"] == evaluate(cnn, study.data.test)["accuracy"]
    values = final_values(table).set_index("network").value
    assert values["efcn"] == values["elcn"] == values["cnn"] == values["cnn+"]
    assert not table[(table.network == "efcn") & table.metric.isin(["unshared", "off_local"])].value.any()


def test_training_moves_weights(done):
    start = embed(done.network("cnn", 0, epoch=1), done.data.train.shape).state_dict()
    end = done.network("efcn", 0, 1).state_dict()
    assert not any(torch.equal(v, end[k]) for k, v in start.items())


# Repeatable

def test_same_seed_same_bits_another_seed_others(done, tmp_path):
    torch.manual_seed(123)  # must not matter
    state = torch.get_rng_state()
    again = tiny.study(tmp_path/"again", keep_weights=True)
    again.run()
    assert torch.equal(state, torch.get_rng_state()), "the global random state is not ours to change"
    assert metrics(again) == done.metrics
    a, b = done.kept, weights(again)
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    other = tiny.study(tmp_path/"other", seeds=[1], keep_weights=True)
    table = other.run()
    c = weights(other)
    assert all(not torch.equal(v, c[k]) for k, v in a.items())
    losses = [t[t.metric == "loss"].value.reset_index(drop=True) for t in (done.result, table)]
    assert (losses[0] != losses[1]).all()


@pytest.mark.parametrize("changed", [dict(shuffle=False), dict(precision="bf16"), dict(lr=.05), dict(batch_size=100),
                                     dict(width=3)], ids=str)
def test_settings_matter(done, tmp_path, changed):
    other = tiny.study(tmp_path/"other", **changed)
    table = other.run()
    assert len(table) == len(done.result) and table.value.notna().all() and metrics(other) != done.metrics
    assert all(v.dtype == torch.float32 for v in other.network("cnn", 0).state_dict().values())
    repeated = tiny.study(tmp_path/"repeated", **changed)
    repeated.run()
    assert metrics(repeated) == metrics(other)


def test_fan_in_of_the_baseline(done, tmp_path):
    table = tiny.study(tmp_path/"padded", fan_in="padded").run()
    same = (table.value == done.result.value) | (table.network == "fcn")
    assert same.all() and not (table.value == done.result.value)[table.network == "fcn"].all()


def test_more_seeds_and_times_in_the_same_folder(done, copied):
    before = tiny.files(copied.out)
    more = tiny.study(copied.out, seeds=2, relax_times=[0, 2], keep_weights=True)
    table = more.run()
    same = table[table.seed == 0].merge(done.result)
    assert same.shape[0] == (table.seed == 0).sum(), "what was there stays as it was"
    after = tiny.files(copied.out)
    assert all(after[name] == content for name, content in before.items() if "/" in name)


@pytest.mark.parametrize("seeds, found", [(2, [0, 1]), (1, [0]), ([7], [7]), ((3, 1), [3, 1]), ([-1], [-1])], ids=str)
def test_seeds(tmp_path, seeds, found): assert tiny.study(tmp_path/"s", seeds=seeds).seeds == found


def test_the_same_seed_twice_is_not_two_seeds(tmp_path):
    try: study = tiny.study(tmp_path/"s", seeds=[5, 5])
    except ValueError: return
    assert study.seeds == [5]


def test_three_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("EFCN_NB_RUNS", str(tmp_path/"runs"))
    monkeypatch.chdir(tmp_path)
    table = relax(tiny.DATA, width=2, epochs=1, seeds=1, relax_times=[0], elcn_times=[])
    assert list(table.columns) == COLUMNS
    assert [p.name[:14] for p in (tmp_path/"runs").iterdir()] == ["digits-small2-"]
    assert [*tmp_path.iterdir()] == [tmp_path/"runs"], "nothing beside the notebook"
    monkeypatch.chdir(tmp_path/"runs")
    assert table.equals(relax(tiny.DATA, width=2, epochs=1, seeds=1, relax_times=[0], elcn_times=[]))


def test_runs_in_the_folder_of_former_versions_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = tiny.study(None).out.name
    tiny.study(f"efcn_runs/{name}")
    monkeypatch.setenv("EFCN_NB_RUNS", str(tmp_path/"new"))
    with pytest.warns(UserWarning, match=f"efcn_runs in this folder .*say out='efcn_runs/{name}' to go on"):
        assert tiny.study(None).out == tmp_path/"new"/name
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        tiny.study(None)


# Interrupted

class Accident(Exception): pass


def interrupt(monkeypatch, step, kind):
    "Raise `kind` in training step number `step`, counted from now; a cohort takes one step for all members."
    real, count = torch.autograd.backward, iter(range(10**9))
    def counted(*args, **kw):
        if next(count) == step: raise kind
        return real(*args, **kw)
    monkeypatch.setattr(torch.autograd, "backward", counted)


@pytest.mark.parametrize("keen", [False, True], ids=["as usual", "every epoch stored"])
@pytest.mark.parametrize("kind", [Accident, KeyboardInterrupt])
def test_interrupted_and_resumed(done, tmp_path, monkeypatch, kind, keen):
    if keen:  # half a minute passes with every look at the clock
        clock = iter(range(0, 10**9, 31))
        monkeypatch.setattr(relaxation, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    for moment in random.Random(kind.__name__).sample(range(24), 3):  # CNN 12, FCN 6, the others 6 or more
        study = tiny.study(tmp_path/str(moment), keep_weights=True)
        with monkeypatch.context() as m, pytest.raises(kind):
            interrupt(m, moment, kind)
            study.run()
        assert not (study.out/"metrics.csv").exists()
        if keen: assert moment < 3 or any(p.stem.split("-")[1] != "0000" for p in study.out.glob("*/epoch-*"))
        again = run_again(study)
        assert metrics(again) == done.metrics
        b = weights(again)
        assert all(torch.equal(v, b[k]) for k, v in done.kept.items())


def test_a_finished_study_does_no_work(copied, done, monkeypatch):
    interrupt(monkeypatch, 0, Accident)
    before = tiny.files(copied.out)
    assert copied.run().equals(done.result) and tiny.files(copied.out) == before


def test_what_is_finished_is_not_done_again(copied, done, monkeypatch):
    shutil.rmtree(copied.open_run("efcn", 0, 1).path)
    interrupt(monkeypatch, 6, Accident)  # one run has six steps
    assert metrics(run_again(copied)) == done.metrics


@pytest.mark.parametrize("network", ["cnn", "fcn", "efcn", "elcn"])
def test_a_run_that_diverges_does_not_stop_the_others(done, tmp_path, monkeypatch, network):
    study, start = tiny.study(tmp_path/"nan", keep_weights=True), Study.start
    def broken(self, *run):
        model = start(self, *run)
        if run[0] == network:
            for p in model.parameters(): p.data.fill_(math.nan)
        return model
    with monkeypatch.context() as m:
        m.setattr(Study, "start", broken)
        table = study.run()
    lost = [r for r in study.plan() if r["network"] == network or network == "cnn" and r["relax"] is not None]
    assert set(study.diverged()) == {study._label(r) for r in lost}
    assert not tiny.study(study.out, keep_weights=True).unfinished()
    assert all(len(why.splitlines()) == 1 and ("not finite at step " in why or "its CNN diverged" in why)
               for why in study.diverged().values())
    names = {"cnn": "cnn+"}.get(network, network)
    times = 3 if network == "efcn" else 1
    assert final_values(table, chance=.125).query("network == @names").value.tolist() == [.125]*times, "it guesses"
    assert summary(table).query("network == @names").diverged.tolist() == [1]*times
    for r in lost: shutil.rmtree(study.open_run(r["network"], r["seed"], r["relax"]).path, ignore_errors=True)
    if network != "cnn": assert metrics(run_again(study)) == done.metrics


def test_weights_that_are_no_numbers_after_the_last_step(tmp_path, monkeypatch):
    real = Cohort.train_epoch
    def spoil(self, *args, **kw):
        found = real(self, *args, **kw)
        for model in self.models:
            for p in model.parameters(): p.data.fill_(math.nan)
        return found
    monkeypatch.setattr(Cohort, "train_epoch", spoil)
    study = tiny.study(tmp_path/"nan", epochs=1, relax_times=[0], elcn_times=[], batch_size=100)
    with pytest.raises(Diverged, match="step 1 .*all other runs diverged"): study.run()
    assert study.open_run("cnn", 0).diverged and not study.open_run("cnn", 0).table.value.isna().any()


def test_a_learning_rate_that_is_too_large(tmp_path):
    study = tiny.study(tmp_path/"large", lr=1e38)
    with pytest.raises(Diverged, match=r"seed 0 \w+: .* at step \d+ \(epoch \d\); try a smaller learning rate"):
        study.run()


# Damaged

DAMAGE = {"truncated": lambda content: content[:-3],
          "altered": lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
          "empty": lambda content: b"", "other": lambda content: b"[]"}


def notices(study, *names):
    "Whether a second pass says something about one of `names`; it must end in the right table, or in one sentence."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try: run_again(study)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
            return any(name in str(error) for name in names)
    return any(name in str(w.message) for w in said for name in names)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("file", ["relaxed-seed0-relax1-*/metrics.csv", "cnn-*/metrics.csv", "fcn-*/finished.json",
                                  "lcn-*/config.json", "study.json"])
def test_damage_is_named(copied, done, damage, file):
    path, = copied.out.glob(file)
    path.write_bytes(damage(path.read_bytes()))
    (copied.out/"metrics.csv").unlink()
    # which of two does not fit the other cannot be known
    also = {"finished.json": path.with_name("metrics.csv").name, "study.json": str(copied.out)}
    assert notices(copied, path.name, also.get(path.name, path.name))
    if (copied.out/"metrics.csv").exists(): assert metrics(copied) == done.metrics


def test_a_damaged_table_of_all_runs_is_written_again(copied, done):
    (copied.out/"metrics.csv").write_bytes(b"data,mod")
    assert metrics(run_again(copied)) == done.metrics


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cnn_is_trained_again_or_named(copied, done, damage):
    "The weights at which a relaxed network must start are damaged, when that network is still to be trained."
    path, = copied.out.glob("cnn-*/epoch-0001-*")
    path.write_bytes(damage(path.read_bytes()))
    shutil.rmtree(copied.open_run("efcn", 0, 1).path)
    assert notices(copied, path.name)


def test_a_damaged_last_checkpoint_of_an_unfinished_cnn(copied, done):
    cnn = copied.open_run("cnn", 0)
    (cnn.path/"finished.json").unlink()
    cnn.checkpoints()[-1].write_bytes(b"")
    with pytest.warns(UserWarning, match="epoch-0004"): again = run_again(copied)
    assert metrics(again) == done.metrics


# What is kept

def test_weights_wanted_later_are_the_final_ones(done, tmp_path, monkeypatch):
    "Finished without weights, asked for them, killed after a checkpoint: that is not the end, and not taken for it."
    tiny.study(tmp_path/"s").run()
    study = tiny.study(tmp_path/"s", keep_weights=True)
    run = next(r for r in study.plan() if r["network"] == "efcn")
    assert run in study.unfinished() and study.open_run("efcn", 0, run["relax"]).finished
    # a checkpoint after every epoch
    monkeypatch.setattr(relaxation.time, "monotonic", iter(range(0, 10**6, 100)).__next__)
    real = Study._train_together
    def one_epoch_less(self, runs, models, founds, lasts, *a):
        return real(self, runs, models, founds, [last - 1 for last in lasts], *a)
    monkeypatch.setattr(Study, "_train_together", one_epoch_less)
    with monkeypatch.context() as m:
        m.setattr(relaxation.Run, "finish", lambda *a, **kw: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): study.carry_out(run)
    assert study.open_run("efcn", 0, run["relax"]).load().epoch == run["last"] - 1
    assert run in study.unfinished()
    with pytest.raises(ValueError,
                       match=f"no good weights after epoch {run['last']}; run the study with keep_weights=True"):
        study.network("efcn", 0, run["relax"])
    monkeypatch.undo()
    assert equal(weights(run_again(study)), done.kept)


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("network, relax", [("efcn", 1), ("cnn", None)])
def test_damaged_final_weights_are_named_and_made_again(done, copied, network, relax):
    last = copied.open_run(network, 0, relax).checkpoints()[-1]
    last.write_bytes(last.read_bytes()[:-1] + b"!")
    says = f"delete {last.name}, which is damaged, and run the study again"
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(ValueError, match=says):
        copied.network(network, 0, relax)
    last.unlink()
    assert equal(weights(run_again(copied)), done.kept) and metrics(copied) == done.metrics


def test_a_diverged_run_has_no_final_weights(tmp_path):
    study = tiny.study(tmp_path/"s", lr=1e10, keep_weights=True, relax_times=[], elcn_times=[], epochs=1)
    study.run()
    with pytest.raises(ValueError, match="diverged: the loss was not finite"): study.network("fcn", 0)


def test_two_studies_on_one_folder(done, copied):
    "Who comes second is told before any work; a finished study can be read all the same."
    with relaxation.held(copied.out):
        assert run_again(copied).measured().equals(done.result)
        (copied.open_run("fcn", 0).path/"finished.json").unlink()
        with pytest.raises(Busy, match="another process is at work on"): run_again(copied)
    assert metrics(run_again(copied)) == done.metrics


def test_a_finished_study_needs_no_room(copied, done, monkeypatch):
    monkeypatch.setattr(relaxation.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    before = tiny.files(copied.out)
    assert run_again(copied).measured().equals(done.result) and tiny.files(copied.out) == before
    (copied.open_run("fcn", 0).path/"finished.json").unlink()
    with pytest.raises(OSError, match="GB more on the disk of .*, where 0.0 GB are free"): run_again(copied)


def test_nothing_measured_yet(tmp_path): assert tiny.study(tmp_path/"s").measured().empty


def test_a_damaged_note_of_the_environment_stops_nothing(copied, done):
    run = copied.open_run("fcn", 0)
    (run.path/"finished.json").unlink()
    (run.path/"environment.json").write_text("[{")
    with pytest.warns(UserWarning, match="environment.json is damaged"): run_again(copied)
    assert metrics(copied) == done.metrics and len(run.environments) == 1


def test_momentum_counts_as_memory(tmp_path, monkeypatch):
    needs = []
    monkeypatch.setattr(acceptance, "require_memory", lambda need, device, slack=1: slack == 1 and needs.append(need))
    for more in {}, dict(momentum=.9), dict(precision="bf16"): tiny.study(tmp_path/str(more), **more)
    assert needs == [needs[0], 2*needs[0], 1.5*needs[0]] and needs[0] > 0


def test_reading_never_unpickles(copied, done, monkeypatch):
    def refuse(*args, **kw): raise AssertionError("something was unpickled")
    for owner, name in (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"):
        monkeypatch.setattr(owner, name, refuse)
    assert copied.run().equals(done.result) and weights(copied)


# Folders

@pytest.mark.parametrize("changed", [dict(lr=.2), dict(width=3), dict(epochs=1, relax_times=[0], elcn_times=[]),
                                     dict(shuffle=False), dict(precision="bf16"),
                                     dict(data=type(tiny.DATA)(tiny.DATA.train, tiny.DATA.train))],
                         ids=["lr", "width", "epochs", "shuffle", "precision", "data"])
def test_a_folder_with_another_study(copied, changed):
    before = tiny.files(copied.out)
    with pytest.raises(ValueError, match="holds another study .*; choose another folder") as error:
        tiny.study(copied.out, **changed)
    assert len(str(error.value).splitlines()) == 1 and tiny.files(copied.out) == before


def test_another_network_of_the_same_name(tmp_path):
    def own(kernel):
        return lambda shape, classes: nn.Sequential(nn.Conv2d(1, 1, kernel), nn.Flatten(), nn.LazyLinear(classes))
    tiny.study(tmp_path/"s", model=own(3), width=None)
    with pytest.raises(ValueError, match="holds another study") as error:
        tiny.study(tmp_path/"s", model=own(5), width=None)
    assert len(str(error.value).splitlines()) == 1


def test_folders_that_are_not_ours(tmp_path):
    (tmp_path/"foreign").mkdir()
    for path in (tmp_path/"foreign"/"thesis.tex", tmp_path/"file"):
        path.write_text("years of work")
    for out in ("foreign", "file"):
        with pytest.raises(ValueError, match="is no study"): tiny.study(tmp_path/out)
    assert set(tiny.files(tmp_path)) == {"foreign/thesis.tex", "file"}
    with pytest.raises(OSError): tiny.study(tmp_path/"file"/"below")


def test_a_folder_that_was_killed_in_its_first_write(tmp_path):
    (tmp_path/"s").mkdir()
    (tmp_path/"s"/".study.json.123").write_text('{"data": "di')
    assert tiny.study(tmp_path/"s").out == tmp_path/"s"


# Bad settings: one sentence, before anything is written

def no_convolution(shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes))


@pytest.mark.parametrize("changed, says", [
    (dict(epochs=-1), "epochs must be a whole number, 0 or more"),
    (dict(relax_times=[3]), "relax time 3 .* from 0 to 2"), (dict(relax_times=[-1]), "relax time -1"),
    (dict(elcn_times=[7]), "7"), (dict(batch_size=0), "batch_size must be a whole number, 1 or more"),
    (dict(batch_size=-5), "batch_size must be a whole number, 1 or more"),
    (dict(lr=0.), "lr must be a positive number"), (dict(lr=-1.), "lr must be a positive number"),
    (dict(lr=math.nan), "lr must be a positive number"), (dict(lr=math.inf), "lr must be a positive number"),
    (dict(seeds=0), "seeds must be a whole number, 1 or more"), (dict(seeds=[]), "at least one value"),
    (dict(seeds=[1, 1]), "must differ"), (dict(seeds=[10**20]), "seed"), (dict(width=0), "width"),
    (dict(width=-2), "width"),
    (dict(device="nowhere"), "no device 'nowhere'"), (dict(device="meta"), "device"),
    (dict(precision="fp8"), "fp32, tf32, bf16"), (dict(fan_in="all"), "known are folded, padded"),
    (dict(model="resnet"), "known are small, strided, skinny, alexnet"), (dict(model="skinny"), "use larger images"),
    (dict(data="pets"), "unknown data 'pets'"),
    *((dict({name: wrong}), f"{name} must be .* not {said}") for name in ("relaxed_lr", "fcn_lr") for wrong, said in (
        (0, 0), (-.1, "-0.1"), (math.nan, "nan"), (True, True), ([.1, 0], 0), ([True], True), ("0.1", "'0.1'"))),
    (dict(relaxed_lr=[]), "relaxed_lr must hold at least one value"),
    (dict(fcn_lr=[.1, .1]), "fcn_lr must differ from each other, but 0.1 is there twice"),
    (dict(relaxed_epochs=-1), "relaxed_epochs must be a whole number, 0 or more"),
    (dict(relaxed_epochs=1.5), "relaxed_epochs must be a whole number, 0 or more"),
    (dict(arms="slowed"), "arms must be a list, such as \\['slowed'\\]"),
    (dict(arms=["slow"]), "unknown arm 'slow'; known are"),
    (dict(arms=["slowed", "slowed"]), "'slowed' is there twice"), (dict(arms=5), "arms must be a list"),
    (dict(images=0), "images must be a whole number from 1 to 100, not 0"),
    (dict(images=101), "images must be a whole number from 1 to 100, not 101"),
    (dict(images=True), "images must be a whole number"), (dict(images=90, validation=20), "images must be"),
    (dict(images=60, seeds=2), "each seed has 60 training images of its own, and 100 are enough for the seeds 0 to 0"),
    (dict(images=10, seeds=[-1]), "not for seed -1"), (dict(images=10, seeds=[3, 10]), "not for seed 10"),
    (dict(validation=0), "validation must be a whole number from 1 to 99, not 0"), (dict(validation=100), "not 100"),
    (dict(validation=3), "validation=3 of 100 .* without an image to choose on; hold out more"),
    (dict(validation=97), "validation=97 of 100 .* without an image to train on; hold out less"),
    (dict(model=no_convolution, width=None), "no convolution")], ids=lambda value: str(value).split(" at 0x")[0])
def test_refusals(tmp_path, changed, says):
    with pytest.raises(ValueError, match=says) as error: tiny.study(tmp_path/"s", **changed)
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path/"s").exists()


def test_refuses_what_does_not_fit_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**5)
    with pytest.raises(MemoryError, match="0.0 GB are free; use smaller images"): tiny.study(tmp_path/"s")
    assert not (tmp_path/"s").exists()


def test_networks_that_are_not_there(copied):
    for call in (lambda: copied.network("cnn", 9), lambda: copied.network("efcn", 0, 9),
                 lambda: copied.network("mlp", 0)):
        with pytest.raises(ValueError, match="this study has no run"): call()
    with pytest.raises(ValueError, match="no good weights"): copied.network("cnn", 0, epoch=99)


# Rates, rivals, images of each seed's own, images held out

ARMED = dict(epochs=1, relaxed_epochs=2, batch_size=20, relax_times=[0, 1], elcn_times=[1], seeds=2, images=30,
             validation=20, relaxed_lr=[.05, .1], fcn_lr=(.02,), arms=[*ARMS], keep_weights=True)


@pytest.fixture(scope="module")
def armed(tmp_path_factory):
    study = tiny.study(tmp_path_factory.mktemp("armed")/"s", **ARMED)
    study.run(progress=False)
    return study


def keys(study, seed=0): return [(r["network"], r["relax"], r["lr"]) for r in study.plan() if r["seed"] == seed]


def test_the_plan_of_rates_and_arms(armed):
    "`annealed` at the rate of the CNN is the CNN, and therefore not there."
    both = [("slowed", t, lr) for t in (0, 1) for lr in (.1, .05)]
    assert keys(armed) == keys(armed, 1) == [
        ("cnn", None, .1), ("averaged", None, .1), ("fcn", None, .02),
        *[("efcn", t, lr) for t in (0, 1) for lr in (.1, .05)], ("elcn", 1, .1), ("elcn", 1, .05),
        ("annealed", 0, .05), ("annealed", 1, .05), *both,
        *[(arm, t, lr) for arm in [*ARMS][3:] for _, t, lr in both]]
    last = {r["network"]: r["last"] - r["first"] for r in armed.plan()}
    assert last == dict.fromkeys(last, 2) | dict(cnn=3, averaged=3, fcn=1)


def test_rows_of_rates_and_arms(armed):
    table = armed.measured()
    assert list(table) == COLUMNS and not armed.diverged() and not armed.unfinished()
    found = table[["network", "seed", "relax", "lr"]].drop_duplicates()
    assert len(found) == len(armed.plan())
    begins = table[table.epoch == table.relax.fillna(0)]
    for split in "test", "validation": assert set(table[table.split == split].epoch) == {0, 1, 2, 3}
    ends = table[(table.epoch == 3) & (table.network != "fcn")].groupby("network").split.unique()
    for network, splits in ends.items():
        matrix = network not in ("cnn", "annealed", "slowed", "averaged")
        assert {*splits} >= {"train", "test", "validation"} and ("weights" in splits) == matrix, network
    losses = begins.query("split == 'test' and metric == 'loss'").set_index(["seed", "network", "relax", "lr"]).value
    for (seed, network, relax, _), loss in losses.items():
        if network in ("cnn", "averaged", "fcn", "noise_1", "noise_3"): continue
        cnn = table.query("network == 'cnn' and split == 'test' and metric == 'loss'")
        start = cnn[(cnn.seed == seed) & (cnn.epoch == relax)].value.item()
        assert loss == pytest.approx(start, abs=1e-4), network


def test_arms_are_what_they_say(armed):
    "By their stored weights: tied equals slowed, no entry within a window moves, the null keeps within the CNNs."
    for seed, t, lr in itertools.product((0, 1), (0, 1), (.1, .05)):
        slowed, tied = (armed.network(arm, seed, t, lr=lr) for arm in ("slowed", "tied"))
        assert not slowed[0].weight._backward_hooks and not tied[0].weight._backward_hooks
        x = armed.train_set(seed).batch(torch.arange(5))[0]
        torch.testing.assert_close(slowed(x), tied(x), atol=1e-4, rtol=1e-4)
        frozen, cnn = armed.network("off_local", seed, t, lr=lr), armed.network("cnn", seed, epoch=t)
        assert torch.equal(frozen[0].conv.weight, cnn[0].weight) and torch.equal(frozen[-1].weight, cnn[-1].weight)
        for name, mask in held_masks(frozen).items():
            assert not frozen.get_parameter(name)[mask].any() and frozen.get_parameter(name).any()
    rows = armed.measured().query("network == 'tied' and split == 'weights' and metric == 'convolutional'")
    assert (rows.value > 1 - 1e-6).all()


def test_annealed_at_the_rate_of_the_cnn_is_the_cnn(armed, tmp_path):
    "Trained by hand; with momentum, whose memory it loses, it is another network, and in the plan."
    cnn, rows = armed.network("cnn", 0, epoch=1), []
    train(cnn, Data(armed.train_set(0), armed.data.test), 3, .1, 20, 0, first=1,
          after_epoch=lambda epoch, step, found: rows.append(found["test", "loss"]))
    table = armed.measured().query("network == 'cnn' and seed == 0 and split == 'test' and metric == 'loss'")
    assert table[table.epoch > 1].value.tolist() == pytest.approx(rows, abs=1e-6)
    own = dict(arms=["annealed"], seeds=1, relax_times=[0], elcn_times=[])
    with pytest.warns(UserWarning, match="own rate 0.1 is the CNN itself, .* another rate by relaxed_lr"):
        assert ("annealed", 0, .1) not in keys(tiny.study(tmp_path/"plain", **own))
    assert ("annealed", 0, .1) in keys(tiny.study(tmp_path/"momentum", momentum=.5, **own))


def test_seeds_share_no_image_and_none_is_held_out(armed):
    parts = [armed.train_set(0), armed.train_set(1), armed.validation]
    assert [len(part) for part in parts[:2]] == [30, 30] and abs(len(armed.validation) - 20) <= 5
    everything = torch.cat([part.x for part in parts]).flatten(1)
    assert len(everything.unique(dim=0)) == len(everything)
    assert armed.steps_per_epoch == 2 and armed.train_size == 30
    with pytest.raises(ValueError, match="unknown seed 2; known are 0, 1"): armed.train_set(2)


def test_several_rates_need_one_to_be_said(armed):
    for call in armed.open_run, armed.network, armed.lost:
        with pytest.raises(ValueError, match=r"efcn.*, seed 0 and relax time 1 at the rates 0.1, 0.05; say lr="):
            call("efcn", 0, 1)
        with pytest.raises(ValueError, match="this study has no run of .* at rate 0.3"): call("efcn", 0, 1, lr=.3)
        call("efcn", 0, 1, lr=.05)
    assert armed.open_run("efcn", 0, 1, .05).path.name.startswith("relaxed-seed0-relax1-lr0.05-")
    assert "lr" not in armed._hashed(armed.plan()[0]) and armed.open_run("fcn", 0).config["lr"] == .02


@pytest.mark.parametrize("arm", ["cnn", *ARMS])
def test_an_arm_that_is_interrupted_arrives_at_the_same_table(armed, tmp_path, arm):
    study, after = tiny.study(tmp_path/"s", **ARMED | dict(seeds=1)), iter(range(100))
    class Accident(Exception): pass
    def stop():
        if next(after) == 3: raise Accident
    for run in study.plan():
        if run["network"] == arm and run["lr"] == min(r["lr"] for r in study.plan() if r["network"] == arm): break
    study.carry_out(study.plan()[0]) if arm != "cnn" else None
    with pytest.raises(Accident): study.carry_out(run, stop)
    assert not study.open_run(arm, 0, run["relax"], run["lr"]).finished
    assert study.carry_out(run).equals(armed._table(run))


def partly_released(shape, classes): return embed(small(shape, classes, 2), shape, layers=["0"])


def test_the_average_of_a_cnn_with_a_dense_layer_is_not_a_step_behind(tmp_path, monkeypatch):
    "A cohort moves dense layers late; the same as if there were no cohorts."
    model = dict(model=partly_released, width=None, arms=["averaged"], relax_times=[0], elcn_times=[],
                 keep_weights=True)
    ends = []
    for name in ("with", "without"):
        study = tiny.study(tmp_path/name, **model)
        study.run(progress=False)
        ends.append(study.network("averaged", 0))
        monkeypatch.setattr(Study, "_joins", lambda self, run: False)
    for p, q in zip(*(end.parameters() for end in ends)): torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


def test_workers_hold_out_the_same_images(armed, tmp_path):
    study = tiny.study(tmp_path/"s", **ARMED)
    with ThreadPoolExecutor(1) as pool: assert study.run(progress=False, executor=pool).equals(armed.measured())


@pytest.mark.parametrize("changed", [dict(images=20), dict(images=None), dict(validation=30), dict(validation=None)],
                         ids=str)
def test_other_images_are_another_study(armed, changed):
    with pytest.raises(ValueError, match=f"holds another study .{[*changed][0]} is"):
        tiny.study(armed.out, **ARMED | changed)


def test_rates_and_arms_may_join_a_folder(done, copied):
    "They leave the runs that are there as they are, and their identity."
    before = tiny.files(copied.out)
    more = tiny.study(copied.out, relaxed_lr=[.1, .01], arms=["slowed"])
    assert len(more.unfinished()) == len(more.plan()) - len(done.plan()) and before == tiny.files(copied.out)


def test_rates_and_arms_when_all_cnns_diverge(tmp_path, monkeypatch):
    rates = dict(lr=1e30, relaxed_lr=[1e30, 1e29], fcn_lr=1e30)
    study = tiny.study(tmp_path/"s", **ARMED | rates | dict(arms=["averaged", "slowed"]))
    with pytest.raises(Diverged, match="all other runs diverged, too"): study.run(progress=False)
    assert len(study.diverged()) == len(study.plan()) and not study.unfinished()


# Models that a function makes

def base(shape, classes):
    return nn.Sequential(nn.Conv2d(shape[0], 2, 5, padding=2), nn.MaxPool2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Linear(32, classes))


def changed(change):
    "A function that makes `base` and lets `change` do something to it."
    def make(shape, classes):
        model = base(shape, classes)
        return change(model) or model
    return make


class Wrapped(nn.Module):
    "`base`, with something done to its output (in training mode alone, if asked)."
    def __init__(self, shape, classes, change=lambda out: out, evaluated=None):
        super().__init__()
        self.body, self.change, self.evaluated = base(shape, classes), change, evaluated or change

    def forward(self, x): return (self.change if self.training else self.evaluated)(self.body(x))


def wrapped(change, evaluated=None): return functools.partial(Wrapped, change=change, evaluated=evaluated)


class Auxiliary(nn.Module):
    "A second head, with a convolution of its own, in training mode."
    def __init__(self, shape, classes):
        super().__init__()
        self.body, self.aux = base(shape, classes), base(shape, classes)

    def forward(self, x): return (self.body(x), self.aux(x)) if self.training else self.body(x)


class Quiet(Auxiliary):
    "The same, but the second head is added to the first."
    def forward(self, x): return self.body(x) + self.aux(x) if self.training else self.body(x)


def weight_norm_at(i): return changed(lambda m: m.__setitem__(i, nn.utils.parametrizations.weight_norm(m[i])))


def remembered(make):
    "A function that hands out one network again and again."
    return functools.lru_cache(lambda shape, classes: make(shape, classes))


def sharing(part):
    "A function whose networks have `part` in common, which it gets when it is first called."
    @functools.cache
    def common(shape, classes): return base(shape, classes)
    return lambda shape, classes: part(base(shape, classes), common(shape, classes))


def put(model, i, module):
    model[i] = module
    return model


class Counter(nn.Module):
    "Counts its calls."
    calls = 0
    def forward(self, x):
        self.calls += 1
        return x.relu()


class Held(nn.Module):
    "Multiplies by a buffer."
    def __init__(self, x):
        super().__init__()
        self.register_buffer("held", x)
    def forward(self, x): return x*self.held


class Written(Held):
    "The same, and training writes to it."
    def forward(self, x):
        if self.training: self.held.mul_(.9)
        return super().forward(x)


COUNTER, RUNNING, HOOKED, GRID = Counter(), nn.BatchNorm2d(2, affine=False), nn.ReLU(), torch.ones(1)
WRITTEN = torch.ones(1)
HOOKED.register_forward_hook(lambda *_: None)


def with_buffer(model, common):
    model.register_buffer("mask", common[0].bias.detach())
    return model


def taking_turns(make):
    "A function with two networks that it hands out in turn."
    two = []
    def hand_out(shape, classes, calls=iter(range(10**6))):
        if not two: two.extend([made := make(shape, classes), copy.deepcopy(made)])
        return two[next(calls) % 2]
    return hand_out


def counting(seed):
    "A function that seeds by itself: from a counter, a generator that outlives the call, or NumPy."
    return changed(lambda m: setattr(m[0], "bias", nn.Parameter(torch.full((2,), float(seed())))))


NORM = changed(lambda m: m.insert(4, nn.BatchNorm1d(32)) and None)
SQUEEZED = wrapped(lambda out: out[0] if len(out) == 1 else out, lambda out: out)
REFUSED = dict(
    double=(changed(nn.Module.double), "0.weight is torch.float64, but the weights of a study are of 32 bit; "
                                       "let the function return network.float()", {}),
    half=(changed(nn.Module.half), "0.weight is torch.float16", {}),
    bfloat16=(changed(nn.Module.bfloat16), "0.weight is torch.bfloat16", {}),
    half_of_bf16=(changed(nn.Module.half), "0.weight is torch.float16", dict(precision="bf16")),
    double_head=(changed(lambda m: m[4].double() and None), "4.weight is torch.float64", {}),
    double_buffer=(changed(lambda m: m.insert(1, nn.BatchNorm2d(2, affine=False).double()) and None),
                   "cannot process", {}),
    pair=(wrapped(lambda out: (out, out)), "in training mode the network returns a tuple, not one tensor", {}),
    listed=(wrapped(lambda out: [out]), "returns a list", {}),
    named=(wrapped(lambda out: dict(out=out)), "returns a dict", {}),
    nothing=(wrapped(lambda out: None), "returns a NoneType", {}),
    pair_in_evaluation=(wrapped(lambda out: out, lambda out: (out, out)),
                        "in evaluation mode the network returns a tuple", {}),
    auxiliary=(Auxiliary, "in training mode the network returns a tuple.*without auxiliary outputs", {}),
    quiet=(Quiet, "aux.0 is never called in evaluation mode.*a study has no layers=", {}),
    unflattened=(lambda s, c: nn.Sequential(nn.Conv2d(1, c, 3), nn.AdaptiveAvgPool2d(1)),
                 r"shape \(2, 10, 1, 1\) of 2 images, not a row of logits for each, \(2, 10\) \(is an "
                 r"nn.Flatten\(\) missing", {}),
    flat=(wrapped(lambda out: out.flatten()), r"shape \(20,\) of 2 images", {}),
    one_row=(wrapped(lambda out: out.mean(0, keepdim=True)), r"shape \(1, 10\) of 2 images", {}),
    scalar=(wrapped(lambda out: out.sum()), r"shape \(\) of 2 images", {}),
    one_output=(lambda s, c: base(s, 1), "has 1 output, but the data have 10 classes", {}),
    fewer=(lambda s, c: base(s, c - 1), "has 9 outputs, but the data have 10 classes", {}),
    fewer_in_evaluation=(wrapped(lambda out: out, lambda out: out[:, :7]), "has 7 outputs", {}),
    answers=(wrapped(lambda out: out.argmax(1, keepdim=True).expand(-1, 10)),
             "returns torch.int64, not real numbers", {}),
    frozen=(changed(lambda m: m.requires_grad_(False)), "all weights of the network are frozen", {}),
    detached=(wrapped(torch.Tensor.detach), "do not depend on its weights in a way that can be differentiated", {}),
    compiled=(changed(lambda m: torch.compile(m, backend="eager")), "is compiled.*without torch.compile", {}),
    part_compiled=(changed(lambda m: put(m, 0, torch.compile(m[0], backend="eager"))), "is compiled", {}),
    parametrized=(weight_norm_at(0), "remove_parametrizations", {}),
    meta=(changed(lambda m: m.to("meta")), "device meta", {}),
    fails=(wrapped(lambda out: out @ torch.ones(3)), "cannot process one image of shape .* in evaluation mode", {}),
    fails_in_training=(wrapped(lambda out: out @ torch.ones(3), lambda out: out),
                       "cannot process 2 images of shape .* in training mode", {}),
    says_nothing=(wrapped(lambda out: (_ for _ in ()).throw(AssertionError()), lambda out: out),
                  "in training mode: AssertionError", {}),
    says_nothing_at_all=(wrapped(lambda out: (_ for _ in ()).throw(AssertionError())),
                         "in evaluation mode: AssertionError", {}),
    batch_of_one=(NORM, "100 images, 33 at a time, leave a batch of one image, "
                        "but .* in training mode.*choose another batch size", dict(batch_size=33)),
    always_one=(NORM, "1 at a time", dict(batch_size=1)),
    squeezed=(SQUEEZED, r"99 at a time, leave a batch of one image, but .* shape \(10,\) of 1 image,",
              dict(batch_size=99)),
    no_network=(lambda s, c: 5, "returned int, not a network", {}),
    no_function=(5, "a function of input shape and number of classes, not 5", {}),
    other_function=(lambda shape: base(shape, 10), "cannot be called with them", {}),
    no_arguments=(lambda: base((1, 16, 16), 10), "cannot be called with them", {}),
    a_network=(base((1, 16, 16), 10), "not a network", {}),
    handed_out_again=(remembered(base), "it is one and the same network", {}),
    shared_module=(sharing(lambda m, c: put(m, 0, c[0])), r"share the module 0 \(Conv2d\)", {}),
    shared_head=(sharing(lambda m, c: put(m, 4, c[4])), "share the module 4", {}),
    shared_counter=(sharing(lambda m, c: put(m, 2, COUNTER)), "share 2, which changes when they are used", {}),
    shared_running=(sharing(lambda m, c: put(m, 2, RUNNING)), "share 2.* changes", {}),
    shared_hook=(sharing(lambda m, c: put(m, 2, HOOKED)), r"share the module 2 \(ReLU\)", {}),
    shared_weight=(sharing(lambda m, c: setattr(m[0], "weight", c[0].weight) or m), "share the memory of 0.weight", {}),
    shared_memory=(sharing(lambda m, c: setattr(m[4], "bias", nn.Parameter(c[4].bias.detach()[:])) or m),
                   "share the memory of 4.bias", {}),
    shared_buffer=(sharing(lambda m, c: put(m, 2, Written(WRITTEN))),
                   "share 2.held, which changes when they are used", {}),
    weight_as_buffer=(sharing(lambda m, c: with_buffer(m, m) and setattr(m[0], "bias", c[0].bias) or m),
                      "share the memory of 0.bias", {}),
    taking_turns=(taking_turns(base), "one and the same network", {}),
    counter=(counting(iter(range(1, 10**6)).__next__), "under one seed have made different networks", {}),
    own_generator=(counting(random.Random(0).random), "under one seed have made different networks", {}))


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_are_refused(tmp_path, case):
    "Before any work, in one sentence, and without a random number used up."
    model, says, settings = REFUSED[case]
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    with pytest.raises(ValueError, match=says) as error:
        tiny.study(tmp_path/"s", **dict(model=model, width=None, seeds=2) | settings)
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path/"s").exists()
    assert torch.equal(state, torch.get_rng_state()) and torch.get_default_dtype() == dtype


DATA_GIVEN = dict(pair=tuple, list=list)


@pytest.mark.parametrize("kind", DATA_GIVEN)
def test_a_pair_of_datasets_are_data_and_home_is_expanded(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HOME", str(tmp_path/"home"))
    monkeypatch.chdir(tmp_path)
    study = tiny.study("~/s", data=DATA_GIVEN[kind](tiny.DATA))
    assert study.config == tiny.study(tmp_path/"t").config and study.out == tmp_path/"home"/"s"
    assert not (tmp_path/"~").exists()


ALLOWED = dict(
    shared_function=sharing(lambda m, c: put(m, 2, c[2])), shared_mask=sharing(with_buffer),
    shared_constant=sharing(lambda m, c: put(m, 2, Held(GRID))),
    plain=base, more_outputs=lambda s, c: base(s, c + 5), softmaxed=changed(lambda m: m.append(nn.Softmax(1))),
    channels_last=changed(lambda m: m.to(memory_format=torch.channels_last)), weight_norm_at_the_end=weight_norm_at(4),
    tied=changed(lambda m: m.insert(4, nn.Linear(32, 32)) and m.insert(5, nn.Linear(32, 32))
                 and setattr(m[5], "weight", m[4].weight)),
    parallel=changed(nn.DataParallel), norm=NORM, lazy=changed(lambda m: put(m, 4, nn.LazyLinear(10))),
    squeezed_batches=SQUEEZED, frozen_head=changed(lambda m: m[4].requires_grad_(False) and None),
    dropout=changed(lambda m: m.insert(4, nn.Dropout()) and None),
    printed_address=changed(lambda m: setattr(m[2], "extra_repr", lambda: f"{object()}")),
    compiled_head=changed(lambda m: put(m, 4, torch.compile(m[4], backend="eager"))),
    double_part=wrapped(lambda out: (out.double() @ torch.eye(10, dtype=torch.float64))))


@pytest.mark.parametrize("case", ALLOWED)
def test_models_that_are_allowed(tmp_path, case):
    "Nothing is said about them, they run, and are found again."
    settings = dict(model=ALLOWED[case], width=None, epochs=1, relax_times=[0], elcn_times=[], batch_size=50)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert tiny.study(tmp_path/"s", **settings).run().value.notna().all()
        assert not tiny.study(tmp_path/"s", **settings | dict(seeds=[0])).unfinished()
    assert not [w for w in said if "efcn_nb" in w.filename]


SAID = dict(frozen=(changed(lambda m: m[0].requires_grad_(False) and None), {},
                    r"frozen convolutions \(0\) stay frozen when they are embedded"),
            seeded=(changed(lambda m: m.load_state_dict(base_of_seed(3).state_dict()) and None), {},
                    "same weights for all seeds.*in dropout and in the order of images alone"),
            constant=(changed(lambda m: [nn.init.constant_(p, .1) for p in m.parameters()] and None),
                      dict(shuffle=False), "same weights for all seeds, so that seeds differ in dropout alone"))


def base_of_seed(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return base((1, 16, 16), 10)


@pytest.mark.parametrize("case", SAID)
def test_models_about_which_something_is_said(tmp_path, case):
    model, settings, says = SAID[case]
    with pytest.warns(UserWarning, match=says) as said:
        study = tiny.study(tmp_path/"s", **dict(model=model, width=None, seeds=2, epochs=1, relax_times=[],
                                                elcn_times=[], batch_size=100) | settings)
    assert len(said) == 1 and study.run().value.notna().all()
    if case != "frozen":  # one seed cannot be the same as another
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tiny.study(tmp_path/"one", model=model, width=None, seeds=1, **settings)


def test_trying_a_model_changes_nothing(tmp_path):
    """The network of a seed is as its function made it, statistics of BatchNorm included,
    and as few others are made as needed."""
    calls = []
    def counted(shape, classes): return calls.append(1) or NORM(shape, classes)
    study = tiny.study(tmp_path/"s", model=counted, width=None)
    assert len(calls) <= 4
    network = study.cnn(0)
    assert network[4].num_batches_tracked == 0 and not network[4].running_mean.any() and network.training
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert equal(network.state_dict(), NORM((1, 16, 16), 10).state_dict())


@pytest.mark.parametrize("model", ["small", base], ids=["by name", "by function"])
def test_records_do_not_depend_on_the_default_dtype(tmp_path, model):
    settings = dict(model=model, width=2 if model == "small" else None, epochs=1, relax_times=[0], elcn_times=[],
                    keep_weights=True)
    usual = tiny.study(tmp_path/"usual", **settings)
    usual.run()
    torch.set_default_dtype(torch.float64)
    try:
        other = tiny.study(tmp_path/"other", **settings)
        other.run()
        assert torch.get_default_dtype() == torch.float64 and other.config == usual.config
    finally: torch.set_default_dtype(torch.float32)
    assert metrics(other) == metrics(usual) and equal(weights(other), weights(usual))


# Text that looks like something else

@pytest.mark.parametrize("name", ["007", "1e5", "true", "NA", "None", "inf", "", " ", "a,b", 'x"y'])
def test_names_stay_text(tmp_path, name):
    def model(shape, classes): return base(shape, classes)
    model.__name__ = name
    data = type(tiny.DATA)(*(dataclasses.replace(part, name=name) for part in tiny.DATA))
    settings = dict(data=data, model=model, width=None, epochs=1, relax_times=[], elcn_times=[], batch_size=100)
    study = tiny.study(tmp_path/"s", **settings)
    study.carry_out(study.plan()[0])
    table = tiny.study(tmp_path/"s", **settings).run()
    assert (table.data == name).all() and (table.model == name).all() and set(table.network) == {"cnn", "fcn"}
    assert table.equals(tiny.study(tmp_path/"s", **settings).measured())
    assert table.equals(read_table((tmp_path/"s/metrics.csv").read_text()))


# Where nothing can be written

@pytest.fixture
def read_only(monkeypatch):
    "From the call of what this returns on, whatever would write fails, also for the superuser."
    def start():
        def fail(*args, **kw): raise OSError(30, "Read-only file system")
        for owner, name in ((files, "FileLock"), (os, "replace"), (os, "mkdir"), (Path, "mkdir"), (Path, "write_bytes"),
                            (Path, "unlink")):
            monkeypatch.setattr(owner, name, fail)
    return start


def test_a_finished_study_can_be_read_where_nothing_can_be_written(copied, done, read_only):
    before = {p: p.stat().st_mtime_ns for p in copied.out.rglob("*")}
    read_only()
    again = tiny.study(copied.out, keep_weights=True)
    assert again.run().equals(done.result) and again.measured().equals(done.result) and again.unfinished() == []
    assert again.environments() and not again.diverged()
    assert again.run(executor=ThreadPoolExecutor(1)).equals(done.result) and again.run(workers=2).equals(done.result)
    assert relax(tiny.DATA, **tiny.SETTINGS | dict(out=copied.out, keep_weights=True),
                 progress=False).equals(done.result)
    for run in again.plan():
        table = again.carry_out(run).drop(columns=["lr", "protocol_epochs"])
        assert table.equals(again.open_run(run["network"], run["seed"], run["relax"]).table)
    assert equal(weights(again), done.kept)
    assert {p: p.stat().st_mtime_ns for p in copied.out.rglob("*")} == before


def test_a_part_of_a_finished_study_can_be_read_there_too(copied, done, read_only):
    "Its table is another one than that of the folder, which stays as it is."
    read_only()
    part = tiny.study(copied.out, relax_times=[0, 2], elcn_times=[])
    with pytest.warns(UserWarning, match="metrics.csv could not be written .*; the table that is returned is whole"):
        table = part.run()
    assert set(table.network) == {"cnn", "fcn", "efcn"} and metrics(copied) == done.metrics


def test_an_unfinished_study_cannot_go_on_there(copied, read_only):
    (copied.open_run("fcn", 0).path/"finished.json").unlink()
    read_only()
    with pytest.raises(OSError,
                       match="nothing can be written to .*Read-only file system.*choose another folder") as error:
        run_again(copied)
    assert len(str(error.value).splitlines()) == 1


# Odd but allowed

@pytest.mark.parametrize("changed", [dict(relax_times=[], elcn_times=[]), dict(relax_times=[]), dict(batch_size=10**6),
                                     dict(relax_times=[0, 0, 1])], ids=str)
def test_small_plans(tmp_path, changed):
    study = tiny.study(tmp_path/"s", **changed)
    table = study.run()
    assert not table.duplicated(COLUMNS[:-1]).any() and {"cnn", "fcn"} <= set(table.network)
    assert summary(table).accuracy.notna().all() and (summary(table).n == 1).all()
    if not study.relax_times:
        with pytest.raises(ValueError, match="run both"): claims(table)


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: functools.partial(f)], ids=["lambda", "partial"])
def test_own_models(tmp_path, wrap):
    model = wrap(lambda shape, classes: nn.Sequential(nn.Conv2d(shape[0], 2, 5, stride=3), nn.ReLU(), nn.Flatten(),
                                                      nn.Linear(32, classes)))
    table = tiny.study(tmp_path/"s", model=model, width=None, elcn_times=[], epochs=1, relax_times=[0]).run()
    assert table.value.notna().all()


def test_a_layer_under_two_names(tmp_path):
    def twice(shape, classes):
        conv = nn.Conv2d(1, 1, 3, padding=1)
        return nn.Sequential(conv, nn.ReLU(), conv, nn.Flatten(), nn.Linear(256, classes))
    study = tiny.study(tmp_path/"s", model=twice, width=None, elcn_times=[], epochs=1, relax_times=[0],
                       keep_weights=True)
    study.run()
    network = study.network("efcn", 0, 0)
    assert network[0] is network[2]


def test_protocols_can_be_run():
    for protocol in PROTOCOLS.values():
        assert max([*protocol["relax_times"], *protocol["elcn_times"]]) <= protocol["epochs"]


# Names of settings

@pytest.mark.parametrize("function, wrong, says", [
    (Study, dict(relax_time=[0]), "Study has no parameter relax_time; the nearest is relax_times"),
    (relax, dict(epoch=3), "relax has no parameter epoch; the nearest is epochs"),
    (relax, dict(worker=3), "relax has no parameter worker; the nearest is workers"),
    (relax, dict(q=3), "relax has no parameter q; known are data, model, progress, executor, workers, relax_times, ")])
def test_a_wrong_name_is_answered_with_the_nearest(function, wrong, says):
    with pytest.raises(TypeError) as error: function(**wrong)
    assert str(error.value).startswith(says) and len(str(error.value).splitlines()) == 1


def test_relax_shows_the_settings_of_a_study_with_their_defaults():
    study, shown = inspect.signature(Study).parameters, inspect.signature(relax).parameters
    assert [*shown][:5] == ["data", "model", "progress", "executor", "workers"]
    assert all(shown[name].default is p.default for name, p in study.items())
    assert not [p for p in shown.values() if p.kind == p.VAR_KEYWORD]
