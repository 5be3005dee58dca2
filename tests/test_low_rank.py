"The study of low-rank kernels, against written-out loops and made-up tables whose answers are known."
import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils import parametrize

import efcn_nb.instruments.kernel_ranks as rooms
import efcn_nb.studies.low_rank as study
from efcn_nb.materials.controls import make_variant
from efcn_nb.materials.data import Data, Dataset
from efcn_nb.materials.models import count_weights
from efcn_nb.ladder.tensor_formats import (
    FORMATS, SHUFFLES, compress, count_cores, fit_rank, held_layers, hold_to_rank, largest_ratio, tensor_shape)
from efcn_nb.instruments.kernel_ranks import (
    composed_kernel, compression, cut_kernel, effective_rank, kernel_ranks, operator_rank, stable_rank)
from efcn_nb.studies.low_rank import (
    SHUFFLED, by_ratio, check_arms, compressed_model, freeze_kernels, held_network, learn_held, low_rank_claims,
    low_rank_grid, post_hoc, post_hoc_study, steadiness, train_held, validation_data)
from efcn_nb.training.loop import Diverged, evaluate, recount_batchnorm

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = dict(width=6, kernel=3, epochs=1, batch_size=20)


def draw(seed=0): return torch.Generator().manual_seed(seed)


def noise(n=40, shape=(1, 8, 8), classes=2, seed=0):
    "Images whose class is their brightness."
    y = torch.arange(n) % classes
    x = torch.randint(60, 120, (n, *shape), generator=draw(seed)) + 60*y.view(-1, *[1]*len(shape))
    return Dataset(x.to(torch.uint8), y, [*map(str, range(classes))], torch.full(shape[:1], .5), torch.full(shape[:1], .25), "noise")


@pytest.fixture(scope="module")
def data(): return Data(noise(40), noise(20, seed=1))


# Networks

@pytest.mark.parametrize("shape, width, kernel, words", [((1, 7, 8), 4, 3, "at least 8 x 8 pixels, not at \\(1, 7, 8\\)"), ((8, 8), 4, 3, "at least 8 x 8"), ((1, 8, 8), 0, 3, "width must be 1 or more"), ((1, 8, 8), 4, 2, "an odd number, not 4 and 2"), ((1, 8, 8), 4., 3, "width must be 1 or more .* not 4.0 and 3"),
                                                         ((1, 8, 8), 4, "3", "not 4 and '3'")])
def test_impossible_networks(shape, width, kernel, words):
    with pytest.raises(ValueError, match=words): held_network(shape, 2, width, kernel)


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    compressed_model((1, 8, 8), 2, "tt", 3, "everything", width=5, kernel=3)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), nn.Conv2d(1, 2, 3)])
def test_nothing_to_hold(model):
    for use in (held_layers, compression, freeze_kernels, lambda m: compress(m, "tt", 2), lambda m: largest_ratio(m, "cp")):
        with pytest.raises(ValueError, match="no convolution to hold: it takes two or more"): use(model)


@given(format=st.sampled_from(FORMATS), shuffle=st.sampled_from(SHUFFLES), width=st.integers(3, 9), kernel=st.sampled_from([1, 3, 5]), ratio=st.floats(1, 6))
@settings(max_examples=40, deadline=None)
def test_ratios_are_counted(format, shuffle, width, kernel, ratio):
    dense = held_network((2, 8, 9), 3, width, kernel)
    shape, entries = (width, kernel**2, width), (width*kernel)**2
    most = entries/count_cores(format, shape, 1)
    assert largest_ratio(dense, format) == most
    if ratio > most:
        with pytest.raises(ValueError, match="numbers at rank 1, which compresses"): compress(dense, format, ratio, shuffle)
        assert not any(parametrize.is_parametrized(m) for m in dense.modules())
        return
    model = compressed_model((2, 8, 9), 3, format, ratio, shuffle, width, kernel)
    table = compression(model)
    stored = count_weights(model) - (count_weights(dense) - 2*entries) # all that is not a dense kernel is as before
    assert table.numbers["all"] == stored == table.numbers.iloc[:2].sum() and table.entries["all"] == 2*entries
    assert table.ratio["all"] >= ratio and table.ratio["all"] == 2*entries/stored
    rank = int(table["rank"]["all"])
    try: assert count_cores(format, shape, rank + 1)*ratio > entries, "a larger rank would do"
    except ValueError: pass # there is none


