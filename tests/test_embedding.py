"""Same function, released weights: `embed` and its way back against PyTorch's own convolutions, and what it refuses."""
import copy
import functools
import gc
import math
import os
import pickle
import random
import re
import subprocess
import sys
import threading
import types
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import deform_conv2d

from efcn_nb.ladder import embedding, geometry, inspection, matrices, proof
from efcn_nb.ladder.matrices import (
    kernel_from_local, kernel_from_matrix, local_from_kernel, local_from_matrix, matrix_from_kernel, matrix_from_local)
from efcn_nb.ladder.inspection import conv_geometries
from efcn_nb.ladder.folding import BATCHNORMS, merge_batchnorm
from efcn_nb.ladder.embedding import convert, embed, nearest_cnn, reinitialize, released_weights
from efcn_nb.ladder.geometry import PADDING_MODES, ConvGeometry
from efcn_nb.ladder.layers import FullyConnected, LocallyConnected
from efcn_nb.materials.models import MODELS
from efcn_nb.instruments.subspaces import project_cnn, project_lcn, residuals, shares, squares

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=150, suppress_health_check=list(HealthCheck))
settings.load_profile("repeatable")

KINDS = {(False, 1): nn.Conv1d, (False, 2): nn.Conv2d, (False, 3): nn.Conv3d,
         (True, 1): nn.ConvTranspose1d, (True, 2): nn.ConvTranspose2d, (True, 3): nn.ConvTranspose3d}
RELEASED = {"fcn": FullyConnected, "lcn": LocallyConnected}
BOTH = pytest.mark.parametrize("to", RELEASED)


def rand(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def conv_of(n, ci, co, *args, seed=0, transposed=False, dtype=torch.float64, **kw):
    "A convolution over `n` axes with weights of `seed`; the global random state is left alone."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return KINDS[transposed, n](ci, co, *args, **kw).to(dtype)


CHANNELS = [(1, 1, 1), (1, 2, 3), (1, 3, 2), (2, 1, 1), (2, 2, 1), (2, 1, 2), (3, 1, 1), (3, 1, 2), (4, 1, 1)]  # groups, and in and out for each


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
    kw = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, bias=draw(st.booleans()), padding_mode=mode, transposed=transposed)
    if transposed:
        kw["output_padding"] = more = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation))
        least = [1 + max(0, -(-(a + 1 - w - m)//s)) for a, w, m, s in zip(around, span, more, stride)]
    else:
        least = [max(1, w - a, {"reflect": p + 1, "circular": p}.get(mode, 1)) for w, a, p in zip(span, around, side)]
    size = tuple(draw(st.integers(low, max(low, most - smaller))) for low in least)
    seed = sum(size) + 10*sum(kernel)
    return conv_of(n, groups*per_in, groups*per_out, kernel, seed=seed, **kw), rand(1 + seed%3, groups*per_in, *size, seed=seed)


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
    (conv_of(2, 4, 6, (3, 2), stride=(3, 2), padding=(1, 0), output_padding=(2, 1), groups=2, transposed=True), rand(2, 4, 3, 4)),
    (conv_of(1, 2, 2, 1, stride=3, output_padding=2, transposed=True), rand(2, 2, 3)),  # outputs that read nothing
    (conv_of(3, 3, 3, 2, stride=(1, 2, 3), dilation=(2, 1, 3), output_padding=(1, 0, 2), groups=3, transposed=True), rand(1, 3, 2, 1, 2)),
]


def over_cases(times=150, smaller=0):
    "Run a test on drawn and on chosen cases."
    def decorate(test):
        for case in CHOSEN: test = example(case)(test)
        return settings(max_examples=times)(given(cases(smaller))(test))
    return decorate


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Threads only cost time on tensors as small as these."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def close(a, b, tolerance):
    "Whether `a` and `b` agree to `tolerance` relative to the largest value."
    return a.shape == b.shape and (not a.numel() or float((a - b).detach().abs().max()) <= tolerance*max(1., float(b.detach().abs().max())))


def geometry_of(conv, x): return ConvGeometry.from_conv(conv, x.shape[2:])


def shape_of(x): return tuple(x.shape[1:])


def functional(conv, x):
    "What torch.nn.functional computes, called without the module."
    name = f"conv{'_transpose' if conv.transposed else ''}{x.dim() - 2}d"
    if conv.transposed: return getattr(F, name)(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
    padding = conv.padding
    if conv.padding_mode != "zeros":
        span = [d*(k-1) for d, k in zip(conv.dilation, conv.kernel_size)]
        pairs = [(t//2, t - t//2) for t in span] if padding == "same" else [(0, 0)]*len(span) if padding == "valid" else [(p, p) for p in padding]
        x, padding = F.pad(x, [p for pair in reversed(pairs) for p in pair], mode=conv.padding_mode), 0
    return getattr(F, name)(x, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)


# Properties of one convolution: each is a function of a case, so that the negative controls below can call it

def same_function(conv, x, to):
    layer, expected = embed(conv, shape_of(x), to, check=False), functional(conv, x)
    assert type(layer) is RELEASED[to] and close(layer(x), expected, 1e-10) and close(conv(x), expected, 1e-12)


def tied_dense(D, g):
    "Sum of `D` (output units, input units) over the copies of each weight, laid out like the convolution's weight."
    co, ci, source = g.out_channels//g.groups, g.in_channels//g.groups, g.source
    D = F.pad(D.view(g.groups, co, len(source), g.groups, ci, -1), (0, 1))  # the last pixel is zero, for taps that read nothing
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


def same_gradient(conv, x):
    "The sum over a tap's copies of the released gradient is the convolution's; so are inputs' and biases'."
    g, gradients, into = geometry_of(conv, x), [], rand(*conv(x).shape, seed=1)
    for layer in (conv, *(embed(conv, shape_of(x), to, check=False) for to in RELEASED)):
        wanted = [x.clone().requires_grad_(), *layer.parameters()]
        gradients.append(torch.autograd.grad((layer(wanted[0])*into).sum(), wanted))
    (dx, dk, *db), *released = gradients
    for (rx, rk, *rb), to in zip(released, RELEASED):
        assert close(rx, dx, 1e-10)
        assert close(TIED[to](rk, g), dk, 1e-10)
        assert [True]*len(db) == [close(r.view(g.out_channels, -1).sum(1), b, 1e-10) for r, b in zip(rb, db)]


def read_by_a_tap(conv, x):
    "Which weights meet a pixel anywhere: from PyTorch's own gradient, without the geometry."
    ones, conv = torch.ones_like(x), copy.deepcopy(conv)
    return torch.autograd.grad(conv(ones).sum(), conv.weight)[0] != 0


def alone_somewhere(g):
    "Whether each tap is, on each axis, somewhere the only one to read its pixel."
    return all(any(row[u] >= 0 and row.count(row[u]) == 1 for row in table.tolist()) for table in g.axes for u in range(table.shape[1]))


def same_way_back(conv, x, to):
    "Every tap that reads a pixel anywhere comes back bit for bit; the others, of which the released layer knows nothing, as zero."
    back = nearest_cnn(embed(conv, shape_of(x), to, check=False), check=False)
    assert type(back) is type(conv) and back.weight.is_contiguous() and back.weight.dtype == conv.weight.dtype
    assert (back.bias is None) == (conv.bias is None) and (conv.bias is None or torch.equal(back.bias, conv.bias))
    assert close(back(x), conv(x), 1e-10)
    if conv.padding_mode == "zeros": assert torch.equal(back.weight, conv.weight*read_by_a_tap(conv, x))
    elif alone_somewhere(geometry_of(conv, x)): assert torch.equal(back.weight, conv.weight)


def matrix_by_autograd(conv, g):
    "The matrix of `conv`, without its bias, from the images of all unit inputs."
    with torch.no_grad(): return conv(torch.eye(math.prod(g.in_shape), dtype=torch.float64).view(-1, *g.in_shape)).flatten(1).T


def matrices_of_taps(conv, g):
    "The matrices of all unit kernels: they span the CNN subspace."
    unit, found = copy.deepcopy(conv), []
    unit.bias = None
    for k in range(conv.weight.numel()):
        with torch.no_grad(): unit.weight.zero_().view(-1)[k] = 1
        found.append(matrix_by_autograd(unit, g).flatten())
    return torch.stack(found, 1)


def projections_are_the_dense_ones(conv, x):
    "Both projections against least squares in the span of the unit kernels' matrices, which PyTorch computes."
    g = geometry_of(conv, x)
    W, basis = rand(*g.matrix_shape), matrices_of_taps(conv, g)
    local = (basis != 0).any(1).view(g.matrix_shape)
    assert torch.equal(g.mask, local) and torch.equal(project_lcn(W, g), W*local)
    nearest = basis @ (torch.linalg.pinv(basis.T @ basis, hermitian=True) @ (basis.T @ W.flatten()))
    assert close(project_cnn(W, g), nearest.view(g.matrix_shape), 1e-10)


DRAWN = set()


@over_cases(times=2350)
def test_one_convolution_same_function_gradient_and_way_back(case):
    for to in RELEASED: same_function(*case, to), same_way_back(*case, to)
    same_gradient(*case)
    DRAWN.add(repr(geometry_of(*case)))


def test_at_least_two_thousand_geometries_were_drawn(request):
    items = request.session.items
    before = [item.name for item in items[:items.index(request.node)]]
    if not any("one_convolution_same" in name for name in before): pytest.skip("counts what the test before has drawn")
    assert len(DRAWN) >= 2000
    for mode in PADDING_MODES: assert sum(repr(mode) in g for g in DRAWN) >= 100
    assert min(sum(f"transposed={kind}" in g for g in DRAWN) for kind in (True, False)) >= 500


@over_cases(times=300, smaller=1)
def test_projections_are_the_dense_ones(case): projections_are_the_dense_ones(*case)


@over_cases(times=300, smaller=1)
def test_projections_are_orthogonal_and_nested(case):
    conv, x = case
    g = geometry_of(conv, x)
    V, W = rand(*g.matrix_shape, seed=1), rand(*g.matrix_shape, seed=2)
    local, nearest = project_lcn(W, g), project_cnn(W, g)
    for project, got in (project_lcn, local), (project_cnn, nearest):
        other = project(V, g)
        assert close(project(got, g), got, 1e-12)
        assert math.isclose((V*got).sum(), (other*W).sum(), rel_tol=1e-10, abs_tol=1e-10)
        assert abs(float((other*(W - got)).sum())) <= 1e-10*float(W.norm()*V.norm())
    assert close(project_lcn(nearest, g), nearest, 1e-12) and close(project_cnn(local, g), nearest, 1e-12)
    K = matrix_from_kernel(conv.weight, g)
    assert torch.equal(project_lcn(K, g), K) and (torch.equal if alone_somewhere(g) else lambda a, b: close(a, b, 1e-12))(project_cnn(K, g), K)


@over_cases(times=300, smaller=1)
def test_shares_and_residuals(case):
    conv, x = case
    layer = embed(conv, shape_of(x))
    g, own, drawn = layer.geometry, squares(layer), reinitialize(layer, seed=0)
    assert own["off_local"] == 0 and own["unshared"] <= 1e-24*float(layer.weight.detach().square().sum())
    got, W = squares(drawn), drawn.weight.detach()
    local, nearest = project_lcn(W, g), project_cnn(W, g)
    wanted = dict(convolutional=nearest, unshared=local - nearest, off_local=W - local)
    for part, matrix in wanted.items(): assert math.isclose(got[part], matrix.square().sum(), rel_tol=1e-10, abs_tol=1e-12)
    table = shares(drawn)
    assert math.isclose(table.loc["all", list(wanted)].sum(), 1, rel_tol=1e-12) and math.isclose(table.loc["all", "norm"], W.norm(), rel_tol=1e-12)
    spread = 0 if drawn.bias is None else drawn.bias.detach().view(g.out_channels, -1).var(1, unbiased=False).sum()*math.prod(g.output_size)
    table, wanted = residuals(drawn), dict(lcn=(W - local).norm(), cnn=((W - nearest).square().sum() + spread)**.5)
    for kind, norm in wanted.items():
        assert all(math.isclose(table.loc[name, kind], norm, rel_tol=1e-10, abs_tol=1e-10) for name in ("all", ""))


@over_cases()
def test_local_weights_and_their_matrix_compute_the_same(case):
    conv, x = case
    layer = reinitialize(embed(conv, shape_of(x), "lcn"), seed=3)
    g, W = layer.geometry, matrix_from_local(layer.weight, layer.geometry)
    assert close(F.linear(x.flatten(1), W, layer.bias), layer(x).flatten(1), 1e-12)
    assert torch.equal(local_from_matrix(W, g), layer.weight) and torch.equal(W != 0, g.mask)
    assert torch.equal(kernel_from_matrix(W, g), kernel_from_local(layer.weight, g))
    assert torch.equal(matrix_from_local(local_from_kernel(conv.weight, g), g), matrix_from_kernel(conv.weight, g))
    empty = (g.reads < 0)[:, None, :, None].expand_as(layer.weight)
    assert not layer.weight[empty].any() and g.local_shape == layer.weight.shape


def test_a_transposed_convolution_may_need_its_output_padding():
    "Without output_padding this one has no output at all; with it PyTorch makes one pixel."
    conv, x = conv_of(1, 2, 2, 2, stride=2, padding=1, output_padding=1, transposed=True), rand(2, 2, 1)
    assert conv(x).shape == (2, 2, 1)
    for to in RELEASED: same_function(conv, x, to), same_way_back(conv, x, to)


@BOTH
@pytest.mark.parametrize("n, kw, size", [
    (1, dict(kernel_size=3, stride=2, padding=1), (5,)), (2, dict(kernel_size=(2, 3), groups=2, padding=1), (3, 3)),
    (3, dict(kernel_size=2, dilation=2, padding=1, bias=False), (2, 3, 2)), (2, dict(kernel_size=3, padding=1, padding_mode="reflect"), (3, 2)),
    (2, dict(kernel_size=2, stride=2, groups=2, transposed=True), (2, 2))])
def test_gradcheck(to, n, kw, size):
    layer, x = embed(conv_of(n, 2, 2, **kw), (2, *size), to), rand(2, 2, *size).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]
    call = lambda x, *values: torch.func.functional_call(layer, dict(zip(names, values)), (x,))
    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))


# Negative controls: a wrong map must make the properties fail

ASYMMETRIC = {
    "plain": (conv_of(2, 2, 3, (3, 2), stride=(1, 2), padding=(1, 0), seed=4), rand(2, 2, 4, 5, seed=4)),
    "transposed": (conv_of(2, 2, 3, (3, 2), stride=(2, 1), padding=(1, 0), output_padding=(1, 0), transposed=True, seed=4), rand(2, 2, 4, 3, seed=4)),
    "reflect": (conv_of(2, 2, 3, (3, 2), padding=(2, 1), stride=(1, 2), padding_mode="reflect", seed=4), rand(2, 2, 5, 6, seed=4))}
CONTROLS = pytest.mark.parametrize("case", ASYMMETRIC.values(), ids=ASYMMETRIC)


def break_map(monkeypatch, how):
    "Change the table of each axis, from which matrices, local weights and everything else are made."
    right = ConvGeometry.axes.fget
    monkeypatch.setattr(ConvGeometry, "axes", property(lambda self: [how(table) for table in right(self)]))
    for table in (geometry._local_shape, matrices._runs, matrices._lone_places, matrices._inverse_counts):
        monkeypatch.setattr(table.__module__ + "." + table.__name__, table.__wrapped__)  # nothing is remembered


PERMUTED = {"rolled": lambda t: t.roll(1, 0), "shuffled": lambda t: t[torch.randperm(len(t), generator=torch.Generator().manual_seed(1))],
            "taps flipped": lambda t: t.flip(1)}
PROPERTIES = {"function fcn": lambda *c: same_function(*c, "fcn"), "function lcn": lambda *c: same_function(*c, "lcn"),
              "gradient": same_gradient, "projections": projections_are_the_dense_ones}


@CONTROLS
@pytest.mark.parametrize("how", PERMUTED.values(), ids=PERMUTED)
@pytest.mark.parametrize("holds", PROPERTIES.values(), ids=PROPERTIES)
def test_a_permuted_map_is_noticed(monkeypatch, how, holds, case):
    holds(*case)
    break_map(monkeypatch, how)
    if holds is projections_are_the_dense_ones and how is PERMUTED["taps flipped"]: return holds(*case)  # other names of the taps, the same subspaces
    with pytest.raises(AssertionError): holds(*case)


@CONTROLS
@BOTH
def test_a_map_that_loses_a_tap_is_noticed(monkeypatch, to, case):
    same_way_back(*case, to)
    break_map(monkeypatch, lambda t: t.index_fill(1, torch.tensor([1]), -1))
    with pytest.raises(AssertionError): same_way_back(*case, to)


@CONTROLS
@BOTH
@pytest.mark.parametrize("rows", [True, False], ids=["outputs", "inputs"])
def test_a_shuffled_embedding_is_another_function(to, rows, case):
    conv, x = case
    layer = embed(conv, shape_of(x), to)
    axis = (0 if rows else 1) if to == "fcn" else (0 if rows else 2)
    order = torch.randperm(layer.weight.shape[axis], generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): layer.weight.copy_(layer.weight.index_select(axis, order))
    assert not close(layer(x), conv(x), 1e-3)


# Every dtype

@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kw", [dict(kernel_size=3, padding=1, groups=2), dict(kernel_size=(2, 3), padding=1, stride=2, padding_mode="replicate"),
                                dict(kernel_size=3, stride=2, padding=1, output_padding=1, transposed=True)], ids=["plain", "replicate", "transposed"])
