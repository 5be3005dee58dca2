"Patterns, networks, runs, rows of digits and claims, against products, loops and closed forms."
import inspect
import math
from dataclasses import fields
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from growth import power
from efcn_nb.ladder.layers import FullyConnected, LocallyConnected
from efcn_nb.materials.models import count_weights
from efcn_nb.experiments.effects import by_seed
from efcn_nb.experiments.sweeps import sweep
from efcn_nb.instruments.fourier import KPattern, all_inputs, hinge, make_pattern, pattern_batches, sign_accuracy
from efcn_nb.materials.controls import pixel_order
from efcn_nb.studies import separation
from efcn_nb.studies.separation import (
    DIGIT_KINDS, PATTERN_KINDS, DigitSettings, PatternSettings, digit_scans, final_rows,
    follow, learn_digits, learn_pattern, make_digit_net, make_local_net, sample_complexity_claims, width_within)
from efcn_nb.training.loop import Diverged


pytestmark = pytest.mark.usefixtures("one_thread")


def signs(count, n, seed=0):
    return torch.randint(0, 2, (count, 1, n), generator=torch.Generator().manual_seed(seed)).float()*2 - 1


def with_readout(net, seed=0):
    "`net` without gradients and with a readout that is not zero."
    nn.init.normal_(net[-1].weight, generator=torch.Generator().manual_seed(seed))
    return net.requires_grad_(False)


# Networks

def by_hand(kind, net, x, k):
    "The hidden units of a network, by loops over places."
    x, n = x[:, 0], x.shape[-1]
    layer = next(m for m in net if hasattr(m, "weight"))
    b = layer.bias if kind in ("cnn", "wide") else layer.bias.view(-1, n-k+1)
    out = []
    for i in range(n-k+1):
        if kind in ("fcn", "efcn"): out.append(x @ layer.weight.view(-1, n-k+1, n)[:, i].T + b[:, i])
        elif kind == "wide": out.append(x.roll(-i, 1) @ layer.weight[:, 0].T + b)
        elif kind == "cnn": out.append(x[:, i:i+k] @ layer.weight[:, 0].T + b)
        else: out.append(x[:, i:i+k] @ layer.weight[i, :, :, 0].T + b[:, i])
    return torch.stack(out, 2).relu().flatten(1)


@pytest.mark.parametrize("kind", PATTERN_KINDS)
@pytest.mark.parametrize("n, k", [(9, 3), (8, 3), (5, 1), (4, 4)])
def test_networks_compute_what_they_say(kind, n, k):
    net, x = with_readout(make_local_net(kind, n, k, width=3, seed=2)), signs(40, n)
    hidden = by_hand(kind, net, x, k)
    torch.testing.assert_close(net(x)[:, 0], hidden @ net[-1].weight[0], rtol=1e-4, atol=1e-5)


def test_kinds_start_from_the_same_or_other_weights():
    nets = {kind: make_local_net(kind, 12, 4, seed=3) for kind in PATTERN_KINDS}
    dense = nets["efcn"][0].weight.view(16, 9, 12)
    for i in range(9): assert torch.equal(dense[:, i, i:i+4], nets["cnn"][0].weight[:, 0])
    assert (dense != 0).sum() == 16*9*4                                              # nothing off-local
    assert (nets["fcn"][0].weight != 0).all() and nets["fcn"][0].weight.abs().max() <= 12**-.5
    assert len(nets["lcn"][0].weight.unique()) == nets["lcn"][0].weight.numel()      # nothing shared
    for net in nets.values(): assert not net[-1].weight.any() and not net[-1].bias.any()