@pytest.mark.parametrize("args, words", [(("tt", .9), "a number from 1 on, not 0.9"), (("tt", math.nan), "a number from 1 on"), (("tt", "2"), "a number from 1 on"), (("tt", True), "a number from 1 on"), (("qr", 2), "unknown tensor format 'qr'"), (("tt", 2, "pixels"), "unknown shuffle 'pixels'"),
                                         (("tt", 1e4), "at most, not 1e\\+04 times")])
def test_impossible_compressions(args, words):
    model = held_network((1, 8, 8), 2, 6, 3)
    with pytest.raises(ValueError, match=words): compress(model, *args)
    assert compression(model).ratio["all"] == 1


def test_compressed_twice():
    with pytest.raises(ValueError, match="layer '4' is parametrized already"): compress(compressed_model((1, 8, 8), 2, "tt", 2, width=6, kernel=3), "cp", 2)
    model = held_network((1, 8, 8), 2, 6, 3)
    hold_to_rank(model[7], "tt", 1)
    with pytest.raises(ValueError, match="layer '7' is parametrized already"): compress(model, "cp", 2)
    assert not parametrize.is_parametrized(model[4]), "nothing is changed"


@pytest.mark.parametrize("convs", [[nn.Conv1d(2, 4, 3), nn.Conv1d(4, 6, 5)], [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, (3, 5), groups=2)], [nn.Conv3d(1, 2, 3), nn.Conv3d(2, 5, 3)]])
def test_other_convolutions(convs):
    model = nn.Sequential(*convs)
    shape = tensor_shape(convs[1])
    compress(model, "tucker", 2, "everything")
    assert compression(model).entries["all"] == math.prod(shape) == convs[1].weight.numel() and [*held_layers(model)] == ["1"]
    assert kernel_ranks(composed_kernel(convs[1]))["out"] == min(shape[0], shape[1]*shape[2])


def test_layers_and_seeds_have_orders_of_their_own():
    orders = [conv.parametrizations.weight[0].order for seed in (0, 1) for conv in held_layers(compressed_model((1, 8, 8), 2, "tt", 2, "everything", 6, 3, seed)).values()]
    assert not any(a.equal(b) for k, a in enumerate(orders) for b in orders[:k])
    again = [conv.parametrizations.weight[0].order for conv in held_layers(compressed_model((1, 8, 8), 2, "tt", 2, "everything", 6, 3, 1)).values()]
    assert again[0].equal(orders[2]) and again[1].equal(orders[3])


def test_kernels_begin_at_the_scale_of_pytorch():
    dense, held = held_network((1, 8, 8), 2, 12, 5), compressed_model((1, 8, 8), 2, "tr", 20, "everything", 12, 5)
    for a, b in zip(held_layers(dense).values(), held_layers(held).values()): torch.testing.assert_close(a.weight.norm(), b.weight.norm())


# Data and training

def test_validation_data_is_a_split_of_the_training_images():
    data = Data(noise(40), noise(20, seed=1))
    rest, held = validation_data(data, .2, seed=2)
    key = lambda part: sorted(t.numpy().tobytes() for t in part.x)
    assert sorted(key(rest) + key(held)) == key(data.train) and held.y.bincount().tolist() == [4, 4]
    assert not key(held) == key(validation_data(data, .2, seed=3).test)


def test_training_is_the_loop_written_out(data):
    "Adam by its formula, rate and norm by theirs; gradients go on into the cores."
    model = compressed_model((1, 8, 8), 2, "tt", 4, "everything", width=5, kernel=3)
    other = copy.deepcopy(model)
    losses = train_held(model, data.train, 2, .02, batch_size=16, seed=3)
    other.train()
    p = [*other.parameters()]
    m, v, t, steps, order, mine = [torch.zeros_like(q) for q in p], [torch.zeros_like(q) for q in p], 0, 6, draw(3), []
    for _ in range(2):
        for x, y in data.train.batches(16, order):
            loss = F.cross_entropy(other(x), y)
            g = torch.autograd.grad(loss, p)
            norm = sum(k.square().sum() for k in g).sqrt()
            lr = .02*min((t + 1)/(.2*steps + 1), (1 - t/steps)/.8)
            t += 1
            with torch.no_grad():
                for q, k, a, b in zip(p, g, m, v):
                    k = k*min(1, 1/(norm + 1e-6))
                    a.mul_(.9).add_(.1*k), b.mul_(.999).add_(.001*k*k)
                    q -= lr*a/(1 - .9**t)/((b/(1 - .999**t)).sqrt() + 1e-8)
            mine.append(loss.item())
    np.testing.assert_allclose(losses, mine, rtol=1e-3)


