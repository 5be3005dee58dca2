"Paths between networks, against loops written out, closed forms and a string of deep copies with `torch.optim.SGD`."
import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efcn_nb.data import Dataset
from efcn_nb.embedding import convert, embed, reinitialize
from efcn_nb.models import make_model
from efcn_nb.paths import (PATHS, OutputAverage, along, along_string, arc_length, barrier, barrier_matrix, in_fcn_space, interpolate, interpolate_curvilinear,
                           refresh_batchnorm, string)
from efcn_nb.training import Diverged, evaluate

SHAPE = (1, 16, 16)


pytestmark = pytest.mark.usefixtures("one_thread")


class Doubles(Dataset):
    "A `Dataset` whose batches are in double precision."
    def batch(self, index):
        x, y = super().batch(index)
        return x.double(), y


def dataset(n, shape=SHAPE, classes=3, seed=0, kind=Doubles):
    "Noise with labels."
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, *shape, generator=draw), torch.randint(classes, (n,), generator=draw)
    return kind(x, y, [*range(classes)], torch.zeros(shape[0]), torch.ones(shape[0]), "noise")


def moons(n=200, seed=0):
    "Two half circles with noise, (N, 2)."
    draw = torch.Generator().manual_seed(seed)
    y, angle = torch.arange(n) % 2, math.pi*torch.rand(n, generator=draw)
    x = torch.stack([angle.cos() + y, (angle.sin() - .25)*(1 - 2*y)], 1) + .1*torch.randn(n, 2, generator=draw)
    return Doubles(x.float(), y, [0, 1], torch.zeros(2), torch.ones(2), "moons")


def mlp(seed, sizes=(2, 8, 2), between=nn.Tanh):
    "A network with dense layers of `sizes`, in double precision."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [layer for i, o in zip(sizes, sizes[1:]) for layer in (nn.Linear(i, o), between())]
        return nn.Sequential(*layers[:-1]).double()


def normed(seed, dropout=0.):
    "A CNN with BatchNorm and unlike running statistics, in double precision."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(1, 4, 5, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(36, 6), nn.BatchNorm1d(6, momentum=.3), nn.Linear(6, 3))
        for norm in (net[1], net[6]): norm.running_mean.normal_(), norm.running_var.uniform_(.5, 2)
        return net.double()


