"Paths between networks, against loops written out, closed forms and a string of deep copies with `torch.optim.SGD`."
import copy
import functools
import math
import threading
import types
from collections import OrderedDict

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from efcn_nb.materials.data import Dataset
from efcn_nb.ladder.embedding import convert, embed, reinitialize
from efcn_nb.materials.models import make_model
from efcn_nb.ladder.masks import hold_to_masks, random_mask, release_masks
from efcn_nb.ladder.tensor_formats import hold_to_rank
from efcn_nb.instruments.paths import (PATHS, OutputAverage, along, along_string, arc_length, barrier, barrier_matrix,
                                       in_fcn_space, interpolate, interpolate_curvilinear, refresh_batchnorm, string)
from efcn_nb.training.loop import Diverged, evaluate

SHAPE = (1, 16, 16)


pytestmark = pytest.mark.usefixtures("one_thread")


class Doubles(Dataset):
    "A `Dataset` whose batches are in double precision."
    def batch(self, index):
        x, y = super().batch(index)
        return x.double(), y


def dataset(n, shape=SHAPE, classes=3, seed=0, kind=Doubles):
    "Noise with labels."
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, *shape, generator=draw), torch.randint(classes, (n,), generator=draw)
    return kind(x, y, [*range(classes)], torch.zeros(shape[0]), torch.ones(shape[0]), "noise")


def moons(n=200, seed=0):
    "Two half circles with noise, (N, 2)."
    draw = torch.Generator().manual_seed(seed)
    y, angle = torch.arange(n) % 2, math.pi*torch.rand(n, generator=draw)
    x = torch.stack([angle.cos() + y, (angle.sin() - .25)*(1 - 2*y)], 1) + .1*torch.randn(n, 2, generator=draw)
    return Doubles(x.float(), y, [0, 1], torch.zeros(2), torch.ones(2), "moons")


def mlp(seed, sizes=(2, 8, 2), between=nn.Tanh):
    "A network with dense layers of `sizes`, in double precision."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [layer for i, o in zip(sizes, sizes[1:]) for layer in (nn.Linear(i, o), between())]
        return nn.Sequential(*layers[:-1]).double()


def normed(seed, dropout=0.):
    "A CNN with BatchNorm and unlike running statistics, in double precision."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(1, 4, 5, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout),
                            nn.Flatten(), nn.Linear(36, 6), nn.BatchNorm1d(6, momentum=.3), nn.Linear(6, 3))
        for norm in (net[1], net[6]): norm.running_mean.normal_(), norm.running_var.uniform_(.5, 2)
        return net.double()


def values(net): return [p.detach().clone() for p in net.parameters()]
def same(a, b): return all(torch.equal(p, q) for p, q in zip(values(a), values(b), strict=True))
def apart(a, b): return max((p - q).abs().max().item() for p, q in zip(values(a), values(b), strict=True))


# One space

@pytest.mark.parametrize("trim", [False, True])
def test_all_kinds_in_one_space_keep_their_functions(trim):
    cnn, other = (make_model("small", SHAPE, 3, seed=seed, width=3).double() for seed in (0, 1))
    lcn, efcn = embed(cnn, SHAPE, to="lcn", trim=trim), embed(other, SHAPE, trim=trim)
    nets = dict(cnn=cnn, lcn=lcn, efcn=efcn, fcn=reinitialize(efcn, seed=2),
                half=embed(other, SHAPE, layers="0", trim=trim))
    space, x = in_fcn_space(nets, SHAPE, trim), dataset(5).batch(range(5))[0]
    shapes = {tuple((name, p.shape) for name, p in net.named_parameters()) for net in space.values()}
    assert [*space] == [*nets] and len(shapes) == 1
    for name, net in nets.items(): torch.testing.assert_close(space[name](x), net(x), rtol=0, atol=1e-12)
    assert space["efcn"] is efcn and space["fcn"] is nets["fcn"] and type(cnn[0]) is nn.Conv2d


def test_networks_without_convolutions_are_taken_as_they_are():
    nets = dict(a=mlp(0), b=mlp(1))
    assert in_fcn_space(nets, (2,)) == nets


def test_what_has_no_common_space_is_refused():
    cnn, wider = (make_model("small", SHAPE, 3, width=width) for width in (3, 4))
    with pytest.raises(ValueError,
                       match=r"a and b do not lie in one space: 0.weight is \(768, 256\) in the first "
                             r"and \(1024, 256\) in the second; take networks of one architecture"):
        in_fcn_space(dict(a=cnn, b=wider), SHAPE)
    tall = make_model("alexnet", (1, 32, 32), 3, width=1)  # rows that nothing reads
    with pytest.raises(ValueError, match="embedded with the same trim"):
        in_fcn_space(dict(a=tall, b=embed(tall, (1, 32, 32), trim=True)), (1, 32, 32), trim=False)
    in_fcn_space(dict(a=tall, b=embed(tall, (1, 32, 32), trim=True)), (1, 32, 32), trim=True)
    with pytest.raises(ValueError, match="missing in the second"):
        in_fcn_space(dict(a=cnn, b=nn.Sequential(embed(cnn, SHAPE)[0])), SHAPE)
    with pytest.raises(ValueError, match="two networks or more to join, not 1"): in_fcn_space(dict(a=cnn), SHAPE)


# Interpolation

