"The difference of norms: task, networks, number of samples and symmetries, against closed forms and explicit steps."
import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from growth import power
from efcn_nb.ladder.layers import LocallyConnected
from efcn_nb.instruments.sample_complexity import (
    NORM_NETWORKS, TURNS, growth_exponents, norm_difference, norm_network, orthogonal, rotated_training,
    sample_complexity, samples_needed)


pytestmark = pytest.mark.usefixtures("one_thread")


# The task

@pytest.mark.parametrize("kind", TURNS)
def test_orthogonal(kind):
    q = orthogonal(9, kind, seed=3)
    torch.testing.assert_close(q @ q.T, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(q, orthogonal(9, kind, seed=3)) and not torch.equal(q, orthogonal(9, kind, seed=4))
    if kind == "permutation": assert torch.equal(q.sum(0), torch.ones(9).double()) and torch.equal(q, q.bool().double())
    if kind == "signs": assert torch.equal(q.abs(), torch.eye(9).double()) and -9 < q.trace() < 9


def test_rotations_are_uniform():
    """Each entry of a uniform orthogonal matrix has mean 0 and mean square 1/n; the trace has variance 1.

    Half of the matrices are reflections.
    """
    many = torch.stack([orthogonal(4, seed=seed) for seed in range(2000)])
    assert many.mean(0).abs().max() < .06 and (many.square().mean(0) - .25).abs().max() < .03
    assert many.diagonal(dim1=1, dim2=2).sum(1).var().item() == pytest.approx(1, rel=.15)
    assert (torch.linalg.det(many) > 0).double().mean().item() == pytest.approx(.5, abs=.05)


@pytest.mark.parametrize("kind", TURNS)
def test_turned_inputs_keep_their_labels(kind):
    x, y = norm_difference(300, 8)
    turned, same = norm_difference(300, 8, turned=kind)
    q = orthogonal(8, kind, seed=8).float()
    assert torch.equal(same, y) and not torch.equal(turned, x)
    torch.testing.assert_close(turned @ q, x, rtol=0, atol=1e-5)
    test, test_turned = norm_difference(50, 8, seed=9)[0], norm_difference(50, 8, seed=9, turned=kind)[0]
    torch.testing.assert_close(test_turned @ q, test, rtol=0, atol=1e-5)  # one turn for training and test samples


# The networks

def set_weights(net, **values):
    with torch.no_grad():
        for p in net.parameters(): p.zero_()
        for name, value in values.items(): net.get_parameter(name.replace("_", ".", 1)).copy_(torch.as_tensor(value))


def exact(architecture, d):
    "A network whose logit is a positive multiple of the difference of squared norms."
    net = norm_network(architecture, 2*d)
    signs = torch.tensor([1.]*d + [-1.]*d)
    if architecture == "fcn":
        set_weights(net, **{"0_weight": torch.eye(2*d).repeat(2, 1), "2_weight": torch.cat([signs, signs])[None]})
    if architecture == "one_channel": set_weights(net, **{"1_weight": [[[0., 1., 0.]]], "5_weight": [[1., -1.]]})
    if architecture in ("cnn", "lcn"):
        with torch.no_grad():
            cnn = norm_network("cnn", 2*d)
            for p in cnn.parameters(): p.zero_()
            cnn[1].weight[0,0,1] = cnn[1].weight[1,1,1] = 1
            cnn[3].weight[0,0,1], cnn[3].weight[0,1,1] = 1, -1
            if architecture == "cnn": return cnn
            from efcn_nb.ladder.embedding import embed
            net.load_state_dict(embed(cnn, (2*d,), to="lcn").state_dict())
    return net


@pytest.mark.parametrize("architecture", NORM_NETWORKS)
def test_every_network_can_compute_the_difference(architecture):
    d = 7
    net, (x, y) = exact(architecture, d), norm_difference(400, 2*d)
    logit = net(x)[:,0].detach()
    difference = x[:,:d].square().sum(1) - x[:,d:].square().sum(1)
    torch.testing.assert_close(logit/logit.std(), difference/difference.std(), rtol=0, atol=1e-5)
    assert torch.equal((logit > 0).long()[difference.abs() > 1e-4], y[difference.abs() > 1e-4])


def test_networks():
    count = lambda name, size: sum(p.numel() for p in norm_network(name, size).parameters())
    assert count("cnn", 24) == count("cnn", 480) == 2*10*3 + 10 + 10*3 + 1 and count("one_channel", 24) == 6
    assert count("fcn", 24) == 24*48 + 48 + 48 + 1
    lcn = norm_network("lcn", 24)
    layer = next(m for m in lcn.modules() if isinstance(m, LocallyConnected))
    assert layer.weight.shape[0] == 12 and not torch.equal(layer.weight[3], layer.weight[4])
    first = norm_network("fcn", 200)[0].weight
    assert first.std().item() == pytest.approx(600**-.5, rel=.02)
    assert (first.abs() > 2*600**-.5).any(), "Gaussian, no bounds"
    before = torch.get_rng_state()
    for name in NORM_NETWORKS:
        a, b, c = (norm_network(name, 10, seed) for seed in (1, 1, 2))
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
        assert not all(torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters()))
        assert a(torch.ones(3, 10)).shape == (3, 1)
    assert torch.equal(torch.get_rng_state(), before)


