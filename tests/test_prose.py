"Numbers of results in README and in the gallery are filled in from tables; the text around has those of settings only."
import ast, json, os, random, re, sys
from pathlib import Path

import numpy as np
import pytest
from execnb.nbio import read_nb
from execnb.shell import CaptureShell

import keep

SETTINGS = Path(__file__).with_name("settings_in_prose.json")
NOTEBOOKS = [path for path in keep.notebooks() if path.stem in json.loads(SETTINGS.read_text(encoding="utf-8"))]
in_prose = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def is_prose(node): return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Markdown"


def typed(text):
    "What is typed between the braces of a string, {} for what is filled in."
    if isinstance(text, ast.Constant): return str(text.value)
    if not isinstance(text, ast.JoinedStr): return ""
    return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in text.values)


def prose(nb):
    "The words of a notebook: its text cells, and what its code cells type into `Markdown`."
    texts = [cell.source for cell in nb.cells if cell.cell_type == "markdown"]
    for cell in keep.code_cells(nb):
        if "Markdown(" not in cell.source: continue
        texts += [typed(node.args[0]) for node in ast.walk(ast.parse(cell.source)) if is_prose(node)]
    return "\n\n".join(texts)


def numbers(text):
    "Each number in a text with the word or % behind it, else the word before; not in code, addresses, other words."
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|<[^>]*>", " ", text, flags=re.S)
    found = re.finditer(r"(?<![\w.-])(?<!\d,)([+-]?(?:\d[\d,]*)?\.?\d+)(?![\w-])(?=\s*(%|\w*))", text)
    def before(match): return "".join(re.findall(r"\S+", text[:match.start()])[-1:])
    return sorted({f"{match[1]} {match[2]}" if match[2] else f"{before(match)} {match[1]}" for match in found})


def filled_in(path, root):
    "The Markdown of each code cell, by its id, when the notebook runs at a small size."
    keep.as_the_gate_runs(path)
    sys.path.insert(0, str(root))
    os.chdir(path.parent)
    random.seed(0)
    np.random.seed(0)
    shell, found = CaptureShell(path), {}
    for cell in keep.code_cells(read_nb(path)):
        if not keep.is_run(cell): continue
        cell.outputs = []
        shell.cell(cell)
        if shell.exc: raise shell.exc
        found[cell.id] = markdown(cell)
    return found


def markdown(cell):
    return "\n".join(keep.joined(output["data"]["text/markdown"]) for output in cell.get("outputs", [])
                     if "text/markdown" in output.get("data", {}))


@in_prose
def test_typed_numbers_are_settings(path):
    "A number that is not on the list is filled in from a table if it is a result, and listed if it is a setting."
    found, listed = set(numbers(prose(read_nb(path)))), set(json.loads(SETTINGS.read_text(encoding="utf-8"))[path.stem])
    assert not found - listed, f"typed in {path.name}: fill in results, list settings in {SETTINGS.name}"
    assert not listed - found, f"listed in {SETTINGS.name}, but no longer in {path.name}"


@in_prose
def test_sentences_have_their_numbers(path):
    "Each cell that fills in numbers has been run."
    cells = [cell for cell in keep.code_cells(read_nb(path)) if re.search(r'\bMarkdown\(f"', cell.source)]
    assert cells
    assert not [cell.source[:80] for cell in cells if not markdown(cell)], f"run python tests/keep.py {path.stem}"


@in_prose
def test_run(path, project, tmp_path):
    "As in test_notebooks; and what the text says of a record is what the record holds. (Of a run: keep.py --compare.)"
    alone = keep.set_apart(project / path.relative_to(keep.ROOT), tmp_path)
    now = keep.in_child(filled_in, alone, project, timeout=keep.HANGS)
    said = {cell.id: markdown(cell) for cell in keep.code_cells(read_nb(path))}
    compared = [cell for cell in now if now[cell]]
    assert compared
    for cell in compared: assert said[cell] == now[cell], f"run python tests/keep.py {path.stem}"


@pytest.mark.parametrize("text, found", [
    ("It is 1.89 ± 0.06 times, -7.7 points.", ["-7.7 points", "0.06 times", "is 1.89"]),
    ("batch 128: 128,000 samples at .02. The", ["128,000 samples", "at .02", "batch 128"]),
    ("95 % of $n = 64$", ["95 %", "= 64"]), ("from {} to {} %", []),
    ("`lr=0.1`, [see](59_bench.ipynb), H200, CIFAR-10, conv1", [])])
def test_which_numbers_are_typed(text, found): assert numbers(text) == found
