"Topologies, against permutations, sets, colours in plain Python, and made-up tables; evolution against loops."
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.spatial.distance import cdist
from torch import nn

from efcn_nb.materials.data import Data, Dataset, load_data
from efcn_nb.ladder.embedding import embed
from efcn_nb.ladder.masks import hold_to_masks, masks_of, random_mask
from efcn_nb.studies import topology as study
from efcn_nb.studies.topology import (
    KINDS, bench_topology, blind_share, check_topology, compare_topologies, draw_weights, evolve, evolve_mask,
    layer_distances, local_cnn, local_masks, match_units, neighbour_distances, null_distances, pack_masks,
    pruning_steps, sparse_runs, start_shares, starting_masks, topology_claims, topology_distance, topology_distances,
    topology_study, train_kind, unit_colours, unpack_masks)
from efcn_nb.training.loop import Diverged

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(seed): return torch.Generator().manual_seed(seed)


def random_topology(sizes, density, seed):
    g = draw(seed)
    return [torch.rand(n, m, generator=g) < density for m, n in zip(sizes, sizes[1:])]


def relabelled(masks, seed, labelled=False):
    "A copy of the network whose units are called otherwise, and the units of the original at its places."
    g, order, copy, orders = draw(seed), torch.arange(masks[0].shape[1]), [], []
    for l, m in enumerate(masks):
        new = torch.arange(len(m)) if labelled and l == len(masks) - 1 else torch.randperm(len(m), generator=g)
        copy.append(m[new][:, order])
        orders.append(order := new)
    return copy, orders


SIZES = st.lists(st.integers(1, 14), min_size=2, max_size=5)
NETS = st.builds(random_topology, SIZES, st.sampled_from([0., .02, .1, .3, .7, 1.]), st.integers(0, 10**6))


# Sets of neighbours

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 20), st.sampled_from([0., .1, .5, 1.]), st.integers(0, 999), st.integers(1, 40))
def test_neighbour_distances_are_scipys(n, m, inputs, density, seed, most):
    g = draw(seed)
    a, b = (torch.rand(k, inputs, generator=g) < density for k in (n, m))
    np.testing.assert_allclose(neighbour_distances(a, b, most), cdist(a.numpy(), b.numpy(), "jaccard"), atol=1e-15)


def test_neighbour_distances_are_exact_for_many_inputs():
    a, b = torch.ones(1, 2**22).bool(), torch.ones(1, 2**22).bool()
    b[0, 0] = False
    assert neighbour_distances(a, b)[0, 0] == 1 - (2**22 - 1)/2**22


@pytest.mark.parametrize("masks, words", [
    (torch.ones(2, 2).bool(), r"not a tensor: write \[mask\]"), ([], "at least one layer"), ({}, "at least one layer"),
    ([torch.ones(2, 2)], r"bool matrix \(output units, input units\), not float32 of \(2, 2\)"), ([torch.ones(4).bool()], r"not bool of \(4,\)"), ([np.ones((2, 2), bool)], "not ndarray"),
    ([torch.ones(0, 2).bool()], r"not bool of \(0, 2\)"),
    ({"a": torch.ones(3, 2).bool(), "b": torch.ones(2, 2).bool()}, "layer 'b' of masks reads 2 units, but layer 'a' before it has 3: take layers that follow each other")])
def test_what_is_no_topology(masks, words):
    with pytest.raises(ValueError, match=words): check_topology(masks)


@pytest.mark.parametrize("a, b, words", [
    ([torch.ones(2, 2).bool()], [torch.ones(2, 3).bool()], "only networks of the same layers can be compared"), ([torch.ones(2, 2).bool()], [torch.ones(2, 2).bool()]*2, "same layers"),
    ({"x": torch.ones(2, 2).bool()}, {"y": torch.ones(2, 2).bool()}, r"have layers \['x'\] and \['y'\]"), ([torch.ones(2, 2).bool()], [torch.ones(2, 2)], "layer 0 of the second topology")])
def test_what_cannot_be_compared(a, b, words):
    for f in (match_units, layer_distances, topology_distance, null_distances, compare_topologies):
        with pytest.raises(ValueError, match=words): f(a, b)


# Colours

def plain_colours(masks, labelled):
    "Partitions of all units after each round of colour refinement, with colours that are nested tuples made numbers."
    sizes = [masks[0].shape[1], *map(len, masks)]
    colours = {(l, i): (i,) if l == 0 or labelled and l == len(masks) else () for l, n in enumerate(sizes) for i in range(n)}
    below = {(l, i): [(l - 1, j) for j in range(sizes[l-1]) if l and masks[l-1][i, j]] for l, i in colours}
    above = {u: [v for v in colours if u in below[v]] for u in colours}
    rounds = []
    while not rounds or len({*colours.values()}) > rounds[-1]:
        rounds.append(len({(u[0], c) for u, c in colours.items()}))
        signs = {u: (u[0], colours[u], tuple(sorted(Counter(colours[v] for v in below[u]).items())), tuple(sorted(Counter(colours[v] for v in above[u]).items()))) for u in colours}
        number = {s: (k,) for k, s in enumerate(sorted({*signs.values()}, key=repr))}
        colours = {u: number[s] for u, s in signs.items()}
    return rounds


@settings(max_examples=40, deadline=None)
@given(NETS, st.booleans())
def test_colours_tell_as_many_apart_as_plain_ones(masks, labelled):
    found = unit_colours(masks, labelled)
    plain = plain_colours(masks, labelled)
    assert [sum(len(np.unique(layer[r])) for layer in found) for r in range(len(found[0]) - 1)] == plain[:len(found[0]) - 1]
    assert len(plain) == len(found[0]) - 1 or plain[-1] == plain[-2]
    assert all(len(np.unique(layer[-1])) == layer.shape[1] for layer in found)


