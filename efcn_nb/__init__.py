"A laboratory for the architectural bias of convolutions: embed a CNN in a fully-connected network, relax it, see where it goes."
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec

__version__ = "0.1.0"

_HOMES = {  # the names that people come for, and the modules that are imported when they are asked for
    "embed": "ladder.embedding", "convert": "ladder.embedding", "nearest_cnn": "ladder.embedding",
    "reinitialize": "ladder.embedding", "load_data": "materials.data", "make_model": "materials.models",
    "FusedSGD": "training.fused", "train": "training.loop", "shares": "instruments.subspaces",
    "relax": "experiments.relaxation", "Study": "experiments.relaxation",
    "claims": "experiments.claims", "summary": "experiments.claims", "plot_study": "experiments.plots"}
__all__ = [*_HOMES]


def __getattr__(name):
    if name not in _HOMES: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__(): return sorted({*globals(), *__all__})


_MOVED = {  # modules of version 0.0.1, and where their names are now
    "geometry": "ladder.geometry", "layers": "ladder.layers", "parametrizations": "ladder.masks ladder.tensor_formats",
    "embedding": "ladder.embedding ladder.folding ladder.inspection ladder.matrices ladder.proof service.memory",
    "data": "materials.data", "controls": "materials.controls", "models": "materials.models", "fused": "training.fused",
    "sharding": "training.sharding", "subspaces": "instruments.subspaces", "paths": "instruments.paths",
    "curvature": "instruments.curvature", "infinite_width": "instruments.infinite_width",
    "runs": "experiments.runs experiments.sweeps service.files service.tables", "effects": "experiments.effects",
    "relaxation": "experiments.relaxation experiments.claims experiments.acceptance", "plots": "experiments.plots",
    "measures": "experiments.measures", "bench": "experiments.bench service.timing"}


class _Moved:
    "Imports a module of 0.0.1 by its old name: its names are looked up where they are now."
    @staticmethod
    def find_spec(name, path=None, target=None):
        package, _, old = name.rpartition(".")
        return ModuleSpec(name, _Moved) if package == __name__ and old in _MOVED else None

    @staticmethod
    def create_module(spec): return None

    @staticmethod
    def exec_module(module):
        homes = _MOVED[module.__name__.rpartition(".")[2]].split()
        def look_up(name):
            for home in homes:
                found = vars(import_module(f"{__name__}.{home}"))
                for known in (name, f"_{name}"):
                    if known in found and not name.startswith("_"): return found[known]
            raise AttributeError(f"{module.__name__} has no {name}; since 0.1.0 its names are in {', '.join(homes)}")
        module.__getattr__ = look_up


sys.meta_path.append(_Moved)