@pytest.mark.parametrize("between", [interpolate, interpolate_curvilinear])
@pytest.mark.parametrize("make",
                         [mlp, normed, lambda seed: embed(make_model("small", SHAPE, 3, seed=seed, width=2), SHAPE)])
def test_ends_are_exact_and_copies(between, make):
    a, b = make(0), make(1)
    before = values(a), values(b)
    for t, end in [(0, a), (1, b)]:
        point = between(a, b, t)
        assert same(point, end)
        floating = lambda net: [x for x in net.buffers() if x.is_floating_point()]
        assert all(torch.equal(x, y) for x, y in zip(floating(point), floating(end), strict=True))
        for p in point.parameters(): p.data.zero_()
        for x in point.buffers(): x.zero_()
    assert all(torch.equal(p, q) for net, kept in zip((a, b), before) for p, q in zip(values(net), kept))


@pytest.mark.parametrize("t", [.5, .3, -1.5, 2.])
def test_linear_against_a_loop(t):
    a, b = normed(0), normed(1)
    point, expected, state = interpolate(a, b, t).state_dict(), a.state_dict(), b.state_dict()
    for name, x in expected.items():
        if not x.is_floating_point(): assert torch.equal(point[name], x)
        else: torch.testing.assert_close(point[name], (1 - t)*x + t*state[name], rtol=0, atol=1e-14)


def test_copies_keep_ties_flags_and_frozen_parameters():
    def net(seed):
        made = mlp(seed, (3, 3, 3))
        made[2].weight = made[0].weight
        made[0].bias.requires_grad_(False)
        made[1].eval()
        made[0].weight.grad = torch.ones(3, 3).double()
        return made
    point = interpolate(net(0), net(1), .5)
    assert point[2].weight is point[0].weight and point[0].weight.grad is None
    assert not point[0].bias.requires_grad and point[2].bias.requires_grad
    assert [m.training for m in point] == [True, False, True]


@pytest.mark.parametrize("t", [.1, .5, .9])
def test_curvilinear_norms_and_directions(t):
    a, b = mlp(0), mlp(1)
    for p, q, r, line in zip(*map(values, (a, b, interpolate_curvilinear(a, b, t), interpolate(a, b, t)))):
        assert r.norm().item() == pytest.approx((1 - t)*p.norm().item() + t*q.norm().item(), rel=1e-12)
        torch.testing.assert_close(r/r.norm(), line/line.norm(), rtol=0, atol=1e-12)


def test_what_cannot_be_mixed_is_refused():
    a, b = mlp(0), mlp(0, (2, 9, 2))
    for between in (interpolate, interpolate_curvilinear):
        with pytest.raises(ValueError,
                           match=r"no path joins these networks: 0.weight is \(8, 2\) in the first "
                                 r"and \(9, 2\) in the second; .*in_fcn_space"):
            between(a, b, .5)
    with pytest.raises(ValueError, match="2.weight is missing in the first"): interpolate(a[:1], a, .5)
    for t in (-.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="runs from t=0 to t=1"): interpolate_curvilinear(a, a, t)


def test_outputs_of_other_shapes_have_no_average():
    x = dataset(7, (2,)).batch(range(7))[0]
    with pytest.raises(ValueError, match=r"\(7, 2\) and \(7, 3\) have no average"):
        OutputAverage(mlp(0), mlp(0, (2, 3)), .5)(x)


# What has nothing between: at each end that network's function to the last bit; in between a network, or a sentence

class Scaled(nn.Module):
    "A linear layer, with attributes and buffers that its forward pass reads."
    def __init__(self, seed, buffers=(), **attributes):
        super().__init__()
        self.seed, self.name = seed, f"network {seed}"                               # nothing reads them
        self.inner = mlp(seed, (2, 4, 2))
        for name, x in dict(buffers).items(): self.register_buffer(name, x)
        for name, x in attributes.items(): setattr(self, name, x)

    def forward(self, x):
        x = self.inner(x)
        if hasattr(self, "factor"): x = x*self.factor
        if hasattr(self, "order"): x = x[:, self.order]
        if hasattr(self, "after"): x = self.after(x)
        return strangely(self, x)


def strangely(net, x): return x*getattr(net, "gain", 1.) + getattr(net, "shift", 0.)


class Counting(nn.Linear):
    "Counts its calls in a buffer of whole numbers, which its function reads."
    def __init__(self, calls):
        super().__init__(2, 2, dtype=torch.float64)
        self.register_buffer("calls", torch.tensor(calls))

    def forward(self, x): return super().forward(x)*self.calls


class Lists(nn.Module):
    "Layers in a plain list, which PyTorch does not know."
    def __init__(self, seed):
        super().__init__()
        self.known, self.unknown = mlp(seed, (2, 2)), [mlp(seed + 5, (2, 2))]

    def forward(self, x): return self.unknown[0](self.known(x))


def generator(seed): return torch.Generator().manual_seed(seed)


def masked(seed, mask=None):
    net = mlp(seed)
    hold_to_masks(net, {"0": random_mask((8, 2), .5, generator(seed if mask is None else mask))})
    return net


def ranked(seed, order=None):
    net = nn.Sequential(nn.Unflatten(1, (2, 1, 1)), nn.ZeroPad2d(1), nn.Conv2d(2, 2, 3), nn.Flatten()).double()
    torch.manual_seed(seed)
    net[2].reset_parameters()
    hold_to_rank(net[2], "cp", 2, "everything", seed if order is None else order)
    return net