def test_seeds_make_networks_and_leave_the_global_state_alone():
    before = torch.get_rng_state()
    a, b, c = (make_local_net("lcn", 8, 3, seed=seed)[0].weight for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(before, torch.get_rng_state())


def test_width_of_exactly_the_budget():
    assert width_within("lcn", 13, 4, count_weights(make_local_net("lcn", 13, 4, 7))) == 7


@pytest.mark.parametrize("call, said", [
    (lambda: make_local_net("transformer", 8, 3),
     r"unknown architecture 'transformer'; known are cnn, lcn, wide, fcn, elcn, efcn"),
    (lambda: width_within("mlp", 8, 3, 100), r"unknown architecture 'mlp'"),
    (lambda: make_local_net("cnn", 3, 4), r"k must be a whole number from 1 to 3, not 4"),
    (lambda: make_local_net("cnn", 8, 3, width=0), r"width must be a whole number, 1 or more, not 0"),
    (lambda: width_within("fcn", 64, 5, 3960),
     r"no width meets a budget of 3,960 weights: the narrowest fcn has 3,961"),
    (lambda: learn_pattern("cnn", 4, 5), r"k must be a whole number from 1 to 4, not 5"),
    (lambda: learn_pattern("lcn", 16, 3, relax=5), r"for elcn and efcn"),
    (lambda: learn_pattern("cnn", 16, 3, optimizer="lbfgs"), r"unknown optimizer 'lbfgs'; known are adam, sgd"),
    (lambda: learn_pattern("cnn", 16, 3, lr=-.1), r"lr must be a number, 0 or more, not -0.1"),
    (lambda: learn_pattern("cnn", 16, 3, steps=0), r"steps must be a whole number, 1 or more, not 0"),
    (lambda: learn_pattern("cnn", 16, 3, every=-1), r"every must be a whole number, 1 or more, not -1"),
    (lambda: learn_pattern("cnn", 16, 3, batch=0), r"batch must be a whole number, 1 or more, not 0"),
    (lambda: learn_pattern("efcn", 16, 3, steps=10, relax=11), r"relax must be a whole number from 0 to 10, not 11"),
    (lambda: learn_digits("efcn", 5, steps=10, relax=11), r"relax must be .* not 11"),
    (lambda: make_digit_net("cnn", 5, width=0), r"width must be a whole number, 1 or more, not 0"),
    (lambda: make_digit_net("cnn", 5, hidden=0), r"hidden must be a whole number, 1 or more, not 0"),
    (lambda: learn_digits("wide", 5), r"known are cnn, lcn, fcn, elcn, efcn"),
    (lambda: learn_digits("cnn", 6), r"odd number of digits.*not 6"),
    (lambda: learn_digits("cnn", 1), r"n must be a whole number, 3 or more, not 1"),
    (lambda: learn_digits("cnn", 3, "scattered"), r"n must be a whole number, 5 or more, not 3"),
    (lambda: learn_digits("cnn", 5, "ordered"), r"unknown bits 'ordered'; known are consecutive, scattered"),
    (lambda: make_digit_net("cnn", 4), r"odd number of digits"),
])
def test_impossible_networks_and_runs(call, said):
    with pytest.raises(ValueError, match=said): call()


# What cannot come out otherwise

def reordered(near, scattered):
    "An order of positions that brings the bits of the pattern `near` to those of `scattered`."
    order = torch.arange(near.n)
    for a, b in zip(near.bits, scattered.bits):
        i = order.tolist().index(a)
        order[[i, b]] = order[[b, i]]
    return order


@pytest.mark.parametrize("n, k", [(10, 3), (12, 5), (9, 4)])
@pytest.mark.parametrize("kind, bits, reorder", [
    ("cnn", "scattered", False), ("lcn", "scattered", False), ("elcn", "scattered", False),
    ("cnn", "consecutive", True), ("efcn", "consecutive", True)])
def test_no_window_sees_the_bits(kind, bits, reorder, n, k):
    """Whatever its weights, a local network is uncorrelated with the parity of bits that no window holds.

    So its hinge loss is never below 1, that of a network that says nothing. (An eFCN is local before it is trained.)"""
    order = pixel_order((1, n), 3).tolist() if reorder else None
    pattern = make_pattern(n, k, bits)
    held = [set(order[i:i+k] if reorder else range(i, i+k)) for i in range(n - k + 1)]
    assert not any({*pattern.bits} <= window for window in held)
    x = all_inputs(n)
    y = pattern.labels(x)
    for seed in range(3):
        scores = with_readout(make_local_net(kind, n, k, width=4, seed=seed, order=order), seed).double()(x.double())
        assert (y*scores[:, 0]).mean().abs() < 1e-12 and scores.abs().max() > .1
        assert hinge(scores, y) >= 1 - 1e-12 and hinge(scores*.01, y) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("n, k", [(12, 3), (16, 5)])
def test_a_dense_network_learns_scattered_bits_as_it_learns_neighbours(n, k):
    "With the columns of its independent initial weights in another order, and the inputs too, its path is the same."
    near, scattered, paths = make_pattern(n, k), make_pattern(n, k, "scattered"), []
    order = reordered(near, scattered)
    tests = next(pattern_batches(near, 500, 1, 9))
    for pattern, places in (near, torch.arange(n)), (scattered, order):
        net = make_local_net("fcn", n, k, width=4, seed=2).double()
        net[0].weight.data = net[0].weight.data[:, places]
        batches = [(x.double()[..., places], y) for x, y in pattern_batches(near, 32, 60, 5)]
        assert all(pattern.labels(x).equal(y) for x, y in batches)
        test = tests[0].double()[..., places], tests[1]
        paths.append(follow(net, batches, test, lr=.01, every=20, stop=False))
    for one, other in zip(*paths):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-9) and one["accuracy"] == other["accuracy"]


