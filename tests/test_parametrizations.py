"Masks, their nulls and held layers; tensor formats, orders and kernels of low rank: against loops, counts, dense algebra and PyTorch's own pruning."
import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import chisquare
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import L1Unstructured

from efcn_nb.ladder.embedding import embed
from efcn_nb.training.fused import FusedSGD
from efcn_nb.ladder.masks import (
    NULLS, check_density, check_mask, erdos_renyi_density, hold_to_masks, magnitude_mask, masks_of, prune_mask,
    random_mask, release_masks, shuffle_mask)
from efcn_nb.ladder.tensor_formats import (
    FORMATS, SHUFFLES, compose, core_shapes, count_cores, decompose, entry_order, fit_rank, hold_to_rank,
    largest_rank, release_rank)
from efcn_nb.training.loop import train_steps

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(seed=0): return torch.Generator().manual_seed(seed)


def batches(n, count=3): return [(torch.randn(8, n, generator=draw(i)), torch.arange(8) % 3) for i in range(count)]


# Masks

@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(.01, 1), st.integers(0, 99))
def test_random_masks_have_their_density(rows, columns, density, seed):
    if not round(density*rows*columns): return
    mask = random_mask((rows, columns), density, draw(seed))
    assert mask.sum() == round(density*rows*columns) and mask.dtype == torch.bool and mask.shape == (rows, columns)
    assert torch.equal(mask, random_mask((rows, columns), density, draw(seed)))


def test_random_masks_are_uniform():
    generator = draw()
    found = [tuple(random_mask((2, 2), .5, generator).flatten().nonzero().flatten().tolist()) for _ in range(1200)]
    counts = [found.count(pair) for pair in itertools.combinations(range(4), 2)]
    assert sum(counts) == 1200 and chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("density", [0, -.1, 1.01, 30, float("nan"), "a tenth", None, True])
def test_densities_outside_are_refused(density):
    with pytest.raises(ValueError, match="density must be a number above 0 and at most 1, not"): random_mask((3, 3), density, draw())


def test_density_that_leaves_nothing():
    with pytest.raises(ValueError, match="a density of 0.001 leaves none of 9 weights"): random_mask((3, 3), .001, draw())


@pytest.mark.parametrize("density", [1, 1., np.float64(.5), 1e-12])
def test_densities_inside_are_not(density): check_density(density)


@pytest.mark.parametrize("mask, said", [
    (torch.ones(2, 3), "not float32 of"), (torch.ones(3, 2).bool(), r"not bool of \(3, 2\)"), (torch.ones(6).bool(), r"not bool of \(6,\)"),
    ([[True]*3]*2, "not list"), (torch.zeros(2, 3).bool(), "the mask leaves no weight"), (None, "not NoneType")])
def test_masks_that_do_not_fit(mask, said):
    with pytest.raises(ValueError, match=said): check_mask(mask, (2, 3))
    with pytest.raises(ValueError, match="layer '0': .*" + said): hold_to_masks(nn.Sequential(nn.Linear(3, 2)), {"0": mask})


def test_erdos_renyi_density():
    assert erdos_renyi_density((1000, 784), 13) == pytest.approx(13*1784/784_000)
    assert erdos_renyi_density((2, 2), 5) == 1
    for epsilon in (0, -1, math.inf, math.nan, "20"):
        with pytest.raises(ValueError, match="epsilon must be a positive number"): erdos_renyi_density((2, 2), epsilon)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.data())
def test_the_largest_stay(values, data):
    weight, count = torch.tensor(values).float(), data.draw(st.integers(1, len(values)))
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    assert magnitude_mask(weight, count).nonzero().flatten().tolist() == sorted(order[:count])