@settings(max_examples=40, deadline=None)
@given(NETS, st.booleans(), st.integers(0, 99))
def test_colours_move_with_their_units(masks, labelled, seed):
    copy, orders = relabelled(masks, seed, labelled)
    for mine, theirs, order in zip(unit_colours(masks, labelled)[1:], unit_colours(copy, labelled)[1:], orders):
        assert (mine[:-1, order.numpy()] == theirs[:-1]).all() and sorted(mine[-1]) == sorted(theirs[-1])


# The distance

@settings(max_examples=100, deadline=None)
@given(NETS, st.booleans(), st.integers(0, 99))
def test_a_relabelled_copy_is_at_distance_zero(masks, labelled, seed):
    copy, _ = relabelled(masks, seed, labelled)
    D, partners = match_units(masks, copy, labelled)
    assert D == [0.]*len(masks)
    order = torch.arange(masks[0].shape[1])
    for a, b, p in zip(masks, copy, partners): # every connection finds its partner
        assert b[p][:, order].equal(a)
        order = p


def rings(sizes, dead=3):
    "Units of a layer without inputs, read two by two by the next, in rings."
    blocks = [torch.eye(n).bool() | torch.eye(n).roll(1, 1).bool() for n in sizes]
    M = torch.block_diag(*[b.int() for b in blocks]).bool()
    return [torch.zeros(len(M), dead).bool(), M, torch.ones(2, len(M)).bool()]


def regular(n, k, layers, seed):
    "Behind a dense layer, layers in which each unit has `k` inputs and `k` readers."
    g = draw(seed)
    circulant = sum(torch.eye(n).roll(i, 1) for i in range(k)).bool()
    swapped = [circulant.clone() for _ in range(layers)]
    for m in swapped:
        for _ in range(20*n): # exchange the ends of two connections
            (i, j), (a, b) = torch.randint(n, (2, 2), generator=g).tolist()
            if m[i, a] and m[j, b] and not m[i, b] and not m[j, a]: m[i, a] = m[j, b] = False; m[i, b] = m[j, a] = True
    return [torch.ones(n, 4).bool(), *swapped, torch.ones(3, n).bool()]


TIED = {"all full": [torch.ones(7, 5).bool(), torch.ones(6, 7).bool()], "all empty": [torch.zeros(7, 5).bool(), torch.zeros(6, 7).bool(), torch.ones(4, 6).bool()],
        "a ring": rings([8]), "two equal rings": rings([5, 5]), "rings of other sizes": rings([3, 4, 5, 4]), "regular": regular(14, 3, 1, 0), "twice regular": regular(12, 3, 2, 1),
        "chains": [torch.zeros(9, 4).bool(), torch.eye(9).bool(), torch.eye(9).bool(), torch.ones(3, 9).bool()],
        "copies of units": [m.repeat_interleave(3, 0).repeat_interleave(3, 1) if l else m.repeat_interleave(3, 0) for l, m in enumerate(random_topology([10, 8, 8, 5], .2, 0))],
        "very sparse": random_topology([20, 90, 90, 90, 10], .012, 1), "a convolution": [*local_masks(embed(local_cnn((1, 12, 12), 3, 3), (1, 12, 12))).values()]}


@pytest.mark.parametrize("name", TIED)
def test_heavy_ties(name):
    masks = TIED[name]
    for seed, labelled in itertools.product(range(3), (False, True)):
        copy, _ = relabelled(masks, seed, labelled)
        assert layer_distances(masks, copy, labelled) == [0.]*len(masks)
    other = [m ^ (torch.rand(m.shape, generator=draw(9)) < .05) for m in masks]
    other[0][0, 0] = ~masks[0][0, 0]
    ways = [layer_distances(relabelled(a, 1)[0], relabelled(b, 2)[0]) for a, b in ((masks, other), (other, masks), (relabelled(masks, 5)[0], other))]
    assert ways[0] == ways[1] == ways[2] and 0 < sum(ways[0])


@pytest.mark.parametrize("name, most", [("very sparse", .02), ("copies of units", .01), ("a convolution", .002)])
def test_one_connection_more_or_less_is_a_small_distance(name, most):
    "Among units with equal input sets, those are matched that are connected alike on the other side. Left to chance, the first of these networks is at .3."
    masks, found = TIED[name], []
    for seed in range(6):
        other = [m.clone() for m in masks]
        layer = other[seed % len(other)].view(-1)
        layer[torch.randint(len(layer), (1,), generator=draw(seed))] ^= True
        found.append(topology_distance(masks, relabelled(other, seed)[0]))
    assert 0 < np.mean(found) < most


@settings(max_examples=40, deadline=None)
@given(SIZES, st.sampled_from([.05, .2, .5]), st.sampled_from([.05, .2, .5]), st.integers(0, 999), st.booleans())
def test_symmetric_bounded_and_blind_to_names(sizes, p, q, seed, labelled):
    a, b = random_topology(sizes, p, seed), random_topology(sizes, q, seed + 1)
    D = layer_distances(a, b, labelled)
    assert D == layer_distances(b, a, labelled) == layer_distances(relabelled(a, 1, labelled)[0], relabelled(b, 2, labelled)[0], labelled)
    assert all(0 <= d <= 1 for d in D) and topology_distance(a, b, labelled) == np.mean(D)
    assert topology_distance(dict(enumerate(a)), b, labelled) == np.mean(D)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=3, max_size=3), st.integers(0, 999))
def test_no_permutation_is_better(sizes, seed):
    a, b = random_topology(sizes, .4, seed), random_topology(sizes, .4, seed + 5000)
    D, partners = match_units(a, b)
    order = torch.arange(sizes[0])
    for x, y, d, p in zip(a, b, D, partners):
        cost = cdist(x.numpy(), y[:, order].numpy(), "jaccard")
        assert sorted(p.tolist()) == [*range(len(y))]
        np.testing.assert_allclose(d, cost[range(len(y)), p].mean(), atol=1e-15)
        np.testing.assert_allclose(d, min(np.mean([cost[j, k] for j, k in enumerate(s)]) for s in itertools.permutations(range(len(y)))), atol=1e-8)
        order = p


