"The study of low-rank kernels, against written-out loops and made-up tables whose answers are known."
import copy
import itertools
import math
from dataclasses import replace

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
from efcn_nb.ladder.tensor_formats import (FORMATS, SHUFFLES, compress, count_cores, fit_rank, freeze_kernels,
                                           held_layers, hold_to_rank, largest_ratio, tensor_shape)
from efcn_nb.instruments.kernel_ranks import (
    composed_kernel, compression, cut_kernel, effective_rank, kernel_ranks, operator_rank, stable_rank)
from efcn_nb.experiments.search import validation_split
from efcn_nb.studies.low_rank import (
    SHUFFLED, LowRankSettings, by_ratio, held_network, learn_held, low_rank_claims, low_rank_grid, post_hoc,
    post_hoc_study, train_held)
from efcn_nb.training.loop import Diverged, evaluate, fit, recount_batchnorm

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = LowRankSettings(width=6, kernel=3, epochs=1, search_epochs=1, batch_size=20)


def tiny(**changed): return replace(TINY, **changed)


def draw(seed=0): return torch.Generator().manual_seed(seed)


def noise(n=40, shape=(1, 8, 8), classes=2, seed=0):
    "Images whose class is their brightness."
    y = torch.arange(n) % classes
    x = torch.randint(60, 120, (n, *shape), generator=draw(seed)) + 60*y.view(-1, *[1]*len(shape))
    mean, std = torch.full(shape[:1], .5), torch.full(shape[:1], .25)
    return Dataset(x.to(torch.uint8), y, [*map(str, range(classes))], mean, std, "noise")


@pytest.fixture(scope="module")
def data(): return Data(noise(40), noise(20, seed=1))


def network(width=6, kernel=3, seed=0, shape=(1, 8, 8), classes=2):
    return held_network(shape, classes, LowRankSettings(width=width, kernel=kernel), seed)


def held(format, ratio, shuffle="none", width=6, kernel=3, seed=0, shape=(1, 8, 8), classes=2):
    return compress(network(width, kernel, seed, shape, classes), format, ratio, shuffle, seed)


# Settings

WRONG = [
    (dict(kernel=2), "kernel must be an odd number, not 2"), (dict(precision="fp8"), "unknown precision 'fp8'"),
    (dict(seeds=[1000]), "from 0 to 999, not 1000"), (dict(lrs=[0]), "must be a positive number, not 0"),
    *((dict([(name, 0)]), f"{name} must be a whole number, 1 or more, not 0") for name in (
        "width", "epochs", "search_epochs", "batch_size", "steps", "measured"))]


@pytest.mark.parametrize("wrong, words", WRONG)
def test_impossible_settings(wrong, words):
    with pytest.raises(ValueError, match=words): LowRankSettings(**wrong)


def test_settings_are_one_value():
    given = LowRankSettings(lrs=[.02, .01], seeds=[np.int64(3), 1])
    assert given == LowRankSettings(lrs=(.01, .02), seeds=(3, 1)) and {given: 1} and type(given.seeds[0]) is int
    with pytest.raises(AttributeError): given.width = 3


# Networks

@pytest.mark.parametrize("shape, words", [
    ((1, 7, 8), "at least 8 x 8 pixels, not \\(1, 7, 8\\)"), ((8, 8), "at least 8 x 8")])
def test_impossible_images(shape, words):
    with pytest.raises(ValueError, match=words): held_network(shape, 2, TINY)


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    held("tt", 3, "everything", width=5)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), nn.Conv2d(1, 2, 3)])
def test_nothing_to_hold(model):
    hold, ask = lambda m: compress(m, "tt", 2), lambda m: largest_ratio(m, "cp")
    for use in (held_layers, compression, freeze_kernels, hold, ask):
        with pytest.raises(ValueError, match="no convolution to hold: it takes two or more"): use(model)


@given(format=st.sampled_from(FORMATS), shuffle=st.sampled_from(SHUFFLES), width=st.integers(3, 9),
       kernel=st.sampled_from([1, 3, 5]), ratio=st.floats(1, 6))
