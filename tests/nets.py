"Networks, convolutions and comparisons that the tests of several rooms share."
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from efcn_nb.ladder.folding import BATCHNORMS
from efcn_nb.ladder.geometry import PADDING_MODES
from efcn_nb.ladder.layers import FullyConnected, LocallyConnected


settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=150,
                          suppress_health_check=list(HealthCheck))
settings.load_profile("repeatable")


KINDS = {(False, 1): nn.Conv1d, (False, 2): nn.Conv2d, (False, 3): nn.Conv3d,
         (True, 1): nn.ConvTranspose1d, (True, 2): nn.ConvTranspose2d, (True, 3): nn.ConvTranspose3d}
RELEASED = {"fcn": FullyConnected, "lcn": LocallyConnected}
BOTH = pytest.mark.parametrize("to", RELEASED)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def conv_of(n, ci, co, *args, seed=0, transposed=False, dtype=torch.float64, **kw):
    "A convolution over `n` axes with weights of `seed`; the global random state is left alone."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return KINDS[transposed, n](ci, co, *args, **kw).to(dtype)


# groups, and in and out for each
CHANNELS = [(1, 1, 1), (1, 2, 3), (1, 3, 2), (2, 1, 1), (2, 2, 1), (2, 1, 2), (3, 1, 1), (3, 1, 2), (4, 1, 1)]