def test_pruning_as_pytorch_prunes():
    weight, mask = torch.randn(30, 40, generator=draw()), torch.ones(30, 40).bool()
    reference = torch.ones(30, 40)
    for _ in range(6):
        left = int(reference.sum())
        alive = reference.bool()
        reference[alive] = L1Unstructured(amount=math.floor(.3*left)).compute_mask(weight[alive], torch.ones(left))
        mask = prune_mask(weight, mask, .3)
        assert torch.equal(mask, reference.bool())


def test_pruning_does_not_look_outside_the_mask():
    weight = torch.tensor([9., 1., 8., 2., math.nan])
    assert prune_mask(weight, torch.tensor([False, True, False, True, False]), .5).tolist() == [False, False, False, True, False]


def test_pruning_nothing_and_the_last():
    weight = torch.randn(3, generator=draw())
    mask = torch.tensor([True, False, True])
    assert torch.equal(prune_mask(weight, mask, 0), mask) and torch.equal(prune_mask(weight, mask, .49), mask)
    assert prune_mask(weight, mask, .5).sum() == 1
    assert torch.equal(prune_mask(weight, torch.tensor([False, True, False]), .99), torch.tensor([False, True, False]))


def test_a_third_of_three_is_one():
    "0.1 of 30 is 3, though 0.1*30 is 3.0000000000000004 and 0.3*10 is 3 only after rounding."
    for n, fraction, gone in [(30, .1, 3), (10, .3, 3), (100, .29, 29), (7, .3, 2)]: assert prune_mask(torch.arange(n).float(), torch.ones(n).bool(), fraction).sum() == n - gone


@pytest.mark.parametrize("fraction", [1, 1.5, -.1, math.nan, "a third", True])
def test_fractions_outside_are_refused(fraction):
    with pytest.raises(ValueError, match="the fraction to prune must be a number from 0 to below 1, not"): prune_mask(torch.ones(4), torch.ones(4).bool(), fraction)


def test_a_fraction_that_leaves_nothing():
    with pytest.raises(ValueError, match="of 4 weights leaves none: choose a smaller fraction"): prune_mask(torch.ones(4), torch.ones(4).bool(), 1 - 1e-12)


@pytest.mark.parametrize("call", [lambda w: magnitude_mask(w, 2), lambda w: prune_mask(w, torch.ones(3).bool(), .5)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite(call, bad):
    with pytest.raises(ValueError, match="weights must be finite"): call(torch.tensor([1., bad, 2.]))


@pytest.mark.parametrize("count", [0, 5, -1, 2.5, None])
def test_counts_outside_are_refused(count):
    with pytest.raises(ValueError, match="must be a whole number from 1 to 4, not"): magnitude_mask(torch.ones(4), count)


# Nulls

@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 999), st.floats(0, 1), st.sampled_from(NULLS))
def test_nulls_keep_what_they_say(rows, columns, seed, density, keep):
    mask = torch.rand(rows, columns, generator=draw(seed)) < density
    found = shuffle_mask(mask, keep, draw(seed + 1))
    assert found.dtype == torch.bool and found.shape == mask.shape and found.sum() == mask.sum()
    if keep in ("inputs", "both"): assert torch.equal(found.sum(0), mask.sum(0))
    if keep in ("units", "both"): assert torch.equal(found.sum(1), mask.sum(1))


def with_sums(rows, columns):
    "All bool matrices with these sums."
    found = []
    for bits in itertools.product([False, True], repeat=len(rows)*len(columns)):
        m = torch.tensor(bits).view(len(rows), len(columns))
        if m.sum(1).tolist() == rows and m.sum(0).tolist() == columns: found.append(m)
    return found


def test_trades_reach_all_matrices_equally_often():
    every = with_sums([2, 1, 2, 1], [2, 2, 2])
    generator, seen = draw(), {str(m.tolist()): 0 for m in every}
    for _ in range(100*len(every)): seen[str(shuffle_mask(every[0], "both", generator, 10).tolist())] += 1
    assert len(seen) == len(every) == 15 and chisquare([*seen.values()]).pvalue > 1e-3


