"The modules in the repository are what the notebooks export."
import keep


def test_modules_equal_export(tmp_path):
    root = keep.working_copy(tmp_path)
    for file in (root / keep.PACKAGE).rglob("*.py"):
        if file.parent.name != keep.PACKAGE or file.name != "__init__.py": file.unlink()
    keep.export(root)
    text = lambda folder: {file.relative_to(folder): file.read_text() for file in (folder / keep.PACKAGE).rglob("*.py")}
    exported, committed = text(root), text(keep.ROOT)
    wrong = [str(file) for file in exported.keys() | committed.keys() if exported.get(file) != committed.get(file)]
    assert not wrong, (f"not what the notebooks export: {sorted(wrong)}; "
                       "run python tests/keep.py --export (nbdev_export alone leaves out the documentation of "
                       "parameters), and remove modules without a notebook")