@settings(max_examples=30, deadline=None)
@given(NETS, st.integers(0, 99))
def test_partners_of_the_way_back(masks, seed):
    other = [m ^ (torch.rand(m.shape, generator=draw(seed)) < .1) for m in masks]
    there, back = match_units(masks, other).partners, match_units(other, masks).partners
    assert all(p[q].equal(torch.arange(len(p))) for p, q in zip(there, back))


def test_disjoint_networks_are_at_distance_one():
    a = [torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool()]
    assert topology_distance(a, [a[0].flip(1)]) == 1 and topology_distance(a, [torch.zeros(2, 4).bool()]) == 1


def test_by_hand():
    "Two units each; the crossed assignment is better: 1 - 2/3 and 0 against 1 and 3/4."
    a = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    b = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]).bool()
    assert match_units([a], [b]).partners[0].tolist() == [1, 0]
    assert topology_distance([a], [b]) == pytest.approx((1/3 + 0)/2)


def test_labelled_outputs_stay():
    a = [random_topology([6, 9], .4, 0)[0], torch.eye(9).bool()[:4]]
    b = [a[0], a[1].roll(1, 0)]
    assert topology_distance(a, b) <= layer_distances(a, b, labelled_outputs=True)[1]/2
    assert layer_distances(a, b, labelled_outputs=True) == [0, 1] and match_units(a, b, True).partners[1].tolist() == [0, 1, 2, 3]


def test_bench_counts_both():
    table = bench_topology(20, [.1, .5], 1)
    assert table.width.tolist() == [20, 20] and (table["loop / this"] == table["loop (s)"]/table["this (s)"]).all()


# Nulls

def test_null_of_independent_masks_is_their_distance():
    a, b = ([random_mask((80, 60), .06, draw(s)), random_mask((50, 80), .06, draw(s + 50))] for s in (0, 1))
    for keep in ("density", "units", "inputs", "both"):
        null = null_distances(a, b, keep, draws=4)
        assert null.shape == (4, 2) and (null.mean() - layer_distances(a, b)).abs().max() < .04 and (null.std() < .04).all() # seeds 0 and 1 drew the masks, too


@pytest.mark.parametrize("keep", ["density", "both"])
def test_null_shuffles_what_it_should(keep, monkeypatch):
    a, b = (dict(zip("uv", random_topology([9, 8, 7], .3, s))) for s in (0, 1))
    seen = []
    monkeypatch.setattr(study, "layer_distances", lambda x, y, labelled: seen.append((x, y)) or [0., 0.])
    state = torch.random.get_rng_state()
    assert [*null_distances(a, b, keep, draws=3, seed=4).columns] == ["u", "v"]
    null_distances(a, b, keep, draws=1, seed=4, second=False)
    assert torch.random.get_rng_state().equal(state)
    for x, y in seen:
        for shuffled, own in zip([*x, *y], [*a.values(), *b.values()]):
            assert shuffled.sum() == own.sum()
            if keep == "both": assert all(shuffled.sum(axis).equal(own.sum(axis)) for axis in (0, 1))
    assert [y[0].equal(b["u"]) for _, y in seen] == [False]*3 + [True] and not any(x[0].equal(a["u"]) for x, _ in seen)
    assert not seen[0][0][0].equal(seen[1][0][0])


def test_compare_is_distance_over_null():
    a, b = (dict(zip("uv", random_topology([30, 25, 20], .1, s))) for s in (0, 1))
    t = compare_topologies(a, b, ["units"], draws=3, seed=2).set_index("layer")
    null = null_distances(a, b, "units", draws=3, seed=2)
    assert [*t.index] == ["u", "v", "all"] and t.distance.tolist()[:2] == layer_distances(a, b)
    assert t.distance["all"] == pytest.approx(t.distance[["u", "v"]].mean()) and t.units["all"] == pytest.approx(null.mean().mean())
    assert t.units_spread["all"] == pytest.approx(null.mean(axis=1).std()) and t.units_relative["v"] == pytest.approx(t.distance["v"]/null.v.mean())
    full = [torch.ones(3, 3).bool()]
    assert compare_topologies(full, full, draws=1)[["density_relative", "both_relative"]].isna().all().all()


@pytest.mark.parametrize("wrong, words", [(dict(draws=0), "draws must be 1 or more, not 0"), (dict(draws=2.5), "not 2.5"), (dict(draws=True), "not True"), (dict(keep="degree"), "keep must be one of")])
def test_impossible_nulls(wrong, words):
    a = random_topology([4, 4], .5, 0)
    with pytest.raises(ValueError, match=words): null_distances(a, a, **wrong)


def test_a_random_network_is_farther_from_a_convolution_than_shuffles_are_from_each_other():
    "Rows of a convolution repeat. The null that leaves it as it is knows."
    local = TIED["a convolution"]
    chance = [random_mask(m.shape, m.float().mean().item(), draw(5)) for m in local]
    free, fixed = (compare_topologies(chance, local, ["density"], draws=3, second=second).density_relative.iloc[-1] for second in (True, False))
    assert free > 1.01 and fixed == pytest.approx(1, abs=.02)


# Networks

