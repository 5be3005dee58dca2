"""The gate runs in this order: what is cheap and explains later failures comes first."""
import os

import pytest
import torch

try: import keep  # refuses fastcore 2 with a sentence that says what to do
except SystemExit as error: raise pytest.UsageError(str(error)) from None

GATE = ["test_keep", "test_export", "test_names", "test_imports", "test_notebooks", "test_readme", "test_package", "test_docs"]

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes that share the cores
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

os.environ["TQDM_DISABLE"] = "1"  # before the first child process starts
os.chdir(keep.ROOT)  # nbdev reads the settings.ini that it finds from here


def pytest_collection_modifyitems(items):
    def place(item):
        name = item.path.stem
        return (GATE.index(name), item.name.startswith("test_run")) if name in GATE else (GATE.index("test_notebooks"), False)
    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "With -n, a process takes a whole file at a time, or one notebook to run, in the order of the gate."
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid): return nodeid if "::test_run[" in nodeid else nodeid.split("::")[0]

    config.option.loadscopereorder = False
    return ByFile(config, log)


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
