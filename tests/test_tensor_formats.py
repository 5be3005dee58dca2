"Tensor formats, orders and kernels of low rank: against definitions, dense algebra and counts."
import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import L1Unstructured

from efcn_nb.ladder.embedding import embed
from efcn_nb.ladder.tensor_formats import (
    FORMATS, SHUFFLES, compose, core_shapes, count_cores, decompose, entry_order, fit_rank, hold_to_rank,
    largest_rank, release_rank)
from efcn_nb.training.loop import train_steps

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(seed=0): return torch.Generator().manual_seed(seed)


def batches(n, count=3): return [(torch.randn(8, n, generator=draw(i)), torch.arange(8) % 3) for i in range(count)]


# Tensor formats

SHAPES = [(4, 3), (5, 4, 3), (2, 7, 2), (3, 1, 4), (2, 3, 4, 2)]


def looped(format, cores, shape):
    "Every entry from the definition."
    T = torch.zeros(shape, dtype=torch.float64)
    for at in itertools.product(*map(range, shape)):
        if format == "cp": T[at] = torch.stack([c[i] for c, i in zip(cores, at)]).prod(0).sum()
        elif format == "tucker":
            core = cores[0]
            for c, i in zip(cores[1:], at): core = torch.tensordot(c[i], core, 1)
            T[at] = core
        else:
            chain = [torch.eye(cores[0].shape[0], dtype=torch.float64), *(c[:, i] for c, i in zip(cores, at))]
            T[at] = torch.linalg.multi_dot(chain).trace()
    return T


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_composed_as_defined(format, shape):
    for rank in {1, 2, largest_rank(format, shape)}:
        if rank > largest_rank(format, shape): continue
        cores = [torch.randn(s, generator=draw(rank), dtype=torch.float64) for s in core_shapes(format, shape, rank)]
        T = compose(format, cores)
        assert T.shape == shape and torch.allclose(T, looped(format, cores, shape), atol=1e-10)
        assert count_cores(format, shape, rank) == sum(c.numel() for c in cores)


@pytest.mark.parametrize("format", ("tucker", "tt"))
@pytest.mark.parametrize("shape", SHAPES)
def test_at_the_largest_rank_every_tensor_is_found(format, shape):
    T = torch.randn(shape, generator=draw(), dtype=torch.float64)
    most = largest_rank(format, shape)
    assert torch.allclose(compose(format, decompose(format, T, most)), T, atol=1e-8)
    if most > 1: assert not torch.allclose(compose(format, decompose(format, T, most - 1)), T, atol=1e-3)


@pytest.mark.parametrize("format", FORMATS)
def test_decompositions_have_the_shapes_that_are_said(format):
    T = torch.randn(5, 4, 3, generator=draw())
    for rank in (1, 2, 3, 4):
        cores = decompose(format, T, rank)
        assert [tuple(c.shape) for c in cores] == core_shapes(format, T.shape, rank)
        assert all(c.dtype == torch.float32 for c in cores)
        assert (compose(format, cores) - T).norm() < T.norm()


@pytest.mark.parametrize("format", FORMATS)
def test_rank_one_is_the_same_in_all_formats(format):
    "At rank 1 every format is an outer product; least squares comes near the best."
    T = torch.einsum("i,j,k->ijk", *(torch.randn(n, generator=draw(n), dtype=torch.float64) for n in (5, 4, 3)))
    assert torch.allclose(compose(format, decompose(format, T, 1)), T, atol=1e-8)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.floats(1, 600))
def test_fitted_ranks_are_the_largest(format, a, b, c, ratio):
    shape, size = (a, b, c), a*b*c
    counts = [count_cores(format, shape, rank) for rank in range(1, largest_rank(format, shape) + 1)]
    fitting = [rank for rank, count in enumerate(counts, 1) if count*ratio <= size]
    if fitting: assert fit_rank(format, shape, ratio) == max(fitting)
    else:
        with pytest.raises(ValueError, match="numbers at rank 1, which compresses"): fit_rank(format, shape, ratio)