def test_other_nulls_are_uniform_too():
    mask, generator = torch.tensor([[1, 1, 0], [0, 1, 0]]).bool(), draw()
    for keep, count in dict(inputs=2*1*1, units=3*3, density=20).items():
        found = [str(shuffle_mask(mask, keep, generator).tolist()) for _ in range(60*count)]
        assert len(set(found)) == count and chisquare([found.count(m) for m in set(found)]).pvalue > 1e-3


@pytest.mark.parametrize("mask", [torch.ones(3).bool(), torch.ones(3, 3), [[True]], torch.ones(1, 2, 3).bool()])
def test_what_is_no_mask_is_not_shuffled(mask):
    with pytest.raises(ValueError, match="a mask to shuffle must be a bool tensor"): shuffle_mask(mask, "both", draw())


def test_unknown_null():
    with pytest.raises(ValueError, match="keep must be one of density, inputs, units, both, not 'rows'"): shuffle_mask(torch.ones(2, 2).bool(), "rows", draw())


# Held layers

def held_net(density=.3):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
    hold_to_masks(net, {"0": random_mask((9, 12), density, draw())})
    return net


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.SGD(p, .1, momentum=.9, weight_decay=.1), lambda p: torch.optim.Adam(p, .1), lambda p: torch.optim.AdamW(p, .1)])
def test_weights_outside_stay_zero_whatever_the_optimiser(optimizer):
    net = held_net()
    start = net[0].weight.detach().clone()
    train_steps(net, optimizer(net.parameters()), batches(12))
    mask = masks_of(net)["0"]
    original = net[0].parametrizations.weight.original
    assert (net[0].weight[~mask] == 0).all() and (original[~mask] == 0).all() and (net[0].weight != start)[mask].all()


@pytest.mark.filterwarnings("ignore:not fused")
def test_held_layers_and_the_fused_optimiser():
    "It hands what it does not know to plain SGD."
    torch.manual_seed(0)
    cnn = nn.Sequential(nn.Unflatten(1, (1, 4, 3)), nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(24, 3))
    nets = [embed(cnn, (12,)) for _ in range(2)]
    for net in nets: hold_to_masks(net, {"1": net[1].geometry.mask})
    fused = FusedSGD(nets[0], .1)
    train_steps(nets[0], fused, batches(12))
    fused.close()
    train_steps(nets[1], torch.optim.SGD(nets[1].parameters(), .1), batches(12))
    assert torch.allclose(nets[0][1].weight, nets[1][1].weight, atol=1e-6) and not nets[0][1].weight[~nets[0][1].geometry.mask].any()


