"Masks, their nulls and held layers, against loops and counts; masks as text."
import copy
import math

import numpy as np
import pandas as pd
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
    NULLS, check_density, check_mask, erdos_renyi_density, hold_to_masks, magnitude_mask, mask_from_text, mask_to_text,
    masks_from_rows, masks_of, masks_to_rows, prune_mask, random_mask, release_masks, shuffle_mask)
from efcn_nb.ladder.tensor_formats import hold_to_rank
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


@pytest.mark.parametrize("density", [0, -.1, 1.01, 30, float("nan"), "a tenth", None, True])
def test_densities_outside_are_refused(density):
    with pytest.raises(ValueError, match="density must be a number above 0 and at most 1, not"):
        random_mask((3, 3), density, draw())


@pytest.mark.parametrize("density", [1, 1., np.float64(.5), 1e-12])
def test_densities_inside_are_not(density): check_density(density)


@pytest.mark.parametrize("mask, said", [
    (torch.ones(2, 3), "not float32 of"), (torch.ones(3, 2).bool(), r"not bool of \(3, 2\)"),
    (torch.ones(6).bool(), r"not bool of \(6,\)"),
    ([[True]*3]*2, "not list"), (torch.zeros(2, 3).bool(), "the mask leaves no weight"), (None, "not NoneType")])
def test_masks_that_do_not_fit(mask, said):
    with pytest.raises(ValueError, match=said): check_mask(mask, (2, 3))
    with pytest.raises(ValueError, match="layer '0': .*" + said):
        hold_to_masks(nn.Sequential(nn.Linear(3, 2)), {"0": mask})


def test_an_impossible_number_of_connections():
    with pytest.raises(ValueError, match="epsilon must be a positive number"): erdos_renyi_density((2, 2), 0)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.data())
def test_the_largest_stay(values, data):
    weight, count = torch.tensor(values).float(), data.draw(st.integers(1, len(values)))
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    assert magnitude_mask(weight, count).nonzero().flatten().tolist() == sorted(order[:count])


def test_pruning_does_not_look_outside_the_mask():
    weight = torch.tensor([9., 1., 8., 2., math.nan])
    found = prune_mask(weight, torch.tensor([False, True, False, True, False]), .5)
    assert found.tolist() == [False, False, False, True, False]


def test_pruning_nothing_and_the_last():
    weight = torch.randn(3, generator=draw())
    mask = torch.tensor([True, False, True])
    assert torch.equal(prune_mask(weight, mask, 0), mask) and torch.equal(prune_mask(weight, mask, .49), mask)
    assert prune_mask(weight, mask, .5).sum() == 1
    assert torch.equal(prune_mask(weight, torch.tensor([False, True, False]), .99), torch.tensor([False, True, False]))


def test_a_third_of_three_is_one():
    "0.1 of 30 is 3, though 0.1*30 is 3.0000000000000004 and 0.3*10 is 3 only after rounding."
    for n, fraction, gone in [(30, .1, 3), (10, .3, 3), (100, .29, 29), (7, .3, 2)]:
        assert prune_mask(torch.arange(n).float(), torch.ones(n).bool(), fraction).sum() == n - gone


@pytest.mark.parametrize("fraction", [1, 1.5, -.1, math.nan, "a third", True])
def test_fractions_outside_are_refused(fraction):
    with pytest.raises(ValueError, match="the fraction to prune must be a number from 0 to below 1, not"):
        prune_mask(torch.ones(4), torch.ones(4).bool(), fraction)


def test_a_fraction_that_leaves_nothing():
    with pytest.raises(ValueError, match="of 4 weights leaves none: choose a smaller fraction"):
        prune_mask(torch.ones(4), torch.ones(4).bool(), 1 - 1e-12)


@pytest.mark.parametrize("call", [lambda w: magnitude_mask(w, 2), lambda w: prune_mask(w, torch.ones(3).bool(), .5)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite(call, bad):
    with pytest.raises(ValueError, match="weights must be finite"): call(torch.tensor([1., bad, 2.]))


@pytest.mark.parametrize("count", [0, 5, -1, 2.5, None])
def test_counts_outside_are_refused(count):
    with pytest.raises(ValueError, match="must be a whole number from 1 to 4, not"):
        magnitude_mask(torch.ones(4), count)


# Nulls

@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 999), st.floats(0, 1), st.sampled_from(NULLS))
def test_nulls_keep_what_they_say(rows, columns, seed, density, keep):
    mask = torch.rand(rows, columns, generator=draw(seed)) < density
    found = shuffle_mask(mask, keep, draw(seed + 1))
    assert found.dtype == torch.bool and found.shape == mask.shape and found.sum() == mask.sum()
    if keep in ("inputs", "both"): assert torch.equal(found.sum(0), mask.sum(0))
    if keep in ("units", "both"): assert torch.equal(found.sum(1), mask.sum(1))


