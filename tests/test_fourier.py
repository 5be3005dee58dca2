"Functions of signs, their Fourier coefficients and first gradients, against loops and closed forms."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from efcn_nb.instruments.fourier import (
    KPattern, all_inputs, degree_masses, gradient_bounds, gradient_law, make_pattern, mean_gradient,
    parity_table, pattern_batches, pattern_gradient)
from efcn_nb.materials.controls import pixel_order
from efcn_nb.studies.separation import make_local_net


pytestmark = pytest.mark.usefixtures("one_thread")


def signs(count, n, seed=0):
    return torch.randint(0, 2, (count, 1, n), generator=torch.Generator().manual_seed(seed)).float()*2 - 1


# Patterns

@settings(max_examples=40, deadline=None)
@given(st.data())
def test_labels_are_looked_up_where_the_bits_say(data):
    n = data.draw(st.integers(1, 9))
    bits = data.draw(st.permutations(range(n)))[:data.draw(st.integers(1, min(n, 5)))]
    table = data.draw(st.lists(st.sampled_from([-1, 1]), min_size=2**len(bits), max_size=2**len(bits)))
    x = all_inputs(n)
    expected = [table[sum(2**u for u, b in enumerate(bits) if row[b] > 0)] for row in x[:, 0]]
    assert KPattern(n, bits, table).labels(x).tolist() == expected
    assert torch.equal(KPattern(n, bits).labels(x), x[:, 0, bits].prod(1))


def test_labels_take_inputs_without_channel():
    x, pattern = signs(50, 7), KPattern(7, (2, 3))
    assert torch.equal(pattern.labels(x), pattern.labels(x[:, 0]))


def test_pattern_of_all_bits():
    assert KPattern(3, range(3)).labels(-torch.ones(1, 1, 3)).item() == -1


@pytest.mark.parametrize("make, said", [
    (lambda: KPattern(4, range(5)), r"each of bits must be a whole number from 0 to 3, not 4"),
    (lambda: KPattern(4, ()), r"bits must hold at least one value"),
    (lambda: KPattern(4, (0, 0)), r"bits must differ from each other, but 0 is there twice"),
    (lambda: KPattern(4, (-1, 0)), r"from 0 to 3, not -1"),
    (lambda: KPattern(4, (0, 1.5)), r"from 0 to 3, not 1.5"),
    (lambda: KPattern(4, (0, 1)).labels(torch.ones(4)),
     r"inputs must be \(N, 1, n\) or \(N, n\) with n = 4 signs, not \(4,\)"),
    (lambda: KPattern(4, (0, 1)).labels(torch.ones(3, 2, 4)), r"not \(3, 2, 4\)"),
    (lambda: KPattern(4, (0, 1), [1, 1, -1, -1, 1]), r"k = 2 bits has 4 labels, not 5"),
    (lambda: KPattern(4, (0, 1), torch.ones(2, 2)), r"k = 2 bits has 4 labels"),
    (lambda: KPattern(4, (0, 1), [1, 1, -1, 2]), r"\+1 or -1, not 2"),
    (lambda: KPattern(4, (0, 1), [1, 1, -1, math.nan]), r"\+1 or -1, not nan"),
    (lambda: KPattern(64, range(30)), r"the number of signs must be a whole number from 1 to 20, not 30"),
    (lambda: parity_table(0), r"from 1 to 20, not 0"),
    (lambda: make_pattern(4, 5), r"k must be a whole number from 1 to 4, not 5"),
    (lambda: make_pattern(4, 5, "anywhere"), r"k must be a whole number from 1 to 4, not 5"),
    (lambda: make_pattern(9, 5, "scattered"), r"k must be a whole number from 2 to 4, not 5"),
    (lambda: make_pattern(9, 1, "scattered"), r"from 2 to 4, not 1"),
    (lambda: make_pattern(9, 2, "far"), r"unknown bits 'far'; known are consecutive, scattered, ordered, anywhere"),
    (lambda: make_pattern(9, 2, "ordered"), r"set it, or reorder"),
])
def test_impossible_patterns(make, said):
    with pytest.raises(ValueError, match=said): make()


@pytest.mark.parametrize("n, k", [(10, 5), (11, 5), (64, 5), (7, 2), (100, 3)])
def test_scattered_bits_share_no_window(n, k):
    bits = make_pattern(n, k, "scattered").bits
    assert len(bits) == k and 0 <= min(bits) and max(bits) < n and min(np.diff(bits)) >= 2
    assert max(bits) - min(bits) >= k