# Training


def test_follow_equals_a_plain_loop():
    pattern = KPattern(8, (3, 4))
    test = next(pattern_batches(pattern, 200, 1, 9))
    net, other = (make_local_net("fcn", 8, 2, width=4, seed=1) for _ in range(2))
    rows = follow(net, pattern_batches(pattern, 16, 7, 3), test, lr=.05, optimizer="sgd", every=3, stop=False)
    losses = []
    for x, y in pattern_batches(pattern, 16, 7, 3):
        loss = F.relu(1 - y*other(x)[:, 0]).mean()
        other.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in other.parameters(): p -= .05*p.grad
        losses.append(loss.item())
    for a, b in zip(net.parameters(), other.parameters()): torch.testing.assert_close(a, b)
    assert [row["step"] for row in rows] == [3, 6, 7]
    expected = [np.mean(losses[:3]), np.mean(losses[3:6]), losses[6]]
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-5)
    assert rows[-1]["accuracy"] == sign_accuracy(other, *test)


def test_divergence_is_told_with_its_step():
    pattern, inf = KPattern(8, (3, 4)), torch.full((4, 1, 8), math.inf)
    batches = [*pattern_batches(pattern, 4, 7, 0), (inf, torch.ones(4))]
    with pytest.raises(Diverged, match="not finite at step 108;"):
        follow(make_local_net("fcn", 8, 2), batches, next(pattern_batches(pattern, 4, 1, 0)), .01, every=5, first=100)


def test_follow_stops_when_nothing_is_left():
    "All is right from the start, so it stops at the second measurement."
    x = signs(64, 4)
    net = with_readout(nn.Sequential(nn.Flatten(), nn.Linear(4, 1))).requires_grad_(True)
    with torch.no_grad(): net[1].weight.copy_(torch.tensor([[5., 0, 0, 0]])), net[1].bias.zero_()
    batches = lambda: ((x, x[:, 0, 0]) for _ in range(50))
    assert [row["step"] for row in follow(net, batches(), (x, x[:, 0, 0]), lr=.1, every=10)] == [10, 20]
    assert len(follow(net, batches(), (x, x[:, 0, 0]), lr=.1, every=10, stop=False)) == 5