@pytest.mark.parametrize("ratio", [.99, 0, -2, math.inf, math.nan, "twice", True])
def test_ratios_outside_are_refused(ratio):
    with pytest.raises(ValueError, match="a compression ratio must be a number from 1 on, not"):
        fit_rank("tt", (8, 9, 8), ratio)


@pytest.mark.parametrize("format, most", [("cp", 12), ("tucker", 5), ("tt", 5), ("tr", 5)])
def test_ranks_that_the_tensor_does_not_allow(format, most):
    for rank in (0, most + 1, 1.5, None, True):
        said = rf"the rank of a {format} of shape \(5, 4, 3\) must be a whole number from 1 to {most}, not"
        with pytest.raises(ValueError, match=said):
            core_shapes(format, (5, 4, 3), rank)


def test_unknown_format_and_shapes():
    with pytest.raises(ValueError, match="unknown tensor format 'svd'; known are cp, tucker, tt, tr"):
        largest_rank("svd", (3, 3))
    for shape in [(3,), (3, 0, 2)]:
        with pytest.raises(ValueError, match="a tensor to compose has two axes or more, none of them empty"):
            core_shapes("tt", shape, 1)


def test_tensorly_is_left_as_it_was():
    import tensorly
    before = tensorly.get_backend()
    decompose("cp", torch.randn(3, 3, 3), 2)
    assert tensorly.get_backend() == before


def test_decompositions_leave_random_numbers_alone():
    torch.manual_seed(0), np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for format in FORMATS: decompose(format, torch.ones(5, 4, 3) + torch.eye(5)[:, :4, None], 4)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


# Orders


def test_windows_are_shuffled_each_in_its_own_way():
    order = entry_order((8, 8, 3, 3), "window", draw()).view(64, 9) % 9
    assert len({str(row.tolist()) for row in order}) > 60


# Kernels of low rank