def solution(seed, data, steps=300):
    "`mlp(seed)` after gradient descent on all of `data`."
    net, (x, y) = mlp(seed), data.batch(range(len(data)))
    optimizer = torch.optim.SGD(net.parameters(), lr=1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def values(net): return [p.detach().clone() for p in net.parameters()]
def same(a, b): return all(torch.equal(p, q) for p, q in zip(values(a), values(b), strict=True))
def apart(a, b): return max((p - q).abs().max().item() for p, q in zip(values(a), values(b), strict=True))


# One space

@pytest.mark.parametrize("trim", [False, True])
def test_all_kinds_in_one_space_keep_their_functions(trim):
    cnn, other = (make_model("small", SHAPE, 3, seed=seed, width=3).double() for seed in (0, 1))
    lcn, efcn = embed(cnn, SHAPE, to="lcn", trim=trim), embed(other, SHAPE, trim=trim)
    nets = dict(cnn=cnn, lcn=lcn, efcn=efcn, fcn=reinitialize(efcn, seed=2), half=embed(other, SHAPE, layers="0", trim=trim))
    space, x = in_fcn_space(nets, SHAPE, trim), dataset(5).batch(range(5))[0]
    shapes = {tuple((name, p.shape) for name, p in net.named_parameters()) for net in space.values()}
    assert [*space] == [*nets] and len(shapes) == 1
    for name, net in nets.items(): torch.testing.assert_close(space[name](x), net(x), rtol=0, atol=1e-12)
    assert space["efcn"] is efcn and space["fcn"] is nets["fcn"] and type(cnn[0]) is nn.Conv2d


def test_networks_without_convolutions_are_taken_as_they_are():
    nets = dict(a=mlp(0), b=mlp(1))
    assert in_fcn_space(nets, (2,)) == nets


def test_what_has_no_common_space_is_refused():
    cnn, wider = (make_model("small", SHAPE, 3, width=width) for width in (3, 4))
    with pytest.raises(ValueError, match=r"a and b do not lie in one space: 0.weight is \(768, 256\) in the first and \(1024, 256\) in the second; take networks of one architecture"):
        in_fcn_space(dict(a=cnn, b=wider), SHAPE)
    tall = make_model("alexnet", (1, 32, 32), 3, width=1)  # rows that nothing reads
    with pytest.raises(ValueError, match="embedded with the same trim"):
        in_fcn_space(dict(a=tall, b=embed(tall, (1, 32, 32), trim=True)), (1, 32, 32), trim=False)
    in_fcn_space(dict(a=tall, b=embed(tall, (1, 32, 32), trim=True)), (1, 32, 32), trim=True)
    with pytest.raises(ValueError, match="missing in the second"): in_fcn_space(dict(a=cnn, b=nn.Sequential(embed(cnn, SHAPE)[0])), SHAPE)
    with pytest.raises(ValueError, match="two networks or more to join, not 1"): in_fcn_space(dict(a=cnn), SHAPE)


# Interpolation

@pytest.mark.parametrize("between", [interpolate, interpolate_curvilinear])
@pytest.mark.parametrize("make", [mlp, normed, lambda seed: embed(make_model("small", SHAPE, 3, seed=seed, width=2), SHAPE)])
def test_ends_are_exact_and_copies(between, make):
    a, b = make(0), make(1)
    before = values(a), values(b)
    for t, end in [(0, a), (1, b)]:
        point = between(a, b, t)
        assert same(point, end)
        floating = lambda net: [x for x in net.buffers() if x.is_floating_point()]
        assert all(torch.equal(x, y) for x, y in zip(floating(point), floating(end), strict=True))
        for p in point.parameters(): p.data.zero_()
        for x in point.buffers(): x.zero_()
    assert all(torch.equal(p, q) for net, kept in zip((a, b), before) for p, q in zip(values(net), kept))


@pytest.mark.parametrize("t", [.5, .3, -1.5, 2.])
def test_linear_against_a_loop(t):
    a, b = normed(0), normed(1)
    point, expected, state = interpolate(a, b, t).state_dict(), a.state_dict(), b.state_dict()
    for name, x in expected.items():
        if not x.is_floating_point(): assert torch.equal(point[name], x)
        else: torch.testing.assert_close(point[name], (1 - t)*x + t*state[name], rtol=0, atol=1e-14)


def test_copies_keep_ties_flags_and_frozen_parameters():
    def net(seed):
        made = mlp(seed, (3, 3, 3))
        made[2].weight = made[0].weight
        made[0].bias.requires_grad_(False)
        made[1].eval()
        made[0].weight.grad = torch.ones(3, 3).double()
        return made
    point = interpolate(net(0), net(1), .5)
    assert point[2].weight is point[0].weight and point[0].weight.grad is None
    assert not point[0].bias.requires_grad and point[2].bias.requires_grad and [m.training for m in point] == [True, False, True]


@pytest.mark.parametrize("t", [.1, .5, .9])
def test_curvilinear_norms_and_directions(t):
    a, b = mlp(0), mlp(1)
    for p, q, r, line in zip(*map(values, (a, b, interpolate_curvilinear(a, b, t), interpolate(a, b, t)))):
        assert r.norm().item() == pytest.approx((1 - t)*p.norm().item() + t*q.norm().item(), rel=1e-12)
        torch.testing.assert_close(r/r.norm(), line/line.norm(), rtol=0, atol=1e-12)


def test_a_tensor_that_cancels_stays_zero():
    a, b = mlp(0), mlp(0)
    b[0].weight.data.neg_()
    b[0].bias.data.zero_(), a[0].bias.data.zero_()
    middle = interpolate_curvilinear(a, b, .5)
    assert not middle[0].weight.any() and not middle[0].bias.any() and torch.equal(middle[2].weight, a[2].weight)


def test_what_cannot_be_mixed_is_refused():
    a, b = mlp(0), mlp(0, (2, 9, 2))
    for between in (interpolate, interpolate_curvilinear):
        with pytest.raises(ValueError, match=r"no path joins these networks: 0.weight is \(8, 2\) in the first and \(9, 2\) in the second; .*in_fcn_space"): between(a, b, .5)
    with pytest.raises(ValueError, match="2.weight is missing in the first"): interpolate(a[:1], a, .5)
    for t in (-.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="runs from t=0 to t=1"): interpolate_curvilinear(a, a, t)


def test_average_of_outputs():
    a, b, x = mlp(0), mlp(1, (2, 5, 2)), dataset(7, (2,)).batch(range(7))[0]
    for t in (0, .3, 1): torch.testing.assert_close(OutputAverage(a, b, t)(x), (1 - t)*a(x) + t*b(x), rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match=r"\(7, 2\) and \(7, 3\) have no average"): OutputAverage(a, mlp(0, (2, 3)), .5)(x)


# BatchNorm

def test_refreshed_statistics_are_those_of_the_batches():
    data, net = dataset(40), normed(0, dropout=.5).eval()
    net[1].train()
    refresh_batchnorm(net, data, batch_size=10)
    means, variances, deeper = [], [], []
    for k in range(4):
        x = net[0](data.batch(range(10*k, 10*k + 10))[0])
        per_channel = x.transpose(0, 1).flatten(1)
        means.append(per_channel.mean(1)), variances.append(per_channel.var(1, correction=1))
        centred = (x - per_channel.mean(1).view(-1, 1, 1))/(per_channel.var(1, correction=0).view(-1, 1, 1) + net[1].eps).sqrt()
        deeper.append(net[5]((centred*net[1].weight.view(-1, 1, 1) + net[1].bias.view(-1, 1, 1)).relu().flatten(1)))  # no dropout
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    close(net[1].running_mean, torch.stack(means).mean(0))
    close(net[1].running_mean, net[0](data.batch(range(40))[0]).transpose(0, 1).flatten(1).mean(1))  # equal batches: of all data
    close(net[1].running_var, torch.stack(variances).mean(0))
    close(net[6].running_mean, torch.cat(deeper).mean(0))
    close(net[6].running_var, torch.stack([x.var(0) for x in deeper]).mean(0))
    assert [m.training for m in net] == [False, True] + [False]*6 and not net.training
    assert (net[1].momentum, net[6].momentum) == (.1, .3) and net[1].num_batches_tracked == 4


def test_a_last_image_is_no_batch_of_its_own():
    net, data = normed(0), dataset(11)
    refresh_batchnorm(net, data, batch_size=10)  # BatchNorm1d would refuse a batch of one
    sizes = [len(part) for part in torch.arange(11).tensor_split(2)]
    assert sizes == [6, 5] and net[6].num_batches_tracked == 2


@pytest.mark.parametrize("kind, size", [(nn.BatchNorm1d, (3, 7)), (nn.BatchNorm2d, (3, 4, 5)), (nn.BatchNorm3d, (3, 2, 3, 4))])
def test_batchnorm_of_any_dimension(kind, size):
    net, data = kind(3).double(), dataset(12, size)
    refresh_batchnorm(net, data)
    x = data.batch(range(12))[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(net.running_mean, x.mean(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(net.running_var, x.var(1), rtol=0, atol=1e-12)


def test_modes_and_momenta_return_after_a_failure():
    net = normed(0).eval()
    with pytest.raises(RuntimeError): refresh_batchnorm(net, dataset(12, (2, 16, 16)))
    assert not any(m.training for m in net.modules()) and net[6].momentum == .3


def test_nothing_to_refresh():
    net, own = mlp(0), nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))
    assert refresh_batchnorm(net, None) is net and refresh_batchnorm(own, None) is own
    with pytest.raises(ValueError, match="need images, in batches of at least one: not 0 in batches of 250"): refresh_batchnorm(normed(0), dataset(0))
    with pytest.raises(ValueError, match="not 5 in batches of 0"): refresh_batchnorm(normed(0), dataset(5), batch_size=0)


# Along a path

def test_a_path_is_measured_at_its_points():
    a, b, data = mlp(0), mlp(1), moons()
    for kind, between in PATHS.items():
        table = along(a, b, data, kind, points=5)
        assert [*table] == ["path", "t", "loss", "accuracy"] and [*table.t] == [0, .25, .5, .75, 1] and {*table.path} == {kind}
        for row in table.itertuples():
            found = evaluate(between(a, b, row.t), data)
            assert (row.loss, row.accuracy) == (found["loss"], found["accuracy"])


def test_no_barrier_where_the_loss_is_convex():
    a, b, data = mlp(0, (2, 2)), mlp(1, (2, 2)), moons()
    a[0].weight.data *= 10
    assert barrier(along(a, b, data, points=21)).height["linear"] < 1e-6
    assert barrier(along(mlp(0), mlp(1), data, "outputs", points=21)).height["outputs"] < 1e-6


def test_batchnorm_is_refreshed_at_every_point_and_nowhere_else():
    a, b, data, other = normed(0).eval(), normed(1).eval(), dataset(30, kind=Doubles), dataset(20, seed=1)
    kept = copy.deepcopy((a.state_dict(), b.state_dict()))
    table = along(a, b, other, points=3, train=data, batch_size=10)
    for row in table.itertuples():
        found = evaluate(refresh_batchnorm(interpolate(a, b, row.t), data, 10), other)
        assert row.loss == pytest.approx(found["loss"], abs=1e-6)
    along_string([a, interpolate(a, b, .5), b], other, train=data)
    for net, state in zip((a, b), kept): assert all(torch.equal(x, state[name]) for name, x in net.state_dict().items())
    along(a, b, other, "outputs", points=2)  # each network with its own statistics
    for kind in ("linear", "curvilinear"):
        with pytest.raises(ValueError, match="have BatchNorm, whose running statistics .* give train="): along(a, b, other, kind)
    with pytest.raises(ValueError, match="give train="): along_string([a, b], other)


def test_measuring_leaves_modes_alone():
    a, b, data = mlp(0), mlp(1).eval(), moons(20)
    a[1].eval()
    for kind in PATHS: along(a, b, data, kind, points=2)
    along_string([a, b], data)
    assert [m.training for m in a] == [True, False, True] and not any(m.training for m in b.modules())


def test_impossible_paths_are_refused():
    a, b, data = mlp(0), mlp(1), moons(20)
    with pytest.raises(ValueError, match="unknown path 'bent'; known are linear, curvilinear, outputs"): along(a, b, data, "bent")
    with pytest.raises(ValueError, match="two points or more, not 1"): along(a, b, data, points=1)
    with pytest.raises(ValueError, match="two networks or more, not 1"): along_string([a], data)
    with pytest.raises(ValueError, match="no path joins"): along_string([a, mlp(0, (2, 9, 2))], data)


# The string

def naive_string(models, data, steps, lr, k, batch_size, seed):
    "Deep copies, `torch.optim.SGD`, and new positions computed from a copy of all old ones."
    models, order, todo = [copy.deepcopy(m) for m in models], torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        todo = todo or [*data.batches(batch_size, order)]
        x, y = todo.pop(0)
        for model in models[1:-1]:
            optimizer = torch.optim.SGD(model.parameters(), lr=lr)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        old = [values(model) for model in models]
        for i, model in [*enumerate(models)][1:-1]:
            for p, here, before, after in zip(model.parameters(), old[i], old[i-1], old[i+1]): p.data = here + k*(after + before - 2*here)
    return models


@pytest.mark.parametrize("steps", [1, 7])
def test_string_against_deep_copies(steps):
    a, b, data = mlp(0), mlp(1), moons(50)
    found = string(a, b, data, beads=4, steps=steps, lr=.3, stiffness=.3, batch_size=20, seed=5)
    naive = naive_string([a, *(interpolate(a, b, i/5) for i in range(1, 5)), b], data, steps, .3, .3, 20, 5)
    assert len(found) == 6 and max(apart(p, q) for p, q in zip(found, naive)) < 1e-12


def test_string_of_released_networks_against_deep_copies():
    a, b = (embed(make_model("small", SHAPE, 3, seed=seed, width=2).double(), SHAPE, to="lcn") for seed in (0, 1))
    data = dataset(30)
    found = string(a, b, data, beads=2, steps=3, lr=.3, stiffness=.5, batch_size=20)
    naive = naive_string([a, interpolate(a, b, 1/3), interpolate(a, b, 2/3), b], data, 3, .3, .5, 20, 0)
    assert max(apart(p, q) for p, q in zip(found, naive)) < 1e-12


def test_ends_of_a_string_stay_and_its_state_is_its_own():
    a, b, data = mlp(0), mlp(1).eval(), moons(50)
    before, begin = (values(a), values(b)), [mlp(2), mlp(3)]
    kept, state = [values(m) for m in begin], torch.get_rng_state()
    begin[0][1].eval()
    found = string(a, b, data, steps=3, start=begin)
    assert found[0] is a and found[-1] is b and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for net, old in zip([a, b, *begin], [*before, *kept]) for p, q in zip(values(net), old))
    assert [m.training for m in found[1]] == [True, False, True] and not any(m.training for m in b.modules())
    assert apart(found[1], begin[0]) > 0 and all(p.grad is None for net in found for p in net.parameters())


def test_string_repeats_itself():
    wet = lambda seed: nn.Sequential(mlp(seed), nn.Dropout(.5))
    a, b, data = wet(0), wet(1), moons(50)
    one, two, other = (string(a, b, data, beads=2, steps=5, seed=seed)[1] for seed in (0, 0, 1))
    assert same(one, two) and not same(one, other)


@pytest.mark.parametrize("stiffness, steps", [(.3, 200), (.5, 100)])
def test_without_a_gradient_the_string_becomes_straight(stiffness, steps):
    a, b, data = mlp(0), mlp(1), moons(20)
    found = string(a, b, data, lr=0, steps=steps, stiffness=stiffness, start=[mlp(seed) for seed in (2, 3, 4)])
    for i, net in enumerate(found): assert apart(net, interpolate(a, b, i/4)) < 1e-12
    np.testing.assert_allclose(arc_length(found), arc_length([a, b])[1]*np.arange(5)/4, atol=1e-12)


def test_string_goes_round_a_barrier():
    data = moons()
    a, b = solution(0, data), solution(1, data)
    found = string(a, b, data, beads=7, steps=300, lr=.5, stiffness=.05, batch_size=100)
    line, way = barrier(along(a, b, data, points=21)).height["linear"], barrier(along_string(found, data)).height["string"]
    assert line > .05 and way < .5*line
    assert arc_length(found)[-1] > arc_length([a, b])[-1]


def test_place_on_a_string_is_arc_length():
    a, b, data = mlp(0, (2, 2)), mlp(1, (2, 2)), moons(20)
    table = along_string([interpolate(a, b, t) for t in (0, .1, .7, 1)], data)
    np.testing.assert_allclose(table.t, [0, .1, .7, 1], atol=1e-12)
    assert table.t.iloc[-1] == 1 and [*along_string([a, a, a], data).t] == [0, .5, 1]
    flat = lambda net: torch.cat([p.flatten() for p in values(net)])
    assert arc_length([a, b])[1] == pytest.approx((flat(a) - flat(b)).norm().item(), rel=1e-12)


def test_frozen_and_unused_parameters_of_beads():
    def net(seed):
        made = mlp(seed)
        made[0].weight.requires_grad_(False)
        made.register_parameter("idle", nn.Parameter(torch.full((1,), float(seed)).double()))
        return made
    a, b = net(0), net(1)
    middle = string(a, b, moons(20), beads=1, steps=4, lr=.3, stiffness=.2)[1]
    torch.testing.assert_close(middle[0].weight, (a[0].weight + b[0].weight)/2)
    assert middle.idle.item() == .5 and apart(middle, interpolate(a, b, .5)) > 1e-3


@pytest.mark.parametrize("wrong, sentence", [
    (dict(stiffness=1), r"stiffness must be above 0 and at most 0.5, not 1: a smoothing step multiplies waves along the string by 1 - 2k\(1 - cos phi\), which .* modulus above one"),
    (dict(stiffness=0), "stiffness must be above 0"), (dict(stiffness=math.nan), "stiffness must be above 0"), (dict(stiffness=-.1), "not -0.1"),
    (dict(beads=0), "at least one bead .*, not 0 beads and 100 steps"), (dict(start=[]), "at least one bead"), (dict(steps=-1), "not 9 beads and -1 steps"),
    (dict(lr=-1), "the learning rate must be 0 or more, not -1"), (dict(lr=math.nan), "the learning rate must be 0 or more, not nan"),
    (dict(batch_size=0), "batch_size is 0: it must be at least 1"), (dict(start=[mlp(0, (2, 9, 2))]), "no path joins these networks")])
def test_impossible_strings_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence): string(mlp(0), mlp(1), moons(20), **wrong)