def test_held_to_the_local_entries_an_efcn_is_an_elcn():
    torch.manual_seed(0)
    cnn = nn.Sequential(nn.Unflatten(1, (1, 4, 3)), nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
    efcn, elcn = embed(cnn, (12,)), embed(cnn, (12,), to="lcn")
    hold_to_masks(efcn, {"1": efcn[1].geometry.mask})
    for net in efcn, elcn: train_steps(net, torch.optim.SGD(net.parameters(), .1), batches(12, 10))
    x = torch.randn(5, 12, generator=draw())
    assert torch.allclose(efcn(x), elcn(x), atol=1e-5)


def test_masks_move_and_go():
    net = held_net()
    other = random_mask((9, 12), .5, draw(7))
    inside = net[0].weight.detach()[other & masks_of(net)["0"]].clone()
    hold_to_masks(net, {"0": other, "2": torch.eye(9).bool()[:3]})
    assert torch.equal(masks_of(net)["0"], other) and [*masks_of(net)] == ["0", "2"]
    assert net[0].weight.detach()[other].count_nonzero() == len(inside)
    weights, x = [net[i].weight.detach().clone() for i in (0, 2)], torch.randn(4, 12)
    before = net(x)
    release_masks(net)
    assert not masks_of(net) and all(torch.equal(net[i].weight, w) for i, w in zip((0, 2), weights)) and torch.equal(net(x), before)
    assert {*net.state_dict()} == {"0.weight", "0.bias", "2.weight", "2.bias"} and all(type(net[i]) is nn.Linear for i in (0, 2))


def test_masks_travel_with_copies_and_state():
    net = held_net()
    clone, other = copy.deepcopy(net), held_net(.5)
    hold_to_masks(clone, {"0": torch.ones(9, 12).bool()})
    assert masks_of(net)["0"].sum() == 32 and masks_of(clone)["0"].all()
    other.load_state_dict(net.state_dict())
    assert torch.equal(masks_of(other)["0"], masks_of(net)["0"]) and torch.equal(other[0].weight, net[0].weight)


def test_releasing_a_copy_leaves_the_original():
    "PyTorch keeps the property in a class that copies share."
    net = held_net()
    clone, x = copy.deepcopy(net), torch.randn(4, 12)
    before = net(x)
    release_masks(clone)
    assert torch.equal(net(x), before) and torch.equal(clone(x), before) and [*masks_of(net)] == ["0"]
    release_masks(net)
    assert torch.equal(net(x), before)


def test_a_given_mask_is_copied():
    mask = torch.ones(9, 12).bool()
    net = nn.Sequential(nn.Linear(12, 9))
    hold_to_masks(net, {"0": mask})
    mask[:] = False
    assert masks_of(net)["0"].all()


def test_nothing_is_changed_by_what_is_refused():
    net = held_net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for masks in ({"0": torch.ones(9, 12).bool(), "2": torch.ones(9, 12).bool()}, {"0": torch.ones(9, 12).bool(), "3": torch.ones(1).bool()}):
        with pytest.raises(ValueError): hold_to_masks(net, masks)
    assert before.keys() == net.state_dict().keys() and all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


def test_unknown_layer():
    with pytest.raises(ValueError, match="the network has no layer 'first' with a weight; it has '0', '2'"): hold_to_masks(held_net(), {"first": torch.ones(9, 12).bool()})


def test_a_single_layer_can_be_held():
    layer = nn.Linear(3, 2)
    hold_to_masks(layer, {"": torch.eye(3).bool()[:2]})
    assert layer.weight.count_nonzero() == 2 and [*masks_of(layer)] == [""]
    release_masks(layer)
    assert not masks_of(layer)


def test_masks_of_other_parametrizations_is_none():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Conv2d(6, 8, 3))
    hold_to_rank(net[1], "cp", 2)
    assert masks_of(net) == {}
    release_masks(net)
    assert parametrize.is_parametrized(net[0])


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
        else: T[at] = torch.linalg.multi_dot([torch.eye(cores[0].shape[0], dtype=torch.float64), *(c[:, i] for c, i in zip(cores, at))]).trace()
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
        assert [tuple(c.shape) for c in cores] == core_shapes(format, T.shape, rank) and all(c.dtype == torch.float32 for c in cores)
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
    with pytest.raises(ValueError, match="a compression ratio must be a number from 1 on, not"): fit_rank("tt", (8, 9, 8), ratio)


@pytest.mark.parametrize("format, most", [("cp", 12), ("tucker", 5), ("tt", 5), ("tr", 5)])
def test_ranks_that_the_tensor_does_not_allow(format, most):
    for rank in (0, most + 1, 1.5, None, True):
        with pytest.raises(ValueError, match=rf"the rank of a {format} of shape \(5, 4, 3\) must be a whole number from 1 to {most}, not"): core_shapes(format, (5, 4, 3), rank)


def test_unknown_format_and_shapes():
    with pytest.raises(ValueError, match="unknown tensor format 'svd'; known are cp, tucker, tt, tr"): largest_rank("svd", (3, 3))
    for shape in [(3,), (3, 0, 2)]:
        with pytest.raises(ValueError, match="a tensor to compose has two axes or more, none of them empty"): core_shapes("tt", shape, 1)


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