@settings(max_examples=12, deadline=None)
def test_ratios_are_counted(format, shuffle, width, kernel, ratio):
    dense = network(width, kernel, shape=(2, 8, 9), classes=3)
    shape, entries = (width, kernel**2, width), (width*kernel)**2
    most = entries/count_cores(format, shape, 1)
    assert largest_ratio(dense, format) == most
    if ratio > most:
        with pytest.raises(ValueError, match="at rank 1, which compresses"): compress(dense, format, ratio, shuffle)
        assert not any(parametrize.is_parametrized(m) for m in dense.modules())
        return
    model = held(format, ratio, shuffle, width, kernel, shape=(2, 8, 9), classes=3)
    table = compression(model)
    stored = count_weights(model) - (count_weights(dense) - 2*entries) # all that is not a dense kernel is as before
    assert table.numbers["all"] == stored == table.numbers.iloc[:2].sum() and table.entries["all"] == 2*entries
    assert table.ratio["all"] >= ratio and table.ratio["all"] == 2*entries/stored
    rank = int(table["rank"]["all"])
    try: assert count_cores(format, shape, rank + 1)*ratio > entries, "a larger rank would do"
    except ValueError: pass # there is none


@pytest.mark.parametrize("args, words", [
    (("tt", .9), "a number from 1 on, not 0.9"), (("qr", 2), "unknown tensor format 'qr'"),
    (("tt", 2, "pixels"), "unknown shuffle 'pixels'"), (("tt", 1e4), "at most, not 1e\\+04 times")])
def test_impossible_compressions(args, words):
    model = network()
    with pytest.raises(ValueError, match=words): compress(model, *args)
    assert compression(model).ratio["all"] == 1


def test_compressed_twice():
    with pytest.raises(ValueError, match="layer '4' is parametrized already"): compress(held("tt", 2), "cp", 2)
    model = network()
    hold_to_rank(model[7], "tt", 1)
    with pytest.raises(ValueError, match="layer '7' is parametrized already"): compress(model, "cp", 2)
    assert not parametrize.is_parametrized(model[4]), "nothing is changed"


@pytest.mark.parametrize("convs", [
    [nn.Conv1d(2, 4, 3), nn.Conv1d(4, 6, 5)], [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, (3, 5), groups=2)],
    [nn.Conv3d(1, 2, 3), nn.Conv3d(2, 5, 3)]])
def test_other_convolutions(convs):
    model, shape = nn.Sequential(*convs), tensor_shape(convs[1])
    compress(model, "tucker", 2, "everything")
    assert compression(model).entries["all"] == math.prod(shape) == convs[1].weight.numel()
    assert [*held_layers(model)] == ["1"]
    assert kernel_ranks(composed_kernel(convs[1]))["out"] == min(shape[0], shape[1]*shape[2])


def orders(seed):
    model = held("tt", 2, "everything", seed=seed)
    return [conv.parametrizations.weight[0].order for conv in held_layers(model).values()]


def test_layers_and_seeds_have_orders_of_their_own():
    drawn = [*orders(0), *orders(1)]
    assert not any(a.equal(b) for k, a in enumerate(drawn) for b in drawn[:k])
    assert all(a.equal(b) for a, b in zip(orders(1), drawn[2:]))


def test_kernels_begin_at_the_scale_of_pytorch():
    dense, cores = network(12, 5), held("tr", 20, "everything", 12, 5)
    for a, b in zip(held_layers(dense).values(), held_layers(cores).values()):
        torch.testing.assert_close(a.weight.norm(), b.weight.norm())


# Training

