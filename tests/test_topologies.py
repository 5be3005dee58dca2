"Topologies, against permutations, sets, and colours in plain Python."
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.spatial.distance import cdist

from efcn_nb.ladder.embedding import embed
from efcn_nb.instruments import topologies
from efcn_nb.instruments.evolution import local_cnn, local_masks
from efcn_nb.instruments.topologies import (
    check_topology, compare_topologies, layer_distances, match_units, neighbour_distances,
    null_distances, topology_distance, unit_colours)

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
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 20), st.sampled_from([0., .1, .5, 1.]), st.integers(0, 999),
    st.integers(1, 40))
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
    ([torch.ones(2, 2)], r"bool matrix \(output units, input units\), not float32 of \(2, 2\)"),
    ([torch.ones(4).bool()], r"not bool of \(4,\)"), ([np.ones((2, 2), bool)], "not ndarray"),
    ([torch.ones(0, 2).bool()], r"not bool of \(0, 2\)"),
    ({"a": torch.ones(3, 2).bool(), "b": torch.ones(2, 2).bool()},
    "layer 'b' of masks reads 2 units, but layer 'a' before it has 3: take layers that follow each other")])
def test_what_is_no_topology(masks, words):
    with pytest.raises(ValueError, match=words): check_topology(masks)


@pytest.mark.parametrize("a, b, words", [
    ([torch.ones(2, 2).bool()], [torch.ones(2, 3).bool()], "only networks of the same layers can be compared"),
    ([torch.ones(2, 2).bool()], [torch.ones(2, 2).bool()]*2, "same layers"),
    ({"x": torch.ones(2, 2).bool()}, {"y": torch.ones(2, 2).bool()}, r"have layers \['x'\] and \['y'\]"),
    ([torch.ones(2, 2).bool()], [torch.ones(2, 2)], "layer 0 of the second topology")])
def test_what_cannot_be_compared(a, b, words):
    for f in (match_units, layer_distances, topology_distance, null_distances, compare_topologies):
        with pytest.raises(ValueError, match=words): f(a, b)


# Colours

def plain_colours(masks, labelled):
    "Partitions of all units after each round of colour refinement, with colours that are nested tuples made numbers."
    sizes = [masks[0].shape[1], *map(len, masks)]
    units = [(l, i) for l, n in enumerate(sizes) for i in range(n)]
    colours = {(l, i): (i,) if l == 0 or labelled and l == len(masks) else () for l, i in units}
    below = {(l, i): [(l - 1, j) for j in range(sizes[l-1]) if l and masks[l-1][i, j]] for l, i in colours}
    above = {u: [v for v in colours if u in below[v]] for u in colours}
    rounds = []
    while not rounds or len({*colours.values()}) > rounds[-1]:
        rounds.append(len({(u[0], c) for u, c in colours.items()}))
        seen = lambda units: tuple(sorted(Counter(colours[v] for v in units).items()))
        signs = {u: (u[0], colours[u], seen(below[u]), seen(above[u])) for u in colours}
        number = {s: (k,) for k, s in enumerate(sorted({*signs.values()}, key=repr))}
        colours = {u: number[s] for u, s in signs.items()}
    return rounds


@settings(max_examples=40, deadline=None)
@given(NETS, st.booleans())
def test_colours_tell_as_many_apart_as_plain_ones(masks, labelled):
    found = unit_colours(masks, labelled)
    plain = plain_colours(masks, labelled)
    rounds = len(found[0]) - 1
    assert [sum(len(np.unique(layer[r])) for layer in found) for r in range(rounds)] == plain[:rounds]
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
            if m[i, a] and m[j, b] and not m[i, b] and not m[j, a]:
                m[i, a] = m[j, b] = False
                m[i, b] = m[j, a] = True
    return [torch.ones(n, 4).bool(), *swapped, torch.ones(3, n).bool()]


