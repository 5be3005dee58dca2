"Imports between our notebooks run from lower numbers to higher ones, so that reading order and import order are one."
import ast
import re
from importlib import import_module

import pytest

import keep

BANNED = {"experiments.plots": {"torch", "torchvision"}}  # what a module must not import from others
EVERYWHERE, APART = "service", "studies"  # open to all; do not know each other


def module(path):
    "Name of the module that the notebook makes, without the package in front."
    return ".".join((*path.relative_to(keep.ROOT / "nbs").parts[:-1], path.stem[3:]))


NOTEBOOKS = {module(path): path for path in keep.notebooks() if re.match(r"\d\d_", path.stem)}
NUMBERS = {name: int(path.stem[:2]) for name, path in NOTEBOOKS.items()}
FILES = {name: keep.module_file(f"{keep.PACKAGE}.{name}") for name in NOTEBOOKS}


def edges(source, package):
    "Modules of ours that `source` imports, without the package in front."
    names = {name.removeprefix(f"{keep.PACKAGE}.") for name in keep.own_imports(source, package)}
    return {name for name in names if name in NUMBERS}


def upwards(name, imported):
    "Those of the `imported` modules that the module `name` must not import."
    own, found = name.split(".")[0], set()
    for other in imported - {name}:
        room = other.split(".")[0]
        if NUMBERS[other] >= NUMBERS[name] and room != EVERYWHERE or room == own == APART: found.add(other)
    return found


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
    wrong = [f"{other} ({NUMBERS[other]})" for other in upwards(name, found)]
    assert not wrong, f"{name} ({NUMBERS[name]}) imports {', '.join(wrong)}"


def test_an_upward_import_is_noticed():
    assert upwards("ladder.layers", {"ladder.embedding"}) == {"ladder.embedding"}
    assert upwards("ladder.embedding", {"ladder.layers", "service.files"}) == set()
    assert upwards("studies.topology", {"studies.separation"}) == {"studies.separation"}


def private(source, package):
    "Names with an underscore that `source` imports from our modules, or looks up in a module of ours that it imports."
    tree, modules, found = ast.parse(source), set(), []
    is_private = re.compile("_(?!_)").match
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node, alias in [(node, alias) for node in imports for alias in node.names]:
        line, last = ast.unparse(type(node)(**(vars(node) | dict(names=[alias])))), alias.name.rpartition(".")[2]
        if not keep.own_imports(line, package): continue
        if is_private(last): found.append(line)
        if any(name.rpartition(".")[2] == last for name in NUMBERS): modules.add(alias.asname or alias.name)
    looked_up = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_private(node.attr)]
    return found + [ast.unparse(node) for node in looked_up if ast.unparse(node.value) in modules]


@pytest.mark.parametrize("name", NUMBERS)
def test_no_private_name_of_another_module_is_used(name):
    assert not private(FILES[name].read_text(), f"{keep.PACKAGE}.{name}".rpartition(".")[0])


def test_a_private_import_is_noticed():
    package = f"{keep.PACKAGE}.ladder"
    assert private("from .masks import hold_to_masks, _own", package) == ["from .masks import _own"]
    assert private(f"from {keep.PACKAGE}.ladder import masks\nmasks._own(1)", "") == ["masks._own"]
    assert not private("from .masks import hold_to_masks\nfrom os import _exit\nhold_to_masks.__name__", package)


def test_no_two_modules_have_a_public_name_in_common():
    homes = {}
    for name in NUMBERS:
        for public in getattr(import_module(f"{keep.PACKAGE}.{name}"), "__all__", []):
            homes.setdefault(public, []).append(name)
    twice = {public: found for public, found in homes.items() if len(found) > 1}
    assert not twice


@pytest.mark.parametrize("name", NUMBERS)
def test_imports_are_plain(name):
    nodes = list(ast.walk(ast.parse(FILES[name].read_text())))
    stars = [ast.unparse(node) for node in nodes if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
             and (node.level or node.module.startswith(keep.PACKAGE))]
    assert not stars, "name what is imported from our own modules"
    foreign = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    foreign |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    assert not {name.split(".")[0] for name in foreign} & BANNED.get(name, set())