def pruned(seed, once=None):
    net = mlp(seed)
    prune.custom_from_mask(net[0], "weight", random_mask((8, 2), .5, generator(seed if once is None else once)))
    return net


def reaching(seed):
    "A closure over a submodule, which copies would share."
    net = Scaled(seed)
    head = net.head = mlp(seed + 7, (2, 2))
    net.after = lambda x: head(x)
    return net


def patched(seed, gain):
    net = mlp(seed, (2, 2))
    net.forward = types.MethodType(lambda self, x: gain*nn.Sequential.forward(self, x), net)
    return net


def changed(net, **attributes):
    for name, x in attributes.items(): setattr(net, name, x)
    return net


def hooked(seed, factor=None):
    net = mlp(seed)
    if factor: net[0].register_forward_hook(lambda m, args, out: factor*out)
    return net


NOTHING_BETWEEN = {
    "masks": (masked,
              "0.parametrizations.weight.0.mask holds bool values, a mask, an order or a table, in which they differ, "
              ".*release_masks"),
    "masks of prune": (pruned, "0.weight_mask is a mask of zeros and ones, .* in which they differ, .*prune.remove"),
    "shuffles": (ranked, "order holds int64 values"),
    "permutations": (lambda s: Scaled(s, dict(order=torch.tensor([s, 1 - s]))), "order holds int64 values"),
    "orders that are attributes": (lambda s: Scaled(s, order=torch.tensor([s, 1 - s])),
                                   "differ in the attribute order"),
    "masks of numbers": (lambda s: Scaled(s, dict(factor=torch.tensor([s, 1. - s]))),
                         "factor is a mask of zeros and ones"),
    "masks that are added": (lambda s: Scaled(s, dict(shift=torch.tensor([s, 1 - s]).log().double())),
                             "shift is a mask of zeros and ones, or of infinite numbers,"),
    "whole parameters": (
        lambda s: changed(Scaled(s), order=nn.Parameter(torch.tensor([s, 1 - s]), requires_grad=False)),
        "order holds int64"),
    "counts that are read": (lambda s: Counting(s + 1), "calls holds int64 values"),
    "factors": (lambda s: Scaled(s, factor=s + 1.), "differ in the attribute factor"),
    "read in a function": (lambda s: Scaled(s, gain=s + 1.), "differ in the attribute gain"),
    "one has an attribute": (lambda s: Scaled(s, shift=1.) if s else Scaled(s), "differ in the attribute shift"),
    "activations": (lambda s: mlp(s, between=[nn.Tanh, nn.ReLU][s]),
                    r"1 is torch.nn.modules.activation.Tanh in the first "
                    r"and torch.nn.modules.activation.ReLU in the second; take two of one architecture"),
    "functions": (lambda s: Scaled(s, after=[torch.tanh, torch.relu][s]), "differ in the attribute after"),
    "lambdas": (lambda s: Scaled(s, after=(lambda x: x.tanh()) if s else (lambda x: x.relu())),
                "differ in the attribute after"),
    "what lambdas hold": (lambda s: Scaled(s, after=lambda x: x*(s + 1)), "differ in the attribute after"),
    "what partials hold": (lambda s: Scaled(s, after=functools.partial(F.leaky_relu, negative_slope=.1 + s)),
                           "differ in the attribute after"),
    "a closure over a submodule": (reaching, "differ in the attribute after"),
    "methods put in": (lambda s: patched(s, s + 1), "differ in the attribute forward"),
    "strides": (lambda s: nn.Sequential(nn.Unflatten(1, (1, 2)), nn.Conv1d(1, 2, 1, stride=1 + s),
                                        nn.AdaptiveAvgPool1d(1), nn.Flatten()).double(),
                "differ in the attribute 1.stride"),
    "orders of layers": (lambda s: nn.Sequential(*[(nn.Tanh(), nn.ReLU())[s], mlp(s)]), "Tanh"),
    "names in another order": (
        lambda s: nn.Sequential(OrderedDict([[("a", mlp(s, (2, 2))), ("b", mlp(s, (2, 2)))],
                                             [("b", mlp(s, (2, 2))), ("a", mlp(s, (2, 2)))]][s])),
        r"\['a', 'b'\] in the first"),
    "hooks": (lambda s: hooked(s, 2*s), "0 has 0 hooks in the first and 1 in the second"),
    "layers in lists": (Lists, "differ in the attribute unknown"),
    "types": (lambda s: mlp(s).to([torch.float64, torch.float32][s]),
              "0.weight is torch.float64 in the first and torch.float32 in the second; bring both to one type"),
    "types of buffers": (
        lambda s: Scaled(s, dict(factor=torch.tensor([.3, .4], dtype=[torch.float64, torch.float32][s]))),
        "factor is torch.float64 in the first"),
    "a weight and a parametrized one": (lambda s: masked(0) if s else mlp(0),
                                        "is missing in the first|missing in the second"),
    "a buffer more": (lambda s: Scaled(s, dict(order=torch.tensor([0, 1]))) if s else Scaled(s),
                      r"order is missing in the first and \(2,\) in the second"),
}


def answers(net, x):
    "What the network says in evaluation mode, whatever the type of its parameters."
    with torch.no_grad(): return copy.deepcopy(net).eval()(x.to(kind(net)))


def kind(net): return next(p.dtype for p in net.parameters() if p.is_floating_point() or p.is_complex()).to_real()