@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.sampled_from(SHUFFLES), st.integers(0, 99))
def test_orders_move_what_they_say(co, ci, side, shuffle, seed):
    order = entry_order((co, ci, side, side), shuffle, draw(seed))
    pair, tap = order.view(co*ci, side**2)//side**2, order.view(co*ci, side**2) % side**2
    assert order.sort().values.equal(torch.arange(co*ci*side**2))
    if shuffle in ("none", "window"): assert (pair == torch.arange(co*ci)[:, None]).all()
    if shuffle in ("none", "channels"): assert (tap == torch.arange(side**2)).all() and (pair == pair[:, :1]).all()


def test_windows_are_shuffled_each_in_its_own_way():
    order = entry_order((8, 8, 3, 3), "window", draw()).view(64, 9) % 9
    assert len({str(row.tolist()) for row in order}) > 60


# Kernels of low rank

@pytest.mark.parametrize("conv", [nn.Conv1d(3, 5, 4), nn.Conv2d(3, 5, 3), nn.Conv3d(2, 3, 2), nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(3, 5, 3), nn.Conv2d(3, 4, 1)], ids=str)
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
    held, cores = conv.parametrizations.weight[0], [p.detach().clone().requires_grad_() for p in conv.parametrizations.weight.parameters()]
    assert torch.autograd.gradcheck(held, cores) and torch.autograd.gradgradcheck(held, cores)
    target = torch.randn(conv.weight.shape, generator=draw(), dtype=torch.float64)
    ours = torch.autograd.grad((held(*cores)*target).sum(), cores)
    plain = torch.autograd.grad((compose("tr", cores).transpose(1, 2).reshape(-1)[held.order].view(target.shape)*target).sum(), cores)
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


def test_shuffled_kernels_have_full_rank_as_convolutions():
    for rank in (1, 2, 3):
        plain, shuffled = nn.Conv2d(10, 8, 3).double(), nn.Conv2d(10, 8, 3).double()
        hold_to_rank(plain, "tt", rank)
        hold_to_rank(shuffled, "tt", rank, "everything")
        assert [int(torch.linalg.matrix_rank(c.weight.flatten(1))) for c in (plain, shuffled)] == [rank, 8]


def test_held_kernels_train_and_travel():
    net = nn.Sequential(nn.Unflatten(1, (1, 4, 3)), nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
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
    (lambda: hold_to_rank(nn.Conv2d(6, 8, 3), "cp", 49), r"the rank of a cp of shape \(8, 9, 6\) must be a whole number from 1 to 48, not 49"),
    (lambda: hold_to_rank(nn.Conv2d(6, 8, 3), "svd", 2), "unknown tensor format 'svd'"),
    (lambda: hold_to_rank(nn.Conv2d(6, 8, 3), "cp", 2, "all"), "unknown shuffle 'all'"),
    (lambda: hold_to_rank(nn.Conv2d(6, 8, 3), "cp", 2, start="zeros"), "start must be 'random' or 'decompose', not 'zeros'"),
    (lambda: hold_to_rank(nn.Linear(6, 8), "cp", 2), "Linear has no kernel"),
    (lambda: release_rank(nn.Conv2d(6, 8, 3)), "Conv2d has no kernel that is held to a rank"),
    (lambda: hold_to_rank(nn.ReLU(), "cp", 2), "ReLU has no kernel"),
    (lambda: hold_to_rank(nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 8, 3)), "cp", 2), "the kernel is parametrized already")])
def test_what_cannot_be_held(make, said):
    with pytest.raises(ValueError, match=said): make()


def test_refused_kernels_are_as_before():
    conv = nn.Conv2d(6, 8, 3)
    before = conv.weight
    with pytest.raises(ValueError): hold_to_rank(conv, "cp", 49)
    assert conv.weight is before and not parametrize.is_parametrized(conv)


@pytest.mark.parametrize("keep", NULLS[:3])
def test_a_generator_that_drew_a_mask_does_not_undo_it(keep):
    mask = random_mask((40, 60), .1, draw())
    found = shuffle_mask(mask, keep, draw())
    assert found[:4].sum() < 45 and (found & mask).sum() < 45


