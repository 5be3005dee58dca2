"""The console command as a process: what it prints and writes, and that every mistake is one line."""
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from inspect import signature
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from PIL import Image

import keep, tiny
from efcn_nb import cli
from efcn_nb.cli import efcn_bench, efcn_relax
from efcn_nb.experiments import claims
from efcn_nb.experiments.plots import NAMES
from efcn_nb.experiments.relaxation import Study
from efcn_nb.service import files
from efcn_nb.service.tables import read_table
from efcn_nb.training.arms import ARMS

REPORTS = {"summary.csv", "claims.csv", "metrics.csv", "figure.png", "command.txt", "study.json", "lock"}


@pytest.fixture(scope="module")
def console(tmp_path_factory):
    console = tiny.Console(tmp_path_factory.mktemp("console"))
    yield console
    console.close()


@pytest.fixture(scope="module")
def done(console, tmp_path_factory):
    "The folder and the standard output of a study at one go."
    folder = tmp_path_factory.mktemp("done")
    code, out, err = console(*tiny.FLAGS, "--out", "study", cwd=folder, draws=True)
    assert code == 0, err
    return folder/"study", out


def one_line(code, err):
    return (code not in (0, None) and len(err.splitlines()) == 1 and err.startswith("efcn_relax")
            and "Traceback" not in err)


def test_what_is_printed_and_written(done):
    study, out = done
    assert {p.name for p in study.iterdir() if p.is_file()} == REPORTS
    assert len([p for p in study.iterdir() if p.is_dir()]) == 5
    for word in ("Test accuracy (last five epochs", "Claims", "fcn", "efcn", "elcn", "cnn", "torch", str(study.name)):
        assert word in out, word
    assert pd.read_csv(study/"summary.csv").n.eq(1).all() and len(pd.read_csv(study/"claims.csv")) >= 5
    with Image.open(study/"figure.png") as figure: assert figure.format == "PNG" and min(figure.size) > 200
    assert (study/"command.txt").read_text().startswith("efcn_relax --width 2 ")
    assert not [name for name in tiny.files(study) if name.rpartition("/")[2].startswith(".")]


def test_a_second_pass_changes_nothing(console, done):
    before = tiny.files(done[0])
    code, out, err = console(*tiny.FLAGS, "--out", "study", cwd=done[0].parent)
    assert code == 0 and tiny.files(done[0]) == before
    assert out.splitlines()[1:] == done[1].splitlines()[1:]


def test_the_default_folders(console, done, tmp_path):
    "Results where the command is given, runs in the cache folder, from where any folder gets its results."
    for folder in tmp_path/"here", tmp_path/"there":
        folder.mkdir()
        code, out, _ = console(*tiny.FLAGS, cwd=folder)
        results, = (folder/"efcn_results").iterdir()
        runs = Path(out.splitlines()[-1].removeprefix("Runs: "))
        assert code == 0 and results.name.startswith(f"{runs.name}-") and runs.name.startswith("digits-small2-")
        assert f"figure and tables are written to efcn_results/{results.name}, runs are kept in {runs}, at most" in out
        assert [*folder.iterdir()] == [folder/"efcn_results"]
        assert {p.name for p in results.iterdir()} == REPORTS - {"study.json", "lock"}
        assert "efcn_results" not in str(runs) and len([p for p in runs.iterdir() if p.is_dir()]) == 5
        for name in "metrics.csv", "summary.csv", "claims.csv":
            assert (results/name).read_bytes() == (done[0]/name).read_bytes()
    before = tiny.files(tmp_path)
    assert console(*tiny.FLAGS, cwd=tmp_path/"there")[:2] == (0, out) and tiny.files(tmp_path) == before


def test_other_settings_have_another_folder(console, tmp_path):
    "Of the same runs: results are those of the command beside them."
    for flags in ["--relax", "0,1"], ["--relax", "0"], ["--relax", "0", "--arms", "slowed"]:
        assert console(*tiny.FLAGS, *flags, cwd=tmp_path)[0] == 0
    found = {*(tmp_path/"efcn_results").iterdir()}
    assert len(found) == 3
    for folder in found:
        told = (folder/"command.txt").read_text()
        assert ("slowed" in told) == ("slowed" in {*pd.read_csv(folder/"metrics.csv").network})


