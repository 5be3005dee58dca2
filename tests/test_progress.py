"How far a long computation is: bars where somebody looks, lines in a log."
import re
import sys
import time

import pytest

from efcn_nb.service import progress
from efcn_nb.service.progress import progress_bar, tell


@pytest.fixture
def clock(monkeypatch):
    "A clock that goes on by `step` seconds with each item."
    class Clock:
        now, step = 1000., 10.
        def tick(self): self.now += self.step
        def items(self, n):
            for i in range(n):
                yield i
                self.tick()
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(progress.tqdm, "__init__", with_clock(progress.tqdm.__init__, clock))
    return clock


def with_clock(init, clock):
    "tqdm takes its clock from its own module."
    def made(self, *args, **kwargs):
        self._time = lambda: clock.now
        init(self, *args, **kwargs)
        self._time, self.start_t, self.last_print_t = (lambda: clock.now), clock.now, clock.now
    return made


def test_a_log_gets_a_line_every_half_minute(clock, capsys):
    assert [*progress_bar(clock.items(12), 12, "training", show=True)] == [*range(12)]
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and "\r" not in err and len(lines) == 3
    assert lines[0] == "training  33%, 00:30 gone, 01:00 left" and lines[-1].startswith("training  83%, 01:30 gone")


def test_a_bar_that_is_moved_by_hand(clock, capsys):
    with progress_bar(total=8, show=True) as bar:
        for k in range(8):
            bar.set_description_str(f"network {k}")  # which redraws a bar on a terminal
            clock.tick()
            bar.update()
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize("n, step", [(12, 2.), (0, 1.)])
def test_what_is_soon_done_says_nothing(clock, capsys, n, step):
    clock.step = step
    assert len([*progress_bar(clock.items(n), n, show=True)]) == n
    assert capsys.readouterr() == ("", "")


def test_nothing_where_none_is_asked_for(clock, capsys):
    assert [*progress_bar([3, 1], show=False)] == [3, 1] == [*progress_bar([3, 1])], "tests set TQDM_DISABLE"
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert [*progress_bar(range(3), what="reading", show=True)] == [0, 1, 2]
    err = capsys.readouterr().err
    assert "\r" in err and re.search(r"reading 100% .* \d\d:\d\d gone, \d\d:\d\d left", err)


@pytest.mark.parametrize("kernel", [False, True])
def test_a_line_beside_the_results(monkeypatch, capsys, kernel):
    monkeypatch.setattr(progress, "_in_notebook", lambda: kernel)
    tell("split")
    assert capsys.readouterr() == (("split\n", "") if kernel else ("", "split\n"))


@pytest.mark.slow
def test_a_widget_that_leaves_nothing_in_a_saved_notebook():
    for name in "ipywidgets", "ipykernel": pytest.importorskip(name)
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    cell = nbformat.v4.new_code_cell("""
from tqdm.notebook import tqdm_notebook
from efcn_nb.service.progress import progress_bar
bar = progress_bar(range(3), what="reading", show=True)
for i in bar: shown = isinstance(bar, tqdm_notebook) and bar.handle is not None
shown""")
    nbclient.NotebookClient(nbformat.v4.new_notebook(cells=[cell]), kernel_name="python3").execute()
    left, result = [output["data"] for output in cell.outputs]
    assert left == {"text/plain": ""} and result["text/plain"] == "True"
