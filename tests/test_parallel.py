"""Sweeps by any executor: the same records as in one process, also when a worker dies."""
import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import keep
import tiny
from efcn_nb.cli import efcn_relax
from efcn_nb.experiments.relaxation import WorkerLost
from efcn_nb.service.files import Busy


def study(out, marker):
    return tiny.study(out, model=functools.partial(tiny.deadly, marker=str(marker), parent=os.getpid()), width=None,
                      seeds=2, keep_weights=True)


def results(study):
    "Names of all weights, which hold the hash of their content, and the tables."
    return {str(p.relative_to(study.out)) for p in study.out.glob("*/epoch-*")}, (study.out/"metrics.csv").read_bytes()


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    "Done by this process."
    folder = tmp_path_factory.mktemp("serial")
    done = study(folder/"study", folder/"marker")
    done.run()
    return results(done)


def pool(workers=2): return ProcessPoolExecutor(workers, keep.processes)  # which start at once, with torch loaded


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_threads_take_turns(serial, tmp_path):
    ours = study(tmp_path/"s", tmp_path/"marker")
    with ThreadPoolExecutor(3) as executor: ours.run(executor=executor)
    assert results(ours) == serial and not (tmp_path/"s"/"data.safetensors").exists()


def test_processes_one_of_which_dies(serial, tmp_path):
    "The pool is lost, and a new one ends with the same records."
    ours = study(tmp_path/"s", tmp_path/"marker")
    says = r"ended before its run did \(BrokenProcessPool\).*the same call goes on"
    with pool() as executor, pytest.raises(WorkerLost, match=says) as error: ours.run(executor=executor)
    assert (tmp_path/"marker").exists() and len(str(error.value).splitlines()) == 1
    left = len(study(tmp_path/"s", tmp_path/"marker").unfinished())
    with pool() as executor: ours.run(executor=executor)
    assert left > 0 and results(ours) == serial
    with pool() as executor: ours.run(executor=executor)  # nothing is left to do
    assert results(ours) == serial


def test_workers_one_of_which_dies(serial, tmp_path):
    "The pool of `workers=`: a new one goes on."
    ours, threads = study(tmp_path/"s", tmp_path/"marker"), torch.get_num_threads()
    with pytest.warns(UserWarning, match=r"ended before its run did \(BrokenProcessPool\).*: it goes on"):
        ours.run(workers=2)
    assert (tmp_path/"marker").exists() and results(ours) == serial
    assert not multiprocessing.active_children() and torch.get_num_threads() == threads


# What cannot travel, and pools that cannot work: a sentence before any work

def local(): return lambda shape, classes: tiny.deadly(shape, classes, "", os.getpid())


class Locked:
    "A model that holds something that cannot be copied."
    def __init__(self): self.lock = threading.Lock()
    def __call__(self, shape, classes): return tiny.deadly(shape, classes, "", os.getpid())


def at_a_prompt(shape, classes): return tiny.deadly(shape, classes, "", os.getpid())


class Hidden:
    "An executor that does not say how it starts its processes."
    def __init__(self, pool): self.pool = pool
    def submit(self, *args): return self.pool.submit(*args)


def forking(): return ProcessPoolExecutor(1, multiprocessing.get_context("fork"))


CANNOT = dict(
    fork=(lambda: dict(executor=forking()), dict(),
          "this executor forks its processes.*ask for workers=2 instead.*get_context\\('spawn'\\)"),
    hidden_fork=(lambda: dict(executor=Hidden(forking())), dict(), "this executor forks its processes"),
    a_lambda=(lambda: dict(workers=2), dict(model=local()),
              "function local.<locals>.<lambda> cannot travel.*define it by def at the top"),
    a_lambda_to_a_pool=(lambda: dict(executor=pool(1)), dict(model=local()), "cannot travel"),
    a_partial=(lambda: dict(workers=2), dict(model=functools.partial(local())), "function partial cannot travel"),
    a_lock=(lambda: dict(workers=3), dict(model=Locked()), "function Locked cannot travel.*cannot pickle"),
    at_a_prompt=(lambda: dict(executor=pool(1)), dict(model=at_a_prompt),
                 "function at_a_prompt is not there in other processes.*in a module of its own"),
    none=(lambda: dict(workers=0), dict(), "workers must be a whole number, 1 or more, not 0"),
    half=(lambda: dict(workers=1.5), dict(), "workers must be a whole number, 1 or more, not 1.5"),
    some=(lambda: dict(workers="2"), dict(), "whole number"),
    both=(lambda: dict(workers=2, executor=Hidden(None)), dict(), "either workers= or executor="),
    a_number=(lambda: dict(executor=2), dict(),
              "executor must be one of the kind of concurrent.futures, not 2.*take workers="))


