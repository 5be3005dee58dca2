"""Kernels as matrices and local weights, against PyTorch's own convolutions, over drawn geometries;
and wrong maps are noticed."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efcn_nb.ladder import geometry, matrices
from efcn_nb.ladder.matrices import (
    kernel_from_local, kernel_from_matrix, local_from_kernel, local_from_matrix, matrix_from_kernel, matrix_from_local)
from efcn_nb.ladder.embedding import embed, nearest_cnn, reinitialize
from efcn_nb.ladder.geometry import PADDING_MODES, ConvGeometry
from efcn_nb.instruments.subspaces import project_cnn, project_lcn, residuals, shares, squares

from nets import BOTH, close, conv_of, over_cases, rand, RELEASED, shape_of, TIED

pytestmark = pytest.mark.usefixtures("one_thread")  # threads only cost time on tensors as small as these


def geometry_of(conv, x): return ConvGeometry.from_conv(conv, x.shape[2:])


def functional(conv, x):
    "What torch.nn.functional computes, called without the module."
    name = f"conv{'_transpose' if conv.transposed else ''}{x.dim() - 2}d"
    if conv.transposed:
        return getattr(F, name)(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.output_padding, conv.groups,
                                conv.dilation)
    padding = conv.padding
    if conv.padding_mode != "zeros":
        span = [d*(k-1) for d, k in zip(conv.dilation, conv.kernel_size)]
        pairs = ([(t//2, t - t//2) for t in span] if padding == "same"
                 else [(0, 0)]*len(span) if padding == "valid" else [(p, p) for p in padding])
        x, padding = F.pad(x, [p for pair in reversed(pairs) for p in pair], mode=conv.padding_mode), 0
    return getattr(F, name)(x, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)


# Properties of one convolution: each is a function of a case, so that the negative controls below can call it.
# Properties of the same case may share its released layers.

def released_layer(conv, x, to): return embed(conv, shape_of(x), to, check=False)


def same_function(conv, x, to, layer=None):
    layer, expected = layer or released_layer(conv, x, to), functional(conv, x)
    assert type(layer) is RELEASED[to] and close(layer(x), expected, 1e-10) and close(conv(x), expected, 1e-12)


def same_gradient(conv, x, layers=None):
    "The sum over a tap's copies of the released gradient is the convolution's; so are inputs' and biases'."
    g, gradients, into = geometry_of(conv, x), [], rand(*conv(x).shape, seed=1)
    for layer in (conv, *(layers or [released_layer(conv, x, to) for to in RELEASED])):
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
    return all(any(row[u] >= 0 and row.count(row[u]) == 1 for row in table.tolist())
               for table in g.axes for u in range(table.shape[1]))


def same_way_back(conv, x, to, layer=None):
    """Every tap that reads a pixel anywhere comes back bit for bit; the others,
    of which the released layer knows nothing, as zero."""
    back = nearest_cnn(layer or released_layer(conv, x, to), check=False)
    assert type(back) is type(conv) and back.weight.is_contiguous() and back.weight.dtype == conv.weight.dtype
    assert (back.bias is None) == (conv.bias is None) and (conv.bias is None or torch.equal(back.bias, conv.bias))
    assert close(back(x), conv(x), 1e-10)
    if conv.padding_mode == "zeros": assert torch.equal(back.weight, conv.weight*read_by_a_tap(conv, x))
    elif alone_somewhere(geometry_of(conv, x)): assert torch.equal(back.weight, conv.weight)


def matrix_by_autograd(conv, g):
    "The matrix of `conv`, without its bias, from the images of all unit inputs."
    with torch.no_grad():
        return conv(torch.eye(math.prod(g.in_shape), dtype=torch.float64).view(-1, *g.in_shape)).flatten(1).T


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
    layers = {to: released_layer(*case, to) for to in RELEASED}
    for to, layer in layers.items(): same_function(*case, to, layer), same_way_back(*case, to, layer)
    same_gradient(*case, layers.values())
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
    assert torch.equal(project_lcn(K, g), K)
    assert (torch.equal if alone_somewhere(g) else lambda a, b: close(a, b, 1e-12))(project_cnn(K, g), K)


@over_cases(times=300, smaller=1)
def test_shares_and_residuals(case):
    conv, x = case
    layer = embed(conv, shape_of(x))
    g, own, drawn = layer.geometry, squares(layer), reinitialize(layer, seed=0)
    assert own["off_local"] == 0 and own["unshared"] <= 1e-24*float(layer.weight.detach().square().sum())
    got, W = squares(drawn), drawn.weight.detach()
    local, nearest = project_lcn(W, g), project_cnn(W, g)
    wanted = dict(convolutional=nearest, unshared=local - nearest, off_local=W - local)
    for part, matrix in wanted.items():
        assert math.isclose(got[part], matrix.square().sum(), rel_tol=1e-10, abs_tol=1e-12)
    table = shares(drawn)
    assert math.isclose(table.loc["all", list(wanted)].sum(), 1, rel_tol=1e-12)
    assert math.isclose(table.loc["all", "norm"], W.norm(), rel_tol=1e-12)
    spread = (0 if drawn.bias is None
              else drawn.bias.detach().view(g.out_channels, -1).var(1, unbiased=False).sum()*math.prod(g.output_size))
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


# Negative controls: a wrong map must make the properties fail

ASYMMETRIC = {
    "plain": (conv_of(2, 2, 3, (3, 2), stride=(1, 2), padding=(1, 0), seed=4), rand(2, 2, 4, 5, seed=4)),
    "transposed": (conv_of(2, 2, 3, (3, 2), stride=(2, 1), padding=(1, 0), output_padding=(1, 0), transposed=True,
                           seed=4), rand(2, 2, 4, 3, seed=4)),
    "reflect": (conv_of(2, 2, 3, (3, 2), padding=(2, 1), stride=(1, 2), padding_mode="reflect", seed=4),
                rand(2, 2, 5, 6, seed=4))}
CONTROLS = pytest.mark.parametrize("case", ASYMMETRIC.values(), ids=ASYMMETRIC)


def break_map(monkeypatch, how):
    "Change the table of each axis, from which matrices, local weights and everything else are made."
    right = ConvGeometry.axes.fget
    monkeypatch.setattr(ConvGeometry, "axes", property(lambda self: [how(table) for table in right(self)]))
    for table in (geometry._local_shape, matrices._kernel_layouts, matrices._slot_layouts, matrices._lone_places,
                  matrices._inverse_counts):
        monkeypatch.setattr(table.__module__ + "." + table.__name__, table.__wrapped__)  # nothing is remembered


PERMUTED = {"rolled": lambda t: t.roll(1, 0),
            "shuffled": lambda t: t[torch.randperm(len(t), generator=torch.Generator().manual_seed(1))],
            "taps flipped": lambda t: t.flip(1)}
PROPERTIES = {"function fcn": lambda *c: same_function(*c, "fcn"), "function lcn": lambda *c: same_function(*c, "lcn"),
              "gradient": same_gradient, "projections": projections_are_the_dense_ones}


@CONTROLS
@pytest.mark.parametrize("how", PERMUTED.values(), ids=PERMUTED)
@pytest.mark.parametrize("holds", PROPERTIES.values(), ids=PROPERTIES)
def test_a_permuted_map_is_noticed(monkeypatch, how, holds, case):
    holds(*case)
    break_map(monkeypatch, how)
    # other names of the taps, the same subspaces
    if holds is projections_are_the_dense_ones and how is PERMUTED["taps flipped"]:
        return holds(*case)
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
@pytest.mark.parametrize("kw", [dict(kernel_size=3, padding=1, groups=2),
                                dict(kernel_size=(2, 3), padding=1, stride=2, padding_mode="replicate"),
                                dict(kernel_size=3, stride=2, padding=1, output_padding=1, transposed=True)],
                         ids=["plain", "replicate", "transposed"])
def test_dtypes(to, dtype, kw):
    conv, x = conv_of(2, 4, 6, dtype=dtype, **kw), rand(3, 4, 5, 6).to(dtype)
    layer = embed(conv, (4, 5, 6), to)
    assert {p.dtype for p in layer.parameters()} == {dtype} and layer(x).dtype == dtype
    exact, tolerance = copy.deepcopy(conv).double(), 8*torch.finfo(dtype).eps
    wanted = embed(exact, (4, 5, 6), to)
    assert (torch.equal if conv.padding_mode == "zeros" else lambda a, b: close(a, b, tolerance))(
        layer.weight, wanted.weight.to(dtype))
    assert close(layer(x).double(), exact(x.double()), tolerance)
    assert close(layer(x).double(), conv(x).double(), 2*tolerance)
    back = nearest_cnn(layer)
    assert back.weight.dtype == dtype and torch.equal(back.weight, conv.weight) and torch.equal(back.bias, conv.bias)


@pytest.mark.parametrize("conv, size, says", [
    (nn.Conv2d(1, 1, 5), (4, 4), "give a larger input or more padding"),
    (nn.ConvTranspose1d(1, 1, 2, padding=2), (2,), "does not fit"),
    (nn.Conv2d(1, 1, 5, padding=4, padding_mode="reflect"), (4, 4), "needs more than 4 input positions"),
    (nn.Conv2d(1, 1, 3), (4, 4, 4), "2 spatial axes")])
def test_impossible_geometries_are_refused(conv, size, says):
    with pytest.raises(ValueError, match=says): ConvGeometry.from_conv(conv, size)