def test_training_is_the_loop_written_out(data):
    "Adam by its formula, rate and norm by theirs; gradients go on into the cores."
    model = held("tt", 4, "everything", width=5)
    other = copy.deepcopy(model)
    losses = train_held(model, data.train, .02, LowRankSettings(epochs=2, batch_size=16), seed=3)
    other.train()
    p = [*other.parameters()]
    m, v = [torch.zeros_like(q) for q in p], [torch.zeros_like(q) for q in p]
    t, steps, order, mine = 0, 6, draw(3), []
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
                    a.mul_(.9).add_(.1*k)
                    b.mul_(.999).add_(.001*k*k)
                    q -= lr*a/(1 - .9**t)/((b/(1 - .999**t)).sqrt() + 1e-8)
            mine.append(loss.item())
    np.testing.assert_allclose(losses, mine, rtol=1e-3)


def test_an_impossible_rate(data):
    with pytest.raises(ValueError, match="the learning rate must be a positive number"):
        train_held(network(), data.train, 0., TINY)


# A cell and the grid

def test_a_cell_by_hand(data):
    row = learn_held(data, "tt", "window", 3, seed=2, lr=.01, settings=TINY)
    model = held("tt", 3, "window", seed=2)
    train_held(model, data.train, .01, TINY, seed=2)
    found = evaluate(model, data.test)
    assert (row["accuracy"], row["loss"]) == (found["accuracy"], found["loss"])
    assert row["true"] == compression(model).ratio["all"]
    ranks = pd.DataFrame([kernel_ranks(composed_kernel(conv)) for conv in held_layers(model).values()]).mean()
    assert row["effective"] == ranks.effective and row["rank_out"] == ranks.out
    again, other = (learn_held(data, "tt", "window", 3, seed=seed, lr=.01, settings=TINY) for seed in (2, 3))
    assert again == row != other


def test_cells_of_one_seed_differ_in_the_kernels_alone():
    first = network(seed=1)
    for format in FORMATS:
        for shuffle in ("none", "everything"):
            net = held(format, 3, shuffle, seed=1)
            assert net[0].weight.equal(first[0].weight) and net[-1].weight.equal(first[-1].weight)


def test_what_a_cell_measures_of_its_kernels(data):
    row, model = learn_held(data, "tt", "none", 3, seed=2, lr=.05, settings=TINY), held("tt", 3, seed=2)
    start = [effective_rank(composed_kernel(conv).flatten(1)) for conv in held_layers(model).values()]
    train_held(model, data.train, .05, TINY, seed=2)
    kernels = [composed_kernel(conv) for conv in held_layers(model).values()]
    assert row["start_effective"] == pytest.approx(np.mean(start)) != pytest.approx(row["effective"])
    assert row["operator"] == pytest.approx(np.mean([operator_rank(K, (8, 8)) for K in kernels])/(64*6))
    assert row["stable"] == pytest.approx(np.mean([stable_rank(K.flatten(1)) for K in kernels]))


def test_a_loss_that_is_not_finite_is_missing(data, monkeypatch):
    monkeypatch.setattr(study, "evaluate", lambda *_, **__: dict(accuracy=.5, loss=math.inf))
    assert math.isnan(learn_held(data, "tt", "none", 3, settings=TINY)["accuracy"])


def test_precision_reaches_training_and_evaluation(data, monkeypatch):
    said = []
    def spied_fit(*args, precision, **options):
        said.append(precision)
        return fit(*args, precision=precision, **options)
    def spied_evaluate(*args, precision):
        said.append(precision)
        return evaluate(*args, precision=precision)
    monkeypatch.setattr(study, "fit", spied_fit)
    for room in (study, rooms): monkeypatch.setattr(room, "evaluate", spied_evaluate)
    learn_held(data, "tt", "none", 3, settings=tiny(precision="bf16"))
    post_hoc(data, [3], tiny(precision="bf16"), formats=["tt"], shuffles=["none"])
    assert said == ["bf16"]*5


def test_pixels_are_the_datas(data):
    mixed = make_variant(data, "permuted", 1)
    row = learn_held(data, "tt", "pixels", 3, seed=1, settings=TINY)
    assert row == learn_held(mixed, "tt", "none", 3, seed=1, settings=TINY)