@pytest.mark.parametrize("case", CANNOT)
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="has no forks")
def test_what_workers_cannot_do(tmp_path, monkeypatch, case):
    how, changed, says = CANNOT[case]
    at_a_prompt.__module__ = "__main__"
    # here alone, as in a notebook
    monkeypatch.setattr(sys.modules["__main__"], "at_a_prompt", at_a_prompt, raising=False)
    ours = tiny.study(tmp_path/"s", **dict(model=functools.partial(tiny.deadly, marker="", parent=os.getpid()),
                                           width=None) | changed)
    given = how()
    with pytest.raises(ValueError, match=says) as error: ours.run(**given)
    assert len(str(error.value).splitlines()) == 1 and not list(ours.out.glob("*/epoch-*"))
    assert not (ours.out/"data.safetensors").exists()
    for executor in (given.get("executor"), getattr(given.get("executor"), "pool", None)):
        if isinstance(executor, ProcessPoolExecutor): executor.shutdown()


@pytest.mark.parametrize("case", ["fork", "a_lambda"])
def test_a_finished_study_needs_no_workers(tmp_path, case):
    settings = dict(model=local(), width=None, epochs=1, relax_times=[], elcn_times=[], batch_size=100)
    table = tiny.study(tmp_path/"s", **settings).run()
    assert tiny.study(tmp_path/"s", **settings).run(**CANNOT[case][0]()).equals(table)


def test_a_program_without_a_file(tmp_path, monkeypatch):
    "From standard input: the workers would look for it."
    main = types.ModuleType("__main__")
    main.__file__ = str(tmp_path/"<stdin>")
    monkeypatch.setitem(sys.modules, "__main__", main)
    with pytest.raises(ValueError, match="<stdin> is no file; write the script to one"):
        tiny.study(tmp_path/"s").run(workers=2)


NO_GUARD = """
import tiny
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
pool = ProcessPoolExecutor(1, get_context("spawn"))
tiny.study("s").run(executor=pool)
"""


