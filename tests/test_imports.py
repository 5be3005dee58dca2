"Imports between our modules run downwards only."
import ast

import pytest

import keep

ALLOWED = {
    "geometry": set(),
    "layers": {"geometry"},
    "fused": {"layers"},
    "sharding": {"layers"},
    "parametrizations": set(),
    "embedding": {"geometry", "layers"},
    "data": set(),
    "models": set(),
    "training": {"fused"},
    "runs": set(),
    "effects": set(),
    "controls": {"data"},
    "relaxation": {"effects", "data", "models", "fused", "training", "runs", "embedding", "subspaces"},
    "bench": {"models", "layers", "embedding", "fused", "data", "training"},
    "cli": {"bench", "measures", "relaxation", "plots", "data", "models", "training", "runs"},
    "subspaces": {"geometry", "layers", "embedding", "training"},
    "paths": {"embedding", "layers", "geometry", "training"},
    "curvature": {"layers", "subspaces", "training"},
    "measures": {"data", "embedding", "relaxation", "subspaces", "paths", "curvature", "runs", "training"},
    "infinite_width": {"controls", "geometry", "layers", "embedding"},
    "studies.pruning": {"controls", "effects", "embedding", "layers", "models", "parametrizations", "runs", "training"},
    "studies.distillation": {"data", "effects", "embedding", "models", "runs", "training"},
    "studies.topology": {"bench", "data", "effects", "embedding", "layers", "parametrizations", "runs", "training"},
    "studies.low_rank": {"controls", "data", "effects", "models", "parametrizations", "runs", "training"},
    "studies.separation": {"data", "effects", "embedding", "models", "subspaces", "training"},
    "plots": set(),
}
FOREIGN = {"plots": {"torch", "torchvision"}}  # what a module must not import from others

PACKAGE = keep.ROOT / keep.PACKAGE
MODULES = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file
           for file in sorted(PACKAGE.rglob("*.py")) if not file.name.startswith("_")}


def test_every_module_has_its_edges():
    assert MODULES.keys() <= ALLOWED.keys(), f"say in tests/test_imports.py what these may import: {MODULES.keys() - ALLOWED.keys()}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module):
    package = f"{keep.PACKAGE}.{module}".rpartition(".")[0]
    names = keep.own_imports(MODULES[module].read_text(), package)
    edges = {name.removeprefix(f"{keep.PACKAGE}.") for name in names if keep.module_file(name)} - {keep.PACKAGE}
    assert edges <= ALLOWED.get(module, set()), f"{module} imports {edges - ALLOWED[module]}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_plain(module):
    nodes = list(ast.walk(ast.parse(MODULES[module].read_text())))
    stars = [ast.unparse(node) for node in nodes if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
             and (node.level or node.module.startswith(keep.PACKAGE))]
    assert not stars, "name what is imported from our own modules"
    foreign = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    foreign |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    assert not {name.split(".")[0] for name in foreign} & FOREIGN.get(module, set())
