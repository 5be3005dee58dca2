"The tool that the other tests rely on."
import json, time

import pytest
from execnb.nbio import dict2nb, mk_cell, new_nb, read_nb, write_nb

import keep


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
    styled = lambda value: [dict(output_type="display_data", data={"text/html": pd.DataFrame(dict(a=[value])).style.to_html()})]
    assert styled(1) != styled(1) and keep.output_differences(styled(1), styled(1)) == [] and len(keep.output_differences(styled(1), styled(2))) == 1