# Samples


def test_samples_to_test_on_are_fresh():
    row, = sample_complexity("fcn", 16, 64, test=64)
    assert row["train"] == 1 and row["test"] < .8


def test_turned_the_convolution_does_not():
    assert sample_complexity("cnn", 16, 64, turned="rotation", test=2000)[0]["test"] < .6


def test_the_dense_network_is_tested_on_inputs_turned_alike():
    plain, turned = (sample_complexity("fcn", 8, 256, turned=turn, test=2000)[0]["test"] for turn in (None, "rotation"))
    assert plain > .85 and turned == pytest.approx(plain, abs=.05)


def test_training_is_that_of_steps_written_out():
    "Momentum 0.9, a gradient of norm one at most, a rate that falls to zero in a straight line."
    net, (x, y), (z, w) = norm_network("cnn", 8, 3), norm_difference(20, 8, 6), norm_difference(4000, 8, 7)
    memory, clipped = [torch.zeros_like(p) for p in net.parameters()], 0
    for step in range(30):
        grads = torch.autograd.grad(torch.nn.functional.softplus((1 - 2*y)*net(x)[:,0]).mean(), [*net.parameters()])
        norm = math.sqrt(sum(g.square().sum().item() for g in grads))
        clipped += norm > 1
        with torch.no_grad():
            for p, m, g in zip(net.parameters(), memory, grads): p -= 5.*(1 - step/30)*m.mul_(.9).add_(g/max(norm, 1))
    expected = ((net(z)[:,0] > 0) == (w > 0)).double().mean().item()
    found = sample_complexity("cnn", 8, 20, 3, steps=30, lr=5., test=4000)[0]["test"]
    assert found == pytest.approx(expected, abs=.002)
    assert expected > .6
    assert clipped, "or the test would not see it"


def test_a_rate_of_zero_is_no_default():
    (still,), (moved,) = (sample_complexity("cnn", 16, 64, steps=100, lr=lr, test=1000) for lr in (0., None))
    net, (x, y) = norm_network("cnn", 16), norm_difference(1000, 16, 1)
    assert still["test"] == pytest.approx(((net(x)[:,0] > 0) == (y > 0)).double().mean().item())
    assert moved["test"] > still["test"] + .1


def test_one_sample_is_enough_to_run():
    for name in NORM_NETWORKS: assert sample_complexity(name, 4, 1, steps=5, test=10)[0]["train"] in (0, 1)


def curve(samples, accuracy, **rest):
    return pd.DataFrame(dict(architecture="cnn", size=8, seed=0, samples=samples, test=accuracy) | rest)


@pytest.mark.parametrize("accuracy, target, needed",
                         [([.5, .7, .9], .7, 40), ([.5, .7, .9], .8, 40*10**.5), ([.5, .7, .9], .95, None),
                          ([.8, .7, .9], .75, 4), ([.5, .8, .6], .8, 40), ([.5, .6, .5], .55, 4*10**.5)])
def test_first_crossing(accuracy, target, needed):
    table = curve([4, 40, 400], accuracy)
    found = samples_needed(table.sample(frac=1, random_state=1), target).samples.item()
    assert math.isnan(found) if needed is None else found == pytest.approx(needed)


def test_needed_by_architecture_size_and_seed():
    table = pd.concat([curve([4, 40], [.5, a], architecture=name, size=size, seed=seed)
                       for name, a in [("cnn", 1.), ("fcn", .75)] for size in (4, 8) for seed in (0, 1)])
    needed = samples_needed(table, .75)
    assert len(needed) == 8 and needed[needed.architecture == "fcn"].samples.tolist() == pytest.approx([40]*4)
    assert needed[needed.architecture == "cnn"].samples.tolist() == pytest.approx([4*10**.5]*4)