@pytest.mark.parametrize("wrong, words", [(dict(lr=0.), "positive number, not 0.0"), (dict(lr=math.nan), "positive number"), (dict(lr=True), "positive number"), (dict(lr="1"), "positive number"), (dict(epochs=0), "epochs must be a whole number, 1 or more"), (dict(epochs=1.5), "epochs must be"),
                                          (dict(batch_size=0), "batch_size must be"), (dict(precision="fp8"), "precision must be one of"), (dict(epochs=True), "epochs must be")])
def test_impossible_training(data, wrong, words):
    with pytest.raises(ValueError, match=words): train_held(held_network((1, 8, 8), 2, 4, 3), data.train, **(dict(epochs=1, lr=.1) | wrong))


@pytest.mark.parametrize("format", ["dense", "cp"])
def test_frozen_kernels_stay(data, format):
    model = held_network((1, 8, 8), 2, 6, 3)
    if format != "dense": compress(model, format, 4, "everything")
    before = [conv.weight.detach().clone() for conv in held_layers(model).values()]
    biases = [conv.bias.detach().clone() for conv in held_layers(model).values()]
    linear = model[-1].weight.detach().clone()
    train_held(freeze_kernels(model), data.train, 1, .01, 20)
    assert all(conv.weight.equal(w) for conv, w in zip(held_layers(model).values(), before)) and not model[-1].weight.equal(linear)
    assert len(biases) == 2 and all(conv.bias.requires_grad for conv in held_layers(model).values())


# A cell and the grid

def test_a_cell_by_hand(data):
    row = learn_held(data, "tt", "window", 3, seed=2, lr=.01, **TINY)
    model = compressed_model((1, 8, 8), 2, "tt", 3, "window", 6, 3, seed=2)
    train_held(model, data.train, 1, .01, 20, seed=2)
    found = evaluate(model, data.test)
    assert (row["accuracy"], row["loss"]) == (found["accuracy"], found["loss"]) and row["true"] == compression(model).ratio["all"]
    ranks = pd.DataFrame([kernel_ranks(composed_kernel(conv)) for conv in held_layers(model).values()]).mean()
    assert row["effective"] == ranks.effective and row["rank_out"] == ranks.out
    assert learn_held(data, "tt", "window", 3, seed=2, lr=.01, **TINY) == row != learn_held(data, "tt", "window", 3, seed=3, lr=.01, **TINY)


def test_cells_of_one_seed_differ_in_the_kernels_alone():
    nets = [held_network((1, 8, 8), 2, 6, 3, seed=1), *(compressed_model((1, 8, 8), 2, f, 3, s, 6, 3, seed=1) for f in FORMATS for s in ("none", "everything"))]
    assert all(net[0].weight.equal(nets[0][0].weight) and net[-1].weight.equal(nets[0][-1].weight) for net in nets)


def test_what_a_cell_measures_of_its_kernels(data):
    row, model = learn_held(data, "tt", "none", 3, seed=2, lr=.05, **TINY), compressed_model((1, 8, 8), 2, "tt", 3, "none", 6, 3, seed=2)
    start = [effective_rank(composed_kernel(conv).flatten(1)) for conv in held_layers(model).values()]
    train_held(model, data.train, 1, .05, 20, seed=2)
    kernels = [composed_kernel(conv) for conv in held_layers(model).values()]
    assert row["start_effective"] == pytest.approx(np.mean(start)) != pytest.approx(row["effective"])
    assert row["operator"] == pytest.approx(np.mean([operator_rank(K, (8, 8)) for K in kernels])/(64*6)) and row["stable"] == pytest.approx(np.mean([stable_rank(K.flatten(1)) for K in kernels]))


def test_a_loss_that_is_not_finite_is_missing(data, monkeypatch):
    monkeypatch.setattr(study, "evaluate", lambda *_, **__: dict(accuracy=.5, loss=math.inf))
    assert math.isnan(learn_held(data, "tt", "none", 3, **TINY)["accuracy"])


