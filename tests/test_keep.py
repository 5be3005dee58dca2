"The tool that the other tests rely on, and that each of them runs as though alone."
import json, os, random, time, types, zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from execnb.nbio import dict2nb, mk_cell, new_nb, read_nb, write_nb
from matplotlib import pyplot as plt

import conftest, keep


@pytest.fixture
def root(tmp_path):
    "A project of two modules, one importing the other, and a notebook that imports the latter."
    package = tmp_path / keep.PACKAGE
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "low.py").write_text("# a comment\none = 1\n")
    (package / "high.py").write_text("from .low import one\n")
    (tmp_path / "settings.ini").write_text((keep.ROOT / "settings.ini").read_text())
    (tmp_path / "nbs").mkdir()
    notebook(tmp_path, "from efcn_nb.high import one", "one + 1")
    return tmp_path


def notebook(root, *sources):
    write_nb(new_nb([mk_cell("# title", "markdown"), *map(mk_cell, sources)]), root / "nbs/00_a.ipynb")


def execute(root): return keep.in_child(keep.execute, root / "nbs/00_a.ipynb", root, timeout=keep.HANGS)


def test_executed_notebook_is_fresh_and_clean(root):
    text = execute(root)
    nb = dict2nb(json.loads(text))
    assert nb.cells[2].outputs[0]["data"]["text/plain"] == ["2"]
    assert nb.metadata[keep.STAMP] == keep.stamp(nb, root)
    assert nb.metadata[keep.STAMP] == keep.stamp(keep.cleaned(nb), root)


def test_stamp_covers_code_outputs_and_modules(root):
    fresh = dict2nb(json.loads(execute(root)))
    old = keep.stamp(fresh, root)
    fresh.cells[0].source = "# another title"
    (root / keep.PACKAGE / "low.py").write_text("# another comment\none = 1\n")
    assert keep.stamp(fresh, root) == old
    (root / keep.PACKAGE / "low.py").write_text("one = 2\n")
    assert keep.stamp(fresh, root) != old
    (root / keep.PACKAGE / "low.py").write_text("one = 1\n")
    for change in (lambda cell: cell.update(source="one + 2"), lambda cell: cell.update(outputs=[])):
        nb = dict2nb(json.loads(keep.nb2str(fresh)))
        change(nb.cells[2])
        assert keep.stamp(nb, root) != old


@pytest.mark.parametrize("seconds, words", [
    (1, "a few seconds"), (20, "about twenty seconds"), (100, "about two minutes"), (660, "about eleven minutes"),
    (5000, "more than a quarter of an hour")])
def test_times_are_told_in_coarse_words(seconds, words): assert keep.wait(seconds) == words


@pytest.mark.parametrize("first, words", [(True, "about ten seconds"), (False, "about two minutes")])
def test_only_a_first_run_shortens_the_time_that_a_notebook_says(first, words):
    nb = new_nb([mk_cell("# title\n\n*Runs for about two minutes on two cores, and writes nothing.*", "markdown")])
    keep.tell_wait(nb, 10, first)
    assert nb.cells[0].source.endswith(f"*Runs for {words} on two cores, and writes nothing.*")
    keep.tell_wait(nb, 400, first)
    assert "about seven minutes" in nb.cells[0].source


def test_failing_cell_is_reported(root):
    notebook(root, "1", "1 / 0")
    with pytest.raises(RuntimeError, match=r"(?s)00_a.ipynb, cell 2:.*1 / 0.*ZeroDivisionError"): execute(root)


def test_marked_cells_keep_their_outputs(root):
    notebook(root, "#| cuda\n1 / 0", "#| eval: false\n1 / 0", "#| slow\n2")
    nb = read_nb(root / "nbs/00_a.ipynb")
    nb.cells[1].outputs = [dict(name="stdout", output_type="stream", text=["kept\n"])]
    write_nb(nb, root / "nbs/00_a.ipynb")
    cells = dict2nb(json.loads(execute(root))).cells
    assert [bool(cell.outputs) for cell in cells[1:]] == [True, False, True]


