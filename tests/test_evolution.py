"Evolution, against loops and counts; the masks of a convolution."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from efcn_nb.ladder.masks import hold_to_masks, masks_of, random_mask
from efcn_nb.instruments.evolution import (
    draw_weights, evolve, evolve_mask, local_cnn, local_masks, pruning_steps, starting_masks)

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(seed): return torch.Generator().manual_seed(seed)


# Networks


@pytest.mark.parametrize("build, words",
    [(lambda: local_cnn((1, 8, 8), 3, 0), "1 or more, not 0"), (lambda: local_cnn((1, 8, 8), 3, 1.5), "not 1.5"),
    (lambda: local_cnn((64,), 3), r"not of shape \(64,\)"),
                                          (lambda: local_masks(local_cnn((1, 8, 8), 3)), "embed a CNN first")])
def test_networks_that_cannot_be(build, words):
    with pytest.raises(ValueError, match=words): build()


# Evolution

@settings(max_examples=80, deadline=None)
@given(st.integers(1, 8), st.integers(2, 8), st.floats(.1, .9), st.sampled_from([0., .1, .3, .5, .99]),
    st.integers(0, 999))
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
    assert kept == alive.keys() - dead and grown.sum() == len(dead) and new.sum() == mask.sum()
    assert new.dtype == torch.bool


def test_growth_is_uniform_over_empty_places():
    mask = torch.zeros(4, 10, dtype=torch.bool)
    mask[:, :3] = True
    weight = mask*torch.arange(1., 41).view(4, 10)
    count = sum(evolve_mask(weight, mask, .5, draw(s))[1].int() for s in range(3000))
    kept = mask & (weight >= weight[mask].sort().values[6])
    assert not count[kept].any()
    expected = 3000*6/34
    assert ((count[~kept] - expected)**2/expected).sum() < 34 + 5*(2*34)**.5 # chi square; places just emptied are empty


@pytest.mark.parametrize("mask, words",
    [(torch.ones(3, 4).bool(), "every place of the layer is taken"), (torch.zeros(3, 4).bool(), "leaves no weight"),
    (torch.ones(4, 3).bool(), r"shape of its weight, \(3, 4\)")])
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
        assert w.abs().max() <= bound < 1.1*w.abs().max() and w.std() == pytest.approx(float(bound)/3**.5, rel=.15)
        assert not net.get_submodule(name).weight[~mask].any()


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, .1, momentum=.9), lambda p: torch.optim.Adam(p, .01)])
def test_evolve_changes_what_it_should(make):
    net = held_net()
    optimizer, x = make(net.parameters()), torch.randn(30, 20, generator=draw(3))
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), torch.arange(30) % 3).backward()
        optimizer.step()
    masks = {n: m.clone() for n, m in masks_of(net).items()}
    weights = {n: net.get_submodule(n).weight.detach().clone() for n in masks}
    output, state = net[4].weight.clone(), torch.random.get_rng_state()
    grown = evolve(net, .3, draw(5), optimizer)
    assert torch.random.get_rng_state().equal(state) and net[4].weight.equal(output)
    for name, mask in masks_of(net).items():
        layer, kept = net.get_submodule(name), mask & masks[name]
        assert mask.sum() == masks[name].sum() and not layer.weight[~mask].any()
        assert grown[name] >= (mask & ~masks[name]).sum() > 0
        same = layer.weight.eq(weights[name]) & kept
        assert same.sum() == mask.sum() - grown[name] # all others are freshly drawn
        fresh = mask & ~same
        for memory in optimizer.state[layer.parametrizations.weight.original].values():
            if torch.is_tensor(memory) and memory.shape == mask.shape:
                assert not memory[fresh].any() and memory[same].any()
        assert layer.weight[fresh].abs().max() <= (mask.sum()/len(mask))**-.5
        assert len(layer.weight[fresh].unique()) == fresh.sum() > 8
        assert (layer.weight[fresh] > 0).float().mean().sub(.5).abs() < .4


def test_evolve_leaves_everything_if_one_layer_cannot():
    net = held_net()
    hold_to_masks(net, {"2": torch.ones(12, 15).bool()})
    before = [p.clone() for p in net.parameters()] + [m.clone() for m in masks_of(net).values()]
    with pytest.raises(ValueError, match="every place of the layer is taken"): evolve(net, .3, draw(0))
    assert all(a.equal(b) for a, b in zip(before, [*net.parameters(), *masks_of(net).values()]))
    with pytest.raises(ValueError, match="no layer of the network is held to a mask"):
        evolve(nn.Linear(3, 3), .3, draw(0))


def test_pruning_steps_are_geometric():
    for size, left, rounds in ((1000, 1, 3), (5000, 400, 4), (10, 10, 2)):
        steps = pruning_steps(size, left, rounds)
        assert len(steps) == rounds and steps[-1] == left
        np.testing.assert_allclose(np.diff(np.log([size, *steps])), math.log(left/size)/rounds, atol=.02)


def test_starting_masks():
    local = dict(x=random_mask((9, 12), .2, draw(0)))
    assert starting_masks(local, "local", 3)["x"].equal(local["x"])
    assert starting_masks(local, "local")["x"] is not local["x"]
    a, b, other = (starting_masks(local, "random", s)["x"] for s in (1, 1, 2))
    assert a.equal(b) and not a.equal(other) and a.sum() == local["x"].sum()
    with pytest.raises(ValueError, match="unknown start 'dense'; known are random, local"):
        starting_masks(local, "dense")