def test_dtypes(to, dtype, kw):
    conv, x = conv_of(2, 4, 6, dtype=dtype, **kw), rand(3, 4, 5, 6).to(dtype)
    layer = embed(conv, (4, 5, 6), to)
    assert {p.dtype for p in layer.parameters()} == {dtype} and layer(x).dtype == dtype
    exact, tolerance = copy.deepcopy(conv).double(), 8*torch.finfo(dtype).eps
    wanted = embed(exact, (4, 5, 6), to)
    assert (torch.equal if conv.padding_mode == "zeros" else lambda a, b: close(a, b, tolerance))(layer.weight, wanted.weight.to(dtype))
    assert close(layer(x).double(), exact(x.double()), tolerance) and close(layer(x).double(), conv(x).double(), 2*tolerance)
    back = nearest_cnn(layer)
    assert back.weight.dtype == dtype and torch.equal(back.weight, conv.weight) and torch.equal(back.bias, conv.bias)


# Whole networks

def network(name, width, dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name]((3, 32, 32), 10, width=width).to(dtype).eval()


@pytest.mark.parametrize("name, width, dtype, tolerance", [
    ("skinny", 64, torch.float64, 1e-12), ("skinny", 64, torch.float32, 1e-5), ("alexnet", 8, torch.float64, 1e-12), ("alexnet", 64, torch.float32, 1e-5)])
def test_networks_of_the_papers(name, width, dtype, tolerance):
    cnn, x = network(name, width, dtype), rand(2, 3, 32, 32).to(dtype)
    with torch.inference_mode():
        for to in ("fcn", "lcn"):
            released = embed(cnn, (3, 32, 32), to)
            assert close(released(x), cnn(x), tolerance)
            got = sum(m.weight.numel() for m in released.modules() if isinstance(m, (FullyConnected, LocallyConnected)))
            assert got == released_weights(conv_geometries(cnn, (3, 32, 32)), to)
            back = nearest_cnn(released).state_dict()
            assert all(torch.equal(v, back[k]) for k, v in cnn.state_dict().items())
            del released


def test_number_of_weights_of_the_papers():
    released = dict(skinny=3072*64*17**2 + (64*8**2)**2 + (64*3**2)**2,
                    alexnet=3072*64*17**2 + (64*8**2)*(192*8**2) + (192*3**2)*(384*3**2) + (384*3**2)*(256*3**2) + (256*3**2)**2)
    for name, weights in ("skinny", 143_178), ("alexnet", 2_848_906):
        cnn = MODELS[name]((3, 32, 32))
        assert sum(p.numel() for p in cnn.parameters()) == weights and released_weights(conv_geometries(cnn, (3, 32, 32))) == released[name]