def test_no_flag_is_abbreviated(console, tmp_path):
    code, out, err = console("--seed", "2", cwd=tmp_path)
    assert one_line(code, err) and "unrecognized arguments: --seed 2" in err


def test_a_folder_without_room_for_results_is_one_line(console, tmp_path):
    (tmp_path/"efcn_results").write_text("a file")
    code, out, err = console(*tiny.FLAGS, cwd=tmp_path)
    assert one_line(code, err) and "work in another folder, or name one by --out" in err


@pytest.mark.parametrize("inside", ["", "/below"])
def test_a_cache_folder_that_is_a_file_is_one_line(tmp_path, monkeypatch, inside):
    (tmp_path/"file").write_text("a file")
    monkeypatch.setenv("EFCN_NB_RUNS", f"{tmp_path}/file{inside}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="cannot be made a folder.*--out|cannot be made a folder.*EFCN_NB_RUNS") as end:
        efcn_relax(tiny.FLAGS)
    assert len(str(end.value).splitlines()) == 1 and not (tmp_path/"efcn_results").exists()


@pytest.fixture(scope="module")
def mortal(console, tmp_path_factory):
    """Flags of a study with dropout, momentum and all weights kept, its folder when it was not interrupted,
    and the seconds that took."""
    folder = tmp_path_factory.mktemp("mortal")
    for k in range(24):
        path = folder/"images"/("test" if k < 8 else "train")/"ab"[k % 2]/f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(k).normal(128, 20 + 60*(k % 2), (32, 32)).clip(0, 255).astype("uint8")
        Image.fromarray(pixels).convert("RGB").save(path)
    flags = ["--data", folder/"images",
             *"--model alexnet --width 1 --epochs 2 --batch_size 8 --seeds 1 --relax 0,1 --elcn 1 --device cpu "
              "--momentum .9 --weight_decay .01 --lr .02 --keep_weights --no-trim".split()]  # which takes time
    start = time.monotonic()
    assert console(*flags, "--out", "whole", cwd=folder, draws=False)[0] == 0
    return flags, folder/"whole", time.monotonic() - start


def results(study):
    "Names of all weights (which hold the hash of their content), and content of all tables."
    weights = {str(p.relative_to(study)) for p in study.glob("*/epoch-*")}
    return weights, {str(p.relative_to(study)): p.read_bytes() for p in study.rglob("*.csv")}


@pytest.mark.parametrize("what, last", [("file", 40), ("half", 40), ("step", 17), ("clock", 0)])
def test_killed_and_started_again(console, mortal, tmp_path, what, last):
    """SIGKILL when a file lies there under its temporary name, in the midst of a write, in training, or at any time:
    two moments each, and then one killed again and again."""
    flags, whole, seconds = mortal
    def run(out, die=None): return console(*flags, "--out", str(out), cwd=tmp_path, die=die)
    random_ = random.Random(what)
    moments = [seconds*random_.random() for _ in range(2)] if what == "clock" else random_.sample(range(last), 2)
    for moment in moments:
        code, _, _ = run(moment, (what, moment))
        assert code == -9 or what == "clock", f"{what} {moment} was not reached"
        code, out, err = run(moment)
        assert code == 0, err
        assert results(tmp_path/str(moment)) == results(whole)
        left = list((tmp_path/str(moment)).rglob(".*"))
        assert not left, "what a killed process had begun to write is cleared away"
    again = 0
    while run("again", (what, seconds/3*1.3**again if what == "clock" else 9))[0] == -9: again += 1
    assert results(tmp_path/"again") == results(whole) and (again > 1 or what == "clock")


@pytest.mark.parametrize("limit", [400, 20_000, 2_000_000])
def test_a_full_disk(console, mortal, tmp_path, limit):
    """No file can be larger than `limit` bytes: one sentence, everything before intact,
    and the same command goes on when there is room."""
    flags, whole, _ = mortal
    code, out, err = console(*flags, "--out", "s", cwd=tmp_path, die=("disk", limit))
    assert one_line(code, err) and "could not be written (" in err and "everything written before it is intact" in err
    assert not [p for p in tmp_path.rglob(".*")]
    code, out, err = console(*flags, "--out", "s", cwd=tmp_path)
    assert code == 0 and not err and results(tmp_path/"s") == results(whole)


def test_two_commands_on_one_folder(console, mortal, tmp_path):
    "The second is told so, and the first is not disturbed."
    flags, whole, _ = mortal
    shutil.copytree(whole, tmp_path/"s")
    run = next((tmp_path/"s").glob("relaxed-*relax1-*"))
    (run/"finished.json").unlink()
    with FileLock(run/"lock"):
        code, out, err = console(*flags, "--out", "s", cwd=tmp_path)
        assert one_line(code, err) and "another process is at work on s/relaxed-seed0-relax1" in err
    code, out, err = console(*flags, "--out", "s", cwd=tmp_path)
    assert code == 0 and results(tmp_path/"s") == results(whole)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_stopped_by_hand_or_by_a_scheduler(console, tmp_path, name):
    flags = "--epochs 100000 --relax 0 --seeds 1 --device cpu --out s".split()
    pid = console.start(*flags, cwd=tmp_path)
    while not any(int(path.name.split("-")[1]) > 1 for path in tmp_path.glob("s/cnn-*/epoch-*")):
        assert console.is_running(), console.wait()
        time.sleep(.05)
    os.kill(pid, getattr(signal, name))
    code, out, err = console.wait()
    assert code == 1 and err.strip() == "stopped; rerun the same command: it resumes after the last stored epoch"


def test_killed_in_the_very_first_write(console, tmp_path):
    assert console(*tiny.FLAGS, "--relax", "0", "--out", "s", cwd=tmp_path, die=("file", 0))[0] == -9
    code, out, err = console(*tiny.FLAGS, "--relax", "0", "--out", "s", cwd=tmp_path)
    assert code == 0, err


def test_help_names_the_flags(console, tmp_path):
    code, out, err = console("--help", cwd=tmp_path)
    assert code == 0 and not err
    flags = "--data --model --relax --epochs --lr --batch_size --seeds --device --precision --out --no-shuffle"
    for flag in flags.split(): assert flag in out, flag


def test_each_setting_of_a_study_has_a_flag_of_its_name():
    flags = {flag for action in cli._parser()._actions for flag in action.option_strings}
    missing = [name for name in signature(Study).parameters if not {f"--{name}", f"--no-{name}"} & flags]
    assert not missing
    asked = cli._parser().parse_args("--relax_times 0,2 --elcn_times 1".split())
    assert (asked.relax, asked.elcn) == ([0, 2], [1])


def test_legends_have_the_words_of_flags():
    for arm in ARMS: assert {*arm.split("_")} <= {*re.findall("[a-z]+|[0-9]+", NAMES[arm].lower())}, arm
    assert all(NAMES[network] == name for network, name in claims._NAME.items())


def test_as_a_fresh_process(tmp_path):
    "Without the help of `tiny.Console`, from another folder."
    command = [sys.executable, "-c", "from efcn_nb.cli import efcn_relax; efcn_relax()"]
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(tiny.Path(tiny.__file__).resolve().parents[1]),
                                                        os.environ.get("PYTHONPATH", "")]))
    wrong = subprocess.run([*command, "--data", "nothing-of-that-name", "--out", "s"], cwd=tmp_path, env=env,
                           capture_output=True, text=True, timeout=keep.HANGS)
    assert one_line(wrong.returncode, wrong.stderr) and "digits, cifar10" in wrong.stderr
    assert not list(tmp_path.iterdir())