def test_reading_in_another_order_is_renaming_the_bits():
    "A CNN that reads in an order, on its own bits, goes the way of the plain CNN on renamed inputs, step by step."
    n, k, order = 10, 3, pixel_order((1, 10), 2).tolist()
    plain, mixed = make_pattern(n, k), make_pattern(n, k, "ordered", order)
    x, y = next(pattern_batches(mixed, 500, 1, 5))
    assert torch.equal(plain.labels(x[..., order]), y)
    for kind in ("cnn", "efcn"):
        a = follow(make_local_net(kind, n, k, seed=1, order=order), pattern_batches(mixed, 32, 60, 4), (x, y),
                   lr=.01, every=20)
        b = follow(make_local_net(kind, n, k, seed=1),
                   ((x[..., order], y) for x, y in pattern_batches(mixed, 32, 60, 4)), (x[..., order], y),
                   lr=.01, every=20)
        assert [r["accuracy"] for r in a] == [r["accuracy"] for r in b]
        assert [r["loss"] for r in a] == pytest.approx([r["loss"] for r in b], rel=1e-4)


def test_relaxed_network_is_the_cnn_until_then():
    options = dict(n=12, k=3, width=8, steps=120, every=20, seed=1)
    cnn, relaxed = learn_pattern("cnn", **options), learn_pattern("efcn", relax=40, **options)
    assert relaxed[:2] == cnn[:2] and [row["step"] for row in relaxed] == [20, 40, 60, 80, 100, 120]
    assert relaxed[2] != cnn[2] and 0 < relaxed[-1]["off_local"] < .3 and math.isnan(cnn[-1]["off_local"])


def test_a_cnn_that_is_done_early_is_relaxed_at_its_time():
    steps = [row["step"] for row in learn_pattern("elcn", 4, 1, width=4, steps=120, relax=100, every=10, lr=.1)]
    assert steps[:10] == [*range(10, 101, 10)] and steps[-1] > 100


@pytest.mark.parametrize("learn, name", [(partial(learn_pattern, "cnn", 6, 2), "pattern_batches"),
                                         (partial(learn_digits, "cnn", 3), "digit_rows")])
def test_tests_are_no_training_inputs(monkeypatch, learn, name):
    "Training and test inputs of all seeds are drawn with seeds of their own; rows of digits from scans of their own."
    drawn, scans, real = [], [], getattr(separation, name)
    def draw(source, *rest):
        drawn.append(rest[-1])
        scans.append(source)
        return real(source, *rest)
    monkeypatch.setattr(separation, name, draw)
    for seed in range(3): learn(width=1, steps=2, every=1, seed=seed)
    assert len(drawn) == len({*drawn}) == 6
    if name == "digit_rows":
        for (train, _), (test, _) in zip(scans[::2], scans[1::2]):
            assert len(train) > len(test)
            assert not {s.numpy().tobytes() for s in train} & {s.numpy().tobytes() for s in test}


def test_relaxed_at_the_end_is_still_convolutional():
    rows = learn_pattern("efcn", 12, 3, width=4, steps=40, relax=20, every=20, lr=1e-9, optimizer="sgd")
    assert rows[-1]["off_local"] < 1e-10


def test_whole_run_is_repeatable_and_seeds_differ():
    one, two, other = (learn_pattern("fcn", 12, 3, width=4, steps=40, every=20, seed=seed) for seed in (1, 1, 2))
    assert one == two and one != other


def test_a_table_is_used():
    first = [1 if line & 1 else -1 for line in range(8)]                              # the first of the three bits
    assert learn_pattern("fcn", 12, 3, width=4, table=first, steps=200, lr=.01)[-1]["accuracy"] > .99
    with pytest.raises(ValueError, match="has 8 labels, not 4"): learn_pattern("fcn", 12, 3, table=[1, 1, 1, -1])


# Rows of digits