def test_precision_reaches_training_and_evaluation(data, monkeypatch):
    real, said = (study.train_held, study.evaluate), []
    monkeypatch.setattr(study, "train_held", lambda *a: (said.append(a[6]), real[0](*a))[1])
    monkeypatch.setattr(study, "evaluate", lambda *a, precision: (said.append(precision), real[1](*a, precision=precision))[1])
    learn_held(data, "tt", "none", 3, precision="bf16", **TINY)
    post_hoc(data, [3], formats=["tt"], shuffles=["none"], precision="bf16", **TINY)
    assert said == ["bf16"]*5


def test_pixels_are_the_datas(data):
    mixed = make_variant(data, "permuted", 1)
    assert learn_held(data, "tt", "pixels", 3, seed=1, **TINY) == learn_held(mixed, "tt", "none", 3, seed=1, **TINY)


@pytest.mark.parametrize("format", FORMATS)
def test_cells_in_lower_precision(data, format):
    "Kernels are composed under autocast, too."
    row = learn_held(data, format, "everything", 2, precision="bf16", **TINY)
    assert math.isfinite(row["accuracy"]) and row["rank_out"] == 6


def test_diverged_cell_is_missing(data, monkeypatch):
    def broken(*_): raise Diverged("the loss was not finite")
    monkeypatch.setattr(study, "train_held", broken)
    row = learn_held(data, "tt", "none", 3, **TINY)
    assert math.isnan(row["accuracy"]) and row["true"] > 3 and "effective" not in row


@pytest.mark.parametrize("arms, words", [([], "at least one arm"), (["tt"], "an arm is a pair"), ([("tt",)], "an arm is a pair"), ([("tt", "none", 1)], "an arm is a pair"), ([("svd", "none")], "unknown tensor format 'svd'; known are dense, cp"), ([("tt", "all")], "unknown shuffle 'all'; known are none, window, channels, everything, pixels"),
                                         ([("dense", "window")], "says nothing new"), ([("tt", "none"), ["tt", "none"]], "is there twice")])
def test_impossible_arms(data, arms, words, tmp_path):
    for use in (check_arms, lambda arms: low_rank_grid(data, arms, [2], folder=tmp_path/"new")):
        with pytest.raises(ValueError, match=words): use(arms)
    assert not (tmp_path/"new").exists()


def test_all_arms_that_there_are(): check_arms([("dense", "none"), ("dense", "pixels"), *((f, s) for f in FORMATS for s in SHUFFLED)])


@pytest.mark.parametrize("wrong, words", [(dict(ratios=[]), "ratios is empty"), (dict(ratios=[.5]), "ratios must be 1 or more, not 0.5"), (dict(ratios=[2, 2.]), "ratios holds 2.0 twice"), (dict(ratios=["2"]), "which is no number"), (dict(ratios=2), "a list of numbers, such as \\[2\\]"), (dict(ratios=[math.inf]), "no number"),
                                          (dict(seeds=[]), "seeds is empty"), (dict(seeds=[-1]), "seeds must be 0 or more"), (dict(seeds=[.5]), "whole numbers below 1000"), (dict(seeds=[1000]), "whole numbers below 1000"), (dict(seeds=3), "a list of numbers"), (dict(lrs=[]), "lrs is empty"), (dict(lrs=[0]), "positive number"),
                                          (dict(epochs=0), "epochs must be"), (dict(search_epochs=0), "epochs must be"), (dict(batch_size=0), "batch_size must be"), (dict(precision="x"), "precision must be"), (dict(width=0), "width must be"), (dict(kernel=2), "odd number")])
def test_impossible_grids(data, wrong, words, tmp_path):
    with pytest.raises(ValueError, match=words): low_rank_grid(data, **(dict(arms=[("tt", "none")], ratios=[2], folder=tmp_path/"new") | wrong))
    assert not (tmp_path/"new").exists()


def fake(data, format, shuffled, ratio, trained, seed, lr, epochs, batch_size, width, kernel, precision):
    "Accuracy by formula: shuffled learns best with .02, plain with .01."
    best = .02 if shuffled == "everything" else .01
    return dict(true=1.1*ratio, numbers=10, accuracy=.9 - .01*ratio - 5*abs(lr - best) + 1e-3*(seed % 7), images=len(data.test))


