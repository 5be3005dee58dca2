"The script of the GPU record at the size for tests: its tables, and that a run that is killed goes on where it was."
import contextlib
import io
import json
import runpy
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

import keep

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "nbs/records/gpu/record.py"
FILES = {"environment.json", "checks.csv", "ladder.csv", "curves.csv", "norms.csv", "outcomes.csv", "done.json"}
ARMS = {"cnn", "annealed", "slowed", "efcn", "fcn"}


def record(folder):
    "Run the script; what it prints."
    torch.set_num_threads(1)
    sys.argv = [str(SCRIPT), "--toy", "--device", "cpu", "--minutes", "60", "--out", str(folder)]
    with contextlib.redirect_stdout(io.StringIO()) as out: runpy.run_path(sys.argv[0], run_name="__main__")
    return out.getvalue()


def finished(folder):
    path = folder / "done.json"
    return json.loads(path.read_text()) if path.exists() else []


def killed(folder):
    "Run the script until a block is finished, then kill it."
    process, _ = keep.started(record, folder)
    while process.is_alive() and not finished(folder): time.sleep(.05)
    process.kill()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "What a killed run left, what the next one said, and what there is then."
    folder = tmp_path_factory.mktemp("record")
    code = killed(folder)
    left = {p.name: p.read_text() for p in folder.iterdir() if not p.name.endswith(".part")}
    return code, left, keep.in_child(record, folder, timeout=keep.HANGS), folder


def table(folder, name): return pd.read_csv(folder / f"{name}.csv")


def test_finished_stages_survive_a_kill(runs):
    code, left, _, _ = runs
    assert code == -signal.SIGKILL and left.keys() == FILES and json.loads(left["done.json"]) == [["toy", [0, 1]]]


def test_a_second_call_goes_on(runs):
    _, left, said, folder = runs
    assert finished(folder) == [["toy", [0, 1]], ["toy, FCN", [0, 1]]]
    assert "toy, FCN, seeds [0, 1]: done" in said and "toy, seeds" not in said and "checks:" not in said
    assert "steps: one by one, on cpu" in said
    assert (folder / "curves.csv").read_text().startswith(left["curves.csv"])
    assert len(json.loads((folder / "environment.json").read_text())) == 2


def test_the_tables_are_small_and_judged(runs):
    folder = runs[-1]
    assert {p.name for p in folder.iterdir()} <= FILES | {"curves.csv.part"}
    assert sum(p.stat().st_size for p in folder.iterdir()) < 100_000
    outcomes = table(folder, "outcomes")
    assert {*outcomes.network} == ARMS and (outcomes.seeds == 2).all()
    judged = outcomes[outcomes.network == "efcn"]
    verdicts = judged[[c for c in judged if c.startswith("verdict")]]
    assert set(verdicts) == {f"verdict_{k}" for k in ("cnn", "annealed", "slowed", "best_rival")}
    assert verdicts.notna().all().all()


def test_curves_and_norms_hold_every_network(runs):
    curves, norms = table(runs[-1], "curves"), table(runs[-1], "norms")
    assert {*curves.network} == ARMS and curves.train_loss.notna().all()
    assert curves[["train", "validation", "test"]].stack().between(0, 1).all()
    assert {*norms.network} == {"efcn"} and {*norms.seed} == {0, 1}
    assert (norms.displacement_off_local > 0).all()


def test_the_step_is_right_in_the_table_of_checks(runs):
    error = table(runs[-1], "checks").set_index("check").relative_error
    assert (error[[k for k in error.index if "float64" in k]] < 1e-12).all()
    steps = error[[k for k in error.index if k.startswith("eager step")]]
    for what, own in steps.items():
        assert own < 1.5*error[f"PyTorch's bf16 gradient of {what.split(', ')[-1]}"]


def test_the_ladder_names_its_rungs(runs):
    rungs = table(runs[-1], "ladder")
    assert {*rungs.network} == {"ceiling", "SkinnyCNN", "AlexNet"} and (rungs.milliseconds > 0).all()