@pytest.mark.parametrize("format", FORMATS)
def test_cells_in_lower_precision(data, format):
    "Kernels are composed under autocast, too."
    row = learn_held(data, format, "everything", 2, settings=tiny(precision="bf16"))
    assert math.isfinite(row["accuracy"]) and row["rank_out"] == 6


def test_diverged_cell_is_missing(data, monkeypatch):
    def broken(*_): raise Diverged("the loss was not finite")
    monkeypatch.setattr(study, "train_held", broken)
    row = learn_held(data, "tt", "none", 3, settings=TINY)
    assert math.isnan(row["accuracy"]) and row["true"] > 3 and "effective" not in row


@pytest.mark.parametrize("arms, words", [
    ([("tt", "none", 1)], "must be a pair"), ([("svd", "none")], "unknown tensor format 'svd'; known are dense, cp"),
    ([("tt", "all")], "unknown shuffle 'all'; known are none, window, channels, everything, pixels"),
    ([("dense", "window")], "a dense kernel changes nothing"), ([("tt", "none"), ["tt", "none"]], "is there twice")])
def test_impossible_arms(data, arms, words, tmp_path):
    with pytest.raises(ValueError, match=words): low_rank_grid(data, arms, [2], TINY, folder=tmp_path/"new")
    assert not (tmp_path/"new").exists()


@pytest.mark.parametrize("ratios, words", [
    ([.5], "ratios must be a number, 1 or more, not 0.5"), ([2, 2.], "2.0 is there twice")])
def test_impossible_ratios(data, ratios, words, tmp_path):
    for use in (lambda folder: low_rank_grid(data, [("tt", "none")], ratios, TINY, folder=folder),
                lambda folder: post_hoc_study(data, ratios, TINY, folder=folder)):
        with pytest.raises(ValueError, match=words): use(tmp_path/"new")
    assert not (tmp_path/"new").exists()


def test_precision_that_the_device_does_not_have(data, tmp_path):
    used = tiny(precision="tf32")
    for use in (lambda folder: low_rank_grid(data, [("tt", "none")], [2], used, folder=folder),
                lambda folder: post_hoc_study(data, [2], used, folder=folder)):
        with pytest.raises(ValueError, match="tf32 products need a GPU"): use(tmp_path/"new")
    assert not (tmp_path/"new").exists()


def fake(data, format, shuffled, ratio, trained, seed, lr, settings):
    "Accuracy by formula: shuffled learns best with .02, plain with .01."
    accuracy = .9 - .01*ratio - 5*abs(lr - (.02 if shuffled == "everything" else .01)) + 1e-3*(seed % 7)
    return dict(true=1.1*ratio, numbers=10, accuracy=accuracy, images=len(data.test))


def test_all_arms_that_there_are(data, monkeypatch):
    monkeypatch.setattr(study, "learn_held", fake)
    arms = [("dense", "none"), ("dense", "pixels"), *((f, s) for f in FORMATS for s in SHUFFLED)]
    assert len(low_rank_grid(data, arms, [2], tiny(lrs=[.01], seeds=[0]))) == len(arms)


def test_rates_are_chosen_on_validation_images(data, monkeypatch):
    calls = []
    def spy(half, format, shuffled, ratio, trained, seed, lr, settings):
        images = half.train.fingerprint, half.test.fingerprint
        calls.append(dict(images=images, ratio=ratio, seed=seed, epochs=settings.epochs, width=settings.width, lr=lr,
                          shuffled=shuffled))
        return fake(half, format, shuffled, ratio, trained, seed, lr, settings)
    monkeypatch.setattr(study, "learn_held", spy)
    used = tiny(seeds=[0, 1], lrs=(.005, .01, .02), epochs=7, search_epochs=3)
    table = low_rank_grid(data, [("tt", "none"), ("tt", "everything")], [2, 3, 4], used)
    assert table.groupby("shuffled").lr.unique().map(list).to_dict() == dict(none=[.01], everything=[.02])
    halves, search = validation_split(data), [c for c in calls if c["seed"] == 1_000]
    images = halves.train.fingerprint, halves.test.fingerprint
    assert len(search) == 2*2*3 and {c["ratio"] for c in search} == {2., 4.}
    assert all((c["images"], c["epochs"], c["width"]) == (images, 3, 6) for c in search)
    final, images = [c for c in calls if c not in search], (data.train.fingerprint, data.test.fingerprint)
    assert len(final) == 2*3*2 and all((c["images"], c["epochs"]) == (images, 7) for c in final)


