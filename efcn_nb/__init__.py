"A laboratory for the architectural bias of convolutions: embed a CNN in a fully-connected network, relax it, see where it goes."
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec

__version__ = "0.1.0"

_NAMES = {  # those that people come for, by the modules that are imported when they are asked for; as in __init__.pyi
    "ladder.embedding": "embed convert nearest_cnn reinitialize",
    "ladder.folding": "merge_batchnorm",
    "ladder.inspection": "conv_geometries",
    "ladder.layers": "FullyConnected LocallyConnected",
    "ladder.costs": "embedding_costs",
    "materials.data": "Data Dataset load_data load_samples",
    "materials.models": "make_model",
    "training.fused": "FusedSGD",
    "training.loop": "train evaluate",
    "instruments.subspaces": "shares dimensions project ablate ablation",
    "instruments.paths": "barrier_matrix",
    "instruments.curvature": "loss_slice",
    "experiments.effects": "show_claims",
    "experiments.relaxation": "relax Study read_protocol",
    "experiments.claims": "summary claims claim_intervals gains choose_rates final_values",
    "experiments.measures": "measured",
    "experiments.plots":
        "plot_study plot_curves plot_curve_panels plot_relax_times plot_gains plot_deviation "
        "plot_accuracy_deviation plot_claims plot_rows plot_ablation plot_profile plot_parts "
        "plot_sharpness plot_matrix plot_paths plot_slice set_style"}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = [*_HOMES]


def __getattr__(name):
    if name not in _HOMES: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    own = {name for name in globals() if name.startswith("__") or f"{__name__}.{name}" in sys.modules}
    return sorted({*own, *__all__})


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