class Residual(nn.Module):
    "Nested, with BatchNorm, dropout, a skip connection, and one convolution that is used twice, the second time under another name."
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.ModuleDict(dict(a=nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)), skip=nn.Conv2d(4, 4, 1)))
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
    return {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def unchanged(model, before):
    return all(torch.equal(v, model.state_dict()[k]) for k, v in before[0].items()) and frozen(model)[1:] == before[1:]


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_residual_network(residual, to, training):
    x = rand(6, 2, 5, 5)
    residual.train(training).head[0].eval()  # one flag that differs from the others
    before, state = frozen(residual), torch.get_rng_state()
    released = embed(residual, (2, 5, 5), to)
    assert unchanged(residual, before) and torch.equal(state, torch.get_rng_state())
    assert [m.training for m in released.modules()] == before[1]
    assert released.alias is released.twice and released.twice is not residual.twice
    assert {type(m) for m in released.modules() if hasattr(m, "geometry")} == {FullyConnected if to == "fcn" else LocallyConnected}
    assert close(released(x), residual(x), 1e-12)
    for name, value in residual.named_buffers(): assert close(dict(released.named_buffers())[name].double(), value.double(), 1e-12)
    with torch.no_grad():
        for p in released.parameters(): p.add_(1)
    assert not [k for k, p in residual.named_parameters() if not torch.equal(p, before[0][k])], "the embedded network shares memory with its CNN"


@BOTH
def test_dropout_draws_the_same(residual, to):
    x, outputs = rand(6, 2, 5, 5), []
    for model in (residual.train(), embed(residual, (2, 5, 5), to)):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            outputs.append(model(x))
    assert close(*outputs, 1e-12) and not close(outputs[0], residual.eval()(x), 1e-3)


@BOTH
def test_gradient_of_a_shared_layer_is_one_gradient(residual, to):
    x, released = rand(3, 2, 5, 5), embed(residual.eval(), (2, 5, 5), to)
    residual(x).square().sum().backward()
    released(x).square().sum().backward()
    g, grad = released.twice.geometry, released.twice.weight.grad
    copies = (g.source >= 0).sum(0).view(3, 3)
    assert close(TIED[to](grad, g), residual.twice.weight.grad, 1e-10)
    assert close(kernel_from_local(grad, g) if to == "lcn" else kernel_from_matrix(grad, g), residual.twice.weight.grad/copies, 1e-10)


@BOTH
@pytest.mark.parametrize("chosen, released", [(["twice"], 1), (lambda name, m: m.kernel_size == (3, 3), 3), ([], 0), (None, 4)])
def test_only_the_chosen_layers(residual, to, chosen, released):
    x = rand(3, 2, 5, 5)
    got = embed(residual.eval(), (2, 5, 5), to, layers=chosen)
    assert close(got(x), residual(x), 1e-12) and sum(hasattr(m, "geometry") for m in got.modules()) == released


@BOTH
def test_round_trips(residual, to, tmp_path):
    x, released = rand(3, 2, 5, 5), embed(residual.eval(), (2, 5, 5), to)
    for copied in (copy.deepcopy(released), pickle.loads(pickle.dumps(released)), reinitialize(released, seed=1)):
        copied.load_state_dict(released.state_dict())
        assert torch.equal(copied(x), released(x))
    assert not torch.equal(reinitialize(released, seed=1)(x), released(x))
    assert all(torch.equal(a, b) for a, b in zip(reinitialize(released, seed=1).parameters(), reinitialize(released, seed=1).parameters()))
    assert not torch.equal(reinitialize(released, seed=2).twice.weight, reinitialize(released, seed=1).twice.weight)
    assert set(released.state_dict()) == set(residual.state_dict()), "the names of weights stay"


def test_reinitialize_leaves_the_random_state_and_its_model_alone(residual):
    released = embed(residual, (2, 5, 5))
    before, state = frozen(released), torch.get_rng_state()
    reinitialize(released, seed=1)
    assert unchanged(released, before) and torch.equal(state, torch.get_rng_state())


def test_a_model_that_draws_numbers_leaves_the_random_state_alone():
    class Noisy(nn.Module):
        def __init__(self): super().__init__(); self.conv = nn.Conv2d(1, 2, 3)
        def forward(self, x): return self.conv(F.dropout(x))
    model, state = Noisy(), torch.get_rng_state()
    embed(model, (1, 5, 5))
    assert torch.equal(state, torch.get_rng_state())


def test_geometries_by_name(residual):
    assert {name: g.out_shape for name, g in conv_geometries(residual, (2, 5, 5)).items()} == {
        "stem.0": (4, 5, 5), "blocks.a.0": (4, 5, 5), "blocks.skip": (4, 5, 5), "twice": (4, 5, 5)}


def made(build, seed=0):
    "A float64 model with weights of `seed`; the global random state is left alone."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().double()


class UNet(nn.Module):
    "Two scales; `output_size` is given in the forward pass, so that odd sizes come back."
    def __init__(self, keyword=True, full=False):
        super().__init__()
        self.keyword, self.full = keyword, full
        self.down, self.below = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.up, self.out = nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Conv2d(6, 2, 3, padding=1, padding_mode="circular")

    def forward(self, x):
        skip = F.relu(self.down(x))
        below, size = F.relu(self.below(F.max_pool2d(skip, 2))), skip.shape if self.full else skip.shape[2:]
        up = self.up(below, output_size=size) if self.keyword else self.up(below, list(size))
        return self.out(torch.cat([skip, up], 1))


@BOTH
@pytest.mark.parametrize("size", [(5, 7), (6, 6), (4, 5)])
@pytest.mark.parametrize("options", [dict(), dict(keyword=False), dict(full=True)], ids=["keyword", "positional", "with batch axis"])
def test_u_net(to, size, options):
    model, x = made(lambda: UNet(**options)), rand(3, 2, *size)
    released = embed(model, (2, *size), to)
    assert close(released(x), model(x), 1e-12) and type(released.up) is RELEASED[to]
    back, mixed = nearest_cnn(released), () if size == (6, 6) else ("below.weight",)  # reflected in two rows, two taps read the same pixels everywhere
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in model.state_dict().items() if k not in mixed) and close(back(x), model(x), 1e-12)
    with pytest.raises(ValueError, match="embed the network again"): released(rand(3, 2, size[0] + 2, size[1]))


def test_a_released_layer_makes_one_output_size():
    layer = embed(made(UNet), (2, 5, 7)).up
    with pytest.raises(ValueError, match=r"makes outputs of size \(5, 7\)"): layer(rand(1, 4, 2, 3), output_size=(4, 6))


SIGNALS = {
    1: lambda: nn.Sequential(nn.Conv1d(2, 4, 5, stride=2, padding=2, groups=2), nn.ReLU(), nn.ConvTranspose1d(4, 2, 3, stride=2),
                             nn.Flatten(), nn.Linear(22, 3)),
    3: lambda: nn.Sequential(nn.Conv3d(2, 3, 2, padding=(1, 0, 1), padding_mode="replicate"), nn.ReLU(), nn.ConvTranspose3d(3, 2, (1, 2, 2)), nn.Flatten())}


@BOTH
@pytest.mark.parametrize("axes, size", [(1, (10,)), (3, (2, 3, 4))])
def test_signals_and_volumes(to, axes, size):
    model, x = made(SIGNALS[axes]), rand(2, 2, *size)
    released = embed(model, (2, *size), to)
    assert close(released(x), model(x), 1e-12) and close(nearest_cnn(released)(x), model(x), 1e-12)
    assert sum(isinstance(m, RELEASED[to]) for m in released.modules()) == 2


class Tied(nn.Module):
    "Two convolutions with one kernel."
    def __init__(self, stride=1):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1, stride=stride, bias=False)
        self.b.weight = self.a.weight
    def forward(self, x): return self.b(F.relu(self.a(x)))


@BOTH
def test_tied_kernels_stay_tied(to):
    model, x = made(Tied), rand(2, 2, 4, 5)
    released = embed(model, (2, 4, 5), to)
    assert released.a is not released.b and released.a.weight is released.b.weight and len(list(released.parameters())) == 2
    model(x).square().sum().backward(), released(x).square().sum().backward()
    assert close(released(x), model(x), 1e-12) and close(TIED[to](released.a.weight.grad, released.a.geometry), model.a.weight.grad, 1e-10)


@BOTH
@pytest.mark.parametrize("stride, layers", [(2, None), (1, ["a"]), (1, ["b"])])
def test_tied_kernels_that_cannot_stay_tied_are_refused(to, stride, layers):
    with pytest.raises(ValueError, match="share a parameter but not a geometry"): embed(made(lambda: Tied(stride)), (2, 4, 5), to, layers)


@BOTH
def test_stage_by_stage(residual, to):
    for first in ["twice"], ["stem.0", "blocks.skip"], lambda name, m: m.groups == 2:
        half = embed(residual, (2, 5, 5), to, layers=first)
        staged, at_once = embed(half, (2, 5, 5), to), embed(residual, (2, 5, 5), to)
        assert staged.state_dict().keys() == at_once.state_dict().keys() and 1 <= sum(hasattr(m, "geometry") for m in half.modules()) < 4
        assert all(torch.equal(v, at_once.state_dict()[k]) for k, v in staged.state_dict().items())
    by_name = embed(residual, (2, 5, 5), to, layers="twice")
    assert [name for name, m in by_name.named_modules() if hasattr(m, "geometry")] == ["twice"]


@BOTH
def test_one_network_in_both_kinds(residual, to):
    other, x = "lcn" if to == "fcn" else "fcn", rand(3, 2, 5, 5)
    mixed = embed(embed(residual.eval(), (2, 5, 5), to, layers="twice"), (2, 5, 5), other)
    assert close(mixed(x), residual(x), 1e-12) and {type(m) for m in mixed.modules() if hasattr(m, "geometry")} == set(RELEASED.values())
    assert all(torch.equal(v, nearest_cnn(mixed).state_dict()[k]) for k, v in residual.state_dict().items())


@BOTH
def test_lazy_modules_after_their_first_batch(to):
    model, x = nn.Sequential(nn.LazyConv2d(3, 3, padding=1), nn.ReLU(), nn.LazyConvTranspose2d(2, 2), nn.Flatten(), nn.LazyLinear(4)), rand(2, 2, 4, 5).float()
    with pytest.raises(ValueError, match="let it process one batch first"): embed(model, (2, 4, 5), to)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model(x)
    assert close(embed(model, (2, 4, 5), to)(x), model(x), 1e-5)


@BOTH
def test_frozen_convolutions_stay_frozen(to):
    model = made(lambda: nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 2)))
    model[0].weight.requires_grad_(False)
    for released in (embed(model, (2, 5, 5), to), convert(embed(model, (2, 5, 5), to), "fcn"), nearest_cnn(embed(model, (2, 5, 5), to))):
        assert [p.requires_grad for p in released.parameters()] == [False, True, True, True]


# BatchNorm

def settled(build, shape, seed=0):
    "A float64 model in evaluation mode whose BatchNorms have affine parameters and running statistics that are not the default."
    model = made(build, seed)
    for i, norm in enumerate(m for m in model.modules() if isinstance(m, BATCHNORMS)):
        for j, t in enumerate((norm.weight, norm.bias, norm.running_mean, norm.running_var)):
            if t is not None: t.data.copy_(rand(len(t), seed=10*i + j).abs() + .5)
    return model.eval()


def norms(model): return [name for name, m in model.named_modules() if isinstance(m, BATCHNORMS)]


FOLDABLE = {
    "plain": lambda: [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)], "without bias": lambda: [nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)],
    "without affine": lambda: [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False)], "groups": lambda: [nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4)],
    "reflect": lambda: [nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)],
    "transposed": lambda: [nn.ConvTranspose2d(2, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4)],
    "transposed, groups": lambda: [nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2), nn.BatchNorm2d(4)]}


@BOTH
@pytest.mark.parametrize("build", FOLDABLE.values(), ids=FOLDABLE)
def test_batchnorm_is_folded(to, build):
    model, x = settled(lambda: nn.Sequential(*build(), nn.ReLU()), (2, 5, 6)), rand(3, 2, 5, 6)
    before = frozen(model)
    folded = embed(model, (2, 5, 6), to, fold_batchnorm=True)
    assert unchanged(model, before) and not norms(folded) and norms(model) and close(folded(x), model(x), 1e-12)
    conv = nearest_cnn(folded)[0]
    if not (conv.transposed and conv.groups > 1):  # of which PyTorch's own function knows nothing
        fused = fuse_conv_bn_eval(model[0], model[1], transpose=conv.transposed)
        assert close(conv.weight, fused.weight, 1e-12) and close(conv.bias, fused.bias, 1e-12)
    kept = embed(model, (2, 5, 6), to)
    assert norms(kept) == ["1"] and close(kept(x), model(x), 1e-12)


@BOTH
@pytest.mark.parametrize("axes", [1, 3])
def test_batchnorm_of_signals_and_volumes_is_folded(to, axes):
    norm = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[axes]
    model, x = settled(lambda: nn.Sequential(KINDS[False, axes](2, 3, 2), norm(3), KINDS[True, axes](3, 2, 2), norm(2)), None), rand(2, 2, *(3,)*axes)
    folded = embed(model, shape_of(x), to, fold_batchnorm=True)
    assert not norms(folded) and close(folded(x), model(x), 1e-12)


class Wired(nn.Module):
    "A convolution, a BatchNorm, and a way between them that must not be folded."
    def __init__(self, way, **norm):
        super().__init__()
        self.conv, self.norm, self.way = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2, **norm), way
    def forward(self, x): return self.way(self, x)


def skipped(m, x):
    y = m.conv(x)
    return F.relu(m.norm(y)) + y


def returned(m, x):
    y = m.conv(x)
    return torch.stack([m.norm(y), y])


