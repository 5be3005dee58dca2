"Controls, against numpy's moments and eigenvectors."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from efcn_nb.materials.controls import VARIANTS, gaussian, make_variant, permute_pixels, pixel_order, whitened
from efcn_nb.materials.data import Data
from tiny import smooth_images as images

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(1, 4, 5), (3, 4, 4), (2, 1, 6), (1, 6, 1)]


def seeded(seed): return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def data(): return Data(images(), images(60, seed=1))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 99))
def test_permutations_are_undone(shape, seed):
    x, order = torch.randn(3, *shape, generator=seeded(seed)), pixel_order(shape, seed)
    y = permute_pixels(x, shape, order)
    assert permute_pixels(y, shape, order.argsort()).equal(x) and sorted(order.tolist()) == [*range(shape[1]*shape[2])]
    for p, q in enumerate(order.tolist()): assert y.flatten(2)[:,:,p].equal(x.flatten(2)[:,:,q]) # all colours alike
    assert permute_pixels(x.flatten(1), shape, order).equal(y.flatten(1))


def test_classes_keep_their_covariance():
    few, n = images(60), 12_000
    few = replace(few, x=few.x*(1 + 2.*few.y.view(-1, 1, 1, 1)))
    many = replace(few, x=few.x.repeat(n//60, 1, 1, 1), y=few.y.repeat(n//60))
    by_class, pooled = (gaussian(Data(few, many), kind, 0).test for kind in (True, False))
    spread = lambda d, c: d.x[d.y == c].var(0).mean().item()
    assert spread(by_class, 2)/spread(by_class, 0) == pytest.approx(spread(few, 2)/spread(few, 0), rel=.1)
    assert spread(pooled, 2)/spread(pooled, 0) < 2


def test_gaussian_data_has_no_third_moment():
    skewed = images(3000)
    skewed = replace(skewed, x=skewed.x.exp())
    third = lambda x: ((x - x.mean(0))**3).mean(0)/x.std(0)**3
    assert third(skewed.x).mean() > .8 and third(gaussian(Data(skewed, skewed), False, 0).train.x).abs().mean() < .1


@pytest.mark.parametrize("kind", [torch.float32, torch.uint8])
def test_whitened_by_numpy(kind):
    raw = images(400, (1, 5, 5))
    raw = replace(raw, x=(raw.x*30 + 120).clamp(0, 255).to(kind))
    part, test = whitened(Data(raw, replace(raw, x=raw.x[:7], y=raw.y[:7])))
    x = raw.x.flatten(1).double().numpy()/(255 if kind == torch.uint8 else 1)
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    want = (x - x.mean(0)) @ vectors @ np.diag((values + .01*values.mean())**-.5) @ vectors.T
    np.testing.assert_allclose(part.x.flatten(1), want, atol=2e-4)
    assert test.x.equal(part.x[:7]) and part.batch([3])[0].equal(part.x[[3]]) # the training images' moments


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_keep_shape_and_labels(data, variant):
    made, again, other = (make_variant(data, variant, seed) for seed in (0, 0, 1))
    assert all(m.x.shape == d.x.shape and m.y.equal(d.y) for m, d in zip(made, data))
    assert made.train.fingerprint == again.train.fingerprint
    assert (made.train.fingerprint == other.train.fingerprint) == (variant in ("images", "white"))
    by_parts = {"images": lambda: data, "white": lambda: whitened(data), "gaussian": lambda: gaussian(data, False, 0),
                "gaussian-class": lambda: gaussian(data, True, 0),
                "white-gaussian": lambda: gaussian(whitened(data), False, 0),
                "permuted": lambda: Data(*(replace(d, x=permute_pixels(d.x, d.shape, pixel_order(d.shape, 0)))
                                           for d in data))}
    assert all(m.fingerprint == d.fingerprint for m, d in zip(made, by_parts[variant]()))


def test_a_class_without_images(data):
    with pytest.raises(ValueError, match="class 1 has no training image"):
        gaussian(Data(replace(data.train, x=data.train.x[::3], y=data.train.y[::3]), data.test), True, 0)


@pytest.mark.parametrize("call,said", [
    (lambda x: permute_pixels(x, (3, 8, 8), pixel_order((3, 8, 8), 0)),
     "images of shape (3, 8, 8), or rows of 192 numbers"),
    # the sizes happen to agree
    (lambda x: permute_pixels(x[:3], (3, 8, 8), pixel_order((3, 8, 8), 0)), "not a tensor of shape (3, 2, 8, 8)"),
    (lambda x: permute_pixels(x, (2, 8, 8), torch.randperm(63)), "has each number from 0 to 63 once"),
    (lambda x: permute_pixels(x, (2, 8, 8), torch.zeros(64, dtype=torch.int64)), "has each number from 0 to 63 once"),
    (lambda x: permute_pixels(x, (2, 8, 8), torch.ones(64, dtype=torch.bool)), "has each number from 0 to 63 once"),
])
def test_pixels_that_cannot_be_permuted(data, call, said):
    with pytest.raises(ValueError) as e: call(data.train.x)
    assert said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("change,said",
                         [(lambda x: x*0 + .5, "all the same cannot be made white"),
                          (lambda x: x*math.nan, "images hold NaN or infinite numbers"),
                          (lambda x: x[:0], "must be there")])
def test_images_that_cannot_be_whitened(data, change, said):
    x = change(data.train.x)
    with pytest.raises(ValueError, match=said):
        whitened(Data(replace(data.train, x=x, y=data.train.y[:len(x)]), data.test))


def test_images_that_are_not_finite(data):
    with pytest.raises(ValueError, match="images hold NaN or infinite numbers"):
        gaussian(Data(replace(data.train, x=data.train.x*math.nan), data.test), True, 0)


def test_draws_of_white_images_keep_what_the_floor_leaves():
    "Weak directions stay weak: white images are correlated still, and their Gaussian draws as much."
    weak = images(6000, (1, 4, 4))
    weak = replace(weak, x=F.avg_pool2d(F.pad(weak.x, (1, 1, 1, 1), mode="circular"), 3, 1))
    C = [np.cov(make_variant(Data(weak, weak), variant, 0).train.x.flatten(1).double().numpy().T)
         for variant in ("white", "white-gaussian")]
    assert np.linalg.eigvalsh(C[0])[0] < .9 and abs(C[0] - C[1]).max() < 6*2**.5/6000**.5


def test_an_unknown_variant(data):
    with pytest.raises(ValueError, match="unknown variant 'scrambled'; known are images, permuted, gaussian"):
        make_variant(data, "scrambled", 0)