@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 7, 10)])
def test_local_masks_are_where_the_matrices_can_be(shape):
    cnn = local_cnn(shape, 4, 3, seed=1)
    efcn = embed(cnn, shape)
    masks = local_masks(efcn)
    assert [*masks] == ["0", "2"] and check_topology(masks) and cnn[-1].in_features == len(masks["2"]) == 6*-(-shape[1]//4)*-(-shape[2]//4)
    for name, m in masks.items(): assert efcn.get_submodule(name).weight.ne(0).equal(m)
    assert local_cnn(shape, 4, 3, seed=1)[0].weight.equal(cnn[0].weight) and not local_cnn(shape, 4, 3, seed=2)[0].weight.equal(cnn[0].weight)


@pytest.mark.parametrize("build, words", [(lambda: local_cnn((1, 8, 8), 3, 0), "1 or more, not 0"), (lambda: local_cnn((1, 8, 8), 3, 1.5), "not 1.5"), (lambda: local_cnn((64,), 3), r"not of shape \(64,\)"),
                                          (lambda: local_masks(local_cnn((1, 8, 8), 3)), "embed a CNN first")])
def test_networks_that_cannot_be(build, words):
    with pytest.raises(ValueError, match=words): build()


# Evolution

@settings(max_examples=80, deadline=None)
@given(st.integers(1, 8), st.integers(2, 8), st.floats(.1, .9), st.sampled_from([0., .1, .3, .5, .99]), st.integers(0, 999))
def test_evolution_is_the_loop(rows, columns, density, zeta, seed):
    g = draw(seed)
    mask = torch.rand(rows, columns, generator=g) < density
    weight = torch.randn(rows, columns, generator=g).round(decimals=1)*mask
    if not mask.any() or mask.all(): return
    new, grown = evolve_mask(weight, mask, zeta, draw(1))
    alive = {(i, j): weight[i, j].item() for i, j in mask.nonzero().tolist()}
    dead = set()
    for side in ([p for p in alive if alive[p] >= 0], [p for p in alive if alive[p] < 0]):
        dead |= {*sorted(side, key=lambda p: abs(alive[p]))[:int(zeta*len(side) + 1e-9)]}
    kept = {*map(tuple, (new & ~grown).nonzero().tolist())}
    assert kept == alive.keys() - dead and grown.sum() == len(dead) and new.sum() == mask.sum() and new.dtype == torch.bool


def test_growth_is_uniform_over_empty_places():
    mask = torch.zeros(4, 10, dtype=torch.bool)
    mask[:, :3] = True
    weight = mask*torch.arange(1., 41).view(4, 10)
    count = sum(evolve_mask(weight, mask, .5, draw(s))[1].int() for s in range(3000))
    kept = mask & (weight >= weight[mask].sort().values[6])
    assert not count[kept].any()
    expected = 3000*6/34
    assert ((count[~kept] - expected)**2/expected).sum() < 34 + 5*(2*34)**.5 # chi square; places just emptied are empty


@pytest.mark.parametrize("zeta", [1, 1., 1.5, -.1, math.nan, math.inf, "half", None, True])
def test_impossible_zeta(zeta):
    weight, mask = torch.randn(3, 4), torch.eye(3, 4).bool()
    with pytest.raises(ValueError, match="zeta, the share of connections to replace, must be a number from 0 to below 1"): evolve_mask(weight, mask, zeta, draw(0))
    if zeta in (1, 1.5) and zeta is not True:
        with pytest.raises(ValueError, match="nothing would be left of a layer"): evolve_mask(weight, mask, zeta, draw(0))


@pytest.mark.parametrize("mask, words", [(torch.ones(3, 4).bool(), "every place of the layer is taken"), (torch.zeros(3, 4).bool(), "leaves no weight"), (torch.ones(4, 3).bool(), r"shape of its weight, \(3, 4\)")])
def test_masks_that_cannot_evolve(mask, words):
    with pytest.raises(ValueError, match=words): evolve_mask(torch.randn(3, 4), mask, .3, draw(0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_cannot_be_compared(value):
    weight, mask = torch.ones(2, 3), torch.tensor([[1, 1, 0], [0, 1, 0]]).bool()
    weight[0, 2] = value
    assert evolve_mask(weight, mask, .5, draw(0))[0].sum() == 3 # outside the mask it does not matter
    weight[0, 1] = value
    with pytest.raises(ValueError, match="weights must be finite"): evolve_mask(weight, mask, .5, draw(0))


def held_net(density=.3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(20, 15), nn.ReLU(), nn.Linear(15, 12), nn.ReLU(), nn.Linear(12, 3))
    hold_to_masks(net, {"0": random_mask((15, 20), density, draw(0)), "2": random_mask((12, 15), density, draw(1))})
    draw_weights(net, draw(2))
    return net


def test_drawn_weights_have_pytorchs_bound_for_so_many_inputs():
    net = held_net()
    for name, mask in masks_of(net).items():
        bound = (mask.sum()/len(mask))**-.5
        w = net.get_submodule(name).weight.detach()[mask]
        assert w.abs().max() <= bound < 1.1*w.abs().max() and w.std() == pytest.approx(float(bound)/3**.5, rel=.15) and not net.get_submodule(name).weight[~mask].any()


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, .1, momentum=.9), lambda p: torch.optim.Adam(p, .01)])
def test_evolve_changes_what_it_should(make):
    net = held_net()
    optimizer, x = make(net.parameters()), torch.randn(30, 20, generator=draw(3))
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), torch.arange(30) % 3).backward()
        optimizer.step()
    masks, weights = {n: m.clone() for n, m in masks_of(net).items()}, {n: net.get_submodule(n).weight.detach().clone() for n in masks_of(net)}
    output, state = net[4].weight.clone(), torch.random.get_rng_state()
    grown = evolve(net, .3, draw(5), optimizer)
    assert torch.random.get_rng_state().equal(state) and net[4].weight.equal(output)
    for name, mask in masks_of(net).items():
        layer, kept = net.get_submodule(name), mask & masks[name]
        assert mask.sum() == masks[name].sum() and not layer.weight[~mask].any() and grown[name] >= (mask & ~masks[name]).sum() > 0
        same = layer.weight.eq(weights[name]) & kept
        assert same.sum() == mask.sum() - grown[name] # all others are freshly drawn
        fresh = mask & ~same
        for memory in optimizer.state[layer.parametrizations.weight.original].values():
            if torch.is_tensor(memory) and memory.shape == mask.shape: assert not memory[fresh].any() and memory[same].any()
        assert layer.weight[fresh].abs().max() <= (mask.sum()/len(mask))**-.5
        assert len(layer.weight[fresh].unique()) == fresh.sum() > 8 and (layer.weight[fresh] > 0).float().mean().sub(.5).abs() < .4