def test_kernels_held_to_a_rank_take_no_mask():
    net = nn.Sequential(nn.Conv2d(2, 3, 2))
    hold_to_rank(net[0], "cp", 2)
    before = net[0].weight.detach().clone()
    with pytest.raises(ValueError, match="the weight of layer '0' is parametrized in another way"): hold_to_masks(net, {"0": torch.ones(3, 2, 2, 2).bool()})
    assert net[0].weight.equal(before) and len(net[0].parametrizations.weight) == 1


@pytest.mark.parametrize("call, said", [
    (lambda: shuffle_mask(torch.ones(4, 4).bool(), "both", draw(), rounds=0), "the number of rounds of trades must be 1 or more, not 0"),
    (lambda: shuffle_mask(torch.ones(4, 4).bool(), "both", draw(), rounds=-1), "must be 1 or more, not -1"),
    (lambda: entry_order((4, 3), "window", draw()), r"a kernel has the shape \(out channels, in channels, \*taps\), not \(4, 3\)"),
    (lambda: decompose("cp", torch.tensor([[[1., math.nan]]]), 1), "a tensor to decompose must hold finite numbers"),
    (lambda: hold_to_rank(zeroed(nn.Conv2d(2, 3, 2)), "cp", 1), "the kernel must have a finite norm above 0")])
def test_what_would_be_silently_wrong(call, said):
    with pytest.raises(ValueError, match=said): call()


def zeroed(conv):
    nn.init.zeros_(conv.weight)
    return conv


# Weights that are shared

def tied(kind):
    "Networks in which a layer's weight is also that of another, or a layer stands in two places."
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2))
    if kind == "weight": net[2].weight = net[0].weight
    if kind == "three": net[2].weight = net[0].weight; net[3] = nn.Linear(6, 6); net.append(nn.Linear(6, 6)); net[4].weight = net[0].weight
    if kind == "other name": net[2].kernel = net[0].weight
    if kind == "table": net[2] = nn.Embedding(6, 6, _weight=net[0].weight); net[2].weight = net[0].weight
    if kind == "deep": net[2] = nn.Sequential(nn.Linear(6, 6)); net[2][0].weight = net[0].weight
    if kind == "root": net.shared = net[0].weight
    if kind == "memory": net[2].weight = nn.Parameter(net[0].weight.data)
    if kind == "data": net[2].weight.data = net[0].weight.data
    if kind == "part": net[3].weight = nn.Parameter(net[0].weight.data[2:4])
    if kind == "buffer": net.register_buffer("kept", net[0].weight.detach())
    if kind == "flat":
        flat = torch.randn(2, 6, 6)
        net[0].weight, net[2].weight = (nn.Parameter(x) for x in flat)          # one storage, no entry in common
    if kind == "layer": net[2] = net[0]
    return net


HALF = torch.arange(36).view(6, 6) % 2 == 0
PARTLY = {
    "one of two": ("weight", {"0": HALF}, "0", "2"), "the other": ("weight", {"2": HALF}, "2", "0"), "two masks": ("weight", {"0": HALF, "2": ~HALF}, "0", "2"),
    "two of three": ("three", {"0": HALF, "2": HALF}, "0", "4"), "three, two masks": ("three", {"0": HALF, "2": HALF, "4": ~HALF}, "0", "4"), "another name": ("other name", {"0": HALF}, "0", "2"),
    "an embedding": ("table", {"0": HALF}, "0", "2"), "deep inside": ("deep", {"0": HALF}, "0", "2.0"), "in the network itself": ("root", {"0": HALF}, "0", ""), "in one memory": ("memory", {"0": HALF}, "0", "2"), "in one memory, two masks": ("memory", {"0": HALF, "2": ~HALF}, "0", "2"),
    "data": ("data", {"2": HALF}, "2", "0"), "a part": ("part", {"0": HALF}, "0", "3"), "a buffer": ("buffer", {"0": HALF}, "0", ""),
    "two masks for one layer": ("layer", {"0": HALF, "2": ~HALF}, "0", "2"),
}