def test_ordered_bits_come_to_the_middle():
    order = pixel_order((1, 12), 4).tolist()
    x, pattern = signs(100, 12), make_pattern(12, 3, "ordered", order)
    assert torch.equal(pattern.labels(x), make_pattern(12, 3).labels(x[..., order]))


def test_bits_anywhere_are_neighbours_from_everywhere():
    found = [make_pattern(7, 3, "anywhere", seed=seed).bits for seed in range(60)]
    assert {*found} == {(0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (4, 5, 6)}
    assert make_pattern(7, 3, "anywhere", seed=5).bits == found[5]
    assert make_pattern(3, 3, "anywhere").bits == (0, 1, 2)


def test_batches_are_fresh_and_repeatable():
    pattern = KPattern(6, (1, 2))
    first, again = (list(pattern_batches(pattern, 8, 3, seed=5)) for _ in range(2))
    assert all(torch.equal(x, z) and torch.equal(y, w) for (x, y), (z, w) in zip(first, again, strict=True))
    assert len(first) == 3 and not torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], next(pattern_batches(pattern, 8, 1, seed=6))[0])


# Loss


# Gradients at the start


def test_pattern_gradient_leaves_the_network_alone():
    net = make_local_net("cnn", 6, 2)
    pattern_gradient(net, KPattern(6, (2, 3)))
    assert net[0].weight.dtype == torch.float32 and net[0].weight.grad is None and not net[-1].weight.any()
    still = make_local_net("cnn", 6, 2).requires_grad_(False)
    assert torch.equal(pattern_gradient(still, KPattern(6, (2, 3))), pattern_gradient(net, KPattern(6, (2, 3))))
    assert not still[0].weight.requires_grad


def test_local_gradient_vanishes_on_scattered_bits():
    for kind in ("cnn", "lcn", "elcn"):
        assert pattern_gradient(make_local_net(kind, 10, 3), make_pattern(10, 3, "scattered")).abs().max() < 1e-12
    assert pattern_gradient(make_local_net("fcn", 10, 3), make_pattern(10, 3, "scattered")).abs().max() > 1e-6


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(0, 10**6), st.floats(.1, 30))
def test_bounds_hold_for_any_unit(n, seed, scale):
    draw = torch.Generator().manual_seed(seed)
    masses = degree_masses(torch.randn(2, n, generator=draw), scale*torch.randn(2, generator=draw))
    for k in range(1, n):
        bounds = gradient_bounds(n, k)
        assert mean_gradient(masses, k).max() <= bounds["sharper"] + 1e-12 and bounds["sharper"] <= bounds["restated"]


def test_sharper_bound_is_nearly_met():
    "The largest: a step function that is one parity, all of its mass at one degree, meets the bound up to (n-k+1)/n."
    n, k = 6, 3
    masses = torch.zeros(1, n+1).double()
    masses[0, k-1] = 1
    assert mean_gradient(masses, k).item() == pytest.approx((n-k+1)/math.comb(n, k))
    assert mean_gradient(masses, k) < gradient_bounds(n, k)["sharper"]


@pytest.mark.parametrize("call, said", [
    (lambda: all_inputs(21), r"number of signs must be a whole number from 1 to 20, not 21"),
    (lambda: all_inputs(0), r"from 1 to 20, not 0"),
    (lambda: pattern_gradient(make_local_net("cnn", 24, 3), KPattern(24, (0, 1, 2))), r"from 1 to 20, not 24"),
    (lambda: mean_gradient(torch.zeros(1, 5), 5), r"k must be a whole number from 1 to 4, not 5"),
    (lambda: mean_gradient(torch.zeros(1, 5), 0), r"not 0"),
    (lambda: gradient_bounds(4, 4), r"k must be a whole number from 1 to 3, not 4"),
    (lambda: gradient_bounds(4, 0), r"not 0"),
])
def test_impossible_enumerations(call, said):
    with pytest.raises(ValueError, match=said): call()


def test_law_leaves_out_what_does_not_fit():
    law = gradient_law([3, 5], [2, 4], units=4)
    assert sorted({(row.n, row.k) for row in law.itertuples()}) == [(3, 2), (5, 2), (5, 4)]
    assert law[law.net == "fcn"].restated.notna().all() and law.gradient.gt(0).all()