@st.composite
def cases(draw, smaller=0):
    "A convolution of any kind and a batch of inputs that it takes, among them kernels that are larger than the input."
    n, transposed = draw(st.sampled_from([1, 2, 2, 3])), draw(st.booleans())
    each = lambda low, high: draw(st.tuples(*[st.integers(low, high)]*n))
    most, taps = {1: (8, 5), 2: (5, 3), 3: (3, 2)}[n]
    kernel, dilation, (groups, per_in, per_out) = each(1, taps), each(1, 2), draw(st.sampled_from(CHANNELS))
    span = [d*(k-1) + 1 for d, k in zip(dilation, kernel)]
    mode = "zeros" if transposed else draw(st.sampled_from(PADDING_MODES))
    padding = "own" if transposed else draw(st.sampled_from(["own", "own", "own", "same", "valid"]))
    stride = (1,)*n if padding == "same" else each(1, 3)
    if padding == "own": padding = each(0, 2)
    around = [0]*n if padding == "valid" else [s-1 for s in span] if padding == "same" else [2*p for p in padding]
    side = [a - a//2 for a in around]
    kw = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, bias=draw(st.booleans()),
              padding_mode=mode, transposed=transposed)
    if transposed:
        kw["output_padding"] = more = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation))
        least = [1 + max(0, -(-(a + 1 - w - m)//s)) for a, w, m, s in zip(around, span, more, stride)]
    else:
        least = [max(1, w - a, {"reflect": p + 1, "circular": p}.get(mode, 1)) for w, a, p in zip(span, around, side)]
    size = tuple(draw(st.integers(low, max(low, most - smaller))) for low in least)
    seed = sum(size) + 10*sum(kernel)
    return (conv_of(n, groups*per_in, groups*per_out, kernel, seed=seed, **kw),
            rand(1 + seed%3, groups*per_in, *size, seed=seed))


CHOSEN = [  # corners that must be among the cases whatever is drawn
    (conv_of(2, 2, 3, (3, 4), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), rand(2, 2, 5, 6)),
    (conv_of(2, 1, 1, 1), rand(1, 1, 1, 1)),
    (conv_of(2, 4, 4, 3, padding=1, groups=4, bias=False), rand(2, 4, 4, 4)),
    (conv_of(1, 2, 2, 7, padding=3), rand(2, 2, 2)),
    (conv_of(3, 1, 2, (1, 2, 3), padding="same"), rand(1, 1, 2, 3, 3)),
    (conv_of(2, 2, 2, (2, 4), padding="same"), rand(1, 2, 3, 5)),
    (conv_of(2, 2, 4, (4, 3), padding="same", padding_mode="reflect", groups=2), rand(2, 2, 4, 5)),
    (conv_of(1, 1, 2, 5, padding=2, padding_mode="circular"), rand(2, 1, 2)),
    (conv_of(2, 3, 2, (3, 5), padding=(2, 4), stride=(3, 2), padding_mode="replicate"), rand(2, 3, 1, 2)),
    (conv_of(2, 4, 6, (3, 2), stride=(3, 2), padding=(1, 0), output_padding=(2, 1), groups=2, transposed=True),
     rand(2, 4, 3, 4)),
    (conv_of(1, 2, 2, 1, stride=3, output_padding=2, transposed=True), rand(2, 2, 3)),  # outputs that read nothing
    (conv_of(3, 3, 3, 2, stride=(1, 2, 3), dilation=(2, 1, 3), output_padding=(1, 0, 2), groups=3, transposed=True),
     rand(1, 3, 2, 1, 2)),
]


def over_cases(times=150, smaller=0):
    "Run a test on drawn and on chosen cases."
    def decorate(test):
        for case in CHOSEN: test = example(case)(test)
        return settings(max_examples=times)(given(cases(smaller))(test))
    return decorate


def close(a, b, tolerance):
    "Whether `a` and `b` agree to `tolerance` relative to the largest value."
    if a.shape != b.shape or not a.numel(): return a.shape == b.shape
    return float((a - b).detach().abs().max()) <= tolerance*max(1., float(b.detach().abs().max()))


def shape_of(x): return tuple(x.shape[1:])


def tied_dense(D, g):
    "Sum of `D` (output units, input units) over the copies of each weight, laid out like the convolution's weight."
    co, ci, source = g.out_channels//g.groups, g.in_channels//g.groups, g.source
    # the last pixel is zero, for taps that read nothing
    D = F.pad(D.view(g.groups, co, len(source), g.groups, ci, -1), (0, 1))
    D = torch.stack([D[i, :, :, i] for i in range(g.groups)]).transpose(2, 3)
    return tap_layout(D[..., torch.arange(len(source))[:, None], source].sum(-2), g)


def tied_local(L, g):
    "Sum of `L` (positions, out channels, slots, in channels of a group) over the copies of each weight."
    total = torch.zeros(g.source.shape[1], g.out_channels, g.in_channels//g.groups, dtype=L.dtype)
    slots = [{p: s for s, p in enumerate(row) if p >= 0} for row in g.reads.tolist()]
    used = [(i, tap, slots[i][p]) for i, row in enumerate(g.source.tolist()) for tap, p in enumerate(row) if p >= 0]
    if used:
        i, tap, slot = map(torch.tensor, zip(*used))
        total.index_add_(0, tap, L[i, :, slot])
    return tap_layout(total.unflatten(1, (g.groups, -1)).permute(1, 2, 3, 0), g)


def tap_layout(kernel, g):
    "(groups, out, in, taps) as the convolution's weight."
    return (kernel.transpose(1, 2) if g.transposed else kernel).reshape(g.kernel_shape)


TIED = {"fcn": tied_dense, "lcn": tied_local}


class Residual(nn.Module):
    """Nested, with BatchNorm, dropout, a skip connection, and one convolution that is used twice,
    the second time under another name."""
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.ModuleDict(dict(a=nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)),
                                         skip=nn.Conv2d(4, 4, 1)))
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.alias = self.twice
        self.head = nn.Sequential(nn.Dropout(), nn.Flatten(), nn.Linear(4*25, 3))

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.blocks["a"](x) + self.blocks["skip"](x))
        return self.head(self.alias(F.relu(self.twice(x))))


@pytest.fixture
def residual():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Residual().double()
        with torch.no_grad(): model(rand(8, 2, 5, 5, seed=9) + 1)  # running statistics that are not the default
    return model


def frozen(model):
    "All that embedding must leave alone."
    return ({k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()])


def unchanged(model, before):
    return all(torch.equal(v, model.state_dict()[k]) for k, v in before[0].items()) and frozen(model)[1:] == before[1:]


def made(build, seed=0):
    "A float64 model with weights of `seed`; the global random state is left alone."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().double()


# BatchNorm

def settled(build, shape, seed=0):
    """A float64 model in evaluation mode whose BatchNorms have affine parameters and running statistics that are not
    the default."""
    model = made(build, seed)
    for i, norm in enumerate(m for m in model.modules() if isinstance(m, BATCHNORMS)):
        for j, t in enumerate((norm.weight, norm.bias, norm.running_mean, norm.running_var)):
            if t is not None: t.data.copy_(rand(len(t), seed=10*i + j).abs() + .5)
    return model.eval()


# Bad input: one clear sentence, before any work

def plain(**kw): return nn.Conv2d(3, 4, 3, padding=1, **kw)


class OwnConv(nn.Conv2d):
    def forward(self, x): return super().forward(x)**2


# The same function, or one sentence

class Net(nn.Module):
    """A convolution, BatchNorm and a linear layer in float64, and a forward pass that is given;
    whatever else `more` adds."""
    def __init__(self, forward, more=lambda m: None, conv=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.norm, self.fc = conv or nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(75, 4)
            more(self)
            self._forward = forward
            self.double()

    def forward(self, x): return self._forward(self, x)
    def head(self, x): return self.fc(x.flatten(1))
    def tail(self, x): return self.fc(self.norm(x).flatten(1))


SHAPE = (2, 5, 5)


def alone(model):
    "All of a network that embedding must leave alone, bit for bit, and the random states."
    tensors = {k: (id(v), v.data_ptr(), v._version, v.detach().clone())
               for k, v in (*model.named_parameters(), *model.named_buffers())}
    return (tensors, [m.training for m in model.modules()], torch.get_rng_state(), np.random.get_state()[1].tolist(),
            random.getstate())


def untouched(model, before):
    after = alone(model)
    return (all(a[:3] == b[:3] and torch.equal(a[3], b[3])
                for a, b in zip(before[0].values(), after[0].values(), strict=True))
            and before[1] == after[1] and torch.equal(before[2], after[2]) and before[3:] == after[3:])


def closure(m): m.f = lambda x: m.fc(x.flatten(1))


def function_with_default(m):
    def f(x, fc=m.fc): return fc(x.flatten(1))
    m.f = f


class Calls(list):
    def __deepcopy__(self, memo): return self


def as_buffers(conv, *names, persistent=True):
    for name in names:
        value = getattr(conv, name).detach().clone()
        delattr(conv, name)
        conv.register_buffer(name, value, persistent)
    return conv


def kernel(m): m.kernel = nn.Parameter(torch.randn(3, 3, 3, 3))