def test_evolve_leaves_everything_if_one_layer_cannot():
    net = held_net()
    hold_to_masks(net, {"2": torch.ones(12, 15).bool()})
    before = [p.clone() for p in net.parameters()] + [m.clone() for m in masks_of(net).values()]
    with pytest.raises(ValueError, match="every place of the layer is taken"): evolve(net, .3, draw(0))
    assert all(a.equal(b) for a, b in zip(before, [*net.parameters(), *masks_of(net).values()]))
    with pytest.raises(ValueError, match="no layer of the network is held to a mask"): evolve(nn.Linear(3, 3), .3, draw(0))


def test_blind_share_is_the_mean_of_blind_evolution():
    local = random_mask((40, 50), .2, draw(0))
    shares = []
    for seed in range(30):
        g, mask = draw(seed), local.clone()
        for _ in range(4): mask, _ = evolve_mask(torch.rand(mask.shape, generator=g), mask, .3, g)
        shares.append(float((mask & local).sum()/mask.sum()))
    assert np.mean(shares) == pytest.approx(blind_share(1., 400, 400, 2000, .3, 4), abs=4*np.std(shares)/30**.5)
    assert blind_share(.7, 400, 400, 2000, .3, 0) == .7 and blind_share(.2, 400, 400, 2000, .3, 9) == pytest.approx(.2)


# Masks in tables, masks at the start

@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.sampled_from(["0", "a.b", "2 x", "nan"]), st.builds(lambda n, m, p, s: random_topology([m, n], p, s)[0], st.integers(1, 30), st.integers(1, 30), st.floats(0, 1), st.integers(0, 9)), min_size=1))
def test_masks_survive_a_table(masks):
    found = unpack_masks(pd.DataFrame(pack_masks(masks)))
    assert [*found] == [*masks] and all(found[n].equal(m) and found[n].dtype == torch.bool for n, m in masks.items())


@pytest.mark.parametrize("mask", [torch.ones(2, 3, 5, 5).bool(), torch.ones(2, 3), [[True]]])
def test_masks_that_no_table_holds(mask):
    with pytest.raises(ValueError, match="the mask of layer 'conv' must be a bool matrix"): pack_masks(dict(conv=mask))


def test_large_masks_come_in_pieces():
    masks = dict(a=random_mask((1000, 2000), .5, draw(0)))
    rows = pack_masks(masks)
    assert len(rows) > 2 and max(len(r["bits"]) for r in rows) <= 100_000 and unpack_masks(pd.DataFrame(rows[::-1]))["a"].equal(masks["a"])


def test_pruning_steps_are_geometric():
    for size, left, rounds in ((1000, 1, 3), (5000, 400, 4), (10, 10, 2)):
        steps = pruning_steps(size, left, rounds)
        assert len(steps) == rounds and steps[-1] == left
        np.testing.assert_allclose(np.diff(np.log([size, *steps])), math.log(left/size)/rounds, atol=.02)


def test_starting_masks():
    local = dict(x=random_mask((9, 12), .2, draw(0)))
    assert starting_masks(local, "local", 3)["x"].equal(local["x"]) and starting_masks(local, "local")["x"] is not local["x"]
    a, b, other = (starting_masks(local, "random", s)["x"] for s in (1, 1, 2))
    assert a.equal(b) and not a.equal(other) and a.sum() == local["x"].sum()
    with pytest.raises(ValueError, match="'random' or 'local', not 'dense'"): starting_masks(local, "dense")


# Training

def noise(n, seed=0, size=8):
    x = torch.randint(256, (n, 1, size, size), generator=draw(seed)).to(torch.uint8)
    return Dataset(x, torch.arange(n) % 3, [*"abc"], torch.full((1,), .5), torch.full((1,), .3), "noise")


TINY = Data(noise(60), noise(30, 1))
FAST = dict(epochs=4, channels=2, batch_size=20)


def rows_of(kind, **how):
    rows = pd.DataFrame(train_kind(kind, TINY, **(FAST | how)))
    if "bits" not in rows: rows["bits"] = None
    return rows[rows.bits.isna()], {epoch: unpack_masks(part) for epoch, part in rows[rows.bits.notna()].groupby("epoch")}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_and_follows_its_seed(kind):
    state = torch.random.get_rng_state()
    table, masks = rows_of(kind, keep=[2], rounds=2)
    assert torch.random.get_rng_state().equal(state)
    assert table.epoch.tolist() == {"pruned dense": [1, 2, 3, 4, 8], "pruned efcn": [*range(1, 9), 12]}.get(kind, [1, 2, 3, 4])
    assert [*masks] == dict(SET=[0, 2], static=[0], dense=[], cnn=[]).get(kind.split()[0], [12 if kind == "pruned efcn" else 8])
    again, other = rows_of(kind, keep=[2], rounds=2)[0], rows_of(kind, keep=[2], rounds=2, seed=1)[0]
    assert again.loss.tolist() == table.loss.tolist() != other.loss.tolist()
    local = local_masks(embed(local_cnn((1, 8, 8), 3, 2), (1, 8, 8)))
    for m in masks.values(): assert [int(x.sum()) for x in m.values()] == [int(x.sum()) for x in local.values()]


def test_when_set_evolves():
    _, masks = rows_of("SET local", keep=[1, 2, 3, 4], every=2)
    same = [all(masks[e][n].equal(masks[e-1][n]) for n in masks[e]) for e in (1, 2, 3, 4)]
    assert same == [True, False, True, True] # never after the last epoch
    starts = [rows_of("SET random", start=s, seed=7)[1][0]["0"] for s in (0, 0, 1)]
    assert starts[0].equal(starts[1]) and not starts[0].equal(starts[2])