UNFOLDABLE = {
    "a residual": skipped, "another output": returned, "ReLU in place": lambda m, x: m.norm(F.relu_(m.conv(x))), "ReLU": lambda m, x: m.norm(F.relu(m.conv(x))),
    "BatchNorm first": lambda m, x: m.conv(m.norm(x)), "convolution used twice": lambda m, x: m.norm(m.conv(m.conv(x))),
    "both used twice": lambda m, x: m.norm(m.conv(m.norm(m.conv(x)))), "convolution elsewhere": lambda m, x: m.norm(m.conv(x)) + m.conv(x),
    "BatchNorm elsewhere": lambda m, x: m.norm(m.conv(x)) + m.norm(x), "sum in place": lambda m, x: m.norm(m.conv(x).add_(1)),
    "kernel read elsewhere": lambda m, x: m.norm(m.conv(x))}


@BOTH
@pytest.mark.parametrize("way", UNFOLDABLE)
def test_batchnorm_that_does_not_simply_follow_stays(to, way):
    model, x = settled(lambda: Wired(UNFOLDABLE[way]), (2, 4, 5)), rand(3, 2, 4, 5)
    if way == "kernel read elsewhere":
        model.other = nn.BatchNorm2d(2).double()
        model.other.bias = model.norm.bias
    folded = embed(model, (2, 4, 5), to, fold_batchnorm=True)
    assert "norm" in norms(folded) and close(folded(x), model(x), 1e-12)


def detached(m, x):
    y = m.conv(x)
    return m.norm(y)*y.detach().sigmoid()


def largest_channel(m, x):
    y = m.conv(x)
    return m.norm(y) + y.argmax(1, keepdim=True)


def as_a_number(m, x):
    y = m.conv(x)
    return m.norm(y)*float(y.max())


def frozen_backbone(m, x):
    "A feature extractor without a graph; the affine map after it makes one."
    with torch.no_grad(): features = m.norm(F.relu(m.conv(x)))
    return m.head(features)


def frozen_residual(m, x):
    with torch.no_grad():
        y = m.conv(x)
        features = m.norm(y) + y
    return m.head(features)


HIDDEN = [detached, largest_channel, as_a_number, frozen_backbone, frozen_residual]


@BOTH
@pytest.mark.parametrize("way", HIDDEN, ids=lambda way: way.__name__)
def test_batchnorm_stays_where_the_graph_does_not_show_what_is_between(to, way):
    "Autograd knows nothing of what happens to detached values or without gradients: then the function must stay all the same."
    model, x = settled(lambda: Wired(way), (2, 4, 5)), rand(3, 2, 4, 5)
    model.head = made(lambda: nn.Linear(5, 3))
    assert close(embed(model, (2, 4, 5), to, fold_batchnorm=True)(x), model(x), 1e-12)


def with_a_hook(norm): norm.register_forward_hook(lambda m, args, out: 2*out)


def with_a_pre_hook(norm): norm.register_forward_pre_hook(lambda m, args: 2*args[0])


def with_another_forward(norm):
    norm.forward = types.MethodType(lambda norm, x: 2*F.batch_norm(x, norm.running_mean, norm.running_var), norm)


@BOTH
@pytest.mark.parametrize("change", [with_a_hook, with_a_pre_hook, with_another_forward], ids=lambda change: change.__name__)
def test_batchnorm_that_computes_something_else_stays(to, change):
    model, x = settled(lambda: Wired(lambda m, x: m.norm(m.conv(x))), (2, 4, 5)), rand(3, 2, 4, 5)
    change(model.norm)
    assert close(embed(model, (2, 4, 5), to, fold_batchnorm=True)(x), model(x), 1e-12)


@BOTH
@pytest.mark.parametrize("fold", [False, True])
def test_inputs_by_keyword(to, fold):
    "PyTorch calls the input of a convolution, and of BatchNorm, `input`."
    model, x = settled(lambda: Wired(lambda m, x: m.norm(input=m.conv(input=x))), (2, 4, 5)), rand(3, 2, 4, 5)
    released = embed(model, (2, 4, 5), to, fold_batchnorm=fold)
    assert close(released(x), model(x), 1e-12) and close(nearest_cnn(released)(x), model(x), 1e-12)


def test_batchnorm_without_statistics_stays():
    model, x = settled(lambda: nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)), (2, 4, 5)), rand(3, 2, 4, 5)
    folded = embed(model, (2, 4, 5), fold_batchnorm=True)
    assert norms(folded) == ["1"] and close(folded(x), model(x), 1e-12)


def test_batchnorm_in_training_mode_is_refused(residual):
    with pytest.raises(ValueError, match="training mode.*call model.eval"): embed(residual.train(), (2, 5, 5), fold_batchnorm=True)
    model = settled(lambda: Wired(skipped), (2, 4, 5)).train()  # its BatchNorm stays, whatever its mode is
    assert embed(model, (2, 4, 5), fold_batchnorm=True).norm.training


@BOTH
def test_batchnorm_of_a_network(residual, to):
    before, x = frozen(residual.eval()), rand(3, 2, 5, 5)
    folded = embed(residual, (2, 5, 5), to, fold_batchnorm=True)
    assert unchanged(residual, before) and not norms(folded) and close(folded(x), residual(x), 1e-12)
    some = embed(residual, (2, 5, 5), to, layers=["stem.0"], fold_batchnorm=True)
    assert norms(some) == ["blocks.a.1"] and sum(hasattr(m, "geometry") for m in some.modules()) == 1 and close(some(x), residual(x), 1e-12)


# The ladder: CNN, LCN, FCN

def ladder():
    "A network with plain, grouped, reflecting and transposed convolutions, and an input."
    return made(lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect", stride=2),
                                      nn.ReLU(), nn.ConvTranspose2d(3, 2, 3, stride=2, bias=False))), rand(3, 2, 5, 4)


def test_a_step_up_is_exact():
    cnn, x = ladder()
    local = reinitialize(embed(cnn, (2, 5, 4), "lcn"), seed=1)
    before, dense = frozen(local), convert(local, "fcn")
    assert close(dense(x), local(x), 1e-12) and unchanged(local, before) and (residuals(dense)["lcn"] == 0).all()
    assert {type(m) for m in dense.modules() if hasattr(m, "geometry")} == {FullyConnected}
    again = convert(dense, "lcn")
    assert torch.equal(again(x), local(x)) and all(torch.equal(v, again.state_dict()[k]) for k, v in local.state_dict().items())
    for name in "0", "2", "4": assert math.isclose(residuals(dense).loc[name, "cnn"], residuals(local).loc[name, "cnn"], rel_tol=1e-10)


def test_a_step_down_is_the_nearest():
    cnn, _ = ladder()
    dense = reinitialize(embed(cnn, (2, 5, 4)), seed=1)
    local, near = convert(dense, "lcn"), nearest_cnn(dense)
    for i in 0, 2, 4:
        g, W = dense[i].geometry, dense[i].weight
        assert torch.equal(matrix_from_local(local[i].weight, g), project_lcn(W, g)) and close(matrix_from_kernel(near[i].weight, g), project_cnn(W, g), 1e-12)
        if dense[i].bias is not None: assert torch.equal(local[i].bias, dense[i].bias) and close(near[i].bias, dense[i].bias.view(g.out_channels, -1).mean(1), 1e-12)
        assert math.isclose(residuals(dense).loc[str(i), "lcn"], (matrix_from_local(local[i].weight, g) - W).detach().norm(), rel_tol=1e-10)
    through = nearest_cnn(local).state_dict()
    assert all(close(v, through[k], 1e-12) for k, v in near.state_dict().items())


@BOTH
def test_what_comes_from_a_cnn_has_no_residual(to):
    cnn, x = ladder()
    released = embed(cnn, (2, 5, 4), to)
    for kind in RELEASED: assert (residuals(convert(released, kind)) == 0).all(axis=None) and close(convert(released, kind)(x), cnn(x), 1e-12)
    same = convert(released, to)
    assert all(a is not b and torch.equal(a, b) for a, b in zip(same.parameters(), released.parameters()))
    assert all(torch.equal(v, convert(released).state_dict()[k]) for k, v in cnn.state_dict().items())


def test_layers_used_twice_stay_one_in_every_step(residual):
    dense = embed(residual, (2, 5, 5))
    for to in ("lcn", "cnn"): assert (lambda m: m.alias is m.twice)(convert(dense, to))


@pytest.mark.parametrize("to", ["cnn", "lcn", "fcn"])
def test_convert_tied_kernels_stay_tied(to):
    tied = convert(embed(made(Tied), (2, 4, 5), "lcn"), to)
    assert tied.a.weight is tied.b.weight


def test_convert_refuses_a_cnn_and_an_unknown_kind():
    for to in "cnn", "lcn", "fcn":
        with pytest.raises(ValueError, match="embed a CNN first"): convert(ladder()[0], to)
    with pytest.raises(ValueError, match="embed a CNN first"): residuals(ladder()[0])
    with pytest.raises(ValueError, match="'cnn', 'lcn' or 'fcn'"): convert(embed(ladder()[0], (2, 5, 4)), "mlp")


# Memory

PEAK = """
import torch
from efcn_nb.ladder.embedding import embed
from efcn_nb.materials.models import MODELS
def peak(): return 1024*int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])
embed(MODELS['alexnet']((3, 32, 32), width=1), (3, 32, 32), TO)
model = MODELS['alexnet']((3, 32, 32))
open('/proc/self/clear_refs', 'w').write('5')
before = peak()
released = embed(model, (3, 32, 32), TO)
print((peak() - before) / sum(p.numel()*p.element_size() for p in released.parameters()))
"""


