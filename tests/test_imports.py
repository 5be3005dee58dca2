"Imports between our notebooks run from lower numbers to higher ones, so that reading order and import order are one."
import ast
import re

import pytest

import keep

ROOMS = {keep.PACKAGE: 0, f"{keep.PACKAGE}._modidx": 0}                              # of no notebook
BANNED = {"experiments.plots": {"torch", "torchvision"}}                              # what a module must not import from others
EVERYWHERE, APART = "service", "studies"                                             # open to all; do not know each other


def numbered():
    "Number of each library notebook, by the name of its module."
    library = [path for path in keep.notebooks() if re.match(r"\d\d_", path.stem)]
    return {".".join((*path.relative_to(keep.ROOT / "nbs").parts[:-1], path.stem[3:])): int(path.stem[:2]) for path in library}


NUMBERS = numbered()
FILES = {name: keep.module_file(f"{keep.PACKAGE}.{name}") for name in NUMBERS}
NOTEBOOKS = {".".join((*path.relative_to(keep.ROOT / "nbs").parts[:-1], path.stem[3:])): path
             for path in keep.notebooks() if re.match(r"\d\d_", path.stem)}


def edges(source, package):
    "Modules of ours that `source` imports, without the package in front."
    names = {name.removeprefix(f"{keep.PACKAGE}.") for name in keep.own_imports(source, package)}
    return {name for name in names if name in NUMBERS}


def upwards(name, imported):
    "Those of the `imported` modules that the module `name` must not import."
    room = name.split(".")[0]
    return {other for other in imported - {name} if NUMBERS[other] >= NUMBERS[name] and other.split(".")[0] != EVERYWHERE
            or other.split(".")[0] == room == APART}


def test_every_module_comes_from_a_notebook():
    missing = [name for name, file in FILES.items() if file is None]
    made = {file for file in (keep.ROOT / keep.PACKAGE).rglob("*.py") if not file.name.startswith("_")}
    assert not missing and made == {*FILES.values()}


def test_no_number_stands_twice():
    assert len({*NUMBERS.values()}) == len(NUMBERS)


@pytest.mark.parametrize("name", NUMBERS)
def test_imports_come_from_lower_numbers(name):
    package = f"{keep.PACKAGE}.{name}".rpartition(".")[0]
    cells = [cell.source for cell in keep.code_cells(keep.read_nb(NOTEBOOKS[name]))]
    python = keep.TransformerManager().transform_cell
    found = edges(FILES[name].read_text(), package).union(*(edges(python(cell), keep.PACKAGE) for cell in cells))
    assert not upwards(name, found), f"{name} ({NUMBERS[name]}) imports {', '.join(f'{o} ({NUMBERS[o]})' for o in upwards(name, found))}"


def test_an_upward_import_is_noticed():
    assert upwards("ladder.layers", {"ladder.embedding"}) and not upwards("ladder.embedding", {"ladder.layers", "service.files"})
    assert upwards("studies.topology", {"studies.separation"}) and upwards("service.files", {"experiments.runs"}) == set()


@pytest.mark.parametrize("name", NUMBERS)
def test_imports_are_plain(name):
    nodes = list(ast.walk(ast.parse(FILES[name].read_text())))
    stars = [ast.unparse(node) for node in nodes if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
             and (node.level or node.module.startswith(keep.PACKAGE))]
    assert not stars, "name what is imported from our own modules"
    foreign = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    foreign |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    assert not {name.split(".")[0] for name in foreign} & BANNED.get(name, set())