def test_strings_that_cannot_go_on():
    with pytest.raises(ValueError, match="images to train the string on"): string(mlp(0), mlp(1), dataset(0, (2,)))
    with pytest.raises(ValueError, match="no path joins these networks"): string(mlp(0), mlp(0, (2, 9, 2)), moons(20))
    with pytest.raises(Diverged, match="was not finite at step 2; try a smaller learning rate than 1e"): string(mlp(0, between=nn.ReLU), mlp(1, between=nn.ReLU), moons(20), lr=1e200)


# Barriers

def table(t, loss, accuracy=None, path="made up"): return pd.DataFrame(dict(path=path, t=t, loss=loss, accuracy=[0.]*len(t) if accuracy is None else accuracy))


def test_barrier_by_hand():
    found = barrier(table([0, .25, .5, 1, 2], [1., 2, 2.5, 3, 99], [.8, .2, .5, .4, 0])).loc["made up"]
    assert found.tolist() == pytest.approx([.5, .25, .5])


@pytest.mark.parametrize("loss", [[1., 2, 3], [3., 2, 1], [1., 1.2, 3], [2., 0, 1], [.1, .1, .1], [3., .7, .9]])
def test_no_barrier(loss):
    found = barrier(table([0, .5, 1], loss, [1 - x for x in loss])).loc["made up"]
    assert 0 <= found.height < 1e-15 and 0 <= found["drop"] < 1e-15