@BOTH
def test_peak_memory_is_the_network(to):
    if not os.access("/proc/self/clear_refs", os.W_OK): pytest.skip("this system does not tell the peak of memory")
    child = subprocess.run([sys.executable, "-c", PEAK.replace("TO", repr(to))], capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stderr
    assert .9 <= float(child.stdout) <= 1.1


# Bad input: one clear sentence, before any work

def plain(**kw): return nn.Conv2d(3, 4, 3, padding=1, **kw)


class Halves(nn.Module):
    "One convolution called with two shapes, and one that is never called."
    def __init__(self, unused): super().__init__(); self.conv = nn.Conv2d(3, 3, 3, padding=1); self.other = plain() if unused else None
    def forward(self, x): return self.conv(x) if self.other else self.conv(F.max_pool2d(self.conv(x), 2))


class OwnConv(nn.Conv2d):
    def forward(self, x): return super().forward(x)**2


def after_a_step(model):
    model(torch.ones(1, 3, 8, 8))
    return model


def hooked():
    model = plain()
    model.register_forward_hook(lambda module, args, output: 2*output)
    return model


class Asserts(nn.Module):
    def __init__(self): super().__init__(); self.conv = plain()
    def forward(self, x):
        assert x.shape[-1] == 4, "only four pixels"
        return self.conv(x)


def pruned():
    model = nn.Sequential(plain())
    prune.l1_unstructured(model[0], "weight", .5)
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make, shape, kw, says", [
    (lambda: nn.Linear(3, 3), (3, 8, 8), {}, "no convolution"),
    (lambda: nn.Sequential(nn.ReLU()), (3, 8, 8), {}, "no convolution"),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(5, 2)), (3, 8, 8), {}, "does not fit"),
    (plain, (1, 8, 8), {}, "does not fit"),
    (plain, (2, 3, 8, 8), {}, "batch axis"),
    (plain, (3, 0, 8), {}, "does not fit"),
    (plain, 8, {}, "input_shape"),
    (lambda: nn.Conv2d(3, 4, 9), (3, 8, 8), {}, "does not fit"),
    (Asserts, (3, 8, 8), {}, "does not fit"),
    (lambda: Halves(False), (3, 8, 8), {}, r"conv is called with shapes \(3, 4, 4\) and \(3, 8, 8\)"),
    (lambda: Halves(True), (3, 8, 8), {}, "other is never called"),
    (lambda: OwnConv(3, 4, 3), (3, 8, 8), {}, "OwnConv"),
    (lambda: nn.LazyConv2d(4, 3), (3, 8, 8), {}, "the model is lazy; let it process one batch first"),
    (lambda: nn.Sequential(plain(), nn.LazyLinear(4)), (3, 8, 8), {}, "1.weight has no shape yet, because the model is lazy"),
    (lambda: parametrizations.weight_norm(plain()), (3, 8, 8), {}, "parametriz"),
    (lambda: parametrizations.spectral_norm(plain()), (3, 8, 8), {}, "parametriz"),
    (lambda: nn.Sequential(weight_norm(plain())), (3, 8, 8), {}, "plain convolution"),
    (lambda: after_a_step(nn.Sequential(spectral_norm(plain()))), (3, 8, 8), {}, "plain convolution"),
    (pruned, (3, 8, 8), {}, "plain convolution"),
    (hooked, (3, 8, 8), {}, "plain convolution"),
    (lambda: nn.Conv2d(3, 4, 3, padding=8, padding_mode="reflect"), (3, 8, 8), {}, "does not fit"),
    (lambda: nn.Conv2d(3, 4, 3, padding=9, padding_mode="circular"), (3, 8, 8), {}, "does not fit"),
    (plain, (3, 8, 8), dict(to="mlp"), "'fcn' or 'lcn'"),
    (lambda: nn.Sequential(plain()), (3, 8, 8), dict(layers=["first"]), "'first'.*'0'"),
])
def test_refusals(make, shape, kw, says):
    with pytest.raises(ValueError, match=says) as error: embed(make(), shape, **kw)
    assert len(str(error.value).splitlines()) == 1


def test_refuses_what_does_not_fit_in_memory():
    model = nn.Conv2d(3, 512, 3, padding=1)
    with pytest.raises(MemoryError, match=r"15,468.3 GB .*GB are free; use smaller images"): embed(model, (3, 224, 224))
    with pytest.raises(MemoryError, match="GB"): embed(model.double(), (3, 224, 224))


@BOTH
def test_released_layers_take_one_size_only(to):
    layer = embed(plain(), (3, 8, 8), to)
    for shape in (2, 3, 9, 8), (3, 8, 7), (1, 1, 3, 8, 8), (8, 8):
        with pytest.raises(ValueError, match="embed the network again"): layer(torch.zeros(shape))
    assert layer(torch.zeros(3, 8, 8)).shape == (4, 8, 8) and layer(torch.zeros(0, 3, 8, 8)).shape == (0, 4, 8, 8)


def test_what_is_not_embedded_has_no_way_back():
    for call in nearest_cnn, shares:
        with pytest.raises(ValueError, match="embed a CNN first"): call(nn.Linear(2, 2))


class Simple(nn.Conv2d):
    "A subclass that only chooses its options, as torchvision's video networks have them."
    def __init__(self, ci, co): super().__init__(ci, co, 3, padding=1, bias=False)


@BOTH
def test_a_subclass_that_computes_the_same_is_embedded(to):
    model, x = nn.Sequential(Simple(2, 3)).double(), rand(2, 2, 5, 5)
    assert close(embed(model, (2, 5, 5), to)(x), model(x), 1e-12)
    assert type(nearest_cnn(embed(model, (2, 5, 5), to))[0]) is nn.Conv2d


class Recycled(nn.Module):
    "BatchNorms that read short-lived tensors, and after each a convolution whose output can take over their memory."
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(4)])
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)])
    def forward(self, x):
        for norm, conv in zip(self.norms, self.convs): x = conv(norm(x*2)).relu()
        return x


def test_memory_used_again_is_not_taken_for_the_same_tensor():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Recycled().double().eval()
    for size in (4, 8, 16, 64):
        merged = merge_batchnorm(model, (4, size, size))
        assert sum(isinstance(m, nn.BatchNorm2d) for m in merged.modules()) == 4


# The same function, or one sentence

class Net(nn.Module):
    "A convolution, BatchNorm and a linear layer in float64, and a forward pass that is given; whatever else `more` adds."
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
    tensors = {k: (id(v), v.data_ptr(), v._version, v.detach().clone()) for k, v in (*model.named_parameters(), *model.named_buffers())}
    return tensors, [m.training for m in model.modules()], torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()


def untouched(model, before):
    after = alone(model)
    return (all(a[:3] == b[:3] and torch.equal(a[3], b[3]) for a, b in zip(before[0].values(), after[0].values(), strict=True))
            and before[1] == after[1] and torch.equal(before[2], after[2]) and before[3:] == after[3:])


ANOTHER = {  # name: forward pass, and where the two part
    "norm of the kernel": (lambda m, x: m.head(m.conv(x)/m.conv.weight.norm()), "at fc"),
    "sum of the biases": (lambda m, x: m.conv(x) - m.conv.bias.sum(), "at the forward pass of Net itself"),
    "type": (lambda m, x: m.head(m.conv(x).relu() if isinstance(m.conv, nn.Conv2d) else m.conv(x)), "at fc"),
    "name of the type": (lambda m, x: m.conv(x)*len(type(m.conv).__name__), "Net itself"),
    "fan-in": (lambda m, x: m.conv(x*m.conv.weight[0].numel()**-.5), "at conv"),
    "shape of the weight": (lambda m, x: m.conv(x)*m.conv.weight.shape[0], "Net itself"),
    "last axis of the weight": (lambda m, x: m.norm(m.conv(x)*m.conv.weight.shape[-1]), "at norm"),
    "kernel used again": (lambda m, x: F.conv_transpose2d(m.conv(x), m.conv.weight, padding=1), "fails in the forward pass of Net itself"),
    "penalty beside the output": (lambda m, x: (m.head(m.conv(x)), sum(p.square().sum() for p in m.parameters())), "Net itself"),
    "penalty in a dictionary": (lambda m, x: {"y": m.conv(x), "more": [m.conv.weight.abs().mean()]}, "Net itself"),
    "a number": (lambda m, x: (m.conv(x), float(m.conv.weight.sum())), "Net itself"),
    "numbers of weights": (lambda m, x: m.conv(x)*sum(p.numel() for p in m.parameters()), "Net itself"),
    "the state": (lambda m, x: m.conv(x)*m.state_dict()["conv.weight"].mean(), "Net itself"),
    "an attribute that released layers lack": (lambda m, x: F.pad(m.conv(x), m.conv._reversed_padding_repeated_twice), "fails"),
    "the way it is called": (lambda m, x: m.conv._conv_forward(m.conv(x)[:, :2], m.conv.weight, m.conv.bias), "fails"),
    "an answer from except": (lambda m, x: attempt(lambda: m.conv.weight.view(3, 2, 9).sum()*m.conv(x), m.conv(x)), "Net itself"),
    "once more": (lambda m, x: m.conv(m.conv(x)[:, :2]) if m.conv.weight.shape[-1] == 3 else m.conv(x), "")}


def attempt(call, other):
    try: return call()
    except RuntimeError: return other


@BOTH
@pytest.mark.parametrize("name", ANOTHER)
def test_another_function_is_refused(to, name):
    forward, where = ANOTHER[name]
    model = Net(forward).train()
    model.fc.eval()
    before = alone(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(ValueError, match=f"Net cannot be embedded.*{where}.*layers=") as error: embed(model, SHAPE, to)
        assert len(str(error.value).splitlines()) == 1 and untouched(model, before)
        embed(model, SHAPE, to, check=False)
    assert untouched(model, before)


def closure(m): m.f = lambda x: m.fc(x.flatten(1))


def function_with_default(m):
    def f(x, fc=m.fc): return fc(x.flatten(1))
    m.f = f


def weak(m):
    held = weakref.ref(m.fc)
    m.f = lambda x: held()(x.flatten(1))


def alias(m):
    m.double()
    w = m.fc.weight.detach()
    m.f = lambda x: x.flatten(1) @ w.T


def through_numpy(m):
    m.double()
    w = m.fc.weight.detach().numpy()
    m.f = lambda x: x.flatten(1) @ torch.from_numpy(w).T


def buffers_alone(m):
    m.plain = nn.BatchNorm2d(3, affine=False)
    m.f = lambda x: m.plain(x)


class Shared(nn.Linear):
    def __deepcopy__(self, memo): return self


def own_deepcopy(m): m.fc = m.f = Shared(75, 4)


THROUGH = dict(closure=closure, default=function_with_default, weak=weak, alias=alias, through_numpy=through_numpy, buffers_alone=buffers_alone)


@BOTH
@pytest.mark.parametrize("more", THROUGH.values(), ids=THROUGH)
@pytest.mark.parametrize("training", [True, False])
def test_a_copy_that_reads_the_original_is_refused(to, more, training):
    model = Net(lambda m, x: m.f(m.conv(x)), more).train(training)
    before = alone(model)
    with pytest.raises(ValueError, match="goes on using (fc.weight|fc.bias|plain.running_mean|plain.running_var) of the original") as error: embed(model, SHAPE, to)
    assert len(str(error.value).splitlines()) == 1 and untouched(model, before)


def test_a_copy_that_shares_a_module_is_refused():
    model = Net(lambda m, x: m.f(m.conv(x).flatten(1)), own_deepcopy)
    with pytest.raises(ValueError, match="goes on using fc.weight of the original"): embed(model, SHAPE)


@pytest.mark.parametrize("make", [
    lambda: Net(lambda m, x: m.f(x), lambda m: setattr(m, "f", lambda x: m.conv(x))), lambda: Net(lambda m, x: m.conv.forward(x)),
    lambda: Net(lambda m, x: F.conv2d(x, m.conv.weight)), lambda: Net(lambda m, x: type(m.conv).__call__(m.conv, x) if m.training else m.conv._conv_forward(x, m.conv.weight, None))])
def test_a_convolution_that_is_not_called_is_not_blamed_for_it(make):
    with pytest.raises(ValueError, match="conv is used without being called as a module"): embed(make(), SHAPE)


@pytest.mark.parametrize("verb, call", [
    ("converted", lambda m: convert(m, "fcn")), ("converted", lambda m: convert(m, "lcn")), ("converted", nearest_cnn), ("reinitialized", lambda m: reinitialize(m, 0))])
def test_every_step_proves_itself(verb, call):
    "What changed after embedding: a closure, and a forward pass that reads a weight."
    released = embed(Net(lambda m, x: m.head(m.conv(x))), SHAPE, "lcn")
    assert call(released) is not released
    closure(released)
    released._forward = lambda m, x: m.f(m.conv(x))
    before = alone(released)
    with pytest.raises(ValueError, match=f"Net cannot be {verb}.*goes on using fc.weight of the original"): call(released)
    assert untouched(released, before)
    released._forward = lambda m, x: m.head(m.conv(x)*m.conv.weight.numel())
    if call is nearest_cnn:
        with pytest.raises(ValueError, match="Net cannot be converted.*first part at fc"): call(released)


def test_a_cnn_with_a_closure_is_not_reinitialized():
    for more in closure, function_with_default:
        with pytest.raises(ValueError, match="goes on using f of the original"): reinitialize(Net(lambda m, x: m.f(m.conv(x)), more), 0)
        assert reinitialize(Net(lambda m, x: m.f(m.conv(x)), more), 0, inplace=True)


def test_merging_proves_itself():
    model = Net(lambda m, x: m.head(m.norm(m.conv(x)))*m.conv.weight.norm()).eval()
    model.norm.running_mean.normal_(), model.norm.running_var.uniform_(2, 3)
    with pytest.raises(ValueError, match="cannot be merged with its BatchNorm.*first part at the forward pass of Net itself"): merge_batchnorm(model, SHAPE)
    assert merge_batchnorm(model, SHAPE, check=False)


@BOTH
@pytest.mark.parametrize("spoil", [lambda w: w.fill_(math.nan), lambda w: w.mul_(1.01), lambda w: w.copy_(w.flip(0, 1)), lambda w: w.zero_()])
def test_wrong_weights_are_named(monkeypatch, to, spoil):
    real = embedding.release
    def wrong(conv, *args):
        layer = real(conv, *args)
        if conv.kernel_size == (1, 1): spoil(layer.weight.data)
        return layer
    monkeypatch.setattr(embedding, "release", wrong)
    model = made(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 3))))
    with pytest.raises(ValueError, match=r"first part at 2.0 \((Fully|Locally)Connected\)"): embed(model, SHAPE, to)