def test_hanging_child_is_stopped():
    with pytest.raises(TimeoutError): keep.in_child(time.sleep, 60, timeout=.1)


def test_comparison_says_what_differs():
    text = lambda *lines: [dict(name="stdout", output_type="stream", text=list(lines))]
    image = lambda data: [dict(output_type="display_data", data={"image/png": data})]
    assert keep.output_differences(text("a\n", "b"), text("a\nb")) == []
    assert keep.output_differences(text("a"), text("b")) == ["text, saved: a now: b"]
    assert keep.output_differences(image("a"), image("b")) == ["another image/png"]
    assert keep.output_differences(text("a"), []) == ["1 outputs saved, 0 now"]


def test_names_that_pandas_draws_are_no_difference():
    import pandas as pd
    def styled(value):
        html = pd.DataFrame(dict(a=[value])).style.to_html()
        return [dict(output_type="display_data", data={"text/html": html})]
    assert styled(1) != styled(1) and keep.output_differences(styled(1), styled(1)) == []
    assert len(keep.output_differences(styled(1), styled(2))) == 1


# Each test as though alone

def draws(): return random.random(), np.random.rand(), torch.rand(()).item()


def expected(config, *words):
    "The same draws from generators of our own."
    seed = zlib.crc32("\0".join([config.getoption("draw"), *words]).encode())
    generator = torch.Generator().manual_seed(seed)
    return random.Random(seed).random(), np.random.RandomState(seed).rand(), torch.rand((), generator=generator).item()


@pytest.fixture(scope="module")
def shared(): return draws()


@pytest.mark.parametrize("turn", range(2))
def test_draws_are_those_of_the_name(request, turn, shared):
    assert draws() == expected(request.config, "test_keep.py", f"test_draws_are_those_of_the_name[{turn}]")
    assert shared == expected(request.config, "test_keep.py", "shared", "0"), "whichever test asks for it first"


def spoil():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True), torch.set_float32_matmul_precision("medium"), np.seterr(all="raise")
    os.environ["EFCN_NB_LEFT_BEHIND"], os.environ["TQDM_DISABLE"] = "1", "0"
    plt.rcParams["lines.linewidth"] = 7
    plt.figure()
    os.chdir("/")


CLEAN = [look() for look, _ in conftest.SWITCHES]


@pytest.mark.parametrize("turn", range(2))
def test_nothing_is_left_behind(turn):
    "Of two tests that spoil the process, neither finds what the other did."
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert not plt.get_fignums() and Path.cwd() == keep.ROOT and plt.rcParams["lines.linewidth"] != 7
    assert "EFCN_NB_LEFT_BEHIND" not in os.environ and os.environ["TQDM_DISABLE"] == "1"
    spoil()
    for (look, put), before in zip(conftest.SWITCHES, CLEAN):
        if look() != before: put(before)
    assert [look() for look, _ in conftest.SWITCHES] == CLEAN
    spoil()


@pytest.mark.parametrize("word", [None, "a", "b"])
def test_orders(word):
    "Within a stage of the gate, file by file; the same word, the same order."
    files = ("test_a", "test_b", "test_c", "test_docs", "test_keep")
    names = [*((file, f"test_{k}") for file in files for k in range(6)), ("test_notebooks", "test_run[x]")]
    config = types.SimpleNamespace(getoption=lambda name: dict(order=word)[name])
    def ordered(names):
        items = [types.SimpleNamespace(path=Path(f"{file}.py"), name=name) for file, name in names]
        conftest.pytest_collection_modifyitems(config, items)
        return [(item.path.stem, item.name) for item in items]
    found = ordered(names)
    files = [file for k, (file, _) in enumerate(found) if not k or found[k-1][0] != file]
    in_order = ("test_keep", "test_a", "test_b", "test_c", "test_notebooks", "test_docs")
    assert sorted(found) == sorted(names) and (files[0], *sorted(files[1:4]), *files[4:]) == in_order
    assert (found[6:24] == names[:18]) == (word is None) == (found != ordered(names[::-1]))