@pytest.mark.parametrize("what", NOTHING_BETWEEN)
def test_what_has_nothing_between_is_refused(what):
    make, sentence = NOTHING_BETWEEN[what]
    a, b, data = make(0), make(1), moons(12)
    x = data.batch(range(12))[0]
    copied = [values(net) for net in (a, b)]
    if "missing" not in sentence:
        for between in (interpolate, interpolate_curvilinear):
            for t, end in [(0, a), (1, b), (1., b)]:
                point = between(a, b, t)
                assert point is not end and torch.equal(answers(point, x), end.eval()(x.to(kind(end)))), (what, t)
                assert all(p is not q for p, q in zip(point.parameters(), end.parameters(), strict=True))
                end.train()
    elsewhere = [lambda: interpolate(a, b, .5), lambda: interpolate(a, b, 2), lambda: interpolate_curvilinear(a, b, .5),
                 lambda: along(a, b, Untouched(data), points=2),
                 lambda: string(a, b, Untouched(data), beads=1, steps=1),
                 lambda: string(a, a, Untouched(data), start=[b], steps=1)]
    for call in elsewhere:
        with pytest.raises(ValueError, match=f"no path joins these networks: .*({sentence})"): call()
    assert all(torch.equal(p, q) for net, old in zip((a, b), copied) for p, q in zip(values(net), old))


class Untouched:
    "Data of which no image may be asked for."
    def __init__(self, data): self.data = data
    def __len__(self): return len(self.data)
    def batches(self, *args): pytest.fail("the data were read before the networks were refused")


def twisted(seed):
    "Complex weights and buffers; real answers."
    class Twist(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 2, dtype=torch.complex128, generator=generator(seed)))
            self.register_buffer("phase", torch.randn(2, dtype=torch.complex128, generator=generator(seed + 9)))

        def forward(self, x): return ((x + 0j) @ self.weight + self.phase).abs()
    return Twist()


def old_norm(seed):
    "Weight norm by a hook, after a forward pass: the weight is no leaf."
    net = mlp(seed)
    with pytest.warns(FutureWarning): nn.utils.weight_norm(net[0])
    net(torch.ones(1, 2).double())
    return net


class Recurrent(nn.Module):
    "A recurrent layer over two steps of one number each."
    def __init__(self, seed, layer, **kwargs):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = layer(1, 3, batch_first=True, **kwargs).double()
        self.last = mlp(seed, (3*(1 + self.layer.bidirectional), 2))

    def forward(self, x): return self.last(self.layer(x[..., None])[0][:, -1])


class Leaving(nn.Module):
    "What a method called `way` leaves behind, without reading it."
    def __init__(self, seed, way):
        super().__init__()
        self.inner, self.way = mlp(seed, (2, 4, 2)), getattr(self, way)
        self.calls, self.total, self.kept = seed, seed, []
        self.seed, self.name, self.optimizer = seed, f"net {seed}", torch.optim.SGD(self.parameters(), .1 + seed)
        for _ in range(1 + seed):
            self.training_step(torch.randn(3, 2, generator=generator(seed)).double(), torch.arange(3) % 2)

    def plain(self, x): return self.inner(x)
    def kept_first(self, x):
        self.h = self.inner[0](x)
        return self.inner[2](self.inner[1](self.h))
    def kept_last(self, x):
        h = self.last = self.inner(x)
        return h
    def after_a_loop(self, x):
        for layer in self.inner: x = layer(x)
        self.features = x
        return 2*self.features
    def counted(self, x):
        self.calls += 1
        return self.inner(x)
    def counted_sometimes(self, x):
        if self.training: self.calls += 1
        return self.inner(x)
    def summed(self, x):
        h = self.inner(x)
        self.total += h.mean().item()
        return h
    def listed(self, x):
        h = self.inner(x)
        self.kept.append(h)
        return h
    def listed_anew(self, x):
        self.kept = []
        for layer in self.inner:
            x = layer(x)
            self.kept.append(x)
        return sum(h.mean(1, keepdim=True) for h in self.kept[:2]) + self.kept[-1]

    def forward(self, x): return self.way(x)
    def training_step(self, x, y):
        self.kept.append(F.cross_entropy(self(x), y))
        return self.kept[-1]
    def reset(self): torch.manual_seed(self.seed)
    def save(self, folder): return f"{folder}/{self.name}.pt", self.calls, self.total
    def fit(self, x, y): self.optimizer.zero_grad(), self.training_step(x, y).backward(), self.optimizer.step()


class Reading(nn.Module):
    "A `value` that the method called `way` reads, one way or another."
    def __init__(self, seed, way, value=None):
        super().__init__()
        self.inner, self.way, self.value = mlp(seed, (2, 2)), getattr(self, way), seed + 1 if value is None else value
        self.flag = False

    def scaled(self, x): return self.inner(x)*self.value
    def before_set(self, x):
        h = self.inner(x)*self.value
        self.value = 3
        return h
    def counted(self, x):
        self.value += 1
        return self.inner(x)*self.value
    def set_sometimes(self, x):
        if self.flag: self.value = 5
        return self.inner(x)*self.value
    def chosen(self, x): return self.inner(x) if self.value > 1 else -self.inner(x)
    def deeper(self, x): return self.helper(x)
    def helper(self, x): return self.inner(x)*self.factor
    @property
    def factor(self): return self.value
    @torch.no_grad()
    def decorated(self, x): return self.inner(x)*self.value
    def within(self, x): return sum((lambda n: self.inner(x)*n*self.value)(n) for n in range(3))
    def by_name(self, x): return self.inner(x)*getattr(self, "value")
    def listed(self, x): return self.inner(x)*self.value[0]
    def appended(self, x):
        self.value.append(1)
        return self.inner(x)*self.value[0]

    def forward(self, x): return self.way(x)