def thrice(masks):
    "Each unit three times, the inputs once."
    return [m.repeat_interleave(3, 0).repeat_interleave(3 if l else 1, 1) for l, m in enumerate(masks)]


TIED = {"all full": [torch.ones(7, 5).bool(), torch.ones(6, 7).bool()],
        "all empty": [torch.zeros(7, 5).bool(), torch.zeros(6, 7).bool(), torch.ones(4, 6).bool()],
        "a ring": rings([8]), "two equal rings": rings([5, 5]), "rings of other sizes": rings([3, 4, 5, 4]),
        "regular": regular(14, 3, 1, 0), "twice regular": regular(12, 3, 2, 1),
        "chains": [torch.zeros(9, 4).bool(), torch.eye(9).bool(), torch.eye(9).bool(), torch.ones(3, 9).bool()],
        "copies of units": thrice(random_topology([10, 8, 8, 5], .2, 0)),
        "very sparse": random_topology([20, 90, 90, 90, 10], .012, 1),
        "a convolution": [*local_masks(embed(local_cnn((1, 12, 12), 3, 3), (1, 12, 12))).values()]}


@pytest.mark.parametrize("name", TIED)
def test_heavy_ties(name):
    masks = TIED[name]
    for seed, labelled in itertools.product(range(3), (False, True)):
        copy, _ = relabelled(masks, seed, labelled)
        assert layer_distances(masks, copy, labelled) == [0.]*len(masks)
    other = [m ^ (torch.rand(m.shape, generator=draw(9)) < .05) for m in masks]
    other[0][0, 0] = ~masks[0][0, 0]
    ways = [layer_distances(relabelled(a, 1)[0], relabelled(b, 2)[0])
        for a, b in ((masks, other), (other, masks), (relabelled(masks, 5)[0], other))]
    assert ways[0] == ways[1] == ways[2] and 0 < sum(ways[0])


@pytest.mark.parametrize("name, most", [("very sparse", .02), ("copies of units", .01), ("a convolution", .002)])
def test_one_connection_more_or_less_is_a_small_distance(name, most):
    "Units with equal input sets are matched by what they are connected to. By chance, the first network is at .3."
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
    copies = relabelled(a, 1, labelled)[0], relabelled(b, 2, labelled)[0]
    assert D == layer_distances(b, a, labelled) == layer_distances(*copies, labelled)
    assert all(0 <= d <= 1 for d in D) and topology_distance(a, b, labelled) == np.mean(D)
    assert topology_distance(dict(enumerate(a)), b, labelled) == np.mean(D)


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


# Nulls


@pytest.mark.parametrize("keep", ["density", "both"])
def test_null_shuffles_what_it_should(keep, monkeypatch):
    a, b = (dict(zip("uv", random_topology([9, 8, 7], .3, s))) for s in (0, 1))
    seen = []
    monkeypatch.setattr(topologies, "layer_distances", lambda x, y, labelled: seen.append((x, y)) or [0., 0.])
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
    assert t.distance["all"] == pytest.approx(t.distance[["u", "v"]].mean())
    assert t.units["all"] == pytest.approx(null.mean().mean())
    assert t.units_spread["all"] == pytest.approx(null.mean(axis=1).std())
    assert t.units_relative["v"] == pytest.approx(t.distance["v"]/null.v.mean())
    full = [torch.ones(3, 3).bool()]
    assert compare_topologies(full, full, draws=1)[["density_relative", "both_relative"]].isna().all().all()


@pytest.mark.parametrize("wrong, words",
    [(dict(draws=0), "draws must be a whole number, 1 or more, not 0"), (dict(draws=2.5), "not 2.5"),
    (dict(draws=True), "not True"), (dict(keep="degree"), "unknown keep 'degree'; known are density")])
def test_impossible_nulls(wrong, words):
    a = random_topology([4, 4], .5, 0)
    with pytest.raises(ValueError, match=words): null_distances(a, a, **wrong)