def test_other_nulls_are_uniform_too():
    mask, generator = torch.tensor([[1, 1, 0], [0, 1, 0]]).bool(), draw()
    for keep, count in dict(inputs=2*1*1, units=3*3, density=20).items():
        found = [str(shuffle_mask(mask, keep, generator).tolist()) for _ in range(60*count)]
        assert len(set(found)) == count and chisquare([found.count(m) for m in set(found)]).pvalue > 1e-3


@pytest.mark.parametrize("mask", [torch.ones(3).bool(), torch.ones(3, 3), [[True]], torch.ones(1, 2, 3).bool()])
def test_what_is_no_mask_is_not_shuffled(mask):
    with pytest.raises(ValueError, match="a mask to shuffle must be a bool tensor"): shuffle_mask(mask, "both", draw())


def test_unknown_null():
    with pytest.raises(ValueError, match="unknown keep 'rows'; known are density, inputs, units, both"):
        shuffle_mask(torch.ones(2, 2).bool(), "rows", draw())


# Held layers

def held_net(density=.3):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
    hold_to_masks(net, {"0": random_mask((9, 12), density, draw())})
    return net


@pytest.mark.parametrize("optimizer",
    [lambda p: torch.optim.SGD(p, .1, momentum=.9, weight_decay=.1), lambda p: torch.optim.Adam(p, .1),
    lambda p: torch.optim.AdamW(p, .1)])
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
    assert torch.allclose(nets[0][1].weight, nets[1][1].weight, atol=1e-6)
    assert not nets[0][1].weight[~nets[0][1].geometry.mask].any()


def test_held_to_the_local_entries_an_efcn_is_an_elcn():
    torch.manual_seed(0)
    cnn = nn.Sequential(nn.Unflatten(1, (1, 4, 3)), nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(24, 3))
    efcn, elcn = embed(cnn, (12,)), embed(cnn, (12,), to="lcn")
    hold_to_masks(efcn, {"1": efcn[1].geometry.mask})
    for net in efcn, elcn: train_steps(net, torch.optim.SGD(net.parameters(), .1), batches(12, 10))
    x = torch.randn(5, 12, generator=draw())
    assert torch.allclose(efcn(x), elcn(x), atol=1e-5)


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
    full = torch.ones(9, 12).bool()
    for masks in ({"0": full, "2": full}, {"0": full, "3": torch.ones(1).bool()}):
        with pytest.raises(ValueError): hold_to_masks(net, masks)
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


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


@pytest.mark.parametrize("keep", NULLS[:3])
def test_a_generator_that_drew_a_mask_does_not_undo_it(keep):
    mask = random_mask((40, 60), .1, draw())
    found = shuffle_mask(mask, keep, draw())
    assert found[:4].sum() < 45 and (found & mask).sum() < 45


def test_kernels_held_to_a_rank_take_no_mask():
    net = nn.Sequential(nn.Conv2d(2, 3, 2))
    hold_to_rank(net[0], "cp", 2)
    before = net[0].weight.detach().clone()
    with pytest.raises(ValueError, match="the weight of layer '0' is parametrized in another way"):
        hold_to_masks(net, {"0": torch.ones(3, 2, 2, 2).bool()})
    assert net[0].weight.equal(before) and len(net[0].parametrizations.weight) == 1


@pytest.mark.parametrize("rounds", [0, -1])
def test_trades_need_a_round(rounds):
    with pytest.raises(ValueError, match=f"rounds of trades must be a whole number, 1 or more, not {rounds}"):
        shuffle_mask(torch.ones(4, 4).bool(), "both", draw(), rounds=rounds)


# Weights that are shared

def tied(kind):
    "Networks in which a layer's weight is also that of another, or a layer stands in two places."
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2))
    if kind == "weight": net[2].weight = net[0].weight
    if kind == "three":
        net[2].weight = net[0].weight
        net[3] = nn.Linear(6, 6)
        net.append(nn.Linear(6, 6))
        net[4].weight = net[0].weight
    if kind == "other name": net[2].kernel = net[0].weight
    if kind == "table":
        net[2] = nn.Embedding(6, 6, _weight=net[0].weight)
        net[2].weight = net[0].weight
    if kind == "deep":
        net[2] = nn.Sequential(nn.Linear(6, 6))
        net[2][0].weight = net[0].weight
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
    "one of two": ("weight", {"0": HALF}, "0", "2"), "the other": ("weight", {"2": HALF}, "2", "0"),
    "two masks": ("weight", {"0": HALF, "2": ~HALF}, "0", "2"),
    "two of three": ("three", {"0": HALF, "2": HALF}, "0", "4"),
    "three, two masks": ("three", {"0": HALF, "2": HALF, "4": ~HALF}, "0", "4"),
    "another name": ("other name", {"0": HALF}, "0", "2"),
    "an embedding": ("table", {"0": HALF}, "0", "2"), "deep inside": ("deep", {"0": HALF}, "0", "2.0"),
    "in the network itself": ("root", {"0": HALF}, "0", ""), "in one memory": ("memory", {"0": HALF}, "0", "2"),
    "in one memory, two masks": ("memory", {"0": HALF, "2": ~HALF}, "0", "2"),
    "data": ("data", {"2": HALF}, "2", "0"), "a part": ("part", {"0": HALF}, "0", "3"),
    "a buffer": ("buffer", {"0": HALF}, "0", ""),
    "two masks for one layer": ("layer", {"0": HALF, "2": ~HALF}, "0", "2"),
}


