"Ranks of kernels and approximations of low rank, against numpy and written-out maps."
import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from efcn_nb.materials.data import Dataset
from efcn_nb.ladder.tensor_formats import (
    FORMATS, SHUFFLES, compose, core_shapes, entry_order, held_layers, hold_to_rank)
from efcn_nb.instruments.kernel_ranks import (
    AXES, CUTS, composed_kernel, cut_kernel, cut_model, cut_rank, effective_rank, format_ranks, kernel_ranks,
    operator_rank, stable_rank, truncation_errors, unfoldings)

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(seed=0): return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images():
    x = torch.randint(60, 180, (40, 1, 8, 8), generator=draw(1)).to(torch.uint8)
    return Dataset(x, torch.arange(40) % 2, ["0", "1"], torch.full((1,), .5), torch.full((1,), .25), "noise")


def network(width=6):
    "Two convolutions that can be held."
    first, second, third = nn.Conv2d(1, width, 3), nn.Conv2d(width, width, 3), nn.Conv2d(width, width, 3)
    return nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), second, nn.BatchNorm2d(width), third)


def error(K, near): return float((near - K).norm()/K.norm())


# Ranks

def matrices(shape=(5, 4, 3, 2), seed=0): return torch.randn(*shape, generator=draw(seed), dtype=torch.float64)


def test_unfoldings_are_numpys():
    K = matrices()
    for k, axis in enumerate(AXES):
        want = np.moveaxis(K.flatten(2).permute(0, 2, 1).numpy(), k, 0).reshape((5, 6, 4)[k], -1)
        found = unfoldings(K)[axis].numpy()
        assert found.shape == want.shape
        np.testing.assert_allclose(found @ found.T, want @ want.T, atol=1e-12) # columns may be in another order


@given(sizes=st.lists(st.floats(.1, 10), min_size=1, max_size=5), seed=st.integers(0, 10))
@settings(max_examples=30, deadline=None)
def test_ranks_by_singular_values(sizes, seed):
    "Matrices of known singular values, turned at random."
    s = np.array(sizes)
    U, V = (np.linalg.qr(np.random.default_rng([seed, k]).standard_normal((7, 7)))[0] for k in (0, 1))
    M = torch.tensor(U[:,:len(s)]*s @ V[:len(s)])
    p = s/s.sum()
    assert stable_rank(M) == pytest.approx((s**2).sum()/(s**2).max())
    assert effective_rank(M) == pytest.approx(math.exp(-(p*np.log(p)).sum()))
    for rank in (stable_rank, effective_rank): assert 1 - 1e-9 <= rank(3*M) <= len(s) + 1e-9


def random_tensor(format, shape, rank):
    shapes = core_shapes(format, shape, rank)
    return compose(format, [torch.randn(s, generator=draw(k), dtype=torch.float64) for k, s in enumerate(shapes)])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape, rank", [
    ((7, 9, 5), 1), ((7, 9, 5), 2), ((7, 9, 5), 3), ((7, 9, 5), 5), ((4, 25, 3), 3), ((6, 1, 6), 2)])
def test_format_ranks_of_random_cores(format, shape, rank):
    T = random_tensor(format, shape, rank).numpy()
    found = [np.linalg.matrix_rank(np.moveaxis(T, k, 0).reshape(shape[k], -1)) for k in range(3)]
    assert [*format_ranks(format, shape, rank).values()] == found


def written_out(K, size):
    "The circular convolution as a matrix, from images with one pixel lit, rolled about."
    co, ci, *taps = K.shape
    columns = []
    for lit in range(ci*math.prod(size)):
        x = np.zeros(ci*math.prod(size))
        x[lit] = 1
        x = x.reshape(ci, *size)
        image = 0
        for u in np.ndindex(*taps):
            shifted = np.roll(x, [-k for k in u], [*range(1, x.ndim)])
            image = image + np.tensordot(K.numpy()[(slice(None), slice(None), *u)], shifted, 1)
        columns.append(image.ravel())
    return np.array(columns).T


@pytest.mark.parametrize("shape, size", [
    ((3, 4, 3), (6,)), ((3, 2, 2, 3), (4, 3)), ((2, 3, 1, 1), (2, 3)), ((2, 2, 2, 2, 2), (2, 3, 2))])