@pytest.mark.parametrize("what", PARTLY)
def test_masks_that_would_break_a_tie_are_refused(what):
    kind, masks, a, b = PARTLY[what]
    net = tied(kind)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=f"the layers '{a}' and '{b}' share their weight: hold both to the same mask"): hold_to_masks(net, masks)
    assert {*net.state_dict()} == {*before} and all(torch.equal(x, before[k]) for k, x in net.state_dict().items()) and not masks_of(net)


@pytest.mark.parametrize("kind, names", [("weight", "02"), ("three", "024"), ("layer", "02"), ("layer", "0"), ("layer", "2")])
def test_ties_are_kept(kind, names):
    "Held together, trained, held to other masks, released: one weight all the time."
    net = tied(kind)
    hold_to_masks(net, {name: HALF for name in names})
    layers = [net[int(name)] for name in names]
    train_steps(net, torch.optim.SGD(net.parameters(), .1), [(torch.randn(8, 6), torch.arange(8) % (6 if kind == "three" else 2)) for _ in range(3)])
    assert all(torch.equal(m.weight, layers[0].weight) and not m.weight[~HALF].any() and m.weight[HALF].all() for m in layers)
    assert len({id(m.parametrizations.weight.original) for m in layers}) == 1
    if len(names) > 1 and kind != "layer":
        with pytest.raises(ValueError, match="share their weight"): hold_to_masks(net, {names[0]: ~HALF})
    hold_to_masks(net, {name: ~HALF for name in names})
    assert all(not m.weight.any() for m in layers)
    release_masks(net)
    assert len({id(m.weight) for m in layers}) == 1 and all(type(m.weight) is nn.Parameter for m in layers)


@pytest.mark.parametrize("kind", ["memory", "data"])
def test_ties_in_memory_are_kept(kind):
    net = tied(kind)
    hold_to_masks(net, {"0": HALF, "2": HALF})
    for mask in (HALF, ~HALF):
        hold_to_masks(net, {"0": mask, "2": mask})
        with torch.no_grad(): net[0].parametrizations.weight.original.add_(mask*1.)
        assert torch.equal(net[0].weight, net[2].weight) and net[0].weight[mask].all() and not net[2].weight[~mask].any()
    release_masks(net)
    assert net[0].weight.data_ptr() == net[2].weight.data_ptr() and net[0].weight is not net[2].weight


def test_neighbours_in_one_storage_are_no_tie():
    net = tied("flat")
    before = net[2].weight.detach().clone()
    hold_to_masks(net, {"0": HALF})
    assert torch.equal(net[2].weight, before) and not net[0].weight[~HALF].any()


def test_shallow_copies_are_no_layers_of_their_own():
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    net[1] = copy.copy(net[0])
    with pytest.raises(ValueError, match="the layers '0' and '1' share their weight, .* take copy.deepcopy"): hold_to_masks(net, {"0": HALF, "1": HALF})
    with pytest.raises(ValueError, match="the layers '0' and '1' share their weight"): hold_to_masks(net, {"0": HALF})
    conv = nn.Conv2d(4, 4, 3)
    other, x = copy.copy(conv), torch.randn(1, 4, 5, 5)
    with pytest.raises(ValueError, match="the kernel of this Conv2d is shared with another module, .* take copy.deepcopy"): hold_to_rank(conv, "cp", 1)
    assert torch.equal(other(x), conv(x))
    del other
    hold_to_rank(conv, "cp", 1)


def test_masks_of_a_tied_network_can_be_put_back():
    net = tied("weight")
    hold_to_masks(net, {"0": HALF, "2": HALF})
    masks = masks_of(net)
    hold_to_masks(net, {name: mask.clone() for name, mask in masks.items()})
    fresh = tied("weight")
    hold_to_masks(fresh, masks)
    assert all(torch.equal(masks_of(fresh)[name], HALF) for name in "02")


