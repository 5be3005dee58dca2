"Locality of masks, against loops over pairs of pixels."
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efcn_nb.instruments.locality import (
    busiest_units, displacement_histogram, expected_histogram, near_profile, near_ratio, null_ratios)
from efcn_nb.materials.controls import permute_pixels, pixel_order

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(1, 4, 5), (3, 4, 4), (2, 1, 6), (1, 6, 1)]


def seeded(seed): return torch.Generator().manual_seed(seed)


def random(units, shape, density=.4, seed=0):
    return torch.rand(units, math.prod(shape), generator=seeded(seed)) < density


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 99), st.floats(0, 1))
def test_histogram_counts_every_pair_both_ways(shape, seed, density):
    mask = random(6, shape, density, seed)
    found, k = displacement_histogram(mask, shape), mask.sum(1)
    assert found.equal(found.flip(1, 2)) and (found >= 0).all()
    assert found.sum() == (k*(k-1)).sum()
    assert found.equal(displacement_histogram(mask[torch.randperm(6, generator=seeded(seed))], shape))


def test_direction_of_displacements():
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0, 0] = mask[0, 0, 1, 3] = True
    assert displacement_histogram(mask.flatten(1), (1, 4, 4)).nonzero().tolist() == [[0, 2, 0], [0, 4, 6]]


@pytest.mark.parametrize("keep", ["inputs", "units", "density"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_full_mask_is_its_own_null(keep, shape):
    mask = torch.ones(4, math.prod(shape), dtype=torch.bool)
    found = displacement_histogram(mask, shape).double()
    torch.testing.assert_close(expected_histogram(mask, shape, keep), found, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(1, 5, 6), (3, 4, 6)])
def test_profile_by_hand(shape):
    mask, place = random(7, shape), torch.cartesian_prod(*map(torch.arange, shape))
    p = near_profile(mask, shape).set_index(["colours", "distance"])
    pairs = {key: [0, 0.] for key in p.index}
    for a, b in itertools.permutations(range(mask.shape[1]), 2):
        colours = "same" if place[a,0] == place[b,0] else "different"
        key = colours, (place[a,1:] - place[b,1:]).abs().max().item()
        pairs[key][0] += (mask[:,a] & mask[:,b]).sum().item()
        pairs[key][1] += (mask[:,a].sum() * mask[:,b].sum()).item()/7
    for key, (found, expected) in pairs.items():
        total = [sum(v[i] for k, v in pairs.items() if k[0] == key[0]) for i in (0, 1)]
        assert p.pairs[key] == found and p.expected[key] == pytest.approx(expected)
        assert p.ratio[key] == pytest.approx(found/total[0]/(expected/total[1]))
    for colours in p.index.unique(0):
        part = {k[1]: v for k, v in pairs.items() if k[0] == colours}
        near = [sum(v[i] for d, v in part.items() if d <= 2)/sum(v[i] for v in part.values()) for i in (0, 1)]
        assert near_ratio(mask, shape, colours=colours) == pytest.approx(near[0]/near[1])


def test_uniform_chance_by_hand():
    "Share of near pairs of connected pixels, over the share among all pairs of places."
    mask = torch.rand(9, 48, generator=seeded(3)) < .4
    place = torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(4))
    found, every = [0, 0], [0, 0] # far, near
    for a, b in itertools.permutations(range(48), 2):
        if place[a,0] != place[b,0]: continue
        near = int((place[a,1:] - place[b,1:]).abs().max() <= 1)
        found[near] += int((mask[:,a] & mask[:,b]).sum())
        every[near] += 1
    want = found[1]/sum(found) / (every[1]/sum(every))
    assert near_ratio(mask, (3, 4, 4), reach=1, keep="density") == pytest.approx(want, rel=1e-9)


