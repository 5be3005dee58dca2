"The notebooks are clean and fresh, and run."
import contextlib, io, json, os, random, re

import numpy as np
import pytest
from execnb.nbio import nb2str, read_nb
from nbdev.config import get_config
from nbdev.test import test_nb as nbdev_test_nb

import keep

NOTEBOOKS = keep.notebooks()
NAMES = [str(path.relative_to(keep.ROOT / "nbs")) for path in NOTEBOOKS]
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
PROSE = json.loads((keep.ROOT / "tests/settings_in_prose.json").read_text(encoding="utf-8"))  # test_prose runs these
RUN = {name: path for name, path in zip(NAMES, NOTEBOOKS) if path.stem not in PROSE}


def outputs(path): return [output for cell in keep.code_cells(read_nb(path)) for output in cell.outputs]


@every_notebook
def test_clean(path):
    clean = path.read_text(encoding="utf-8") == nb2str(keep.cleaned(read_nb(path)))
    assert clean, f"run python tests/keep.py {path.stem}, or nbdev_clean"


@every_notebook
def test_fresh(path):
    assert keep.is_fresh(path), ("its code, its outputs or a module it imports have changed: "
                                 f"run python tests/keep.py {path.stem}")


@every_notebook
def test_outputs_are_presentable(path):
    found = outputs(path)
    assert not [output for output in found if output.output_type == "error"]
    kinds = {kind for output in found for kind in output.get("data", {})}
    assert not [kind for kind in kinds if "widget" in kind]
    assert not [output for output in found if output.get("name") == "stderr"], "a warning or a progress bar"
    text = json.dumps(found) + "".join(cell.source for cell in read_nb(path).cells)
    ours = r"(?<![\w./:])/(?:home|root|work|Users|tmp|usr|var|opt|mnt)/[\w./-]*|[A-Z]:\\\\\w+"
    assert not re.findall(ours, text), "paths of one machine"


@every_notebook
def test_small(path):
    limit = 1000 if keep.is_gallery(path) else 250 if path.stem == "index" else 150  # the index has README's figures
    assert path.stat().st_size <= limit * 1000, f"over {limit} kB"


GALLERY = [path for path in NOTEBOOKS if keep.is_gallery(path)]


@pytest.mark.parametrize("path", GALLERY, ids=[path.stem for path in GALLERY])
def test_gallery_says_how_long_it_runs_and_where_it_writes(path):
    nb = read_nb(path)
    top, code = nb.cells[0].source, "".join(cell.source for cell in keep.code_cells(nb))
    assert keep.WAIT.search(top)[0] in {*keep.WAITS, keep.wait(float("inf"))}
    trains = re.search(r"\bStudy\(|\bsweep\(|_study\(|_grid\(", code)
    assert ("`EFCN_NB_RUNS`" in top) == bool(trains) and ("writes nothing" in top) != bool(trains)


@pytest.mark.parametrize("path", RUN.values(), ids=RUN)
def test_run(path, project, tmp_path):
    "From top to bottom, in a folder and a process of its own; the gallery at a small size."
    alone = keep.set_apart(project / path.relative_to(keep.ROOT), tmp_path)
    passed, errors = keep.in_child(run_notebook, alone, project, timeout=keep.HANGS)
    assert passed, errors


def run_notebook(path, root, strict=True):
    keep.as_the_gate_runs(path)
    if not strict: del os.environ["EFCN_NB_STRICT"]
    os.chdir(keep.ROOT)
    random.seed(0), np.random.seed(0)  # as PyTorch's generator, which begins alike in every process
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        passed, _ = nbdev_test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=root)
    return passed, errors.getvalue()


def test_the_gate_leaves_a_notebook_nothing_but_itself(tmp_path):
    path = keep.set_apart(next(path for path in NOTEBOOKS if path.stem == "needle"), tmp_path)
    assert [file.name for file in path.parent.iterdir()] == ["needle.ipynb"]


# What a reader may change in the cell with the settings: fewer seeds, other relax times
PLAYS = [("seeds=2", "seeds=1"), ("seeds=(0, 1)", "seeds=(0,)"), ("seeds=[0, 1]", "seeds=[0]"),
         ("relax_times=[0, 1], elcn_times=[1]", "relax_times=[1]"), ("relax_times=[0, 1]", "relax_times=[1]"),
         ("range(2 if quick", "range(1 if quick"), ("(range(2), ", "(range(1), "), ("findings(quick", "findings(False")]
PLAYED = [path for path in GALLERY if "`EFCN_NB_RUNS`" in read_nb(path).cells[0].source]


def played(text):
    for was, now in PLAYS: text = text.replace(was, now)
    return text


@pytest.mark.slow
@pytest.mark.parametrize("path", PLAYED, ids=[path.stem for path in PLAYED])
def test_a_reader_who_plays_gets_figures_and_notes(path, project, tmp_path):
    alone = tmp_path / path.name
    alone.write_text(played(path.read_text(encoding="utf-8")), encoding="utf-8")
    passed, errors = keep.in_child(run_notebook, alone, project, False, timeout=keep.HANGS)
    assert passed, errors


@pytest.fixture(scope="module")
def beside(tmp_path_factory): return tmp_path_factory.mktemp("beside")


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem not in keep.QUOTES], ids=lambda p: p.stem)
def test_runs_with_an_installed_package_beside_other_notebooks_and_again(path, site, beside):
    alone = keep.set_apart(path, beside)
    for _ in range(2):
        passed, errors = keep.in_child(run_notebook, alone, site, timeout=keep.HANGS)
        assert passed, errors