def test_ties_go_to_the_smaller_rate_and_a_diverged_one_loses(data, monkeypatch):
    def level(data, format, shuffled, ratio, trained, seed, lr, settings):
        return dict(true=ratio, numbers=1, accuracy=math.nan if lr == .005 else .5)
    monkeypatch.setattr(study, "learn_held", level)
    assert {*low_rank_grid(data, [("cp", "none")], [2], tiny(seeds=[0], lrs=(.02, .005, .01))).lr} == {.01}


def test_an_arm_that_always_diverges_gets_the_smallest_rate(data, monkeypatch):
    monkeypatch.setattr(study, "learn_held", lambda *args: dict(true=args[3], numbers=1, accuracy=math.nan))
    assert {*low_rank_grid(data, [("cp", "none")], [2], tiny(seeds=[0], lrs=(.02, .01))).lr} == {.01}


def test_ratios_out_of_reach_are_said(data, monkeypatch):
    monkeypatch.setattr(study, "learn_held", fake)
    arms = [("dense", "none"), ("tt", "none"), ("cp", "everything")]
    table = low_rank_grid(data, arms, [2, 500], tiny(seeds=[0, 1], lrs=[.01]))
    lost = table[table.ratio == 500]
    assert len(lost) == 4 and {*lost.note} == {f"rank 1 compresses {6*9*6/21:.4g} times at most"}
    assert lost.accuracy.isna().all() and lost.true.isna().all() and table[table.ratio < 500].note.isna().all()
    assert len(table) == 2 + 4 + 4 and table[table.format == "dense"].ratio.tolist() == [1, 1]
    for lrs in ([.01], [.01, .02]):
        nothing = low_rank_grid(data, [("tt", "none")], [500], tiny(seeds=[0], lrs=lrs))
        assert len(nothing) == 1 and nothing.note.notna().all()


def test_study_goes_on_after_an_interruption(data, tmp_path, monkeypatch):
    calls = []
    def counted(*args):
        calls.append(args[1:])
        return fake(*args)
    def stopping(*args):
        if len(calls) == 5: raise KeyboardInterrupt
        return counted(*args)
    def run(folder=tmp_path):
        arms, used = [("tt", "none"), ("tt", "everything")], tiny(seeds=[0, 1], lrs=(.01, .02))
        return low_rank_grid(data, arms, [2, 6], used, folder=folder)
    monkeypatch.setattr(study, "learn_held", stopping)
    with pytest.raises(KeyboardInterrupt): run()
    monkeypatch.setattr(study, "learn_held", counted)
    table = run()
    assert len(calls) == len({*calls}) == 2*2*2 + 2*2*2, "nothing twice"
    monkeypatch.setattr(study, "learn_held", None)
    pd.testing.assert_frame_equal(run(), table)
    monkeypatch.setattr(study, "learn_held", fake)
    pd.testing.assert_frame_equal(run(None), table)


def test_other_images_are_other_cells(data, tmp_path, monkeypatch):
    calls = []
    def spy(*args):
        calls.append(1)
        return fake(*args)
    monkeypatch.setattr(study, "learn_held", spy)
    for d in (data, Data(data.train, data.train), Data(data.test, data.test), data):
        low_rank_grid(d, [("tt", "none")], [2], tiny(seeds=[0], lrs=[.01]), folder=tmp_path)
    assert len(calls) == 3