@pytest.mark.parametrize("conv",
    [nn.Conv1d(3, 5, 4), nn.Conv2d(3, 5, 3), nn.Conv3d(2, 3, 2), nn.Conv2d(4, 6, 3, groups=2),
    nn.ConvTranspose2d(3, 5, 3), nn.Conv2d(3, 4, 1)], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_kernels_are_composed_in_their_order(conv, format):
    conv = copy.deepcopy(conv).double()
    conv.reset_parameters()                                                       # it was drawn when this file was read
    shape, norm = conv.weight.shape, conv.weight.norm()
    three = (shape[0], math.prod(shape[2:]), shape[1])
    hold_to_rank(conv, format, 2, "everything", seed=3)
    held = conv.parametrizations.weight[0]
    tensor = compose(format, [*conv.parametrizations.weight.parameters()])
    flat = tensor.transpose(1, 2).reshape(-1)
    expected = torch.stack([flat[int(i)] for i in entry_order(shape, "everything", draw(3))]).view(shape)
    assert tensor.shape == three and conv.weight.shape == shape and torch.equal(conv.weight, expected)
    assert torch.isclose(conv.weight.norm(), norm) and held.shuffled
    assert sum(p.numel() for p in conv.parametrizations.weight.parameters()) == count_cores(format, three, 2)


def test_gradients_through_the_order():
    conv = nn.Conv2d(3, 4, 2).double()
    hold_to_rank(conv, "tr", 2, "everything")
    held = conv.parametrizations.weight[0]
    cores = [p.detach().clone().requires_grad_() for p in conv.parametrizations.weight.parameters()]
    assert torch.autograd.gradcheck(held, cores) and torch.autograd.gradgradcheck(held, cores)
    target = torch.randn(conv.weight.shape, generator=draw(), dtype=torch.float64)
    ours = torch.autograd.grad((held(*cores)*target).sum(), cores)
    kernel = compose("tr", cores).transpose(1, 2).reshape(-1)[held.order].view(target.shape)
    plain = torch.autograd.grad((kernel*target).sum(), cores)
    assert all(torch.allclose(a, b) for a, b in zip(ours, plain))


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_what_is_assigned_is_decomposed_in_its_order(shuffle):
    conv = nn.Conv2d(4, 5, 2).double()
    hold_to_rank(conv, "tt", 2, shuffle)
    within = conv.weight.detach().clone()
    conv.weight = within*2
    assert torch.allclose(conv.weight, within*2, atol=1e-10)
    anything = torch.randn(conv.weight.shape, generator=draw(), dtype=torch.float64)
    conv.weight = anything
    error = (conv.weight - anything).norm()
    assert 0 < error < anything.norm()


def test_decomposed_at_full_rank_nothing_changes():
    conv, x = nn.Conv2d(4, 5, 2).double(), torch.randn(2, 4, 6, 6).double()
    before = conv(x)
    hold_to_rank(conv, "tt", largest_rank("tt", (5, 4, 4)), "everything", start="decompose")
    assert torch.allclose(conv(x), before, atol=1e-10)
    release_rank(conv)
    assert type(conv) is nn.Conv2d and torch.allclose(conv(x), before, atol=1e-10)


def test_the_seed_decides_and_nothing_else():
    def held(seed):
        torch.manual_seed(0)
        conv = nn.Conv2d(4, 5, 2)
        state = torch.get_rng_state()
        hold_to_rank(conv, "cp", 2, "everything", seed)
        assert torch.equal(torch.get_rng_state(), state)
        return conv.weight.detach()
    assert torch.equal(held(1), held(1)) and not torch.equal(held(1), held(2))


def test_held_kernels_train_and_travel():
    net = nn.Sequential(nn.Unflatten(1, (1, 4, 3)), nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(48, 3))
    hold_to_rank(net[1], "tucker", 2, "window")
    clone = copy.deepcopy(net)
    first = train_steps(net, torch.optim.Adam(net.parameters(), .01), batches(12)*20)
    assert first[-3:].mean() < first[:3].mean()
    assert not torch.equal(clone[1].weight, net[1].weight)
    clone.load_state_dict(net.state_dict())
    assert torch.equal(clone[1].weight, net[1].weight)
    with pytest.raises(ValueError, match="remove_parametrizations"): embed(net, (12,))
    release_rank(net[1])
    x = torch.randn(3, 12)
    assert torch.allclose(embed(net, (12,))(x), clone(x), atol=1e-6)


@pytest.mark.parametrize("make, said", [
    (lambda: hold_to_rank(nn.Conv2d(6, 8, 3), "cp", 49),
    r"the rank of a cp of shape \(8, 9, 6\) must be a whole number from 1 to 48, not 49"),
    (lambda: hold_to_rank(nn.Conv2d(6, 8, 3), "svd", 2), "unknown tensor format 'svd'"),
    (lambda: hold_to_rank(nn.Conv2d(6, 8, 3), "cp", 2, "all"), "unknown shuffle 'all'"),
    (lambda: hold_to_rank(nn.Conv2d(6, 8, 3), "cp", 2, start="zeros"),
    "start must be 'random' or 'decompose', not 'zeros'"),
    (lambda: hold_to_rank(nn.Linear(6, 8), "cp", 2), "Linear has no kernel"),
    (lambda: release_rank(nn.Conv2d(6, 8, 3)), "Conv2d has no kernel that is held to a rank"),
    (lambda: hold_to_rank(nn.ReLU(), "cp", 2), "ReLU has no kernel"),
    (lambda: hold_to_rank(nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 8, 3)), "cp", 2),
    "the kernel is parametrized already")])
def test_what_cannot_be_held(make, said):
    with pytest.raises(ValueError, match=said): make()


def test_refused_kernels_are_as_before():
    conv = nn.Conv2d(6, 8, 3)
    before = conv.weight
    with pytest.raises(ValueError): hold_to_rank(conv, "cp", 49)
    assert conv.weight is before and not parametrize.is_parametrized(conv)


@pytest.mark.parametrize("call, said", [
    (lambda: entry_order((4, 3), "window", draw()),
    r"a kernel has the shape \(out channels, in channels, \*taps\), not \(4, 3\)"),
    (lambda: decompose("cp", torch.tensor([[[1., math.nan]]]), 1), "a tensor to decompose must hold finite numbers"),
    (lambda: hold_to_rank(zeroed(nn.Conv2d(2, 3, 2)), "cp", 1), "the kernel must have a finite norm above 0")])
def test_what_would_be_silently_wrong(call, said):
    with pytest.raises(ValueError, match=said): call()