def convs(kind):
    "A convolution whose kernel another module keeps, and that module."
    conv, other = nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3) if kind == "transposed" else nn.Conv2d(4, 4, 3)
    if kind == "other name": other.register_parameter("kernel", conv.weight)
    elif kind == "container": other = nn.ParameterList([conv.weight])
    elif kind == "dictionary": other = nn.ParameterDict(dict(a=conv.weight))
    elif kind == "memory": other.weight = nn.Parameter(conv.weight.data)
    elif kind == "data": other.weight.data = conv.weight.data
    elif kind == "part": other = nn.Linear(3, 3, bias=False); other.weight = nn.Parameter(conv.weight.data[1, 1])
    elif kind == "buffer": other.register_buffer("kernel", conv.weight.detach())
    else: other.weight = conv.weight
    if kind == "nested": other = nn.Sequential(nn.Sequential(other))
    return conv, other


def shares(net, p): return any(q.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for q in [*net.parameters(), *net.buffers()])


@pytest.mark.parametrize("kind, start", [("weight", "random"), ("weight", "decompose"), *[(kind, "random") for kind in ("transposed", "other name", "container", "dictionary", "nested", "memory", "data", "part", "buffer")]])
def test_a_shared_kernel_is_not_held_to_a_rank(kind, start):
    conv, other = convs(kind)
    before = conv.weight
    with pytest.raises(ValueError, match=r"the kernel of this Conv2d is shared with another module.*give it a kernel of its own first"): hold_to_rank(conv, "cp", 2, start=start)
    assert conv.weight is before and type(conv) is nn.Conv2d and shares(other, before)
    conv.weight = nn.Parameter(conv.weight.detach().clone())                   # the way out
    hold_to_rank(conv, "cp", 2, start=start)
    assert shares(other, before) and conv(torch.randn(1, 4, 5, 5)).isfinite().all()


def test_who_else_refers_to_a_kernel_does_not_matter():
    "Optimizers, lists, dictionaries, gradients, a module in two places, and modules that nobody refers to any more."
    conv = nn.Conv2d(4, 4, 3)
    net, optimizer, named, listed = nn.Sequential(conv, conv), torch.optim.SGD(conv.parameters(), .1, momentum=.9), dict(conv.named_parameters()), [*conv.parameters()]
    net(torch.randn(1, 4, 9, 9)).sum().backward()
    optimizer.step()
    gone = nn.Sequential(nn.Conv2d(4, 4, 3))
    gone[0].weight, gone.itself = conv.weight, [gone]                          # a cycle, which only the collector takes away
    with pytest.raises(ValueError, match="shared with another module"): hold_to_rank(conv, "cp", 2)
    del gone
    hold_to_rank(conv, "cp", 2)
    assert net[0] is net[1] and torch.equal(net[0].weight, net[1].weight) and named["weight"] is listed[0]
    copied = copy.deepcopy(nn.Conv2d(4, 4, 3))
    hold_to_rank(copied, "tt", 2)


@pytest.mark.parametrize("hook", [lambda m: nn.utils.weight_norm(m), lambda m: L1Unstructured.apply(m, "weight", .5) and m, lambda m: nn.utils.spectral_norm(m)])
@pytest.mark.filterwarnings("ignore")
def test_weights_that_a_hook_computes_are_refused(hook):
    conv = nn.Conv2d(4, 4, 3)
    hook(conv)
    with pytest.raises(ValueError, match="the kernel is parametrized already"): hold_to_rank(conv, "cp", 2)
    with pytest.raises(ValueError, match="the weight of layer '0' is parametrized in another way: remove that first"): hold_to_masks(nn.Sequential(conv), {"0": torch.ones(4, 4, 3, 3).bool()})