def test_stored_cells_keep_their_names(tmp_path, monkeypatch):
    "What earlier versions have stored is found again: names are hashes of settings and images."
    monkeypatch.setattr(study, "learn_held", fake)
    monkeypatch.setattr(study, "post_hoc", lambda *_: [dict(accuracy=.5)])
    monkeypatch.setattr(Dataset, "fingerprint", "images")
    data = Data(noise(40), noise(20, seed=1))
    low_rank_grid(data, [("tt", "none")], [2], tiny(seeds=[0], lrs=[.01, .02]), folder=tmp_path)
    post_hoc_study(data, [2], tiny(seeds=[0]), pixels=[False], folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "low_rank-7fe149e400ab", "low_rank-post_hoc-7541e2d4576e", "low_rank-search-af85f9ba6c60",
        "low_rank-search-c6c315850535"]


# Tables

PAIR = (("tt", "none", True), ("tt", "everything", True))


def made_up(accuracy, seeds=4, ratios=(2., 8., 32.), arms=PAIR, noise=.003):
    rng, rows = np.random.default_rng(1), []
    for (f, s, t), r, k in itertools.product(arms, ratios, range(seeds)):
        measured = accuracy(f, s, t, r) + noise*rng.standard_normal()
        rows.append(dict(format=f, shuffled=s, trained=t, ratio=r, seed=k, true=r, accuracy=measured))
    return pd.DataFrame(rows)


ARMS = [("tt", s, True) for s in ("none", "everything", "window", "channels", "pixels")]
ARMS += [("tt", "everything", False), ("dense", "none", False)]


def test_ratios_that_were_not_reached_are_left_out():
    table = made_up(lambda *_: .5)
    table = pd.concat([table, table[table.ratio == 2].assign(ratio=500., true=math.nan, accuracy=math.nan)])
    assert [*by_ratio(table, "tt").columns] == [2, 8, 32]


@pytest.mark.parametrize("frozen, said", [([2., 32.], "never trained, 32x"), ([2., 8.], "never trained, 8x")])
def test_frozen_cores_are_compared_at_a_ratio_of_their_own(frozen, said):
    table = made_up(lambda f, s, t, r: .5 - .1*(not t) - .01*r*t, arms=ARMS)
    table = table[table.trained | table.ratio.isin(frozen) | (table.format == "dense")]
    table = table[(table.format != "dense") | (table.ratio == 2)]
    row = low_rank_claims(table).set_index("claim").filter(like="above the same cores", axis=0)
    assert row.index[0].endswith(said)
    assert float(row.effect.iloc[0].split()[0]) == pytest.approx(100*(.1 - .01*frozen[-1]), abs=.6)
    dense = low_rank_claims(table).set_index("claim").filter(like="plain is above dense", axis=0)
    assert dense.index[0].endswith("32x") and float(dense.effect.iloc[0].split()[0]) == pytest.approx(-22, abs=.6)
    apart = made_up(lambda *_: .5, ratios=(4.,), arms=ARMS[5:6])
    no = low_rank_claims(pd.concat([table[table.trained | (table.format == "dense")], apart]))
    assert no.set_index("claim").filter(like="above the same cores", axis=0).verdict.tolist() == ["not judged"]


def test_a_seed_that_diverged_is_left_out():
    table = made_up(lambda f, s, t, r: .5 - .01*r*(s == "none"))
    table.loc[(table.seed == 3) & (table.ratio == 32) & (table.shuffled == "none"), "accuracy"] = math.nan
    found = low_rank_claims(table)
    assert [*found.n[:3]] == [3]*3 and [*found.verdict[:3]] == ["holds"]*3


def test_tables_without_an_arm():
    table = made_up(lambda *_: .5)
    with pytest.raises(ValueError, match="no networks that were frozen with format 'tt' and 'none'"):
        by_ratio(table, "tt", trained=False)
    with pytest.raises(ValueError, match="have one ratio and seed"): by_ratio(pd.concat([table, table]), "tt")
    for part in (table[table.shuffled == "none"], table[table.ratio == 2]):
        assert {*low_rank_claims(part).verdict} == {"not judged"}