@pytest.mark.parametrize("shuffle", ["none", "window", "everything"])
def test_operator_rank_is_that_of_the_map(shape, size, shuffle):
    core = random_tensor("tt", (shape[0], math.prod(shape[2:]), shape[1]), 1)
    K = core.transpose(1, 2).flatten()[entry_order(shape, shuffle, draw(3))].view(shape)
    assert operator_rank(K, size) == np.linalg.matrix_rank(written_out(K, size))


@pytest.mark.parametrize("size", [(2, 5), (5,), (5, 5, 5)])
def test_operator_of_too_small_an_image(size):
    with pytest.raises(ValueError, match="at least as large as the kernel, \\(3, 3\\)"):
        operator_rank(torch.zeros(2, 2, 3, 3), size)


@pytest.mark.parametrize("format", FORMATS)
def test_rounding_does_not_hide_the_rank(format):
    conv = nn.Conv2d(30, 40, 5)
    hold_to_rank(conv, format, 2)
    rank = format_ranks(format, (40, 25, 30), 2)["out"]
    assert kernel_ranks(composed_kernel(conv))["out"] == rank
    torch.testing.assert_close(composed_kernel(conv).float(), conv.weight.detach())
    s = torch.linalg.svdvals(composed_kernel(conv).flatten(1))
    assert s[rank] < 1e-12*s[0] and s[rank-1] > 1e-3*s[0]


# Approximations


@pytest.mark.parametrize("ranks", [[-1], [1.5], ["2"]])
def test_impossible_truncations(ranks):
    with pytest.raises(ValueError, match="a rank must be a whole number, 0 or more"):
        truncation_errors(torch.eye(3), ranks)


def test_cuts_against_eckart_and_young():
    "A matrix is cut as well as possible; a train, of the same rank, never better; a ring has that rank squared."
    K = torch.randn(9, 6, 3, 3, generator=draw(2))
    for rank in (1, 2, 4):
        best = truncation_errors(K.flatten(1), [rank, rank**2])
        assert error(K, cut_kernel(K, "svd", rank)) == pytest.approx(best[0], abs=1e-5)
        for format in ("cp", "tucker", "tt"): assert error(K, cut_kernel(K, format, rank)) >= best[0] - 1e-6
        assert error(K, cut_kernel(K, "tr", rank)) >= best[1] - 1e-6


@pytest.mark.parametrize("shuffle", SHUFFLES[1:])
@pytest.mark.parametrize("format", CUTS)
def test_cuts_in_another_order(format, shuffle):
    K = torch.randn(5, 4, 3, 3, generator=draw(1))
    order = entry_order(K.shape, shuffle, draw(7))
    before = torch.empty(K.numel())
    before[order] = K.flatten() # the kernel from which the shuffle makes K
    want = cut_kernel(before.view_as(K), format, 2, seed=7).flatten()[order].view_as(K)
    torch.testing.assert_close(cut_kernel(K, format, 2, shuffle, seed=7), want)


@pytest.mark.parametrize("call, words", [
    (lambda K: cut_kernel(K, "qr", 1), "unknown format 'qr'; known are svd"),
    (lambda K: cut_kernel(K, "tt", 0), "from 1 to"), (lambda K: cut_kernel(K, "svd", 5), "from 1 to 4, not 5"),
    (lambda K: cut_kernel(K, "tt", 1, "rows"), "unknown shuffle 'rows'"),
    (lambda K: cut_rank("svd", (4, 9, 3), 9), "has 31 numbers at rank 1"),
    (lambda K: cut_rank("qr", (4, 9, 3), 2), "unknown format"), (lambda K: cut_rank("cp", (4, 9, 3), .1), "from 1 on"),
    (lambda K: unfoldings(K[0,0]), "a kernel has axes")])
def test_impossible_cuts(call, words):
    with pytest.raises(ValueError, match=words): call(torch.randn(4, 3, 3, 3))


def test_cut_model_leaves_the_model(images):
    model = network()
    state = copy.deepcopy(model.state_dict())
    near, e = cut_model(model, images, "tt", 5, "everything", seed=1)
    assert all(v.equal(state[k]) for k, v in model.state_dict().items()) and model.training and not near.training
    pairs = zip(held_layers(model).values(), held_layers(near).values())
    assert e == pytest.approx(np.mean([error(a.weight.detach(), b.weight.detach()) for a, b in pairs]))
    assert near[0].weight.equal(model[0].weight)
    kernel = held_layers(cut_model(model, images, "svd", 5)[0])["3"].weight.detach()
    assert kernel_ranks(kernel)["out"] == cut_rank("svd", (6, 9, 6), 5)