@over_cases(times=120)
def test_what_is_right_is_not_refused(case):
    conv, x = case
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for to in RELEASED: convert(embed(copy.deepcopy(conv).to(dtype), shape_of(x), to), "fcn")


def interrupted(m, x):
    m.seen.append(1)
    if len(m.seen) == 2: raise KeyboardInterrupt
    return m.head(m.conv(x))


class Calls(list):
    def __deepcopy__(self, memo): return self


def test_an_interrupted_proof_leaves_the_original_alone():
    model = Net(interrupted, lambda m: setattr(m, "seen", Calls()))
    before = alone(model)
    with pytest.raises(KeyboardInterrupt): embed(model, SHAPE)
    assert untouched(model, before) and len(model.seen) == 2 and not model.fc.weight.isnan().any()


def compiled(m):
    m.double()
    m.fc.compile(backend="eager")
    m.fc(torch.ones(1, 75).double())


def lora(m):
    class Merging(nn.Linear):
        "Merges its low-rank update into its weight in evaluation mode, and takes it out in training mode."
        merged = False
        def train(self, mode=True):
            if self.merged is mode: self.weight.data += (-1 if mode else 1)*self.update
            self.merged = not mode
            return super().train(mode)
        def forward(self, x): return F.linear(x, self.weight if self.merged else self.weight + self.update)
    m.fc = Merging(75, 4)
    m.fc.register_buffer("update", torch.randn(4, 75))


def counts(m): m.register_buffer("calls", torch.zeros((), dtype=torch.long))


class Answer:
    def __init__(self, y): self.y = y


def per_image(m, x): return torch.vmap(lambda one: m.conv(one[None])[0])(x) if x.dim() == 4 else m.conv(x)


def with_autocast(m, x):
    with torch.autocast("cpu", torch.bfloat16): return m.head(m.conv(x).double())


def counting(m, x):
    m.calls += 1
    return m.conv(x)


def held_down(m, x):
    m.fc.weight.data = torch.renorm(m.fc.weight.data, 2, 0, .1)
    return m.head(m.conv(x))


def clamped(m, x):
    with torch.no_grad(): m.fc.weight.clamp_(-.01, .01)
    return m.head(m.conv(x))


def keeps(m, x):
    m.features = m.conv(x)
    return m.head(m.features)


def one_image(m, x):
    assert len(x) == 1
    return m.head(m.conv(x))


def swallowed(m, x):
    try: m.norm(x[:, :1])
    except RuntimeError: pass
    return m.conv(x)


RIGHT = {  # networks that embed, however odd: forward pass, and what else they have
    "tuple": (lambda m, x: (m.conv(x), [m.head(m.conv(x)), None], "word"),), "object": (lambda m, x: Answer(m.conv(x)),),
    "classes": (lambda m, x: m.head(m.conv(x)).argmax(1),), "sparse": (lambda m, x: m.head(m.conv(x)).relu().to_sparse(),),
    "dropout": (lambda m, x: m.head(F.dropout(m.conv(x))),), "numpy's noise": (lambda m, x: m.conv(x) + np.random.rand() + random.random(),),
    "in place": (lambda m, x: m.norm(m.conv(x).relu_().add_(1)),), "input in place": (lambda m, x: m.conv(x.mul_(2)),),
    "only positive numbers": (lambda m, x: m.conv(x.log() if (x > 0).all() else 1/0),), "logarithm": (lambda m, x: m.conv(x.log()),),
    "table of grey values": (lambda m, x: m.conv(m.table[(x*255).long()]), lambda m: m.register_buffer("table", torch.randn(256))),
    "one image": (one_image,), "squeeze": (lambda m, x: m.one(m.conv(x).mean((2, 3), keepdim=True).squeeze()), lambda m: setattr(m, "one", nn.BatchNorm1d(3))),
    "vmap": (per_image,), "autocast": (with_autocast,), "writes a count": (counting, counts), "holds a weight down": (held_down,), "clamps": (clamped,),
    "stores an activation": (keeps,), "swallows an error": (swallowed,), "merges in evaluation mode": (lambda m, x: m.head(m.conv(x)), lora),
    "bound method": (lambda m, x: m.f(m.conv(x).flatten(1)), lambda m: setattr(m, "f", m.fc.forward)),
    "partial": (lambda m, x: m.f(m.conv(x).flatten(1)), lambda m: setattr(m, "f", functools.partial(nn.Linear.forward, m.fc))),
    "partial with a weight": (lambda m, x: m.f(m.conv(x).flatten(1)), lambda m: setattr(m, "f", functools.partial(F.linear, weight=m.double().fc.weight))),
    "lambda without a hold": (lambda m, x: m.f(m, m.conv(x)), lambda m: setattr(m, "f", lambda m, x: m.head(x))),
    "lambda that is not called": (lambda m, x: m.conv(x), lambda m: setattr(m, "f", lambda: m.fc.weight)),
    "a Python module": (lambda m, x: m.F.relu(m.conv(x)), lambda m: setattr(m, "F", F)), "a generator of numbers": (lambda m, x: m.conv(x), lambda m: setattr(m, "g", torch.Generator())),
    "compiled part that ran": (lambda m, x: m.fc(m.conv(x).flatten(1)), compiled),
    "checkpoint": (lambda m, x: torch.utils.checkpoint.checkpoint(m.conv, x, use_reentrant=False),),
    "cond": (lambda m, x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (m.conv(x),)),),
    "cancels": (lambda m, x: m.conv(x + 1e6),), "zeros": (lambda m, x: m.conv(x*0),), "nothing finite": (lambda m, x: m.conv(x*math.nan),),
    "empty": (lambda m, x: m.conv(x[:0]),), "long chain": (lambda m, x: functools.reduce(lambda y, _: m.conv(y.tanh())[:, :2]*50, range(30), x),),
    "reads attributes": (lambda m, x: m.conv(F.pad(x, (m.conv.kernel_size[0]//2 - m.conv.padding[0],)*4))*m.conv.out_channels/m.conv.groups,)}


@pytest.mark.filterwarnings("ignore::UserWarning")
@BOTH
@pytest.mark.parametrize("name", RIGHT)
def test_odd_networks_are_embedded(to, name):
    forward, *more = RIGHT[name]
    model = Net(forward, *more)
    if name == "stores an activation": model(rand(2, *SHAPE))
    model.norm.eval()
    before = alone(model)
    released = embed(model, SHAPE, to)
    assert untouched(model, before) and [m.training for m in released.modules()] == before[1] and type(released.conv) is RELEASED[to]
    assert all(torch.equal(v, before[0][k][3]) for k, v in released.state_dict().items() if not k.startswith("conv"))
    near = nearest_cnn(released)
    for step in near, convert(released, "lcn"), reinitialize(released, 0): assert [m.training for m in step.modules()] == before[1]
    x, answers = rand(1 if name == "one image" else 2, *SHAPE, seed=5).abs()/4, []
    for m in model, released, near:
        with torch.random.fork_rng():
            torch.manual_seed(3), np.random.seed(3), random.seed(3)
            answers.append(inspection.tensors_in(m.eval()(x.clone())))
    for y, *others in zip(*answers, strict=True):
        if y.isfinite().any(): assert all(close(o.to_dense().double(), y.to_dense().double(), 1e-2 if name == "autocast" else 1e-6) for o in others)


@BOTH
def test_compiled_networks_that_ran_before(to):
    for wrap in (lambda m: torch.compile(m, backend="eager"), lambda m: m.compile(backend="eager") or m):
        model, x = wrap(Net(lambda m, x: m.head(m.conv(x)))), rand(2, *SHAPE)
        y = model(x)
        released = embed(model, SHAPE, to)
        assert close(released(x), y, 1e-12) and close(model(x), y, 1e-12) and close(nearest_cnn(released)(x), y, 1e-12)
        with torch.no_grad():
            for p in released.parameters(): p.zero_()
        assert not released(x).any()


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64, torch.complex128], ids=str)
def test_deep_networks_of_low_precision_and_complex_ones_prove_themselves(to, dtype):
    model = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.Identity() if dtype.is_complex else nn.LayerNorm((6, 6)))))
    model = model.to(dtype)
    assert type(embed(model, (4, 6, 6), to)[0]) is RELEASED[to]
    wrong = Net(lambda m, x: m.conv(x)*m.conv.weight.shape[-1])
    with pytest.raises(ValueError, match="another function"): embed(wrong.to(dtype), SHAPE, to)


def test_outputs_of_every_kind_are_compared():
    for wrap in (lambda y: y, lambda y: (1, {"a": [y]}), Answer, lambda y: y.detach().numpy(), lambda y: y.to_sparse(), lambda y: torch.distributions.Normal(y, 1),
                 lambda y: types.SimpleNamespace(y=y), float, lambda y: y.argmax()):
        model = Net(lambda m, x: wrap((m.conv(x)[:, 0]*(1 if m.conv.weight.shape[-1] == 3 else -1)).sum((1, 2))[:1 if wrap is float else None]))
        with pytest.raises(ValueError, match="another function"): embed(model, SHAPE)


GIVEN = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "transposed", "output_padding")


@BOTH
@pytest.mark.parametrize("conv, size", [
    (nn.Conv2d(4, 6, (3, 5), (1, 2), (1, 2), (2, 1), 2), (9, 9)), (nn.Conv2d(2, 3, 3, padding="same"), (4, 5)), (nn.Conv2d(2, 3, (2, 4), padding="same"), (4, 5)),
    (nn.Conv2d(2, 3, 3, padding="valid"), (4, 5)), (nn.Conv1d(2, 3, 3, padding="same", padding_mode="circular"), (5,)), (nn.Conv3d(1, 2, 2, padding=1, padding_mode="replicate"), (3, 2, 3)),
    (nn.ConvTranspose1d(2, 4, 3, 2, 1, 1, 2), (4,)), (nn.ConvTranspose2d(2, 3, 3, (2, 3), output_padding=(1, 0)), (3, 3)), (nn.ConvTranspose3d(1, 2, 2, 2), (2, 2, 2))], ids=str)