def test_blocks_are_local_in_their_frame_alone():
    "Units that see a block of 2 x 2 each are local, with pixels permuted they are not, and are again in their order."
    mask = torch.zeros(16, 4, 2, 4, 2, dtype=torch.bool)
    for i, (y, x) in enumerate(itertools.product(range(4), repeat=2)): mask[i, y, :, x, :] = True
    mask, order = mask.view(16, 64), pixel_order((1, 8, 8), 3)
    local = near_ratio(mask, (1, 8, 8), 1)
    assert local == pytest.approx(64*63/(2*8*7*2 + 2*7*7*2)) # all pairs are near; of the null, those of all places
    moved = permute_pixels(mask, (1, 8, 8), order)
    assert near_ratio(moved, (1, 8, 8), 1) < local/3
    assert near_ratio(permute_pixels(moved, (1, 8, 8), order.argsort()), (1, 8, 8), 1) == local


def test_no_pairs_no_ratio():
    corners = torch.zeros(3, 49, dtype=torch.bool)
    corners[0, [0, 48]] = corners[1:, [6, 42]] = True # pairs, none of them near, and none expected
    assert math.isnan(near_ratio(corners, (1, 7, 7))) and near_profile(corners, (1, 7, 7)).expected[0] == 0
    assert math.isnan(near_ratio(torch.eye(16).bool(), (1, 4, 4)))
    assert near_profile(torch.zeros(2, 16).bool(), (1, 4, 4)).ratio.isna().all()


@pytest.mark.parametrize("call,said", [
    (lambda: displacement_histogram(torch.ones(2, 16), (1, 4, 4)), "must be a bool tensor"),
    (lambda: displacement_histogram(np.ones((2, 16), bool), (1, 4, 4)), "must be a bool tensor"),
    (lambda: displacement_histogram(torch.ones(16).bool(), (1, 4, 4)), "must be a bool tensor"),
    (lambda: near_profile(torch.ones(2, 16).bool(), (1, 4, 5)), "16 columns, but images of shape (1, 4, 5) have 20"),
    (lambda: near_ratio(torch.ones(2, 16).bool(), (4, 4)), "not of inputs of shape (4, 4)"),
    (lambda: near_ratio(torch.ones(2, 16).bool(), (1, 4, 4), 0), "from 1 to 2, not 0"),
    (lambda: near_ratio(torch.ones(2, 16).bool(), (1, 4, 4), 1.5), "from 1 to 2, not 1.5"),
    (lambda: near_ratio(torch.ones(2, 16).bool(), (1, 4, 4), 3), "from 1 to 2, not 3"),
    (lambda: near_ratio(torch.ones(2, 16).bool(), (1, 4, 4), colours="different"), "colours 'different'; known"),
    (lambda: near_ratio(torch.ones(2, 16).bool(), (1, 4, 4), keep="degree"), "unknown null model 'degree'"),
    (lambda: expected_histogram(torch.ones(2, 16).bool(), (1, 4, 4), "both"), "null model 'both'; known are"),
    (lambda: null_ratios(torch.ones(2, 16).bool(), (1, 4, 4), 0, seeded(0)), "draws must be a whole number, 1 or more"),
    (lambda: null_ratios(torch.ones(2, 16).bool(), (1, 4, 4), 2, seeded(0), "rows"), "unknown keep 'rows'; known are"),
    (lambda: busiest_units(torch.ones(2, 16).bool(), (1, 4, 4), 3), "count must be a whole number from 1 to 2, not 3"),
])
def test_bad_input(call, said):
    with pytest.raises(ValueError) as e: call()
    assert said in str(e.value) and "\n" not in str(e.value)


def test_busiest_units_come_in_order():
    mask = torch.arange(6)[:,None] % 4 >= torch.arange(4)
    assert busiest_units(mask, (1, 2, 2), 3).flatten(1).equal(mask[[3, 2, 1]])
    assert busiest_units(mask, (1, 2, 2), 4)[3].flatten().equal(mask[5])
