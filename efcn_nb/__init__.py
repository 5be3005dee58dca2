"A laboratory for the architectural bias of convolutions: embed a CNN in a fully-connected network, relax it, see where it goes."
from importlib import import_module

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