LEFT_BEHIND = ["plain", "kept_first", "kept_last", "after_a_loop", "counted", "counted_sometimes", "summed", "listed",
               "listed_anew"]
READ = ["scaled", "before_set", "counted", "set_sometimes", "chosen", "deeper", "decorated", "within", "by_name",
        "listed", "appended"]
RECURRENT = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN, "two layers": functools.partial(nn.LSTM, num_layers=2),
             "both ways": functools.partial(nn.GRU, bidirectional=True),
             "projected": lambda i, h, **kwargs: nn.LSTM(i, h + 1, proj_size=h, **kwargs)}


@pytest.mark.parametrize("way", READ)
def test_attributes_that_a_forward_pass_reads_are_refused(way):
    a, b = (Reading(seed, way, [seed + 1] if way in ("listed", "appended") else None) for seed in (0, 1))
    with pytest.raises(ValueError, match="no path joins these networks: they differ in the attribute value, which"):
        interpolate(a, b, .5)


class Listing(nn.Module):
    "Its own parameters and a buffer once more, in a list and a dictionary."
    def __init__(self, seed):
        super().__init__()
        self.inner = mlp(seed, (2, 2))
        self.register_buffer("gain", torch.full((2,), 1.5 + seed).double())
        self.weights, self.named, self.same = [*self.inner.parameters()], dict(gain=self.gain), self.inner[0].weight

    def forward(self, x): return F.linear(x, *self.weights)*self.named["gain"]


SOMETHING_BETWEEN = {
    "plain": mlp, "names and seeds": Scaled, "one mask": lambda s: masked(s, 3), "one shuffle": lambda s: ranked(s, 3),
    "one mask of prune": lambda s: pruned(s, 3),
    "weights released from masks": lambda s: (lambda net: release_masks(net) or net)(masked(s)),
    "one mask that is added": lambda s: changed(Scaled(s, dict(hidden=torch.tensor([0, -math.inf]).double())),
                                                after=lambda x: x),
    "tables": lambda s: Scaled(s, dict(order=torch.tensor([1, 0]))),
    "one lambda": lambda s: Scaled(s, after=lambda x: x.tanh()),
    "one closure": lambda s: Scaled(s, after=(lambda n: lambda x: n*x)(3)),
    "one method put in": lambda s: patched(s, 3),
    "running statistics": lambda s: Scaled(s, dict(shift=torch.full((2,), .3 + s).double())), "complex": twisted,
    "weight norm": lambda s: nn.Sequential(parametrizations.weight_norm(mlp(s)[0])),
    "weight norm by a hook": old_norm, "another mode": lambda s: mlp(s).train(bool(s)),
    "an activation kept": lambda s: changed(mlp(s), last=torch.ones(2, requires_grad=True)*(1. + s)),
    "own tensors in lists": Listing,
    **{name: lambda s, layer=layer: Recurrent(s, layer) for name, layer in RECURRENT.items()},
    **{f"left behind, {way}": lambda s, way=way: Leaving(s, way) for way in LEFT_BEHIND},
}


@pytest.mark.parametrize("what", SOMETHING_BETWEEN)
def test_what_has_something_between(what):
    "Ends to the last bit, and half-way all numbers half-way, even if the networks differ in what nobody reads."
    a, b, x = SOMETHING_BETWEEN[what](0), SOMETHING_BETWEEN[what](1), moons(12).batch(range(12))[0]
    for t, end in [(0, a), (1, b)]:
        for between in (interpolate, interpolate_curvilinear): assert torch.equal(answers(between(a, b, t), x), end(x))
    middle, state = interpolate(a, b, .5), b.state_dict()
    for name, p in a.state_dict().items():
        expected = (p + state[name])/2 if p.is_floating_point() or p.is_complex() else p
        torch.testing.assert_close(middle.state_dict()[name], expected)
    bent = interpolate_curvilinear(a, b, .5)
    for (name, p), q, r in zip(a.named_parameters(), b.parameters(), bent.parameters()):
        norms = p.abs().square().sum().sqrt() + q.abs().square().sum().sqrt()
        assert r.abs().square().sum().sqrt().item() == pytest.approx(norms.item()/2)
    assert torch.isfinite(middle(x)).all() and np.isfinite(arc_length([a, middle, b])).all()


def test_what_is_infinite_in_both_stays_beyond_the_ends():
    a, b = (Scaled(seed, dict(shift=torch.tensor([0, -math.inf]).double())) for seed in (0, 1))
    for t in (-1, .5, 2): assert torch.equal(interpolate(a, b, t).shift, a.shift)


def test_counts_of_batches_may_differ():
    a, b = normed(0), normed(1)
    b(dataset(8).batch(range(8))[0])
    assert b[1].num_batches_tracked == 1 and interpolate(a, b, .5)[1].num_batches_tracked == 0
    assert interpolate(a, b, 1)[1].num_batches_tracked == 1