def test_rates_are_chosen_on_validation_images(data, monkeypatch):
    calls = []
    def spy(half, *args):
        calls.append((half.train.fingerprint, half.test.fingerprint, *args))
        return fake(half, *args)
    monkeypatch.setattr(study, "learn_held", spy)
    table = low_rank_grid(data, [("tt", "none"), ("tt", "everything")], [2, 3, 4], seeds=[0, 1], lrs=(.005, .01, .02), epochs=7, search_epochs=3, **{k: TINY[k] for k in ("width", "kernel")})
    assert table.groupby("shuffled").lr.unique().map(list).to_dict() == dict(none=[.01], everything=[.02])
    halves = validation_data(data)
    search = [c for c in calls if c[6] == study.SEARCH_SEED]
    assert len(search) == 2*2*3 and all(c[:2] == (halves.train.fingerprint, halves.test.fingerprint) and c[8] == 3 for c in search) and {c[4] for c in search} == {2., 4.}
    final = [c for c in calls if c not in search]
    assert len(final) == 2*3*2 and all(c[:2] == (data.train.fingerprint, data.test.fingerprint) and c[8] == 7 for c in final)


def test_ties_go_to_the_smaller_rate_and_a_diverged_one_loses(data, monkeypatch):
    monkeypatch.setattr(study, "learn_held", lambda *a: dict(true=a[3], numbers=1, accuracy=math.nan if a[6] == .005 else .5))
    assert {*low_rank_grid(data, [("cp", "none")], [2], seeds=[0], lrs=(.02, .005, .01), width=6, kernel=3).lr} == {.01}


def test_ratios_out_of_reach_are_said(data, monkeypatch):
    monkeypatch.setattr(study, "learn_held", fake)
    table = low_rank_grid(data, [("dense", "none"), ("tt", "none"), ("cp", "everything")], [2, 500], seeds=[0, 1], lrs=[.01], width=6, kernel=3)
    lost = table[table.ratio == 500]
    assert len(lost) == 4 and {*lost.note} == {f"rank 1 compresses {6*9*6/21:.4g} times at most"} and lost.accuracy.isna().all() and lost.true.isna().all()
    assert len(table) == 2 + 4 + 4 and table[table.format == "dense"].ratio.tolist() == [1, 1] and table[table.ratio < 500].note.isna().all()
    nothing = low_rank_grid(data, [("tt", "none")], [500], seeds=[0], width=6, kernel=3)
    assert len(nothing) == 1 and nothing.note.notna().all()


def test_study_goes_on_after_an_interruption(data, tmp_path, monkeypatch):
    real, calls = study.learn_held, []
    def stopping(*args):
        if len(calls) == 5: raise KeyboardInterrupt
        calls.append(args[1:])
        return real(*args)
    run = lambda: low_rank_grid(data, [("tt", "none"), ("tt", "everything")], [2, 6], seeds=[0, 1], lrs=(.01, .02), folder=tmp_path, search_epochs=1, **TINY)
    monkeypatch.setattr(study, "learn_held", stopping)
    with pytest.raises(KeyboardInterrupt): run()
    monkeypatch.setattr(study, "learn_held", lambda *args: (calls.append(args[1:]), real(*args))[1])
    table = run()
    assert len(calls) == len({*calls}) == 2*2*2 + 2*2*2, "nothing twice"
    monkeypatch.setattr(study, "learn_held", None)
    pd.testing.assert_frame_equal(run(), table)
    monkeypatch.setattr(study, "learn_held", real)
    whole = low_rank_grid(data, [("tt", "none"), ("tt", "everything")], [2, 6], seeds=[0, 1], lrs=(.01, .02), search_epochs=1, **TINY)
    pd.testing.assert_frame_equal(whole, table)