def test_scans_are_normalised_and_disjoint():
    (x, y), (z, w) = digit_scans()
    assert x.shape[1:] == z.shape[1:] == (8, 8) and len(y) + len(w) == 1797
    assert {*y.tolist()} == {*w.tolist()} == set(range(10))
    assert not {s.numpy().tobytes() for s in x} & {s.numpy().tobytes() for s in z}
    from sklearn.datasets import load_digits
    scans = torch.cat([x, z]).double()
    # 0 to 16, as scikit-learn has them
    ink = (16*(scans - scans.min())/(scans.max() - scans.min())).round().flatten(1)
    assert {tuple(scan) for scan in ink.tolist()} == {tuple(scan) for scan in load_digits().data.tolist()}


@pytest.mark.parametrize("kind", DIGIT_KINDS)
def test_digit_windows(kind):
    "Each place sees three digits, or, if dense, may see all; what is embedded starts as the CNN."
    net = make_digit_net(kind, 5, width=2, hidden=3, seed=1)
    x = torch.randn(4, 1, 8, 40, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for place in range(3):
        seen = torch.autograd.grad(net[0](x)[:, :, 0, place].sum(), x)[0].abs().sum((0, 1, 2)).view(5, 8).sum(1) > 0
        assert seen.tolist() == ([True]*5 if kind == "fcn" else [place <= d < place+3 for d in range(5)])
    if kind.startswith("e"):
        torch.testing.assert_close(net(x), make_digit_net("cnn", 5, width=2, hidden=3, seed=1)(x), rtol=1e-4, atol=1e-5)
    layers = {"cnn": nn.Conv2d, "lcn": LocallyConnected, "elcn": LocallyConnected}
    assert isinstance(net[0], layers.get(kind, FullyConnected))


def test_learn_digits_runs():
    rows = learn_digits("efcn", 3, width=4, hidden=8, steps=40, every=20, relax=20)
    # a window of all three digits leaves nothing outside
    assert [row["step"] for row in rows] == [20, 40] and rows[-1]["off_local"] == 0


# Tables and claims

def test_final_rows_of_a_sweep(tmp_path):
    configs = [dict(kind=kind, n=8, k=2, width=2, steps=40, every=20, seed=seed, relax=0) for kind in ("cnn", "efcn")
               for seed in (0, 1)]
    table, again = (sweep(learn_pattern, configs, tmp_path) for _ in range(2))
    ends = final_rows(table.sample(frac=1, random_state=0).sort_index())
    assert len(ends) == 4 and (ends.step <= 40).all()
    pd.testing.assert_frame_equal(final_rows(again), final_rows(table), check_dtype=False)
    one = table[(table.kind == "cnn") & (table.seed == 1)]
    assert by_seed(ends, kind="cnn")[1] == one.accuracy.iloc[-1]
    with pytest.raises(ValueError, match="no run has kind=fcn"): by_seed(ends, kind="fcn")
    with pytest.raises(ValueError, match="several runs have n=8 and one seed"): by_seed(ends, n=8)


def test_runs_that_nothing_tells_apart():
    "Tables of labels are lists, so a sweep has no column for them."
    table = sweep(learn_pattern, [dict(kind="fcn", n=4, k=1, width=1, steps=2, every=1, seed=0, table=table)
                                  for table in ([1, -1], [1, 1])])
    with pytest.raises(ValueError, match="several runs have the same settings"): final_rows(table)


@pytest.mark.parametrize("asked", [dict(kid="cnn"), dict(column="acuracy", kind="cnn")])
def test_unknown_columns(asked):
    with pytest.raises(ValueError, match="unknown column '(kid|acuracy)'; known are kind, seed, accuracy"):
        by_seed(pd.DataFrame(dict(kind=["cnn"], seed=[0], accuracy=[1.])), **asked)


def test_missing_settings_are_asked_for_by_none():
    ends = pd.DataFrame(dict(kind="cnn", seed=[0, 0], lr=[math.nan, .1], accuracy=[.5, .6]))
    assert by_seed(ends, kind="cnn", lr=None).tolist() == [.5]


# Samples: claims about growth

def test_claims_about_samples():
    verdicts = lambda **exponents: sample_complexity_claims(power(exponents)).verdict.tolist()
    assert verdicts(cnn=0., fcn=2.) == ["holds"]*3
    assert verdicts(cnn=0., fcn=1.) == ["holds", "fails", "holds"]
    assert verdicts(cnn=1., fcn=2.) == ["holds", "holds", "fails"]
    assert verdicts(cnn=2., fcn=0.) == ["fails"]*3
    one = sample_complexity_claims(power(dict(cnn=0., fcn=2.), seeds=[0]))
    assert one.verdict.tolist() == ["undecided"]*3, "one seed has no spread"
    for p, found in [(1., "holds"), (2.5, "fails"), (-.5, "fails"), (2., "undecided")]:
        assert sample_complexity_claims(power(dict(cnn=0., lcn=p, fcn=2.))).verdict[3] == found
    table = sample_complexity_claims(power(dict(cnn=0., lcn=1., fcn=2.)))
    assert table.n.eq(4).all() and table.effect[1] == "exponent 1.99 ± 0.02"


@pytest.mark.parametrize("holes", [[("cnn", 32, 0)], [("cnn", 32, seed) for seed in range(4)], [("fcn", 8, 1)],
                                   [("fcn", 8, seed) for seed in range(4)], [("lcn", 16, 2)]])
def test_claims_wait_for_seeds_that_did_not_get_there(holes):
    "Seeds that reach the target are the better ones: a verdict on them alone would flatter."
    needed = power(dict(cnn=0., lcn=1., fcn=2.))
    for a, size, seed in holes:
        needed.loc[(needed.architecture == a) & (needed["size"] == size) & (needed.seed == seed), "samples"] = math.nan
    claims, (name, _, _) = sample_complexity_claims(needed), holes[0]
    touched = {"cnn": [0, 2, 3], "fcn": [0, 1, 3], "lcn": [3]}[name]
    assert claims.verdict.tolist() == ["undecided" if i in touched else "holds" for i in range(4)]
    assert all(claims.n[i] == 4 - len(holes) for i in touched if i != 0)


def test_claims_need_both():
    with pytest.raises(ValueError, match="both must be in the table"):
        sample_complexity_claims(power(dict(cnn=0., lcn=2.)))


# Settings

def test_a_run_is_known_by_its_settings():
    "Stored runs are found by the hash of their settings, defaults included, so neither names nor defaults may change."
    from efcn_nb.experiments.sweeps import _defaults
    assert _defaults(learn_pattern) == dict(k=5, bits="consecutive", width=16, seed=0, reorder=False, table=None,
                                            relax=0, steps=1000, batch=128, lr=.006, optimizer="adam", every=50)
    assert _defaults(learn_digits) == dict(bits="consecutive", width=32, hidden=64, seed=0, relax=0, steps=1000,
                                           batch=128, lr=.001, optimizer="adam", every=100)


@pytest.mark.parametrize("learn, settings", [(learn_pattern, PatternSettings), (learn_digits, DigitSettings)])
def test_a_run_takes_the_settings_by_name_or_place(learn, settings):
    taken = inspect.signature(learn).parameters.values()
    own = {field.name: field.default for field in fields(settings) if field.name not in ("kind", "n")}
    assert {p.name: p.default for p in taken if p.default is not p.empty} == own
    assert {p.kind for p in taken} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_arguments_by_place():
    by_place = learn_pattern("efcn", 6, 2, "anywhere", 4, 1, 10, 20, 8, .01, "sgd", 5, True, None)
    by_name = learn_pattern(kind="efcn", n=6, k=2, bits="anywhere", width=4, seed=1, relax=10, steps=20, batch=8,
                            lr=.01, optimizer="sgd", every=5, reorder=True)
    assert by_place == by_name
    by_place = learn_digits("efcn", 3, "consecutive", 2, 1, 10, 20, 8, .01, "sgd", 5, 4)
    by_name = learn_digits(kind="efcn", n=3, width=2, seed=1, relax=10, steps=20, batch=8, lr=.01, optimizer="sgd",
                           every=5, hidden=4)
    assert by_place == by_name