@pytest.mark.parametrize("what", PARTLY)
def test_masks_that_would_break_a_tie_are_refused(what):
    kind, masks, a, b = PARTLY[what]
    net = tied(kind)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=f"the layers '{a}' and '{b}' share their weight: hold both to the same mask"):
        hold_to_masks(net, masks)
    assert {*net.state_dict()} == {*before} and all(torch.equal(x, before[k]) for k, x in net.state_dict().items())
    assert not masks_of(net)


@pytest.mark.parametrize("kind, names",
    [("weight", "02"), ("three", "024"), ("layer", "02"), ("layer", "0"), ("layer", "2")])
def test_ties_are_kept(kind, names):
    "Held together, trained, held to other masks, released: one weight all the time."
    net = tied(kind)
    hold_to_masks(net, {name: HALF for name in names})
    layers = [net[int(name)] for name in names]
    classes = 6 if kind == "three" else 2
    images = [(torch.randn(8, 6), torch.arange(8) % classes) for _ in range(3)]
    train_steps(net, torch.optim.SGD(net.parameters(), .1), images)
    for m in layers:
        assert torch.equal(m.weight, layers[0].weight) and not m.weight[~HALF].any() and m.weight[HALF].all()
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
        assert torch.equal(net[0].weight, net[2].weight) and net[0].weight[mask].all()
        assert not net[2].weight[~mask].any()
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
    with pytest.raises(ValueError, match="the layers '0' and '1' share their weight, .* take copy.deepcopy"):
        hold_to_masks(net, {"0": HALF, "1": HALF})
    with pytest.raises(ValueError, match="the layers '0' and '1' share their weight"): hold_to_masks(net, {"0": HALF})


def test_masks_of_a_tied_network_can_be_put_back():
    net = tied("weight")
    hold_to_masks(net, {"0": HALF, "2": HALF})
    masks = masks_of(net)
    hold_to_masks(net, {name: mask.clone() for name, mask in masks.items()})
    fresh = tied("weight")
    hold_to_masks(fresh, masks)
    assert all(torch.equal(masks_of(fresh)[name], HALF) for name in "02")


@pytest.mark.parametrize("hook",
    [lambda m: nn.utils.weight_norm(m), lambda m: L1Unstructured.apply(m, "weight", .5) and m,
    lambda m: nn.utils.spectral_norm(m)])
@pytest.mark.filterwarnings("ignore")
def test_weights_that_a_hook_computes_are_refused(hook):
    conv = nn.Conv2d(4, 4, 3)
    hook(conv)
    with pytest.raises(ValueError, match="the weight of layer '0' is parametrized in another way: remove that first"):
        hold_to_masks(nn.Sequential(conv), {"0": torch.ones(4, 4, 3, 3).bool()})


# Masks as text

MASKS = st.builds(lambda n, m, density, seed: torch.rand(n, m, generator=draw(seed)) < density,
                  st.integers(1, 30), st.integers(1, 30), st.floats(0, 1), st.integers(0, 9))


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.sampled_from(["0", "a.b", "2 x", "nan"]), MASKS, min_size=1))
def test_masks_survive_a_table(masks):
    found = masks_from_rows(pd.DataFrame(masks_to_rows(masks)))
    assert [*found] == [*masks] and all(found[n].equal(m) and found[n].dtype == torch.bool for n, m in masks.items())


@pytest.mark.parametrize("mask", [torch.ones(2, 3, 5, 5).bool(), torch.ones(2, 3), [[True]]])
def test_masks_that_no_table_holds(mask):
    with pytest.raises(ValueError, match="the mask of layer 'conv' must be a bool matrix"):
        masks_to_rows(dict(conv=mask))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 99), st.integers(1, 9))
def test_a_mask_is_hexadecimal_digits(rows, columns, seed, most):
    mask = torch.rand(rows, columns, generator=draw(seed)) < .5
    bits = "".join("1" if entry else "0" for entry in mask.flatten().tolist())
    bits += "0"*(-len(bits) % 8)
    digits = "".join(f"{int(bits[i:i+4], 2):x}" for i in range(0, len(bits), 4))
    parts = mask_to_text(mask, most)
    assert all(part[0] == "x" and len(part) <= most + 1 for part in parts)
    assert "".join(part[1:] for part in parts) == digits
    found = mask_from_text(parts, (rows, columns))
    assert found.equal(mask) and found.dtype == torch.bool
