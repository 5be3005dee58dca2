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


@pytest.mark.parametrize("path", RUN.values(), ids=RUN)
def test_run(path, project, tmp_path):
    """From top to bottom, alone in a folder of its own, in a process of its own;
    the gallery at a small size."""
    alone = keep.set_apart(project / path.relative_to(keep.ROOT), tmp_path)
    passed, errors = keep.in_child(run_notebook, alone, project, timeout=keep.HANGS)
    assert passed, errors


def run_notebook(path, root):
    keep.as_the_gate_runs()
    os.chdir(root)
    random.seed(0), np.random.seed(0)  # as PyTorch's generator, which begins alike in every process
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        passed, _ = nbdev_test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=root)
    return passed, errors.getvalue()


def test_the_gate_leaves_a_notebook_nothing_but_itself(tmp_path):
    path = keep.set_apart(next(path for path in NOTEBOOKS if path.stem == "needle"), tmp_path)
    assert [file.name for file in path.parent.iterdir()] == ["needle.ipynb"]