def test_released_layers_tell_what_their_convolution_tells(to, conv, size):
    layer = embed(conv, (conv.in_channels, *size), to)
    for m in (layer, convert(layer, "fcn"), convert(layer, "lcn"), nearest_cnn(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), reinitialize(layer, 0)):
        for name in GIVEN: assert getattr(m, name) == getattr(conv, name) and type(getattr(m, name)) is type(getattr(conv, name)), name
    assert str(nearest_cnn(layer)) == str(conv) and "same" not in repr(layer)


def test_an_output_padding_that_is_overruled_in_the_call():
    model = Net(lambda m, x: m.conv(x, output_size=[x.shape[2]*2 + m.conv.output_padding[0]]*2), conv=nn.ConvTranspose2d(2, 3, 2, 2, output_padding=1))
    for m in (lambda: embed(model, SHAPE)), (lambda: embed(model, SHAPE, "lcn")): assert m().conv.output_padding == (1, 1) and close(m()(rand(2, *SHAPE)), model(rand(2, *SHAPE)), 1e-12)


def as_buffers(conv, *names, persistent=True):
    for name in names:
        value = getattr(conv, name).detach().clone()
        delattr(conv, name)
        conv.register_buffer(name, value, persistent)
    return conv


@BOTH
@pytest.mark.parametrize("names", [["weight"], ["bias"], ["weight", "bias"]])
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("fold", [False, True])
def test_a_kernel_that_is_a_buffer_stays_one(to, names, persistent, fold):
    model, x = settled(lambda: nn.Sequential(as_buffers(nn.Conv2d(2, 3, 3), *names, persistent=persistent), nn.BatchNorm2d(3)), None), rand(2, *SHAPE)
    released = embed(model, SHAPE, to, fold_batchnorm=fold)
    for m in (released, nearest_cnn(released), convert(released, "fcn"), convert(released, "lcn"), copy.deepcopy(released)):
        assert close(m(x), model(x), 1e-12) and [*m[0]._buffers.keys() - {"pixels"}] == [n for n in ("weight", "bias") if n in names] or set(m[0]._buffers) - {"pixels"} == set(names)
        assert ("0.weight" in m.state_dict()) == ("weight" not in names or persistent)


def test_a_network_without_parameters():
    model = as_buffers(nn.Conv2d(2, 3, 3), "weight", "bias")
    assert close(embed(model, SHAPE)(torch.ones(1, *SHAPE)), model(torch.ones(1, *SHAPE)), 1e-5) and not list(embed(model, SHAPE).parameters())


class Own(nn.modules.conv._ConvNd):
    "A convolution that is none of torch.nn's."
    def __init__(self): super().__init__(3, 3, (3, 3), (1, 1), (1, 1), (1, 1), False, (0, 0), 1, True, "zeros")
    def forward(self, x): return F.conv2d(x, self.weight, self.bias, padding=1)


def kernel(m): m.kernel = nn.Parameter(torch.randn(3, 3, 3, 3))


STAYS = {  # forward pass, more, layers, and what the warning says; None for none
    "F.conv2d": (lambda m, x: F.conv2d(m.conv(x), m.kernel), kernel, None, "in the forward pass of Net itself, by aten.convolution"),
    "torch.conv_transpose2d": (lambda m, x: torch.conv_transpose2d(m.conv(x), m.kernel), kernel, None, "in the forward pass of Net itself"),
    "torch.convolution": (lambda m, x: torch.convolution(m.conv(x), m.kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1), kernel, None, "in the forward pass of Net itself"),
    "deformable": (lambda m, x: deform_conv2d(m.conv(x), torch.zeros(len(x), 18, 3, 3).to(x), m.kernel), kernel, None, "by torchvision.deform_conv2d"),
    "a module": (lambda m, x: m.own(m.conv(x)), lambda m: setattr(m, "own", Own()), None, r"in own \(Own\)"),
    "inside a block": (lambda m, x: m.block(m.conv(x)), lambda m: setattr(m, "block", nn.Sequential(nn.ReLU(), Own(), nn.Sequential(Own()))), None, r"in block.1 \(Own\), by .*; in block.2.0 \(Own\)"),
    "in inference mode": (torch.inference_mode()(lambda m, x: F.conv2d(m.conv(x), m.kernel)), kernel, None, "in the forward pass of Net itself"),
    "left out": (lambda m, x: m.other(m.conv(x)), lambda m: setattr(m, "other", nn.Conv2d(3, 2, 1)), ["conv"], None),
    "a refused one left out": (lambda m, x: m.other(m.conv(x)), lambda m: setattr(m, "other", OwnConv(3, 2, 1)), lambda name, m: name == "conv", None),
    "none": (lambda m, x: m.conv(x).to(torch.float32).relu(), lambda m: None, None, None), "padding by another mode": (lambda m, x: m.other(m.conv(x)), lambda m: setattr(m, "other", nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular")), None, None)}


@pytest.mark.parametrize("name", STAYS)
def test_convolutions_that_stay_are_named(name):
    forward, more, layers, says = STAYS[name]
    model, x = Net(forward, more), rand(2, *SHAPE)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        released = embed(model, SHAPE, layers=layers)
    said = [w for w in said if "not released" in str(w.message)]
    assert close(released(x), model(x), 1e-6) and len(said) == (says is not None)
    if says: assert re.search(says, str(said[0].message)) and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed(model, SHAPE, layers=layers, check=False)


@pytest.mark.parametrize("name, make, says", [
    ("loader", lambda: (i for i in range(3)), "loader holds a generator"), ("lock", threading.Lock, "lock holds a lock"), ("file", lambda: open(os.devnull), "file holds a TextIOWrapper"),
    ("pool", lambda: dict(of=[threading.RLock()]), "pool holds a dict")])
def test_what_cannot_be_copied_is_named(name, make, says):
    model = nn.Sequential(nn.Sequential(nn.Conv2d(2, 3, 3)))
    setattr(model[0], name, make())
    for call in (lambda: embed(model, SHAPE), lambda: merge_batchnorm(model, SHAPE), lambda: reinitialize(model), lambda: conv_geometries(model, SHAPE)):
        with pytest.raises(ValueError, match=rf"Sequential cannot be copied, because 0\.{says} \(cannot pickle.*delete it first") as error: call()
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")
@BOTH
@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
@pytest.mark.parametrize("used", [True, False])
def test_old_weight_norm_beside_the_convolutions(to, norm, used):
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), norm(nn.Linear(27, 4))).eval(), rand(2, *SHAPE).float()
    if used: model(x)
    released = embed(model, SHAPE, to)
    assert close(released(x), model(x), 1e-5)
    with torch.no_grad():
        for p in released.parameters(): p.zero_().add_(1e-3)
    assert not close(released(x), model(x), 1e-2)


def test_images_in_place_of_noise():
    "A network that takes only images of its own kind: without them the refusal says what to give."
    def picky(m, x):
        assert x.min() > 5, "too dark"
        return m.conv(x)*(1 if m.conv.weight.shape[-1] == 3 else 2) if m.wrong else m.conv(x)
    model, images = Net(picky, lambda m: setattr(m, "wrong", False)), 6 + rand(3, *SHAPE).abs()
    with pytest.raises(ValueError, match="too dark"): embed(model, SHAPE)
    assert close(embed(model, SHAPE, images=images)(images), model(images), 1e-12) and conv_geometries(model, SHAPE, images=images)
    model.wrong = True
    with pytest.raises(ValueError, match="another function"): embed(model, SHAPE, images=images)
    for wrong in (images[:, :1], images[0], images[:0], images[..., :3]):
        with pytest.raises(ValueError, match=r"images must be a batch of shape \(N, 2, 5, 5\)"): embed(model, SHAPE, images=wrong)


def test_many_channels_and_positions_are_proved_in_part():
    "A layer of more weights than the proof reads: each position, or some, by one channel."
    model = made(lambda: nn.Sequential(nn.Conv2d(2, 40, 3, padding=1), nn.Conv2d(40, 30, 3, padding=1, groups=2)))
    for to in RELEASED:
        good = embed(model, (2, 12, 12), to)
        assert good[1].weight.numel() > proof.SAMPLE or to == "lcn"
        with torch.no_grad(): good[1].weight.mul_(1.001)
        trace = inspection.traced_geometries(model, (2, 12, 12))[1]
        with pytest.raises(ValueError, match="first part at 1"): proof.prove(trace, good, "embedded", trace.calls)


@BOTH
def test_without_the_check_the_network_runs_once(to):
    "One pass to listen, and one for the proof."
    for check, passes in (True, 2), (False, 1):
        model = Net(lambda m, x: m.seen.append(1) or m.conv(x), lambda m: setattr(m, "seen", Calls()))
        embed(model, SHAPE, to, check=check)
        assert len(model.seen) == passes


def test_the_proof_keeps_no_weights():
    "No circle of references holds the result, or the original, until Python looks for circles."
    gc.collect()
    gc.disable()
    try:
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).eval()
        steps = [embed(model, SHAPE, "lcn"), embed(model, SHAPE, fold_batchnorm=True)]
        steps += [nearest_cnn(steps[0]), convert(steps[0], "fcn"), convert(steps[1], "lcn"), reinitialize(steps[0], 0), model]
        held = [weakref.ref(p) for m in steps for p in m.parameters()]
        del model, steps
        assert not [ref for ref in held if ref() is not None]
    finally: gc.enable()


# What a proof may say, and what it may not

def spoilt(change, which=None):
    "A small network in single precision after `change` of all parameters, or of one."
    model = made(lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, stride=2), nn.Tanh() if which == "tanh" else nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)))
    with torch.no_grad():
        for name, p in model.float().named_parameters():
            if which in (None, "tanh", name): change(p)
    return model


def one_entry(value): return lambda p: p.view(-1)[:1].fill_(value)


BEYOND = {  # weights of which roundings, overflows and what is not finite decide
    **{f"scaled by 1e{e}": (lambda p, e=e: p.mul_(10.**e), None) for e in (8, 15, 19, 22, 30, 37)}, "huge before tanh": (lambda p: p.mul_(1e19), "tanh"),
    **{f"{value} in {name}": (one_entry(value), name) for value in (math.nan, math.inf, -math.inf) for name in ("0.weight", "0.bias", "2.weight", "2.bias", "5.weight")},
    "nothing but NaN": (lambda p: p.fill_(math.nan), None), "nothing but infinity": (lambda p: p.fill_(math.inf), None), "largest numbers": (lambda p: p.fill_(3e38), None),
    "sums that overflow": (lambda p: p.copy_(3e38*p.sign()), "0.weight"), "tiny": (lambda p: p.mul_(1e-38), None)}


@BOTH
@pytest.mark.parametrize("name", BEYOND)
def test_weights_beyond_what_numbers_hold_are_not_refused(to, name):
    model = spoilt(*BEYOND[name])
    released = embed(model, SHAPE, to)
    for step in (nearest_cnn, lambda m: convert(m, "lcn"), lambda m: convert(m, "fcn"), lambda m: reinitialize(m, 0)): step(released)
    merge_batchnorm(nn.Sequential(model[0], nn.BatchNorm2d(3), *model[1:]).eval(), SHAPE)