def shuffled_is_better(f, s, t, r):
    falls = .01*r*(s in ("none", "pixels"))*(1 + (s == "pixels")*.02/.68)
    return .7 + .02*(s != "none") - falls - .5*(f == "dense") - .1*(not t)


def shuffled_is_worse(f, s, t, r):
    return .7 - .01*r*(s != "none") - .05*(s == "everything") + .1*(f == "dense") + .2*(not t)


def all_are_level(f, s, t, r): return .6


SAID = ["everything shuffled falls", "everything shuffled varies", "everything shuffled keeps", "above plain at every",
        "no more than 1 point", "window alone shuffled keeps", "channels alone shuffled keeps",
        "pixels alone shuffled keeps", "above the same cores", "plain is above dense"]


@pytest.mark.parametrize("accuracy, verdicts", [
    (shuffled_is_better, ["holds"]*7 + ["undecided", "holds", "holds"]), (shuffled_is_worse, ["fails"]*10),
    (all_are_level, ["undecided"]*4 + ["holds"] + ["undecided"]*5)])
def test_claims_on_made_up_tables(accuracy, verdicts):
    found = low_rank_claims(made_up(accuracy, arms=ARMS, noise=.002, seeds=5))
    assert all(words in claim for words, claim in zip(SAID, found.claim)) and len(found) == len(SAID)
    assert [*found.verdict] == verdicts


def test_effects_by_hand():
    table = made_up(lambda f, s, t, r: .5 - .01*r*(s == "none"), noise=.01)
    A = {(r.shuffled, r.ratio, r.seed): r.accuracy for r in table.itertuples()}
    fall = {s: np.array([A[s, 2., k] - A[s, 32., k] for k in range(4)]) for s in ("none", "everything")}
    found = low_rank_claims(table).iloc[0]
    assert found.effect == f"{100*fall['everything'].mean():.1f} instead of {100*fall['none'].mean():.1f} points"
    assert found.spread == f"{100*(fall['none'] - fall['everything']).std(ddof=1):.1f} points"


def test_the_margin_is_not_in_the_effect():
    found = low_rank_claims(made_up(lambda f, s, t, r: .5 - .004*(s == "everything")*(r == 8), noise=1e-4), margin=.02)
    words = ("above plain", "no more than 2 point")
    strict, lenient = (found[found.claim.str.contains(said)].iloc[0] for said in words)
    assert strict.effect == lenient.effect == "-0.4 points at 8x"
    assert (strict.verdict, lenient.verdict) == ("fails", "holds")


# Afterwards

def error(K, near): return float((near - K).norm()/K.norm())


def recounted(model, images): return recount_batchnorm(model, (x for x, _ in images.batches(250)))


def test_post_hoc_takes_other_settings_for_other_cells(data, tmp_path, monkeypatch):
    calls = []
    def spy(data, *args):
        calls.append(args)
        return [dict(accuracy=.5)]
    monkeypatch.setattr(study, "post_hoc", spy)
    base = dict(ratios=[2], formats=["svd"], shuffles=["none"], pixels=[False], lr=.01)
    other = dict(ratios=[3], formats=["cp"], shuffles=["window"], pixels=[True], lr=.02)
    changes = dict(seeds=[2], epochs=4, batch_size=50, width=7, kernel=5, precision="bf16", steps=51, measured=20)
    def run(changed=(), data=data, **settings):
        post_hoc_study(data, settings=tiny(**(dict(seeds=[1]) | settings)), folder=tmp_path, **(base | dict(changed)))
    for _ in range(2):
        run()
        for name, value in other.items(): run({name: value})
        for name, value in changes.items(): run(**{name: value})
    expected = 1 + len(other) + len(changes)
    assert len(calls) == len({*map(str, calls)}) == expected, "each once, and each with what was asked for"
    run(lrs=[.1], search_epochs=5)
    assert len(calls) == expected, "what concerns the grid alone changes nothing"
    run(data=Data(data.test, data.train))
    assert len(calls) == expected + 1, "other images"


