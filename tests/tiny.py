"""The smallest studies that have every part, and a console in which commands start fast: for the tests of runs,
relaxation and cli; images for those of controls and pruning."""
import functools
import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from efcn_nb.materials.data import Data, Dataset, load_data
from efcn_nb.experiments.relaxation import Study

SETTINGS = dict(model="small", width=2, epochs=2, batch_size=40, seeds=1, relax_times=[0, 1, 2], elcn_times=[1],
                device="cpu")
# as many parts, from the command line
FLAGS = "--width 2 --epochs 1 --batch_size 500 --seeds 1 --relax 0,1 --elcn 0 --device cpu".split()


@functools.cache
def digits(): return Data(*(replace(part, x=part.x[:100], y=part.y[:100]) for part in load_data("digits")))


def __getattr__(name):
    "`DATA` is loaded when it is asked for: scikit-learn takes long, and workers get their data otherwise."
    if name == "DATA": return digits()
    raise AttributeError(name)


def study(out, **changed):
    data = changed.pop("data") if "data" in changed else digits()
    return Study(data, **(SETTINGS | dict(out=out) | changed))


def smooth_images(n=90, shape=(2, 8, 8), seed=0, classes=3):
    "Noise that is smooth, with labels that show in its mean."
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(n) % classes
    shown = .3*y.view(-1, 1, 1, 1)*torch.linspace(-1, 1, shape[2])
    x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="circular"), 3, 1) + shown
    return Dataset(x, y, [*map(str, range(classes))], torch.zeros(shape[0]), torch.ones(shape[0]), "smooth noise")


def files(folder):
    "Content of every file under `folder`, by path."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


class Deadly(nn.Module):
    "Does nothing, but kills a process that is not `parent` in its tenth call, once: then the file `marker` is there."
    def __init__(self, marker, parent):
        super().__init__()
        self.marker, self.parent, self.calls = Path(marker), parent, 0

    def forward(self, x):
        self.calls += self.training
        if self.calls == 10 and os.getpid() != self.parent and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return x


def deadly(shape, classes, marker, parent):
    "A small CNN with dropout, and with `Deadly` in it."
    return nn.Sequential(nn.Conv2d(shape[0], 2, 5, stride=3), nn.ReLU(), nn.Dropout(.3), Deadly(marker, parent),
                         nn.Flatten(), nn.Linear(32, classes))


SERVER = r"""
import gc, json, os, resource, signal, sys, threading, traceback
from pathlib import Path
from matplotlib.figure import Figure
import torch, torch._dynamo, torchvision, scipy.special, sklearn.datasets  # all that a command imports when it needs it
import efcn_nb.experiments.bench, efcn_nb.experiments.claims, efcn_nb.experiments.measures, efcn_nb.experiments.plots
import efcn_nb.experiments.relaxation, efcn_nb.experiments.runs, efcn_nb.service.files
from efcn_nb.cli import efcn_relax
torch.set_num_threads(1)
gc.freeze()

def die(): os.kill(os.getpid(), signal.SIGKILL)

def die_at(moment):
    '''Kill this process before the file, in the midst of it, or before the training step number `moment[1]`,
    or after so many seconds.'''
    what, left = moment
    if what == 'disk': return resource.setrlimit(resource.RLIMIT_FSIZE, (left, left))
    if what == 'clock': return threading.Timer(left, die).start()
    writers = [efcn_nb.experiments.runs, efcn_nb.experiments.relaxation, efcn_nb.service.files]
    owners, name = dict(file=([os], 'replace'), half=(writers, 'publish'), step=([torch.optim.SGD], 'step'))[what]
    real, count = getattr(owners[0], name), iter(range(10**9))
    def counted(*args, **kw):
        if next(count) == left:
            if what == 'half':
                path, write = args[:2]
                beside = path.with_name(f'.{path.name}.0.part')
                write(beside)
                os.truncate(beside, os.path.getsize(beside)//2)
            die()
        return real(*args, **kw)
    for owner in owners: setattr(owner, name, counted)

def serve():
    'Fork a process for each line of the input; return in that process.'
    for line in sys.stdin:
        case = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.chdir(case['cwd'])
            signal.signal(signal.SIGINT, signal.default_int_handler)  # as on a terminal, also in the background
            for number, name in enumerate(['/dev/null', case['stdout'], case['stderr']]):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
            sys.argv = ['efcn_relax', *case['argv']]
            if case['die']: die_at(case['die'])
            if not case['draws']: Figure.savefig = lambda figure, path, **kw: Path(path).write_bytes(b'a figure')
            return
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    os._exit(0)

serve()
code = 0
try: efcn_relax()
except SystemExit as end:  # what the interpreter does, without its clearing up, which takes longer than all the rest
    code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    if isinstance(end.code, str): print(end.code, file=sys.stderr)
except BaseException:
    traceback.print_exc()
    code = 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""


class Console:
    "Runs `efcn_relax` in processes of its own, forked from one that has imported everything."
    def __init__(self, folder):
        self.folder, env = Path(folder), os.environ | dict(OMP_NUM_THREADS="1", TQDM_DISABLE="1", MPLBACKEND="Agg")
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       bufsize=0, env=env,  # so that `is_running` sees all that was answered
                                       cwd=Path(__file__).resolve().parents[1])

    def __call__(self, *argv, cwd, die=None, draws=False):
        """Exit status, standard output, standard error of the command; `die` is a pair ('file', 'half',
        'step' or 'clock', number): when it is killed; or ('disk', bytes that a file can have).
        A command that does not draw writes a figure without pixels, at the same moment."""
        self.start(*argv, cwd=cwd, die=die, draws=draws)
        return self.wait()

    def start(self, *argv, cwd, die=None, draws=False):
        "Start the command; its process id."
        self.streams = {name: self.folder/name for name in ("stdout", "stderr")}
        for path in self.streams.values(): path.unlink(missing_ok=True)
        case = dict(argv=list(map(str, argv)), cwd=str(cwd), die=die, draws=draws,
                    **{name: str(path) for name, path in self.streams.items()})
        self.server.stdin.write(f"{json.dumps(case)}\n".encode())
        return int(self.server.stdout.readline())

    def is_running(self): return not select.select([self.server.stdout], [], [], 0)[0]

    def wait(self):
        "Exit status, standard output, standard error of the command that was started."
        return int(self.server.stdout.readline()), *(path.read_text() for path in self.streams.values())

    def close(self):
        self.server.stdin.close()
        self.server.wait(600)