def test_weights_and_growth_follow_the_seed(monkeypatch):
    seen, own, evolved = [], study.draw_weights, study.evolve
    monkeypatch.setattr(study, "draw_weights", lambda model, generator: seen.append(generator.initial_seed()) or own(model, generator))
    monkeypatch.setattr(study, "evolve", lambda model, zeta, generator, optimizer: seen.append(generator.initial_seed()) or evolved(model, zeta, generator, optimizer))
    for seed in (0, 0, 1): rows_of("SET local", seed=seed, epochs=2)
    assert len(seen) == 6 and len({*seen[:4]}) == 1 and seen[4] == seen[5] != seen[0]


@pytest.mark.parametrize("kind", ["cnn", "SET random", "pruned efcn"])
def test_images_come_in_the_order_of_the_seed_at_the_rate_asked_for(kind, monkeypatch):
    seen, own = [], study.train
    def spied(model, data, epochs, lr, batch_size, seed, first, optimizer, after_epoch):
        seen.append((first, epochs, batch_size, seed, optimizer.param_groups[0]["lr"], {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}))
        return own(model, data, epochs, lr, batch_size, seed, first, optimizer=optimizer, after_epoch=after_epoch)
    monkeypatch.setattr(study, "train", spied)
    rows_of(kind, seed=5, lr=.02, epochs=2, rounds=2)
    assert [s[:2] for s in seen] == ([(0, 2), (2, 4), (4, 5), (5, 6)] if kind == "pruned efcn" else [(0, 2)]) and {s[2:] for s in seen} == {(20, 5, .02, True)}


def test_pruning_takes_its_rounds(monkeypatch):
    counts, epochs, own, fit = [], [], study.hold_to_masks, study._fit
    monkeypatch.setattr(study, "hold_to_masks", lambda model, masks: counts.append([int(m.sum()) for m in masks.values()]) or own(model, masks))
    monkeypatch.setattr(study, "_fit", lambda model, data, n, *rest: epochs.append(n) or fit(model, data, n, *rest))
    rows_of("pruned dense", rounds=3)
    local = local_masks(embed(local_cnn((1, 8, 8), 3, 2), (1, 8, 8)))
    assert counts == [[*c] for c in zip(*(pruning_steps(m.numel(), int(m.sum()), 3) for m in local.values()))] and epochs == [4, 1, 1, 2]


def test_pruned_efcn_is_more_local_than_pruned_dense():
    local = local_masks(embed(local_cnn((1, 8, 8), 3, 2), (1, 8, 8)))
    share = {kind: np.mean([float((m & local[n]).sum()/m.sum()) for n, m in next(iter(rows_of(kind, lr=.003)[1].values())).items()]) for kind in ("pruned dense", "pruned efcn")}
    assert share["pruned efcn"] > share["pruned dense"] + .2


@pytest.mark.parametrize("wrong, words", [
    (dict(kind="set"), "kinds must be some of cnn, dense, .*, not 'set'"), (dict(zeta=1), "from 0 to below 1, not 1: nothing would be left"), (dict(epochs=0), "number of epochs must be 1 or more, not 0"),
    (dict(rounds=0), "rounds of pruning must be 1 or more, not 0"), (dict(every=0), "from one step of SET to the next must be 1 or more, not 0"), (dict(keep=[5]), "between 0 and 4, not 5"),
    (dict(channels=0), "channels must be 1 or more"), (dict(lr=-1), "-1")])
def test_impossible_training(wrong, words):
    with pytest.raises(ValueError, match=words): train_kind(**(dict(kind="SET random", data=TINY) | FAST | wrong))


SMALL = dict(kinds=["dense", "static random", "SET random", "SET local"], seeds=[0, 1, 2], lrs=[.01], search_epochs=1, keep=[2], progress=False) | FAST


@pytest.fixture(scope="module")
def runs(): return sparse_runs(TINY, **SMALL)


def test_runs_of_a_study(runs):
    assert len(runs.table) == 4*(4*3 + 2) and set(runs.masks) == {("static random", s, s, 0) for s in range(3)} | {(k, s, t, e) for k in ("SET random", "SET local") for s in range(3)
                                                                     for t in {s, 0 if k == "SET random" else s} for e in (0, 2, 4)}
    own = pd.DataFrame(train_kind("SET random", Data(study._split(TINY).train, TINY.test), 1, 0, .01, keep=[0, 2, 4], **FAST))
    ours = runs.table.query("kind == 'SET random' and seed == 1 and start == 0")
    np.testing.assert_allclose(ours.loss, own.loss.dropna(), rtol=1e-12)
    for name, m in unpack_masks(own[own.bits.notna() & (own.epoch == 4)]).items(): assert m.equal(runs.masks["SET random", 1, 0, 4][name])


def test_interrupted_runs_resume(runs, tmp_path, monkeypatch):
    calls, own = [], study.train_kind
    def counted(*args, **how):
        calls.append(args[0])
        if len(calls) == 6: raise KeyboardInterrupt
        return own(*args, **how)
    monkeypatch.setattr(study, "train_kind", counted)
    with pytest.raises(KeyboardInterrupt): sparse_runs(TINY, folder=tmp_path, **SMALL)
    found = sparse_runs(TINY, folder=tmp_path, **SMALL)
    assert len(calls) == 14 + 1
    pd.testing.assert_frame_equal(found.table, runs.table)
    assert all(found.masks[key][n].equal(m) for key, masks in runs.masks.items() for n, m in masks.items())
    sparse_runs(TINY, folder=tmp_path, **SMALL)
    assert len(calls) == 15
    sparse_runs(Data(noise(60, 2), TINY.test), folder=tmp_path, **SMALL) # other images are another study
    assert len(calls) == 29


