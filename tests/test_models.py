"Widths for a budget, against trying them all."
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from efcn_nb.ladder.embedding import embed, released_weights
from efcn_nb.ladder.inspection import conv_geometries
from efcn_nb.materials.models import count_weights, fit_width, make_model, small


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 40), st.integers(0, 400))
def test_widest_of_all(base, each, most, budget):
    "`most` included: powers of two are where doubling ends."
    make = lambda width: nn.Embedding(1, base + each*width)
    meet = [width for width in range(1, most+1) if base + each*width <= budget]
    if meet: assert fit_width(make, budget, most) == meet[-1]
    else:
        said = f"no width meets a budget of {budget} weights: the narrowest network has {base + each}"
        with pytest.raises(ValueError, match=said):
            fit_width(make, budget, most)


def test_of_a_real_network_without_making_it():
    before, width = torch.get_rng_state(), fit_width(lambda width: small(width=width), 50_000)
    assert torch.equal(before, torch.get_rng_state())
    assert count_weights(small(width=width)) <= 50_000 < count_weights(small(width=width+1))
    assert fit_width(lambda width: nn.Linear(2**20, width, bias=False), 2**50) == 2**20, "terabytes, were they made"


@pytest.mark.parametrize("shape, classes, width, places", [
    ((1, 16, 16), 10, None, 4), ((3, 32, 32), 100, 5, 16), ((2, 13, 9), 3, 1, 1)])
def test_the_strided_network(shape, classes, width, places):
    "Its weights are counted by hand; its eFCN computes the same, and has few weights for its images."
    model, channels = make_model("strided", shape, classes, width=width), width or 24
    first, second = channels*(16*shape[0] + 1), channels*(9*channels + 1)
    assert count_weights(model) == first + second + classes*(places*channels + 1)
    x = torch.randn(2, *shape)
    assert model(x).shape == (2, classes)
    torch.testing.assert_close(embed(model, shape)(x), model(x), atol=1e-5, rtol=1e-5)
    of = {name: make_model(name, (1, 16, 16), 10, width=8) for name in ("small", "strided")}
    few, many = (released_weights(conv_geometries(of[name], (1, 16, 16))) for name in ("strided", "small"))
    assert few < many


@pytest.mark.parametrize("call, said", [
    (lambda: make_model("strided", (3, 4, 4), 10), "images of shape .3, 4, 4. do not fit this network"),
    (lambda: make_model("vgg", (3, 32, 32), 10), "unknown model 'vgg'; known are small, strided, skinny, alexnet"),
    (lambda: make_model("small", (1, 16, 16), 10, width=0), "width must be a whole number from 1 to 100000, not 0"),
    (lambda: make_model("small", (1, 16, 16), 10, width=2.5), "width must be a whole number from 1 to 100000, not 2.5"),
    (lambda: make_model("skinny", (3, 8, 8), 10),
     "images of shape .3, 8, 8. do not fit this network .*; use larger images or another model")])
def test_what_is_refused(call, said):
    with pytest.raises(ValueError, match=said): call()