def test_other_images_are_other_cells(data, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(study, "learn_held", lambda *args: (calls.append(1), fake(*args))[1])
    for d in (data, Data(data.train, data.train), Data(data.test, data.test), data): low_rank_grid(d, [("tt", "none")], [2], seeds=[0], lrs=[.01], folder=tmp_path, width=6, kernel=3)
    assert len(calls) == 3


# Tables

def made_up(accuracy, seeds=4, ratios=(2., 8., 32.), arms=(("tt", "none", True), ("tt", "everything", True)), noise=.003):
    rng = np.random.default_rng(1)
    return pd.DataFrame([dict(format=f, shuffled=s, trained=t, ratio=r, seed=k, true=r, accuracy=accuracy(f, s, t, r) + noise*rng.standard_normal()) for f, s, t in arms for r in ratios for k in range(seeds)])


ARMS = [("tt", s, True) for s in ("none", "everything", "window", "channels", "pixels")] + [("tt", "everything", False), ("dense", "none", False)]


def test_steadiness_by_hand():
    table = made_up(lambda f, s, t, r: .5 - .01*r*(s == "none"), noise=.02).sample(frac=1, random_state=1)
    A = {(r.shuffled, r.ratio, r.seed): r.accuracy for r in table.itertuples()}
    for row in steadiness(table).itertuples():
        values = [A[row.shuffled, r, row.seed] for r in (2., 8., 32.)]
        assert row.fall == pytest.approx(values[0] - values[-1]) and row.spread == pytest.approx(np.std(values, ddof=1)) and row.kept == pytest.approx(values[-1]/values[0]) and (row.least, row.most) == (2, 32)
    assert len(steadiness(table)) == 8


def test_ratios_that_were_not_reached_are_left_out():
    table = made_up(lambda *_: .5)
    table = pd.concat([table, table[table.ratio == 2].assign(ratio=500., true=math.nan, accuracy=math.nan)])
    assert {*steadiness(table).most} == {32} and [*by_ratio(table, "tt").columns] == [2, 8, 32]


def test_ratios_of_one_rank_count_once():
    "A ring that goes to rank 1 at 150 and at 500 times is one network."
    table = made_up(lambda f, s, t, r: .5 - .01*r*(s == "none"), ratios=(2., 8., 32.))
    twice = pd.concat([table, table[table.ratio == 32].assign(ratio=20.)])
    assert [*by_ratio(twice, "tt").columns] == [2, 8, 32] and steadiness(twice).equals(steadiness(table)) and low_rank_claims(twice).equals(low_rank_claims(table))


@pytest.mark.parametrize("frozen, said", [([2., 32.], "never trained, 32x"), ([2., 8.], "never trained, 8x")])
def test_frozen_cores_are_compared_at_a_ratio_of_their_own(frozen, said):
    table = made_up(lambda f, s, t, r: .5 - .1*(not t) - .01*r*t, arms=ARMS)
    table = table[table.trained | table.ratio.isin(frozen) | (table.format == "dense")]
    table = table[(table.format != "dense") | (table.ratio == 2)]
    row = low_rank_claims(table).set_index("claim").filter(like="above the same cores", axis=0)
    assert row.index[0].endswith(said) and float(row.effect.iloc[0].split()[0]) == pytest.approx(100*(.1 - .01*frozen[-1]), abs=.6)
    dense = low_rank_claims(table).set_index("claim").filter(like="plain is above dense", axis=0)
    assert dense.index[0].endswith("32x") and float(dense.effect.iloc[0].split()[0]) == pytest.approx(-22, abs=.6)
    no = low_rank_claims(table[table.trained | (table.format == "dense")].pipe(lambda t: pd.concat([t, made_up(lambda *_: .5, ratios=(4.,), arms=ARMS[5:6])])))
    assert no.set_index("claim").filter(like="above the same cores", axis=0).verdict.tolist() == ["not judged"]


def test_a_seed_that_diverged_is_left_out():
    table = made_up(lambda f, s, t, r: .5 - .01*r*(s == "none"))
    table.loc[(table.seed == 3) & (table.ratio == 32) & (table.shuffled == "none"), "accuracy"] = math.nan
    found = low_rank_claims(table)
    assert [*found.n[:3]] == [3]*3 and [*found.verdict[:3]] == ["holds"]*3


def test_tables_without_an_arm():
    table = made_up(lambda *_: .5)
    with pytest.raises(ValueError, match="no networks that were frozen with format 'tt' and 'none'"): by_ratio(table, "tt", trained=False)
    with pytest.raises(ValueError, match="have one ratio and seed"): by_ratio(pd.concat([table, table]), "tt")
    assert not len(steadiness(table[table.ratio == 2])) and "fall" in steadiness(table[table.ratio == 2])
    assert {*low_rank_claims(table[table.shuffled == "none"]).verdict} == {"not judged"} == {*low_rank_claims(table[table.ratio == 2]).verdict}


@pytest.mark.parametrize("accuracy, verdicts", [
    (lambda f, s, t, r: .7 + .02*(s != "none") - .01*r*(s in ("none", "pixels"))*(1 + (s == "pixels")*.02/.68) - .5*(f == "dense") - .1*(not t), ["holds"]*7 + ["undecided", "holds", "holds"]),
    (lambda f, s, t, r: .7 - .01*r*(s != "none") - .05*(s == "everything") + .1*(f == "dense") + .2*(not t) , ["fails"]*10),
    (lambda f, s, t, r: .6, ["undecided"]*4 + ["holds"] + ["undecided"]*5)])
def test_claims_on_made_up_tables(accuracy, verdicts):
    found = low_rank_claims(made_up(accuracy, arms=ARMS, noise=.002, seeds=5))
    said = ["everything shuffled falls", "everything shuffled varies", "everything shuffled keeps", "above plain at every", "no more than 1 point", "window alone shuffled keeps", "channels alone shuffled keeps", "pixels alone shuffled keeps", "above the same cores", "plain is above dense"]
    assert all(words in claim for words, claim in zip(said, found.claim)) and len(found) == len(said)
    assert [*found.verdict] == verdicts


def test_effects_by_hand():
    table = made_up(lambda f, s, t, r: .5 - .01*r*(s == "none"), noise=.01)
    A = {(r.shuffled, r.ratio, r.seed): r.accuracy for r in table.itertuples()}
    fall = {s: np.array([A[s, 2., k] - A[s, 32., k] for k in range(4)]) for s in ("none", "everything")}
    found = low_rank_claims(table).iloc[0]
    assert found.effect == f"{100*fall['everything'].mean():.1f} instead of {100*fall['none'].mean():.1f} points" and found.spread == f"{100*(fall['none'] - fall['everything']).std(ddof=1):.1f} points"


def test_the_margin_is_not_in_the_effect():
    found = low_rank_claims(made_up(lambda f, s, t, r: .5 - .004*(s == "everything")*(r == 8), noise=1e-4), margin=.02)
    strict, lenient = (found[found.claim.str.contains(words)].iloc[0] for words in ("above plain", "no more than 2 point"))
    assert strict.effect == lenient.effect == "-0.4 points at 8x" and (strict.verdict, lenient.verdict) == ("fails", "holds")


# Afterwards

def recounted(model, images): return recount_batchnorm(model, (x for x, _ in images.batches(250)))


def error(K, near): return float((near - K).norm()/K.norm())


def test_post_hoc_takes_other_settings_for_other_cells(data, tmp_path, monkeypatch):
    calls = []
    def spy(data, *args):
        calls.append(args)
        return [dict(accuracy=.5)]
    monkeypatch.setattr(study, "post_hoc", spy)
    base = dict(ratios=[2], formats=["svd"], shuffles=["none"], pixels=[False], seeds=[1], lr=.01, epochs=3, batch_size=100, width=6, kernel=3, precision="fp32", steps=50, measured=2_000)
    other = dict(ratios=[3], formats=["cp"], shuffles=["window"], pixels=[True], seeds=[2], lr=.02, epochs=4, batch_size=50, width=7, kernel=5, precision="bf16", steps=51, measured=20)
    for _ in range(2):
        for k in [None, *other]: post_hoc_study(data, folder=tmp_path, **(base if k is None else base | {k: other[k]}))
    assert len(calls) == len({*map(str, calls)}) == 1 + len(other), "each once, and each with what was asked for"
    post_hoc_study(data, **{k: base[k] for k in ("ratios", "formats", "shuffles", "pixels", "seeds", "width", "kernel")}, folder=tmp_path)
    assert len(calls) == 1 + len(other), "a default that is written out is the same cell"
    post_hoc_study(Data(data.test, data.train), folder=tmp_path, **base)
    assert len(calls) == 2 + len(other), "other images"


def test_post_hoc_by_hand(data):
    "Kernels cut one by one, each layer in an order of its own; BatchNorm measured on some training images, accuracy on test images."
    rows = post_hoc(data, [4], formats=["cp"], shuffles=["everything"], seed=1, lr=.02, steps=2, measured=10, **TINY)
    model, some = held_network((1, 8, 8), 2, 6, 3, seed=1), data.train.thinned(10)
    train_held(model, data.train, 1, .02, 20, seed=1)
    whole = evaluate(recounted(copy.deepcopy(model), some), data.test)["accuracy"]
    errors = []
    for k, conv in enumerate(held_layers(model).values()):
        near = cut_kernel(conv.weight, "cp", fit_rank("cp", (6, 9, 6), 4), "everything", seed=1_000 + k, steps=2)
        errors.append(error(conv.weight.detach(), near))
        conv.weight.data.copy_(near)
    assert rows == [dict(format="cp", shuffled="everything", ratio=4., whole=whole, error=pytest.approx(np.mean(errors)), accuracy=evaluate(recounted(model, some), data.test)["accuracy"])]


def test_post_hoc_measures_where_it_says(data, monkeypatch):
    seen = []
    def spied_recount(model, inputs):
        inputs = list(inputs)
        seen.append(("norms", sum(map(len, inputs))))
        return recount_batchnorm(model, inputs)
    def spied_evaluate(model, images, precision):
        seen.append(("accuracy", images.fingerprint))
        return evaluate(model, images)
    for room in (study, rooms): monkeypatch.setattr(room, "recount_batchnorm", spied_recount)
    monkeypatch.setattr(study, "evaluate", spied_evaluate)
    post_hoc(data, [4], formats=["tt"], shuffles=["none"], measured=10, **TINY)
    assert seen == [("norms", 10), ("accuracy", data.test.fingerprint)]*2


def test_a_bad_word_is_no_ratio_out_of_reach(data):
    for wrong in (dict(shuffles=["rows"]), dict(formats=["qr"]), dict(ratios=[.5])):
        with pytest.raises(ValueError): post_hoc(data, **(dict(ratios=[2]) | wrong), **TINY)


def test_post_hoc(data, tmp_path):
    run = lambda: post_hoc_study(data, [2, 100], pixels=[False, True], seeds=[0, 1], formats=["svd", "cp"], folder=tmp_path, steps=5, **TINY)
    table = run()
    assert run().equals(table) and len(table) == 2*2*2*2*2 and table[table.ratio == 100].note.str.contains("times at most").all() and table[table.ratio == 2].note.isna().all()
    rows = pd.DataFrame(post_hoc(data, [2], pixels=True, formats=["cp"], seed=1, steps=5, **TINY))
    part = table[(table.pixels) & (table.seed == 1) & (table.format == "cp") & (table.ratio == 2)]
    assert part.error.tolist() == rows.error.tolist() and part.accuracy.tolist() == rows.accuracy.tolist()
    model = held_network((1, 8, 8), 2, 6, 3, seed=1)
    train_held(model, make_variant(data, "permuted", 1).train, 1, .01, 20, seed=1)
    assert evaluate(recounted(model, make_variant(data, "permuted", 1).train), make_variant(data, "permuted", 1).test)["accuracy"] == rows.whole[0]


@pytest.mark.parametrize("wrong, words", [(dict(ratios=[]), "ratios is empty"), (dict(ratios=[.1]), "ratios must be 1 or more"), (dict(seeds=[]), "seeds is empty"), (dict(formats=["qr"]), "unknown format 'qr'"), (dict(lr=0), "positive number"), (dict(epochs=0), "epochs must be"),
                                          (dict(formats=[]), "formats is a list such as"), (dict(formats="svd"), "formats is a list such as"), (dict(shuffles=["pixels"]), "unknown shuffle 'pixels'; known are none, window"), (dict(shuffles="none"), "shuffles is a list such as"),
                                          (dict(steps=0), "steps must be a whole number"), (dict(measured=1.5), "measured must be a whole number"), (dict(seeds=[0, .5]), "seeds are whole numbers, not 0, 0.5"), (dict(pixels=True), "pixels is a list of False"), (dict(pixels=[]), "pixels is a list"),
                                          (dict(pixels=[True, True]), "pixels is a list"), (dict(width=2.5), "width must be 1 or more"), (dict(batch_size=0), "batch_size must be"), (dict(precision="x"), "precision must be")])
def test_impossible_post_hoc(data, wrong, words, tmp_path):
    with pytest.raises(ValueError, match=words): post_hoc_study(data, **(dict(ratios=[2], folder=tmp_path/"new") | wrong))
    assert not (tmp_path/"new").exists()