def test_barriers_of_several_paths_in_any_order():
    both = pd.concat([table([0, .5, 1], [0., 1, 0]).assign(seed=3), table([1, .5, 0], [0., 2, 2], path="other").assign(seed=4)])
    assert barrier(both).height.to_dict() == {"made up": 1, "other": 1}
    found = barrier(both, by=["path", "seed"]).height
    assert found.to_dict() == {("made up", 3): 1, ("other", 4): 1} and [*found.index.names] == ["path", "seed"]


def test_a_loss_that_is_not_finite_is_no_small_barrier():
    assert barrier(table([0, .5, 1], [1., math.inf, 1])).height.item() == math.inf
    assert math.isnan(barrier(table([0, .5, 1], [1., math.nan, 1])).height.item())


def test_one_column_or_a_list_of_one():
    both = pd.concat([table([0, .5, 1], [0., 1, 0]), table([0, .5, 1], [0., 2, 0], path="other")])
    assert barrier(both, by=["path"]).height.tolist() == barrier(both).height.tolist() == [1, 2]


def test_barriers_without_ends_are_refused():
    for t, missing in [([0, .5], 1), ([.5, 1], 0)]:
        with pytest.raises(ValueError, match=f"the path made up has no point at t={missing}"): barrier(table(t, [1., 2]))
    with pytest.raises(ValueError, match="no point from t=0 to t=1"): barrier(table([2, 3], [1., 2]))