def test_post_hoc_by_hand(data):
    "Kernels cut one by one, each layer in an order of its own; BatchNorm measured on some training images."
    used = tiny(steps=2, measured=10)
    rows = post_hoc(data, [4], used, formats=["cp"], shuffles=["everything"], seed=1, lr=.02)
    model, some = network(seed=1), data.train.thinned(10)
    train_held(model, data.train, .02, used, seed=1)
    whole = evaluate(recounted(copy.deepcopy(model), some), data.test)["accuracy"]
    errors, rank = [], fit_rank("cp", (6, 9, 6), 4)
    for k, conv in enumerate(held_layers(model).values()):
        near = cut_kernel(conv.weight, "cp", rank, "everything", seed=1_000 + k, steps=2)
        errors.append(error(conv.weight.detach(), near))
        conv.weight.data.copy_(near)
    accuracy = evaluate(recounted(model, some), data.test)["accuracy"]
    expected = dict(error=pytest.approx(np.mean(errors)), accuracy=accuracy)
    assert rows == [dict(format="cp", shuffled="everything", ratio=4., whole=whole) | expected]


def test_post_hoc_measures_where_it_says(data, monkeypatch):
    seen = []
    def spied_recount(model, inputs):
        inputs = list(inputs)
        seen.append(("norms", sum(map(len, inputs))))
        return recount_batchnorm(model, inputs)
    def spied_evaluate(model, images, precision):
        seen.append(("accuracy", images.fingerprint))
        return evaluate(model, images)
    monkeypatch.setattr(rooms, "recount_batchnorm", spied_recount)
    monkeypatch.setattr(rooms, "evaluate", spied_evaluate)
    post_hoc(data, [4], tiny(measured=10), formats=["tt"], shuffles=["none"])
    assert seen == [("norms", 10), ("accuracy", data.test.fingerprint)]*2


def test_a_bad_word_is_no_ratio_out_of_reach(data):
    for wrong in (dict(shuffles=["rows"]), dict(formats=["qr"]), dict(ratios=[.5])):
        with pytest.raises(ValueError): post_hoc(data, **(dict(ratios=[2], settings=TINY) | wrong))


def test_post_hoc(data, tmp_path):
    used = tiny(seeds=[0, 1], steps=5)
    run = lambda: post_hoc_study(data, [2, 100], used, formats=["svd", "cp"], folder=tmp_path)
    table = run()
    assert run().equals(table) and len(table) == 2*2*2*2*2 and table[table.ratio == 2].note.isna().all()
    assert table[table.ratio == 100].note.str.contains("times at most").all()
    rows = pd.DataFrame(post_hoc(data, [2], used, pixels=True, formats=["cp"], seed=1))
    part = table[(table.pixels) & (table.seed == 1) & (table.format == "cp") & (table.ratio == 2)]
    assert part.error.tolist() == rows.error.tolist() and part.accuracy.tolist() == rows.accuracy.tolist()
    model, mixed = network(seed=1), make_variant(data, "permuted", 1)
    train_held(model, mixed.train, .01, TINY, seed=1)
    assert evaluate(recounted(model, mixed.train), mixed.test)["accuracy"] == rows.whole[0]


@pytest.mark.parametrize("wrong, words", [
    (dict(formats=["qr"]), "unknown format 'qr'"), (dict(lr=0), "the learning rate must be a positive number"),
    (dict(shuffles=["pixels"]), "unknown shuffle 'pixels'; known are none, window"),
    (dict(pixels=True), "pixels must be a list"), (dict(pixels=[2]), "unknown pixels '2'; known are False, True")])
def test_impossible_post_hoc(data, wrong, words, tmp_path):
    given = dict(ratios=[2], settings=TINY, folder=tmp_path/"new") | wrong
    with pytest.raises(ValueError, match=words): post_hoc_study(data, **given)
    assert not (tmp_path/"new").exists()
