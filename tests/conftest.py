"""The gate runs in this order: what is cheap and explains later failures comes first. Each test runs as though it
were alone: it draws from a seed of its own, and what it changes in the process is put back."""
import os, random, sys, zlib

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, register_random, settings

try: import keep  # refuses fastcore 2 with a sentence that says what to do
except SystemExit as error: raise pytest.UsageError(str(error)) from None

GATE = ["test_keep", "test_export", "test_names", "test_imports", "test_notebooks", "test_readme", "test_package",
        "test_docs"]

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes that share the cores
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

os.environ["TQDM_DISABLE"] = "1"  # before the first child process starts
os.chdir(keep.ROOT)  # nbdev reads the settings.ini that it finds from here


def pytest_addoption(parser):
    group = parser.getgroup("independence", "what no result may depend on")
    group.addoption("--order", metavar="WORD",
                    help="another order of the files within a stage of the gate, and of the tests within a file")
    group.addoption("--draw", metavar="WORD", default="",
                    help="other random numbers wherever a test leaves the seed open")


# Order

def number(*words):
    "A number that the words determine, in every process and on every machine."
    return zlib.crc32("\0".join(map(str, words)).encode())


def pytest_collection_modifyitems(config, items):
    order = config.getoption("order")
    def place(item):
        name = item.path.stem
        of_gate = (GATE.index(name), item.name.startswith("test_run")) if name in GATE else None
        stage = of_gate or (GATE.index("test_notebooks"), False)
        return stage if order is None else (*stage, number(order, name), number(order, name, item.name))
    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "With -n, a process takes a whole file at a time, or one notebook to run, in the order of the gate."
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid): return nodeid if "::test_run[" in nodeid else nodeid.split("::")[0]

    config.option.loadscopereorder = False
    return ByFile(config, log)


# Seeds

class Torch:
    "PyTorch's generator as Hypothesis wants it: so what an example draws does not depend on the examples before it."
    seed = staticmethod(torch.default_generator.manual_seed)
    getstate, setstate = staticmethod(torch.get_rng_state), staticmethod(torch.set_rng_state)


GENERATORS = [(random.seed, random.getstate, random.setstate),
              (np.random.seed, np.random.get_state, np.random.set_state),
              (torch.manual_seed, torch.get_rng_state, torch.set_rng_state)]
TORCH = Torch()
register_random(TORCH)


def seed(config, *words):
    for generator, _, _ in GENERATORS: generator(number(config.getoption("draw"), *words))


def pytest_configure(config):
    "Hypothesis tries the same examples everywhere, on machines of any speed; others with its --hypothesis-seed."
    config.addinivalue_line("markers", "slow: starts a browser or JupyterLab; left out unless -m asks for it")
    fixed = config.getoption("--hypothesis-seed", None) is None
    settings.register_profile("alone", derandomize=fixed, database=None, deadline=None,
                              suppress_health_check=[HealthCheck.too_slow])


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    "A module that draws while it is imported."
    if isinstance(collector, pytest.Module):
        settings.load_profile("alone")  # a module may have loaded another
        seed(collector.config, collector.path.name)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    "A fixture that several tests share draws the same, whichever of them comes first."
    if fixturedef.scope == "function": return (yield)
    states = [state() for _, state, _ in GENERATORS]
    seed(request.config, fixturedef.baseid.rpartition("/")[2], fixturedef.argname, getattr(request, "param_index", 0))
    try: return (yield)
    finally:
        for (_, _, restore), state in zip(GENERATORS, states): restore(state)


# What a test may leave behind

def deterministic():
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def set_deterministic(state): torch.use_deterministic_algorithms(state[0], warn_only=state[1])


def environment(): return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


def set_environment(before):
    for name in environment().keys() - before.keys(): del os.environ[name]
    os.environ.update(before)


def style(): return {name: value for name, value in dict.items(matplotlib.rcParams) if not name.startswith("backend")}


def set_style(before): dict.update(matplotlib.rcParams, before)


def figures(): return sys.modules["matplotlib.pyplot"].get_fignums() if "matplotlib.pyplot" in sys.modules else []


def set_figures(before):
    for figure in {*figures()} - {*before}: sys.modules["matplotlib.pyplot"].close(figure)


SWITCHES = [
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, torch.set_default_device),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (deterministic, set_deterministic),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (np.geterr, lambda before: np.seterr(**before)),
    (os.getcwd, os.chdir),
    (environment, set_environment),
    (lambda: [*sys.path], lambda before: sys.path.__setitem__(slice(None), before)),
    (style, set_style),
    (figures, set_figures)]


@pytest.fixture(autouse=True)
def alone(request):
    "Each test draws from a seed that its name determines, and its switches are put back."
    seed(request.config, request.node.path.name, request.node.name)
    before = [look() for look, _ in SWITCHES]
    yield
    for (look, put), state in zip(SWITCHES, before):
        if look() != state: put(state)


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    "A copy of the project in which tests may write."
    return keep.working_copy(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def one_thread():
    "For networks that are too small to be worth sharing out."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