def test_the_rate_is_chosen_on_images_that_nobody_trains_on(monkeypatch):
    seen = []
    def fake(kind, data, seed, start, lr, epochs, keep, **_):
        seen.append((seed, data))
        return [dict(epoch=epochs, accuracy={.1: .5, .2: .9, .3: .7}[lr], loss=1.)]
    monkeypatch.setattr(study, "train_kind", fake)
    found = sparse_runs(TINY, **(SMALL | dict(lrs=[.1, .3, .2])))
    assert set(found.table.lr) == {.2}
    key = lambda d: {x.numpy().tobytes() for x in d.x}
    search, final = ([d for s, d in seen if (s >= 12345) == searching] for searching in (True, False))
    assert len(search) == 4*3*3 and {s for s, _ in seen} == {0, 1, 2, 12345, 12346, 12347}
    assert all(not key(d.train) & key(d.test) and key(d.train) | key(d.test) == key(TINY.train) for d in search)
    assert all(key(d.train) == key(search[0].train) and d.test is TINY.test for d in final)


def test_the_rate_is_the_best_on_average_and_never_diverges(monkeypatch):
    last = {.1: [.9, .3, .3], .2: [.6, .5, .6], .3: [.9, None, .9]}
    def fake(kind, data, seed, start, lr, epochs, keep, **_):
        if last[lr][seed % 3] is None: raise Diverged(1)
        return [dict(epoch=e, accuracy=a, loss=1.) for e, a in ((1, 1.), (2, last[lr][seed % 3]))]
    monkeypatch.setattr(study, "train_kind", fake)
    found = sparse_runs(TINY, **(SMALL | dict(lrs=[.1, .2, .3], kinds=["dense", "cnn"])))
    assert set(found.table.lr) == {.2}
    assert study._best_lrs(pd.DataFrame([dict(kind="pruned dense", lr=lr, seed=9, epoch=2, accuracy=a) for lr in (.1, .2) for a in (lr, math.nan)])) == {"pruned dense": .2} # with a row of a mask


def test_what_diverges_is_missing(monkeypatch):
    own = study.train_kind
    def fails(kind, data, seed, start, lr, **how):
        if lr > .1: raise Diverged(3)
        return own(kind, data, seed, start, lr, **how)
    monkeypatch.setattr(study, "train_kind", fails)
    assert set(sparse_runs(TINY, **(SMALL | dict(lrs=[.01, 5.], kinds=["dense"]))).table.lr) == {.01}
    with pytest.raises(Diverged, match="dense: every learning rate diverged; try smaller ones than 4"): sparse_runs(TINY, **(SMALL | dict(lrs=[4., 5.], kinds=["dense"])))
    assert sparse_runs(TINY, **(SMALL | dict(lrs=[5.], kinds=["dense"]))).table.accuracy.isna().all()


@pytest.mark.parametrize("out", [None, 3])
def test_a_study_without_a_folder_does_nothing(out, monkeypatch):
    monkeypatch.setattr(study, "sparse_runs", None)
    with pytest.raises(ValueError, match="out must be the path of a folder"): topology_study(TINY, out, **SMALL)


@pytest.mark.parametrize("wrong, words", [(dict(kinds=["cnn", "FCN"]), "not 'FCN'"), (dict(kinds=[]), "kinds must be some of"), (dict(kinds="cnn"), r"kinds must be a list, such as \['cnn'\]"), (dict(batch_size=0), "size of a batch must be 1 or more, not 0"), (dict(keep=[-1]), "not -1"),
                                          (dict(lrs=0.), r"not \[0.0\]"), (dict(epochs=2.5), "number of epochs must be 1 or more, not 2.5"), (dict(seeds=[]), "different whole numbers"), (dict(seeds=[0, 0]), "different whole"),
                                          (dict(seeds=[12345]), "from 0 to 12344 .the search uses those above"), (dict(seeds=[-1]), "from 0"), (dict(keep=["2"]), "between 0 and 4, not '2'"), (dict(keep=[2.5]), "not 2.5"), (dict(searches=0), "number of networks in the search must be 1 or more, not 0"), (dict(lrs=[.01, .01]), "all different"), (dict(seeds=[.5]), "whole numbers"), (dict(lrs=[]), "learning rates must be positive"), (dict(lrs=[0]), r"not \[0\]"),
                                          (dict(zeta=2), "zeta"), (dict(search_epochs=0), "number of epochs must be 1"), (dict(channels=0), "channels"), (dict(draws=0), "draws must be 1 or more, not 0")])
def test_impossible_studies_do_nothing(wrong, words, tmp_path):
    with pytest.raises(ValueError, match=words): topology_study(TINY, tmp_path/"new", **(SMALL | wrong))
    assert not (tmp_path/"new").exists()


# Comparisons and claims

def test_which_topologies_are_compared(runs):
    t = topology_distances(runs, draws=1)
    every = t.query("layer == 'all'")
    counts = every.groupby(["comparison", "kind", "epoch"]).size()
    assert set(counts) == {3} and {(c, k) for c, k, _ in counts.index} == {("the CNN", "SET random"), ("the CNN", "SET local"), ("own start", "SET random"), ("own start", "SET local"),
                                                                          ("same start", "SET random"), ("same start", "SET local"), ("other start", "SET random")}
    assert every.both.notna().equals(every.epoch == 4)
    D = every.set_index(["comparison", "kind", "seed", "epoch"]).distance
    m = lambda kind, seed, start, epoch: runs.masks[kind, seed, start, epoch]
    assert D["own start", "SET local", 1, 2] == topology_distance(m("SET local", 1, 1, 2), runs.local) == D["the CNN", "SET local", 1, 2]
    assert D["other start", "SET random", 2, 4] == topology_distance(m("SET random", 2, 2, 4), m("SET random", 0, 0, 4))
    assert D["same start", "SET random", 1, 4] == topology_distance(m("SET random", 1, 0, 4), m("SET random", 2, 0, 4)) and D["same start", "SET random", 1, 0] == 0
    row = every.set_index(["comparison", "kind", "seed", "epoch"]).loc[("the CNN", "SET random", 0, 4)]
    null = null_distances(m("SET random", 0, 0, 4), runs.local, "both", draws=1, second=False)
    assert row.both == pytest.approx(null.mean(axis=1).item()) and row.both_relative == pytest.approx(row.distance/row.both)