def zeroed(conv):
    nn.init.zeros_(conv.weight)
    return conv


def test_a_shallow_copy_shares_its_kernel():
    conv = nn.Conv2d(4, 4, 3)
    other, x = copy.copy(conv), torch.randn(1, 4, 5, 5)
    with pytest.raises(ValueError, match="this Conv2d is shared with another module, .* take copy.deepcopy"):
        hold_to_rank(conv, "cp", 1)
    assert torch.equal(other(x), conv(x))
    del other
    hold_to_rank(conv, "cp", 1)


def convs(kind):
    "A convolution whose kernel another module keeps, and that module."
    conv, other = nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3) if kind == "transposed" else nn.Conv2d(4, 4, 3)
    if kind == "other name": other.register_parameter("kernel", conv.weight)
    elif kind == "container": other = nn.ParameterList([conv.weight])
    elif kind == "dictionary": other = nn.ParameterDict(dict(a=conv.weight))
    elif kind == "memory": other.weight = nn.Parameter(conv.weight.data)
    elif kind == "data": other.weight.data = conv.weight.data
    elif kind == "part":
        other = nn.Linear(3, 3, bias=False)
        other.weight = nn.Parameter(conv.weight.data[1, 1])
    elif kind == "buffer": other.register_buffer("kernel", conv.weight.detach())
    else: other.weight = conv.weight
    if kind == "nested": other = nn.Sequential(nn.Sequential(other))
    return conv, other


OTHERS = "transposed", "other name", "container", "dictionary", "nested", "memory", "data", "part", "buffer"


def shares(net, p):
    return any(q.untyped_storage().data_ptr() == p.untyped_storage().data_ptr()
        for q in [*net.parameters(), *net.buffers()])


@pytest.mark.parametrize("kind, start",
    [("weight", "random"), ("weight", "decompose"), *itertools.product(OTHERS, ["random"])])
def test_a_shared_kernel_is_not_held_to_a_rank(kind, start):
    conv, other = convs(kind)
    before = conv.weight
    said = "the kernel of this Conv2d is shared with another module.*give it a kernel of its own first"
    with pytest.raises(ValueError, match=said):
        hold_to_rank(conv, "cp", 2, start=start)
    assert conv.weight is before and type(conv) is nn.Conv2d and shares(other, before)
    conv.weight = nn.Parameter(conv.weight.detach().clone())                   # the way out
    hold_to_rank(conv, "cp", 2, start=start)
    assert shares(other, before) and conv(torch.randn(1, 4, 5, 5)).isfinite().all()


def test_who_else_refers_to_a_kernel_does_not_matter():
    "Optimizers, lists, dictionaries, gradients, a module in two places, and modules that nobody refers to any more."
    conv = nn.Conv2d(4, 4, 3)
    net, optimizer = nn.Sequential(conv, conv), torch.optim.SGD(conv.parameters(), .1, momentum=.9)
    named, listed = dict(conv.named_parameters()), [*conv.parameters()]
    net(torch.randn(1, 4, 9, 9)).sum().backward()
    optimizer.step()
    gone = nn.Sequential(nn.Conv2d(4, 4, 3))
    gone[0].weight, gone.itself = conv.weight, [gone]        # a cycle, which only the collector takes away
    with pytest.raises(ValueError, match="shared with another module"): hold_to_rank(conv, "cp", 2)
    del gone
    hold_to_rank(conv, "cp", 2)
    assert net[0] is net[1] and torch.equal(net[0].weight, net[1].weight) and named["weight"] is listed[0]
    copied = copy.deepcopy(nn.Conv2d(4, 4, 3))
    hold_to_rank(copied, "tt", 2)


@pytest.mark.parametrize("hook",
    [lambda m: nn.utils.weight_norm(m), lambda m: L1Unstructured.apply(m, "weight", .5) and m,
    lambda m: nn.utils.spectral_norm(m)])
@pytest.mark.filterwarnings("ignore")
def test_kernels_that_a_hook_computes_are_refused(hook):
    conv = nn.Conv2d(4, 4, 3)
    hook(conv)
    with pytest.raises(ValueError, match="the kernel is parametrized already"): hold_to_rank(conv, "cp", 2)