@BOTH
def test_wrong_weights_beside_huge_or_broken_ones_are_noticed(to):
    for change in (lambda p: p.mul_(1e19), lambda p: p.mul_(1e15), one_entry(math.nan)):
        model = spoilt(change, "0.weight")
        trace, good = inspection.traced_geometries(model, SHAPE)[1], embed(model, SHAPE, to)
        for spoil in (lambda w: w.mul_(1.1), lambda w: w.fill_(math.nan), lambda w: w.fill_(math.inf)):
            wrong = copy.deepcopy(good)
            with torch.no_grad(): spoil(wrong[0].weight)
            with pytest.raises(ValueError, match="first part at 0"): proof.prove(trace, wrong, "embedded", trace.calls)


READS = {  # reads of a released weight that move the outputs by little
    "mean": lambda m, x: m.head((m.conv(x) + .01*m.conv.weight.abs().mean()).relu()), "less": lambda m, x: m.head((m.conv(x) + 1e-4*m.conv.weight.abs().mean()).relu()),
    "norm": lambda m, x: m.head(m.conv(x))*(1 + 1e-4*m.conv.weight.norm()), "bias": lambda m, x: m.head(m.conv(x) + 1e-3*m.conv.bias.sum()),
    "input": lambda m, x: m.head(m.conv(x + 1e-4*m.conv.weight.norm())), "type": lambda m, x: m.head(m.conv(x)) + (1e-4 if isinstance(m.conv, nn.Conv2d) else 0)}


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", READS)
def test_small_reads_of_a_released_weight_are_refused(to, name, dtype):
    with pytest.raises(ValueError, match="another function"): embed(Net(READS[name]).to(dtype), SHAPE, to)


class Energy(nn.Module):
    "The gradient of an energy with respect to the image, and with `both` the energy too."
    def __init__(self, both, wrong=False):
        super().__init__()
        self.both, self.wrong, self.a, self.b, self.f = both, wrong, nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 1)
    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = self.f(self.b(self.a(x).tanh()).tanh().flatten(1))
            if self.wrong: y = y*self.a.weight.norm()
            g = torch.autograd.grad((y + x.pow(2).sum()*self.both).sum(), x)[0]
        return (y.detach(), g) if self.both else g


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("both", [False, True])
def test_networks_that_differentiate_are_embedded(to, both, dtype):
    model, x = made(lambda: Energy(both)).to(dtype), rand(2, *SHAPE, dtype=dtype)
    released = embed(model, SHAPE, to)
    for m in released, nearest_cnn(released), convert(released, "fcn"), convert(released, "lcn"):
        assert all(close(a, b, .1 if dtype == torch.bfloat16 else 1e-5) for a, b in zip(inspection.tensors_in(m(x)), inspection.tensors_in(model(x))))
    reinitialize(released, 0)
    with pytest.raises(ValueError, match="another function"): embed(made(lambda: Energy(both, wrong=True)).to(dtype), SHAPE, to)


class Experts(nn.Module):
    "A mixture of experts, each of which takes the images that a gate sends it."
    def __init__(self):
        super().__init__()
        self.experts, self.gate, self.fc = nn.ModuleList([nn.Conv2d(2, 2, 3) for _ in range(4)]), nn.Linear(50, 4), nn.Linear(18, 2)
    def forward(self, x):
        expert, h = self.gate(x.flatten(1)).argmax(1), x.new_zeros(len(x), 2, 3, 3)
        for i, conv in enumerate(self.experts): h[expert == i] = conv(x[expert == i])
        return self.fc(h.flatten(1))


@BOTH
def test_a_mixture_of_experts_is_reinitialized(to):
    released = embed(made(Experts), SHAPE, to)
    for seed in range(10): assert reinitialize(released, seed) is not released
    released.held = lambda x: released.fc(x)
    released.forward = types.MethodType(lambda self, x: self.held(x.flatten(1)[:, :18]), released)
    with pytest.raises(ValueError, match="goes on using fc.weight of the original"): reinitialize(released, 0)


class FrozenNorm(nn.Sequential):
    "Keeps its BatchNorm in evaluation mode; returns nothing, as many a `train` of one's own."
    def train(self, mode=True):
        super().train(mode)
        self[1].eval()


def test_a_train_of_ones_own_that_returns_nothing():
    model, x = FrozenNorm(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), rand(2, *SHAPE).float()
    model.train(False)
    released = embed(model, SHAPE, fold_batchnorm=True)
    assert type(released[1]) is nn.Identity and close(released(x), model(x), 1e-5) and type(merge_batchnorm(model, SHAPE)[1]) is nn.Identity


@pytest.mark.parametrize("forward", [
    lambda m, x: m.conv(x) + np.random.default_rng().normal(), lambda m, x: m.conv(x + np.random.default_rng().normal(size=(5, 5))),
    lambda m, x: m.head(m.conv(x)*random.Random().random())], ids=["after", "before", "factor"])
def test_noise_of_ones_own_is_no_other_function(forward):
    with pytest.warns(UserWarning, match="embedded without a proof, because its own outputs") as said: embed(Net(forward), SHAPE)
    assert said[0].filename == __file__
    wrong = Net(lambda m, x: m.conv(x + 1e-6*np.random.default_rng().normal())*m.conv.weight.shape[-1])
    with pytest.raises(ValueError, match="another function"): embed(wrong, SHAPE)


class Raw(nn.Module):
    "Parameters of its own that it cannot draw."
    def __init__(self):
        super().__init__()
        self.scale, self.conv = nn.Parameter(torch.ones(3, 1, 1)), nn.Conv2d(2, 3, 3)
    def forward(self, x): return self.conv(x)*self.scale


class OwnDraw(nn.Linear):
    "Draws in a way that leaves no trace in the version of its parameters."
    def reset_parameters(self):
        for p in self.parameters(): p.data.uniform_(-1, 1)


def attention():
    m = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
    with torch.no_grad(): m[1].in_proj_bias.fill_(1), m[1].out_proj.bias.fill_(1)
    return m


def pruned_linear():
    m = nn.Linear(3, 3)
    prune.l1_unstructured(m, "weight", .5)
    return m


UNDRAWN = {  # network, and the parameters that stay
    "plain": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.PReLU(), nn.GroupNorm(1, 3), nn.Linear(3, 3, bias=False), nn.Embedding(3, 2), nn.LSTM(2, 2)), []),
    "raw": (Raw, ["scale"]), "attention": (attention, []), "without a trace": (lambda: OwnDraw(3, 3), []),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), ["parametrizations.weight.original0", "parametrizations.weight.original1"]),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(3, 3)), ["parametrizations.weight.original"]),
    "old spectral norm": (lambda: spectral_norm(nn.Linear(3, 3)), ["weight_orig"]), "old weight norm": (lambda: weight_norm(nn.Linear(3, 3)), ["weight_g", "weight_v"]),
    "pruned": (pruned_linear, ["weight_orig"])}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", UNDRAWN)
def test_parameters_that_are_not_drawn_are_named(name, inplace):
    make, kept = UNDRAWN[name]
    model = made(make).float()
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        drawn = reinitialize(model, 1, inplace=inplace)
    said = [w for w in said if "not drawn anew" in str(w.message)]
    assert len(said) == bool(kept) and all(f": {', '.join(sorted(kept))};" in str(w.message) and w.filename == __file__ for w in said)
    assert all(torch.equal(p, before[k]) == (k in kept) for k, p in drawn.named_parameters() if p.dim() > 1 or k in kept)
    if name == "attention": assert not drawn[1].in_proj_bias.any() and not drawn[1].out_proj.bias.any()


def test_attention_changes_no_other_draw():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, out, last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    drawn = reinitialize(made(attention).float(), 1)
    assert all(torch.equal(a.weight, b.weight) for a, b in [(drawn[0], first), (drawn[1].out_proj, out), (drawn[2], last)])


@pytest.mark.parametrize("call, says", [
    (lambda m, x: embed(m, SHAPE, images=[x[0]]), "images must be a tensor.*not a list.*torch.stack"), (lambda m, x: conv_geometries(m, SHAPE, images=x.numpy()), "images must be a tensor.*not a ndarray"),
    (lambda m, x: embed(m, SHAPE, layers=nn.Conv2d), "names of convolutions or a predicate.*not the class Conv2d"), (lambda m, x: embed(m, SHAPE, layers=3), "not a int"),
    (lambda m, x: embed(lambda x: x, SHAPE), "torch.nn.Module with convolutions, not a function"), (lambda m, x: embed(Net, SHAPE, trim=True), "not the class Net"),
    (lambda m, x: embed(m, SHAPE, layers=lambda name, m: False), r"layers chooses no convolution.*\['conv'\]"),
    (lambda m, x: embed(m, SHAPE, layers=[m.conv]), "no convolution is called Conv2d"), (lambda m, x: embed(m, SHAPE, layers=""), "no convolution is called ''")])
def test_arguments_of_another_kind_are_refused(call, says):
    with pytest.raises(ValueError, match=says) as error: call(Net(lambda m, x: m.head(m.conv(x))), rand(2, *SHAPE))
    assert len(str(error.value).splitlines()) == 1


@BOTH
@pytest.mark.parametrize("options", [{}, dict(trim=True), dict(fold_batchnorm=True)], ids=str)
def test_images_show_convolutions_that_few_call(to, options):
    route = lambda m, x: m.norm(m.conv(x)) if x.mean() < 5 else m.other(x)*m.factor()
    def more(m): m.other, m.factor = nn.Conv2d(2, 3, 3), lambda: 1
    model = Net(route, more).eval()
    images = torch.cat([rand(5, *SHAPE), 10 + rand(1, *SHAPE)])
    with pytest.raises(ValueError, match="other is never called in evaluation mode for the images tried.*give images="): embed(model, SHAPE, to)
    released = embed(model, SHAPE, to, images=images, **options)
    assert type(released.other) is RELEASED[to] and all(close(released(x), model(x), 1e-10) for x in (images[:2], images[5:]))
    wrong = Net(lambda m, x: m.conv(x) if x.mean() < 5 else m.other(x)*m.other.weight.shape[-1], more)
    with pytest.raises(ValueError, match="another function"): embed(wrong, SHAPE, to, images=images)


class Plain(nn.Module):
    "Holds numbers alone."
    def __init__(self): super().__init__(); self.factor, self.name = 2, "plain"
    def forward(self, x): return x*self.factor


class Marked(Plain):
    "Its class has a way of its own to be copied."
    def __deepcopy__(self, memo):
        twin = type(self)()
        twin.factor, twin.copied = self.factor, True
        return twin


@pytest.mark.parametrize("kind", [nn.ReLU, nn.Dropout, functools.partial(nn.MaxPool2d, 1), Plain, Marked])
def test_modules_that_hold_numbers_alone_are_copied_like_others(kind):
    model = Net(lambda m, x: m.head(m.plain(m.conv(x))), lambda m: setattr(m, "plain", kind())).eval()
    model.again = model.plain
    twin = embed(model, SHAPE).plain
    expected = copy.deepcopy(model.plain)
    assert type(twin) is type(expected) and vars(twin) == vars(expected)
    assert not {id(x) for x in vars(twin).values() if isinstance(x, dict)} & {id(x) for x in vars(model.plain).values()}
    twin.extra, twin.training = 1, True
    twin.register_forward_hook(lambda *call: None)
    assert not hasattr(model.plain, "extra") and not model.plain.training and not model.plain._forward_hooks
    assert embed(model, SHAPE).again is not model.plain


def test_a_plain_module_in_two_places_stays_one():
    model = Net(lambda m, x: m.head(m.again(m.plain(m.conv(x)))), lambda m: setattr(m, "plain", Plain()))
    model.again = model.plain
    released = embed(model, SHAPE)
    assert released.again is released.plain