@pytest.mark.parametrize("draws", [0, 2.5, True, "3"])
def test_impossible_draws(runs, draws):
    with pytest.raises(ValueError, match="number of draws must be 1 or more"): topology_distances(runs, draws)


@pytest.mark.parametrize("zeta, every, words", [(5, 1, "zeta"), (.3, 0, "from one step of SET to the next must be 1 or more")])
def test_impossible_shares(runs, zeta, every, words):
    with pytest.raises(ValueError, match=words): start_shares(runs, zeta, every)


def test_two_seeds_are_one_pair(runs):
    two = runs._replace(masks={k: m for k, m in runs.masks.items() if k[1] < 2})
    counts = topology_distances(two, draws=1).query("layer == 'all' and epoch == 4").groupby("comparison").size()
    assert counts["other start"] == 1 and counts["same start"] == 2 and counts["the CNN"] == 4


def test_shares_of_the_start(runs):
    t = start_shares(runs, .3, 1).set_index(["kind", "seed", "epoch", "layer"])
    assert len(t) == 2*3*3*2 and t.index.is_unique and (t.share.xs(0, level="epoch") == 1).all()
    for kind, first in (("SET local", runs.local["0"]), ("SET random", starting_masks(runs.local, "random", 1)["0"])):
        m, n = runs.masks[kind, 1, 1, 2]["0"], int(first.sum())
        assert t.share[kind, 1, 2, "0"] == float((m & first).sum())/n and t.blind[kind, 1, 2, "0"] == blind_share(1., n, n, first.numel(), .3, 2)
        assert t.blind[kind, 1, 4, "0"] == blind_share(1., n, n, first.numel(), .3, 3)
    assert start_shares(runs, .3, 3).query("epoch == 2").blind.eq(1).all()
    assert not len(start_shares(SimpleNamespace(table=runs.table[:0], masks={}, local={}), .3, 1))


def made(gain=.05, relative=.9, share=.6, seeds=4, noise=.002, both=1.):
    "Tables whose effects are known."
    g = np.random.default_rng(0)
    better = {"SET random": 1, "static local": 1, "SET local": 2}
    table = pd.DataFrame([dict(kind=k, seed=s, start=s, epoch=e, accuracy=.5 + gain*better.get(k, 0)*(e > 0) + noise*g.normal()) for k in KINDS for s in range(seeds) for e in (0, 9)])
    table = pd.concat([table, table[table.kind == "SET random"].assign(start=99, accuracy=0.)]) # from a shared mask: does not count
    step = -.1 if relative < 1 else .1
    rows = []
    for kind, c, s, e in itertools.product(("SET random", "SET local", "pruned dense", "pruned efcn"), ("the CNN", "own start", "other start", "same start"), range(seeds), (0, 9)):
        r = relative + step*(c == "same start") + noise*g.normal() if e else 1/relative
        rows += [dict(comparison=c, kind=kind, seed=s, epoch=e, layer=layer, distance=.9*x, density=.9, both=.9, density_relative=x, both_relative=both*x) for layer, x in (("all", r), ("0", 2 - r))]
    shares = pd.DataFrame([dict(kind=k, seed=s, epoch=e, layer=l, share=x + noise*g.normal() if e == 9 else 1 - x, blind=.45 + .1*(x < .5)) for k, x in (("SET local", share), ("SET random", .5))
                           for s in range(seeds) for e in (1, 9) for l in "ab"])
    return table, pd.DataFrame(rows), shares


def test_claims_find_what_is_there():
    assert set(topology_claims(*made()).verdict) == {"holds"}
    assert set(topology_claims(*made(-.05, 1.1, .4)).verdict) == {"fails"}
    assert set(topology_claims(*made(0, .999, .5, noise=.02)).verdict) >= {"undecided"}
    assert set(topology_claims(*made(seeds=1)).verdict) == {"undecided"}
    found = topology_claims(*made(both=1.3)).set_index("claim").verdict # each claim by its own null
    assert {c[:2] for c in found.index[found == "fails"]} == {"2b", "3c", "4b", "4c"} and set(found) == {"holds", "fails"}
    assert set(topology_claims(*[t[t.seed < 0] for t in made()]).verdict) == {"not judged"}


def test_effects_of_claims():
    table, distances, shares = made(noise=0.)
    found = topology_claims(table, distances, shares).set_index("claim").effect
    at = lambda number: found[[c for c in found.index if c.startswith(number)][0]]
    assert at("1a") == "+5.0 points" and at("3f") == "+5.0 points" and at("2a") == "0.810, by chance 0.900" and at("2c") == "0.720, else 0.810" and at("3d") == "60.0 %, else 45.0 %" and at("3e") == "60.0 %, else 50.0 %"


def test_a_study_writes_its_tables(tmp_path):
    data = load_data("digits")
    few = Data(data.train.thinned(100), data.test.thinned(40))
    how = dict(kinds=["static random", "SET random"], seeds=[0, 1], lrs=[.01], epochs=2, search_epochs=1, keep=[1], channels=1, draws=1, progress=False)
    tables = topology_study(few, tmp_path, **how)
    assert {p.stem for p in tmp_path.glob("*.csv")} == {"accuracy", "distances", "shares", "claims"} == set(tables)
    again = topology_study(few, tmp_path, **how)
    for name in tables: pd.testing.assert_frame_equal(tables[name], again[name])
    assert tables["claims"].verdict.iloc[0] in ("holds", "fails", "undecided") and "not judged" in set(tables["claims"].verdict)


def test_a_study_without_anything_to_compare(tmp_path):
    how = dict(kinds=["cnn", "static local"], seeds=[3], lrs=[.01], search_epochs=1, progress=False) | FAST
    tables = topology_study(TINY, tmp_path, **how)
    assert not len(tables["distances"]) and not len(tables["shares"]) and set(tables["claims"].verdict) == {"not judged"} and tables["accuracy"].seed.unique().tolist() == [3]