def test_masks_are_found_before_any_pair_is_measured():
    cnn = make_model("small", SHAPE, 3, width=2).double()
    nets = dict(a=embed(cnn, SHAPE), b=embed(cnn, SHAPE), c=embed(cnn, SHAPE), d=embed(cnn, SHAPE))
    for seed, net in enumerate(nets.values()):
        hold_to_masks(net, {"0": random_mask(net[0].weight.shape, .5, generator(seed//2))})
    with pytest.raises(ValueError, match="no path joins a and c: 0.parametrizations.weight.0.mask holds bool"):
        barrier_matrix(nets, Untouched(dataset(9)), SHAPE)
    assert not barrier_matrix(nets, dataset(9), SHAPE, "outputs", points=2).values.any()


@pytest.mark.parametrize("wrong, sentence",
                         [(lambda: interpolate(mlp(0), mlp(1), math.nan),
                           "a place on the line is a finite number, not nan"),
                          (lambda: interpolate(mlp(0), mlp(1), math.inf), "not inf"),
                          (lambda: interpolate(nn.LazyLinear(2), nn.LazyLinear(2), .5),
                           "weight has no shape yet: run a batch through the network first"),
                          (lambda: interpolate(changed(mlp(0), lock=threading.Lock()), mlp(1), 0),
                           "Sequential cannot be copied .*; take from it what only a running program can hold"),
                          (lambda: OutputAverage(nn.LSTM(2, 2), nn.LSTM(2, 2), .5)(torch.ones(1, 2)),
                           "outputs of the types tuple and tuple have no average")])
def test_other_impossible_points(wrong, sentence):
    with pytest.raises(ValueError, match=sentence): wrong()


def test_frozen_batchnorm_of_beads_stays_frozen():
    def net(seed):
        made = normed(seed)
        made[1].eval()
        return made
    a, b = net(0), net(1)
    first, bead, last = string(a, b, dataset(20), beads=1, steps=2, lr=.01)
    torch.testing.assert_close(bead[1].running_mean, (a[1].running_mean + b[1].running_mean)/2)
    assert bead[6].num_batches_tracked == 2 and bead[1].num_batches_tracked == 0
    assert [m.training for m in bead] == [m.training for m in a]


# BatchNorm

def test_refreshed_statistics_are_those_of_the_batches():
    data, net = dataset(40), normed(0, dropout=.5).eval()
    net[1].train()
    refresh_batchnorm(net, data, batch_size=10)
    means, variances, deeper = [], [], []
    for k in range(4):
        x = net[0](data.batch(range(10*k, 10*k + 10))[0])
        per_channel = x.transpose(0, 1).flatten(1)
        means.append(per_channel.mean(1)), variances.append(per_channel.var(1, correction=1))
        variance = per_channel.var(1, correction=0).view(-1, 1, 1)
        centred = (x - per_channel.mean(1).view(-1, 1, 1))/(variance + net[1].eps).sqrt()
        # no dropout
        deeper.append(net[5]((centred*net[1].weight.view(-1, 1, 1) + net[1].bias.view(-1, 1, 1)).relu().flatten(1)))
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    close(net[1].running_mean, torch.stack(means).mean(0))
    # equal batches: of all data
    close(net[1].running_mean, net[0](data.batch(range(40))[0]).transpose(0, 1).flatten(1).mean(1))
    close(net[1].running_var, torch.stack(variances).mean(0))
    close(net[6].running_mean, torch.cat(deeper).mean(0))
    close(net[6].running_var, torch.stack([x.var(0) for x in deeper]).mean(0))
    assert [m.training for m in net] == [False, True] + [False]*6 and not net.training
    assert (net[1].momentum, net[6].momentum) == (.1, .3) and net[1].num_batches_tracked == 4


def test_a_last_image_is_no_batch_of_its_own():
    net, data = normed(0), dataset(11)
    refresh_batchnorm(net, data, batch_size=10)  # BatchNorm1d would refuse a batch of one
    sizes = [len(part) for part in torch.arange(11).tensor_split(2)]
    assert sizes == [6, 5] and net[6].num_batches_tracked == 2


@pytest.mark.parametrize("kind, size",
                         [(nn.BatchNorm1d, (3, 7)), (nn.BatchNorm2d, (3, 4, 5)), (nn.BatchNorm3d, (3, 2, 3, 4))])
def test_batchnorm_of_any_dimension(kind, size):
    net, data = kind(3).double(), dataset(12, size)
    refresh_batchnorm(net, data)
    x = data.batch(range(12))[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(net.running_mean, x.mean(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(net.running_var, x.var(1), rtol=0, atol=1e-12)


def test_modes_and_momenta_return_after_a_failure():
    net = normed(0).eval()
    with pytest.raises(RuntimeError): refresh_batchnorm(net, dataset(12, (2, 16, 16)))
    assert not any(m.training for m in net.modules()) and net[6].momentum == .3


def test_nothing_to_refresh():
    net, own = mlp(0), nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))
    assert refresh_batchnorm(net, None) is net and refresh_batchnorm(own, None) is own
    with pytest.raises(ValueError, match="need images, in batches of at least one: not 0 in batches of 250"):
        refresh_batchnorm(normed(0), dataset(0))
    with pytest.raises(ValueError, match="not 5 in batches of 0"):
        refresh_batchnorm(normed(0), dataset(5), batch_size=0)


# Along a path

def test_a_path_is_measured_at_its_points():
    a, b, data = mlp(0), mlp(1), moons()
    for kind, between in PATHS.items():
        table = along(a, b, data, kind, points=5)
        assert [*table] == ["path", "t", "loss", "accuracy"] and [*table.t] == [0, .25, .5, .75, 1]
        assert {*table.path} == {kind}
        for row in table.itertuples():
            found = evaluate(between(a, b, row.t), data)
            assert (row.loss, row.accuracy) == (found["loss"], found["accuracy"])


def test_batchnorm_is_refreshed_at_every_point_and_nowhere_else():
    a, b, data, other = normed(0).eval(), normed(1).eval(), dataset(30, kind=Doubles), dataset(20, seed=1)
    kept = copy.deepcopy((a.state_dict(), b.state_dict()))
    table = along(a, b, other, points=3, train=data, batch_size=10)
    for row in table.itertuples():
        found = evaluate(refresh_batchnorm(interpolate(a, b, row.t), data, 10), other)
        assert row.loss == pytest.approx(found["loss"], abs=1e-6)
    along_string([a, interpolate(a, b, .5), b], other, train=data)
    for net, state in zip((a, b), kept): assert all(torch.equal(x, state[name]) for name, x in net.state_dict().items())
    along(a, b, other, "outputs", points=2)  # each network with its own statistics
    for kind in ("linear", "curvilinear"):
        with pytest.raises(ValueError, match="have BatchNorm, whose running statistics .* give train="):
            along(a, b, other, kind)
    with pytest.raises(ValueError, match="give train="): along_string([a, b], other)


def test_measuring_leaves_modes_alone():
    a, b, data = mlp(0), mlp(1).eval(), moons(20)
    a[1].eval()
    for kind in PATHS: along(a, b, data, kind, points=2)
    along_string([a, b], data)
    assert [m.training for m in a] == [True, False, True] and not any(m.training for m in b.modules())


def test_impossible_paths_are_refused():
    a, b, data = mlp(0), mlp(1), moons(20)
    with pytest.raises(ValueError, match="unknown path 'bent'; known are linear, curvilinear, outputs"):
        along(a, b, data, "bent")
    with pytest.raises(ValueError, match="points must be a whole number, 2 or more, not 1"): along(a, b, data, points=1)
    with pytest.raises(ValueError, match="two networks or more, not 1"): along_string([a], data)
    with pytest.raises(ValueError, match="no path joins"): along_string([a, mlp(0, (2, 9, 2))], data)


# The string

def naive_string(models, data, steps, lr, k, batch_size, seed):
    "Deep copies, `torch.optim.SGD`, and new positions computed from a copy of all old ones."
    models, order, todo = [copy.deepcopy(m) for m in models], torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        todo = todo or [*data.batches(batch_size, order)]
        x, y = todo.pop(0)
        for model in models[1:-1]:
            optimizer = torch.optim.SGD(model.parameters(), lr=lr)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        old = [values(model) for model in models]
        for i, model in [*enumerate(models)][1:-1]:
            for p, here, before, after in zip(model.parameters(), old[i], old[i-1], old[i+1]):
                p.data = here + k*(after + before - 2*here)
    return models


def elcn(seed): return embed(make_model("small", SHAPE, 3, seed=seed, width=2).double(), SHAPE, to="lcn")


@pytest.mark.parametrize("make, data, steps", [(mlp, moons(50), 1), (mlp, moons(50), 7), (elcn, dataset(30), 3)])
def test_string_against_deep_copies(make, data, steps):
    a, b = make(0), make(1)
    found = string(a, b, data, beads=4, steps=steps, lr=.3, stiffness=.3, batch_size=20, seed=5)
    naive = naive_string([a, *(interpolate(a, b, i/5) for i in range(1, 5)), b], data, steps, .3, .3, 20, 5)
    assert len(found) == 6 and max(apart(p, q) for p, q in zip(found, naive)) < 1e-12


def test_ends_of_a_string_stay_and_its_state_is_its_own():
    a, b, data = mlp(0), mlp(1).eval(), moons(50)
    before, begin = (values(a), values(b)), [mlp(2), mlp(3)]
    kept, state = [values(m) for m in begin], torch.get_rng_state()
    begin[0][1].eval()
    found = string(a, b, data, steps=3, start=begin)
    assert found[0] is a and found[-1] is b and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for net, old in zip([a, b, *begin], [*before, *kept])
               for p, q in zip(values(net), old))
    assert [m.training for m in found[1]] == [True, False, True] and not any(m.training for m in b.modules())
    assert apart(found[1], begin[0]) > 0 and all(p.grad is None for net in found for p in net.parameters())


def test_string_repeats_itself():
    wet = lambda seed: nn.Sequential(mlp(seed), nn.Dropout(.5))
    a, b, data = wet(0), wet(1), moons(50)
    one, two, other = (string(a, b, data, beads=2, steps=5, seed=seed)[1] for seed in (0, 0, 1))
    assert same(one, two) and not same(one, other)


def test_place_on_a_string_is_arc_length():
    a, b, data = mlp(0, (2, 2)), mlp(1, (2, 2)), moons(20)
    table = along_string([interpolate(a, b, t) for t in (0, .1, .7, 1)], data)
    np.testing.assert_allclose(table.t, [0, .1, .7, 1], atol=1e-12)
    assert table.t.iloc[-1] == 1 and [*along_string([a, a, a], data).t] == [0, .5, 1]
    flat = lambda net: torch.cat([p.flatten() for p in values(net)])
    assert arc_length([a, b])[1] == pytest.approx((flat(a) - flat(b)).norm().item(), rel=1e-12)


def test_frozen_and_unused_parameters_of_beads():
    def net(seed):
        made = mlp(seed)
        made[0].weight.requires_grad_(False)
        made.register_parameter("idle", nn.Parameter(torch.full((1,), float(seed)).double()))
        return made
    a, b = net(0), net(1)
    middle = string(a, b, moons(20), beads=1, steps=4, lr=.3, stiffness=.2)[1]
    torch.testing.assert_close(middle[0].weight, (a[0].weight + b[0].weight)/2)
    assert middle.idle.item() == .5 and apart(middle, interpolate(a, b, .5)) > 1e-3


@pytest.mark.parametrize("wrong, sentence", [
    (dict(stiffness=1),
     r"stiffness must be above 0 and at most 0.5, not 1: a smoothing step multiplies waves along the string "
     r"by 1 - 2k\(1 - cos phi\), which .* modulus above one"),
    (dict(stiffness=0), "stiffness must be above 0"), (dict(stiffness=math.nan), "stiffness must be above 0"),
    (dict(stiffness=-.1), "not -0.1"),
    (dict(beads=0), "at least one bead .*, not 0 beads and 100 steps"), (dict(start=[]), "at least one bead"),
    (dict(steps=-1), "not 9 beads and -1 steps"),
    (dict(lr=-1), "the learning rate must be 0 or more, not -1"),
    (dict(lr=math.nan), "the learning rate must be 0 or more, not nan"),
    (dict(batch_size=0), "batch_size must be a whole number, 1 or more, not 0"),
    (dict(start=[mlp(0, (2, 9, 2))]), "no path joins these networks")])
def test_impossible_strings_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence): string(mlp(0), mlp(1), moons(20), **wrong)


def test_strings_that_cannot_go_on():
    with pytest.raises(ValueError, match="images to train the string on"): string(mlp(0), mlp(1), dataset(0, (2,)))
    with pytest.raises(ValueError, match="no path joins these networks"): string(mlp(0), mlp(0, (2, 9, 2)), moons(20))
    with pytest.raises(Diverged, match="was not finite at step 2; try a smaller learning rate than 1e"):
        string(mlp(0, between=nn.ReLU), mlp(1, between=nn.ReLU), moons(20), lr=1e200)


# Barriers

def table(t, loss, accuracy=None, path="made up"):
    return pd.DataFrame(dict(path=path, t=t, loss=loss, accuracy=[0.]*len(t) if accuracy is None else accuracy))


@pytest.mark.parametrize("loss", [[1., 2, 3], [3., 2, 1], [1., 1.2, 3], [2., 0, 1], [.1, .1, .1], [3., .7, .9]])
def test_no_barrier(loss):
    found = barrier(table([0, .5, 1], loss, [1 - x for x in loss])).loc["made up"]
    assert 0 <= found.height < 1e-15 and 0 <= found["drop"] < 1e-15


def test_barriers_of_several_paths_in_any_order():
    both = pd.concat([table([0, .5, 1], [0., 1, 0]).assign(seed=3),
                      table([1, .5, 0], [0., 2, 2], path="other").assign(seed=4)])
    assert barrier(both).height.to_dict() == {"made up": 1, "other": 1}
    found = barrier(both, by=["path", "seed"]).height
    assert found.to_dict() == {("made up", 3): 1, ("other", 4): 1} and [*found.index.names] == ["path", "seed"]


def test_a_loss_that_is_not_finite_is_no_small_barrier():
    assert barrier(table([0, .5, 1], [1., math.inf, 1])).height.item() == math.inf
    assert math.isnan(barrier(table([0, .5, 1], [1., math.nan, 1])).height.item())


def test_barriers_without_ends_are_refused():
    for t, missing in [([0, .5], 1), ([.5, 1], 0)]:
        with pytest.raises(ValueError, match=f"the path made up has no point at t={missing}"):
            barrier(table(t, [1., 2]))
    with pytest.raises(ValueError, match="no point from t=0 to t=1"): barrier(table([2, 3], [1., 2]))


def test_barrier_matrix():
    cnn = make_model("small", SHAPE, 3, width=2).double()
    lcn, efcn = embed(cnn, SHAPE, to="lcn"), embed(make_model("small", SHAPE, 3, seed=1, width=2).double(), SHAPE)
    nets, data = dict(cnn=cnn, lcn=lcn, efcn=efcn, fcn=reinitialize(efcn, seed=0)), dataset(30)
    for kind in PATHS:
        found = barrier_matrix(nets, data, SHAPE, kind, points=3)
        assert [*found.index] == [*found.columns] == [*nets]
        assert (found.values == found.values.T).all() and not found.values.diagonal().any()
        assert (found.values >= 0).all()
        one = barrier(along(efcn, convert(lcn, "fcn"), data, kind, points=3)).height[kind]
        assert found.loc["lcn", "efcn"] == pytest.approx(one, abs=1e-6) and found.loc["cnn", "lcn"] < 1e-6
    with pytest.raises(ValueError, match="unknown path"): barrier_matrix(nets, data, SHAPE, "bent")
    with pytest.raises(ValueError, match="two networks or more to join"): barrier_matrix(dict(cnn=cnn), data, SHAPE)
    with pytest.raises(ValueError, match="do not lie in one space"):
        barrier_matrix(dict(cnn=cnn, wider=make_model("small", SHAPE, 3, width=3)), data, SHAPE)