def test_exponents():
    found = growth_exponents(power(dict(cnn=0., lcn=1., fcn=2.), noise=0.))
    assert found.shape == (4, 3)
    for name, p in dict(cnn=0, lcn=1, fcn=2).items(): np.testing.assert_allclose(found[name], p, atol=1e-9)
    holes = power(dict(cnn=0., fcn=2.))
    holes.loc[(holes.architecture == "fcn") & (holes.seed == 1) & (holes["size"] == 32), "samples"] = math.nan
    assert growth_exponents(holes).isna().to_numpy().sum() == 1 and math.isnan(growth_exponents(holes).loc[1, "fcn"])


# The symmetry

def network(seed=0): return norm_network("fcn", 8, seed).double()
def task(n=40):
    x, y = norm_difference(n, 8)
    return x.double(), y


def test_the_trace_is_that_of_plain_steps():
    "Gradients of the quadratic network written out."
    x, y = task()
    net = network()
    W, b, a, c = (p.detach().clone() for p in net.parameters())
    losses = []
    for _ in range(5):
        h = x @ W.T + b
        logit = h.square() @ a[0] + c
        losses.append((torch.nn.functional.softplus(logit) - y*logit).mean())
        g = (logit.sigmoid() - y)/len(y)
        dh = 2*g[:,None]*h*a
        W, b, a, c = W - .1*dh.T @ x, b - .1*dh.sum(0), a - .1*(g @ h.square())[None], c - .1*g.sum()
    q = orthogonal(8, seed=1)
    for trace in rotated_training(net, x, y, q, partial(torch.optim.SGD, lr=.1), steps=5):
        torch.testing.assert_close(trace, torch.stack(losses)[:,0] if losses[0].dim() else torch.stack(losses),
                                   rtol=1e-10, atol=0)
    assert torch.equal(net[0].weight, network()[0].weight), "left untouched"


# What cannot be

def test_bad_tasks():
    for samples in (0, -1):
        with pytest.raises(ValueError, match=f"samples must be a whole number, 1 or more, not {samples}"):
            norm_difference(samples, 4)
        with pytest.raises(ValueError, match="samples must be a whole number"): sample_complexity("cnn", 4, samples)
    for option, message in [(dict(steps=0), "steps"), (dict(batch_size=0), "batch_size"), (dict(test=-1), "test")]:
        with pytest.raises(ValueError, match=f"{message} must be a whole number, 1 or more"):
            sample_complexity("cnn", 4, 10, **option)
    for size, message in [(0, "a whole number, 2 or more, not 0"),
                          (7, "an even number, two blocks of one length, not 7"), (-2, "not -2")]:
        with pytest.raises(ValueError, match=f"size must be .*{message}"): norm_difference(5, size)
        with pytest.raises(ValueError, match=f"size must be .*{message}"): norm_network("cnn", size)
    with pytest.raises(ValueError, match="unknown turn 'shear'; known are rotation, permutation, signs"):
        norm_difference(5, 4, turned="shear")
    with pytest.raises(ValueError, match="unknown architecture 'rnn'; known are cnn, one_channel, lcn, fcn"):
        sample_complexity("rnn", 4, 10)


def test_bad_tables():
    for target in (.5, .3, 1.2, math.nan):
        with pytest.raises(ValueError, match=f"target must lie above chance, 0.5, and not above 1, not be {target}"):
            samples_needed(curve([4, 8], [.5, .9]), target)
    with pytest.raises(ValueError, match="growth needs two sizes or more"):
        growth_exponents(power(dict(cnn=0., fcn=2.), sizes=(8,)))
    with pytest.raises(ValueError, match="growth needs two sizes or more, fcn has one"):
        growth_exponents(pd.concat([power(dict(cnn=0.)), power(dict(fcn=2.), sizes=(8,))]))
    with pytest.raises(ValueError,
                       match="several rows have one architecture, size, seed and number of samples.*such as turned"):
        samples_needed(pd.concat([curve([4, 8], [.5, .9], turned=t) for t in ("a", "b")]))


def test_bad_turns():
    x, y = task()
    sgd = partial(torch.optim.SGD, lr=.1)
    for turn in (2*orthogonal(8), orthogonal(7), torch.ones(8, 8), orthogonal(8)[:4]):
        with pytest.raises(ValueError, match="must be an orthogonal matrix of size 8"):
            rotated_training(network(), x, y, turn, sgd)
    with pytest.raises(ValueError, match="first layer must be dense to be turned with the data, not Conv1d"):
        rotated_training(nn.Sequential(nn.Conv1d(1, 1, 3)), x, y, orthogonal(8), sgd)