def test_barrier_matrix():
    cnn = make_model("small", SHAPE, 3, width=2).double()
    lcn, efcn = embed(cnn, SHAPE, to="lcn"), embed(make_model("small", SHAPE, 3, seed=1, width=2).double(), SHAPE)
    nets, data = dict(cnn=cnn, lcn=lcn, efcn=efcn, fcn=reinitialize(efcn, seed=0)), dataset(30)
    for kind in PATHS:
        found = barrier_matrix(nets, data, SHAPE, kind, points=3)
        assert [*found.index] == [*found.columns] == [*nets]
        assert (found.values == found.values.T).all() and not found.values.diagonal().any() and (found.values >= 0).all()
        one = barrier(along(efcn, convert(lcn, "fcn"), data, kind, points=3)).height[kind]
        assert found.loc["lcn", "efcn"] == pytest.approx(one, abs=1e-6) and found.loc["cnn", "lcn"] < 1e-6
    with pytest.raises(ValueError, match="unknown path"): barrier_matrix(nets, data, SHAPE, "bent")
    with pytest.raises(ValueError, match="two networks or more to join"): barrier_matrix(dict(cnn=cnn), data, SHAPE)
    with pytest.raises(ValueError, match="do not lie in one space"): barrier_matrix(dict(cnn=cnn, wider=make_model("small", SHAPE, 3, width=3)), data, SHAPE)