WRONG = [
    ("--data", "nothing"), ("--data", ""), ("--data", "no/such/folder"), ("--data", "a-file"), ("--data", "empty"),
    ("--data", "no-images"), ("--data", "broken"), ("--data", "unequal"),
    ("--model", "resnet"), ("--model", "skinny"), ("--width", "0"), ("--width", "-3"), ("--width", "x"),
    ("--width", "99999999999"),
    ("--relax", "7"), ("--relax", "-1"), ("--relax=-1,0",), ("--relax", "a"), ("--relax", "0.5"), ("--elcn", "7"),
    ("--elcn", "x"),
    ("--epochs", "-1"), ("--epochs", "1.5"), ("--epochs", ""), ("--lr", "nan"), ("--lr", "inf"), ("--lr", "0"),
    ("--lr", "-1"), ("--lr", "x"),
    ("--batch_size", "0"), ("--batch_size", "-5"), ("--batch_size", "x"), ("--seeds", "0"), ("--seeds", "-1"),
    ("--seeds", ""), ("--seeds", "1.5"), ("--seeds", "x"),
    ("--seeds", "99999999999999999999,"), ("--seeds", "99999999999999999,"), ("--device", "nowhere"),
    ("--device", "meta"), ("--device", "cuda:99"), ("--precision", "fp8"),
    ("--workers", "0"), ("--precision", "tf32"), ("--out", "a-file"), ("--out", "a-file/below"), ("--out", "foreign"),
    ("--out", "/dev/null/x"), ("--foo",), ("bar",),
    *((flag, value) for flag in ("--relaxed_lr", "--fcn_lr") for value in ("x", ",", "0", "-1", "nan", "0.1,0.1")),
    ("--relaxed_lr", ""),
    ("--relaxed_epochs", "-1"), ("--relaxed_epochs", "x"), ("--arms", "slow"), ("--arms", "slowed,slowed"),
    ("--arms", "slowed,eFCN"), ("--images", "0"), ("--images", "99999"), ("--images", "1000", "--seeds", "2"),
    ("--images", "x"), ("--validation", "0"), ("--validation", "1438"), ("--validation", "3")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with all that can be wrong; nothing may be added to it."
    folder = tmp_path_factory.mktemp("place")
    (folder/"a-file").write_text("x")
    for name in ("empty", "foreign", "no-images/train/cat", "no-images/test/cat"): (folder/name).mkdir(parents=True)
    (folder/"foreign"/"thesis.tex").write_text("years of work")
    for data, sizes in dict(broken=(8, 8), unequal=(8, 9)).items():
        for part in ("train", "test"):
            for k, size in enumerate(sizes):
                path = folder/data/part/"cat"/f"{k}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (size, size)).save(path)
    (folder/"broken"/"train"/"cat"/"1.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("wrong", WRONG, ids=" ".join)
def test_every_mistake_is_one_line_and_leaves_nothing(console, place, wrong):
    before = sorted(place.rglob("*"))
    code, out, err = console(*tiny.FLAGS, *wrong, cwd=place)
    assert one_line(code, err), err
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("name", ["007", "1e5", "NA", "true"])
def test_a_name_that_looks_like_something_else(console, tmp_path, name):
    flags = [*tiny.FLAGS, "--relax", "", "--elcn", "", "--name", name, "--out", "s"]
    code, out, err = console(*flags, cwd=tmp_path)
    assert code == 0 and not err and set(read_table((tmp_path/"s/metrics.csv").read_text()).data) == {name}
    assert console(*flags, cwd=tmp_path) == (code, out, err)


def test_a_finished_study_is_reported_where_nothing_can_be_written(done, monkeypatch, capsys):
    before = tiny.files(done[0])
    def fail(*args, **kw): raise OSError(30, "Read-only file system")
    for owner, name in ((files, "FileLock"), (os, "replace"), (os, "mkdir"), (Path, "mkdir"), (Path, "write_bytes"),
                        (Path, "unlink")):
        monkeypatch.setattr(owner, name, fail)
    monkeypatch.chdir(done[0].parent)
    efcn_relax([*tiny.FLAGS, "--out", "study"])
    said = capsys.readouterr()
    assert said.out.splitlines()[1:] == done[1].splitlines()[1:] and not said.err and tiny.files(done[0]) == before
    with pytest.raises(SystemExit) as end: efcn_relax([*tiny.FLAGS, "--seeds", "2", "--out", "study"])
    assert one_line(1, end.value.code) and "nothing can be written to study (Read-only file system)" in end.value.code


def test_not_a_number_while_training(console, tmp_path):
    code, out, err = console(*tiny.FLAGS, "--lr", "1e38", "--epochs", "3", "--out", "s", cwd=tmp_path)
    assert one_line(code, err) and "step" in err and (tmp_path/"s"/"study.json").exists()


@pytest.mark.parametrize("name, content", [("study.json", b""), ("study.json", b"[]"), ("cnn-*/config.json", b"{"),
                                           ("fcn-*/finished.json", b""), ("fcn-*/finished.json", b"{}"),
                                           ("relaxed-*relax1-*/metrics.csv", b"epoch"), ("cnn-*/epoch-0001-*", b"")])
def test_damage_is_no_traceback(console, done, tmp_path, name, content):

    study = tmp_path/"study"
    shutil.copytree(done[0], study)
    path, = study.glob(name)
    path.write_bytes(content)
    if path.suffix == ".safetensors": shutil.rmtree(next(study.glob("relaxed-*relax1-*")))  # which starts from there
    code, out, err = console(*tiny.FLAGS, "--out", "study", cwd=tmp_path)
    assert str(path.parent.relative_to(tmp_path)) in err
    assert all(line.startswith("efcn_relax: ") for line in err.splitlines())
    if code == 0: assert (study/"metrics.csv").read_bytes() == (done[0]/"metrics.csv").read_bytes()
    else: assert err.splitlines()[-1].startswith("efcn_relax: ")


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="the superuser may write everywhere")
def test_a_folder_that_cannot_be_written(console, tmp_path):
    (tmp_path/"locked").mkdir(mode=0o555)
    for out in ("locked", "locked/s"): assert one_line(*console(*tiny.FLAGS, "--out", out, cwd=tmp_path)[::2])


@pytest.mark.parametrize("flags, seeds", [(["--seeds", "2"], [0, 1]), (["--seeds", "7,"], [7]),
                                          (["--seeds", "3,1"], [1, 3]), (["--seeds", "4,4"], [4])], ids=str)
def test_seeds(console, tmp_path, flags, seeds):
    code, out, err = console(*tiny.FLAGS, "--relax", "0", "--elcn", "", *flags, "--out", "s", cwd=tmp_path)
    if flags[1] == "4,4" and code: assert one_line(code, err) and not (tmp_path/"s").exists()
    else: assert code == 0 and sorted(pd.read_csv(tmp_path/"s"/"metrics.csv").seed.unique()) == seeds, err


@pytest.mark.parametrize("flags", [["--relax", ""], ["--relax", "", "--elcn", ""], ["--epochs", "0", "--relax", "0"],
                                   ["--batch_size", "999999"], ["--precision", "bf16"],
                                   ["--no-shuffle"], ["--keep_weights"], ["--name", "my digits/2"]], ids=" ".join)
def test_other_studies(console, done, tmp_path, flags):
    code, out, err = console(*tiny.FLAGS, *flags, "--out", "s", cwd=tmp_path, draws=True)
    assert code == 0 and "Traceback" not in err, err
    assert {"summary.csv", "metrics.csv", "figure.png"} <= {p.name for p in (tmp_path/"s").iterdir()}
    if flags[0] in ("--precision", "--no-shuffle"):
        assert (tmp_path/"s"/"metrics.csv").read_bytes() != (done[0]/"metrics.csv").read_bytes()


RATES = "--relaxed_lr 0.1,0.02 --fcn_lr 0.05 --relaxed_epochs 2 --arms annealed,averaged --images 100".split()


def test_rates_arms_and_images(console, tmp_path):
    "With images held out the claims are judged at the rates chosen on them; without, a sentence says what is missing."
    code, out, err = console(*tiny.FLAGS, *RATES, "--seeds", "2", "--validation", "50", "--out", "s", cwd=tmp_path,
                             draws=True)
    assert code == 0 and "Traceback" not in err, err
    table = pd.read_csv(tmp_path/"s"/"metrics.csv")
    rates = table.groupby("network").lr.unique().map(sorted).to_dict()
    assert rates == dict(cnn=[.1], averaged=[.1], fcn=[.05], efcn=[.02, .1], elcn=[.02, .1], annealed=[.02])
    assert {"validation", "test"} < set(table.split) and table[table.network == "efcn"].epoch.max() == 3
    assert {"claims.csv", "summary.csv", "figure.png"} <= {p.name for p in (tmp_path/"s").iterdir()}, out
    code, out, err = console(*tiny.FLAGS, *RATES, "--out", "t", cwd=tmp_path)
    assert code == 0 and "not measured: claims: " in out and not (tmp_path/"t"/"claims.csv").exists(), out + err


def test_no_arms(console, tmp_path):
    "Not even those of the protocol."
    flags = [*tiny.FLAGS, "--relax", "0", "--elcn", "", "--model", "strided", "--relaxed_epochs", "1",
             "--relaxed_lr", ".1", "--fcn_lr", ".1", "--arms", "", "--out", "s"]
    code, out, err = console(*flags, cwd=tmp_path, draws=True)
    assert code == 0 and set(pd.read_csv(tmp_path/"s"/"metrics.csv").network) == {"cnn", "efcn", "fcn"}, err


def test_no_baseline(console, tmp_path):
    "What needs the FCN is not judged, all else is."
    flags = [*tiny.FLAGS, "--relax", "0,1", "--elcn", "", "--fcn_lr", "", "--out", "s"]
    code, out, err = console(*flags, cwd=tmp_path, draws=True)
    assert code == 0 and set(pd.read_csv(tmp_path/"s"/"metrics.csv").network) == {"cnn", "efcn"}, err
    effect = pd.read_csv(tmp_path/"s"/"claims.csv").set_index("claim").effect
    assert effect.str.contains("needs the FCN").sum() == 2 and (tmp_path/"s"/"figure.png").exists()


def test_a_folder_of_images(console, tmp_path):
    for part in ("train", "test"):
        for name, grey in dict(dark=40, light=200).items():
            (tmp_path/"shades"/part/name).mkdir(parents=True)
            Image.new("L", (16, 16), grey).save(tmp_path/"shades"/part/name/"0.png")
    code, out, err = console(*tiny.FLAGS, "--data", "shades", "--model", "small", "--out", "s", cwd=tmp_path)
    assert code == 0 and "2 training and 2 test images" in out, err


def test_another_study_in_the_folder(console, done):
    before = tiny.files(done[0])
    code, out, err = console(*tiny.FLAGS, "--lr", "0.3", "--out", "study", cwd=done[0].parent)
    assert one_line(code, err) and "another study" in err and tiny.files(done[0]) == before


def test_measuring_a_study(console, tmp_path):
    "The tables of all measures, claims that use them, and a second pass that computes nothing again."
    command = [*tiny.FLAGS, "--relax", "1", "--out", "study", "--measure"]
    code, out, err = console(*command, cwd=tmp_path)
    assert code == 0, err
    tables = {"ablation", "profiles", "biases", "templates", "barriers", "paths", "gradients", "curvature"}
    assert {f"{name}.csv" for name in tables} | {"rows.npz"} < {p.name for p in (tmp_path/"study").iterdir()}
    for name in tables: assert len(pd.read_csv(tmp_path/"study"/f"{name}.csv")), name
    claims = pd.read_csv(tmp_path/"study/claims.csv").claim.str[:2].tolist()
    assert "removing them costs" in out
    before = tiny.files(tmp_path/"study")
    assert console(*command, cwd=tmp_path)[0] == 0
    after = tiny.files(tmp_path/"study")
    assert before == after


@pytest.mark.parametrize("wrong, says", [
    ("embed --models vgg", "unknown model"), ("embed --repeat 0", "repeat must be 1 or more"),
    ("embed --batch 0", "batch must be"), ("train --models vgg", "unknown model"), ("train --width 0", "width must be"),
    ("train --images 8", "must fill a batch of 250"), ("train --batch 0", "batch must be 1 or more"),
    ("train --device cuda:99", "there is no device"), ("train --precision tf32 --device cpu", "need a GPU")])
def test_what_cannot_be_timed(capsys, wrong, says):
    with pytest.raises(SystemExit) as end: efcn_bench(wrong.split())
    assert end.value.code.startswith("efcn_bench: ") and says in end.value.code
    assert len(end.value.code.splitlines()) == 1