def run_script(folder, text):
    (folder/"script.py").write_text(text)
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(
        [str(Path(tiny.__file__).parent), str(Path(tiny.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run([sys.executable, "script.py"], cwd=folder, env=env, capture_output=True, text=True)


def test_a_script_without_a_guard(tmp_path):
    ended = run_script(tmp_path, NO_GUARD)
    said = [line for line in ended.stderr.splitlines()
            if "below `if __name__ == '__main__':`, because each worker imports the script" in line]
    assert ended.returncode == 1 and said[0].endswith("this worker ends")
    assert said[-1].startswith("ValueError: no worker could start, so that nothing was computed")
    assert "goes on" not in ended.stderr
    assert not list((tmp_path/"s").glob("*/epoch-*"))


# A function that reads what the script sets below the guard, or draws at import, is another one in a worker

ELSEWHERE = """
import functools, json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
import torch
from torch import nn
import tiny

WIDTH, SLOPE, W, MASK, TABLE = 2, .1, torch.randn(2, 1, 5, 5), torch.rand(2, 1, 1), {}

class Scaled(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)
    def forward(self, x): return x*self.mask*SLOPE

def net(shape, classes, width=2, mask=None, weight=None, more=nn.ReLU):
    parts = [nn.Conv2d(1, width, 5, stride=3), *([Scaled(mask)] if mask is not None else []), more(), nn.Flatten()]
    made = nn.Sequential(*parts, nn.LazyLinear(classes))
    if weight is not None: made[0].weight.data.copy_(weight)
    return made

def width(s, c): return net(s, c, WIDTH)
def slope(s, c): return net(s, c, mask=torch.ones(2, 1, 1))
def weight(s, c): return net(s, c, weight=W)
def buffer(s, c): return net(s, c, mask=MASK.clone())
def name(s, c): return net(s, c, args.width)
def entry(s, c): return net(s, c, TABLE["width"])
def ours(s, c): return net(s, c, 3, more=nn.Dropout)
class Made:
    def __call__(self, s, c): return net(s, c, WIDTH)

if __name__ == "__main__":
    import argparse
    WIDTH, SLOPE, args, TABLE["width"] = 4, .3, argparse.Namespace(width=4), 4
    pool = ProcessPoolExecutor(1, get_context("spawn"))
    for model in width, slope, weight, buffer, name, entry, Made(), ours, functools.partial(net, width=WIDTH):
        label = getattr(model, "__name__", type(model).__name__)
        small = tiny.study(label, model=model, epochs=1, relax_times=[], elcn_times=[], width=None, batch_size=100)
        try: said = len(small.run(executor=pool)) and "ran"
        except ValueError as e: said = f"{e} [{len([*small.out.iterdir()])}]"
        print(json.dumps([label, said]))
"""

SAID_OF = dict(
    width=r"width makes another network in a worker than here \(its layers differ\)", slope=r"its outputs differ",
    weight=r"its weights differ", buffer="its weights differ", Made=r"Made makes another network .*its layers differ",
    name=r"name fails in a worker, though not here \(NameError: name 'args' is not defined\)",
    entry=r"entry fails in a worker, though not here \(KeyError: 'width'\)", ours="^ran$", partial="^ran$")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    "What a script hears of its functions, by their names."
    ended = run_script(tmp_path_factory.mktemp("elsewhere"), ELSEWHERE)
    assert ended.returncode == 0, ended.stderr
    return dict(map(json.loads, ended.stdout.splitlines()))


@pytest.mark.parametrize("function", SAID_OF)
def test_a_function_that_is_another_one_in_a_worker(elsewhere, function):
    "Said before any run: the folder holds nothing but the settings and the lock."
    said = elsewhere[function]
    assert re.search(SAID_OF[function], said) and "\n" not in said
    if said != "ran": assert "below `if __name__ == '__main__':`" in said and said.endswith(" [2]")


def ended(error=None):
    "A run in a worker that has ended, perhaps by an error."
    future = Future()
    if error: future.set_exception(error)
    else: future.set_result(None)
    return future


def broken(): raise BrokenProcessPool("it is broken")


@pytest.mark.parametrize("answer, kind, says", [
    (lambda: ended(Busy("another process is at work")), Busy, "another process is at work"),
    (lambda: ended(RuntimeError("a bug in the network")), RuntimeError, "a bug in the network"),
    (broken, WorkerLost, "the same call goes on from there"),
    (ended, OSError, "all workers must see that folder")])  # one that writes elsewhere: nobody waits for ever
def test_what_a_worker_says_is_passed_on(tmp_path, answer, kind, says):
    executor = types.SimpleNamespace(submit=lambda *args: answer())
    with pytest.raises(kind, match=says) as error: study(tmp_path/"s", tmp_path/"marker").run(executor=executor)
    assert type(error.value) is kind


def test_a_pool_that_outlives_a_study(serial, tmp_path):
    "The same folder, other data: a worker must not go on with what it had opened."
    with pool(1) as executor:
        tiny.study(tmp_path/"s", data="digits", epochs=1, relax_times=[], elcn_times=[],
                   batch_size=1000).run(executor=executor)
        shutil.rmtree(tmp_path/"s")
        ours = study(tmp_path/"s", tmp_path/"marker")
        (tmp_path/"marker").touch()
        ours.run(executor=executor)
    assert results(ours) == serial


def test_a_relative_folder(serial, tmp_path, monkeypatch):
    "Workers may have been started elsewhere."
    (tmp_path/"marker").touch()
    with pool(1) as executor:
        executor.submit(os.getpid).result()
        monkeypatch.chdir(tmp_path)
        ours = study("s", tmp_path/"marker")
        ours.run(executor=executor)
    assert results(ours) == serial and (tmp_path/"s"/"study.json").exists()


@pytest.mark.parametrize("dies", [False, True], ids=["", "a worker dies"])
def test_dask(serial, tmp_path, monkeypatch, dies):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(
        [str(Path(tiny.__file__).parent), str(Path(tiny.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
    if not dies: (tmp_path/"marker").touch()
    with distributed.LocalCluster(n_workers=1 + dies, threads_per_worker=1, dashboard_address=None, silence_logs=50,
                                  local_directory=tmp_path) as cluster, distributed.Client(cluster) as client:
        ours = study(tmp_path/"s", tmp_path/"marker")
        ours.run(executor=client.get_executor())
    assert (tmp_path/"marker").exists() and results(ours) == serial


@pytest.fixture
def command(tmp_path):
    "Starts `efcn_relax` in a process of its own."
    (tmp_path/"command.py").write_text("import signal\nfrom efcn_nb.cli import efcn_relax\nif __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)  "
        "# as on a terminal, also where tests run in the background\n    efcn_relax()\n")
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(Path(tiny.__file__).parents[1]),
                                                        os.environ.get("PYTHONPATH", "")]))
    started = []
    def start(*argv):
        started.append(subprocess.Popen([sys.executable, "command.py", *tiny.FLAGS, *argv], cwd=tmp_path, env=env,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]
    yield start
    for process in started: process.kill()


def test_workers_of_the_command(command, tmp_path):
    together = command("--out", "together", "--workers", "2")
    efcn_relax([*tiny.FLAGS, "--out", f"{tmp_path}/alone"])
    assert together.communicate(timeout=keep.HANGS)[1] == "" and together.returncode == 0
    for name in ("metrics.csv", "summary.csv", "claims.csv"):
        assert (tmp_path/"together"/name).read_bytes() == (tmp_path/"alone"/name).read_bytes()


def test_workers_end_when_their_parent_is_killed_or_asked_to_end(command, tmp_path):
    "So that the same command can go on, and is not told that another process is at work; it says so itself if it can."
    flags = ["--out", "s", "--workers", "2", "--epochs", "100000", "--relax", "", "--elcn", ""]
    def last(): return max((int(p.name.split("-")[1]) for p in tmp_path.glob("s/cnn-*/epoch-*")), default=-1)
    def wait_for(epoch, process):
        while last() < epoch:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(.05)
    killed = command(*flags)
    wait_for(1, killed)
    killed.kill()
    for run in tmp_path.glob("s/*-seed0-*"):
        with FileLock(run/"lock", timeout=keep.HANGS): pass  # which a worker holds while it lives
    for name in "SIGTERM", "SIGINT":
        before, asked = last(), command(*flags)
        wait_for(before + 2, asked)
        asked.send_signal(getattr(signal, name))
        said = asked.communicate(timeout=keep.HANGS)[1].strip()
        assert said == "stopped; rerun the same command: it resumes after the last stored epoch", name
