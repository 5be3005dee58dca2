"The study of topologies, on images of noise and made-up tables."
import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from efcn_nb.materials.data import Data, Dataset
from efcn_nb.ladder.embedding import embed
from efcn_nb.ladder.masks import magnitude_mask, masks_from_rows
from efcn_nb.experiments.search import validation_split
from efcn_nb.instruments import evolution
from efcn_nb.instruments.evolution import blind_share, local_cnn, local_masks, pruning_steps, starting_masks
from efcn_nb.instruments.topologies import null_distances, topology_distance
from efcn_nb.studies import topology as study
from efcn_nb.studies.topology import (
    TOPOLOGY_KINDS, TopologySettings, sparse_runs, start_shares, topology_claims, topology_distances, topology_study,
    train_kind)
from efcn_nb.training.arms import add_off_local_noise
from efcn_nb.training.loop import Diverged

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(seed): return torch.Generator().manual_seed(seed)


# Training

def noise(n, seed=0, size=8):
    x = torch.randint(256, (n, 1, size, size), generator=draw(seed)).to(torch.uint8)
    return Dataset(x, torch.arange(n) % 3, [*"abc"], torch.full((1,), .5), torch.full((1,), .3), "noise")


TINY = Data(noise(60), noise(30, 1))
FAST = TopologySettings(epochs=4, channels=2, batch_size=20)


def rows_of(kind, seed=0, start=0, lr=.01, keep=(), **changed):
    rows = pd.DataFrame(train_kind(kind, TINY, replace(FAST, **changed), seed, start, lr, keep))
    if "bits" not in rows: rows["bits"] = None
    masks = {epoch: masks_from_rows(part) for epoch, part in rows[rows.bits.notna()].groupby("epoch")}
    return rows[rows.bits.isna()], masks


RELAXED = "pruned efcn", "pruned noisy efcn"


def own_masks(): return local_masks(embed(local_cnn((1, 8, 8), 3, 2), (1, 8, 8)))


@pytest.mark.parametrize("kind", TOPOLOGY_KINDS)
def test_every_kind_trains_and_follows_its_seed(kind):
    state = torch.random.get_rng_state()
    table, masks = rows_of(kind, keep=[2], rounds=2)
    assert torch.random.get_rng_state().equal(state)
    epochs = {"pruned dense": [1, 2, 3, 4, 8], **dict.fromkeys(RELAXED, [*range(1, 9), 12])}
    assert table.epoch.tolist() == epochs.get(kind, [1, 2, 3, 4])
    kept = {"pruned dense": [8], "pruned efcn": [12], "pruned noisy efcn": [4, 12], "dense": [], "cnn": []}
    assert [*masks] == (kept[kind] if kind in kept else dict(SET=[0, 2], static=[0])[kind.split()[0]])
    again, other = rows_of(kind, keep=[2], rounds=2)[0], rows_of(kind, keep=[2], rounds=2, seed=1)[0]
    assert again.loss.tolist() == table.loss.tolist() != other.loss.tolist()
    for m in masks.values(): assert [int(x.sum()) for x in m.values()] == [int(x.sum()) for x in own_masks().values()]


def test_when_set_evolves():
    _, masks = rows_of("SET local", keep=[1, 2, 3, 4], every=2)
    same = [all(masks[e][n].equal(masks[e-1][n]) for n in masks[e]) for e in (1, 2, 3, 4)]
    assert same == [True, False, True, True] # never after the last epoch
    starts = [rows_of("SET random", start=s, seed=7)[1][0]["0"] for s in (0, 0, 1)]
    assert starts[0].equal(starts[1]) and not starts[0].equal(starts[2])


def test_weights_and_growth_follow_the_seed(monkeypatch):
    seen, own, evolved = [], study.draw_weights, study.evolve
    def drawing(model, generator):
        seen.append(generator.initial_seed())
        own(model, generator)
    def evolving(model, zeta, generator, optimizer):
        seen.append(generator.initial_seed())
        return evolved(model, zeta, generator, optimizer)
    monkeypatch.setattr(study, "draw_weights", drawing)
    monkeypatch.setattr(study, "evolve", evolving)
    for seed in (0, 0, 1): rows_of("SET local", seed=seed, epochs=2)
    assert len(seen) == 6 and len({*seen[:4]}) == 1 and seen[4] == seen[5] != seen[0]


@pytest.mark.parametrize("kind", ["cnn", "SET random", *RELAXED])
def test_images_come_in_the_order_of_the_seed_at_the_rate_asked_for(kind, monkeypatch):
    parts, how, own = [], set(), study.train
    def spied(model, data, epochs, lr, batch_size, seed, first, optimizer, after_epoch):
        parts.append((first, epochs))
        group = optimizer.param_groups[0]
        every = {id(p) for p in model.parameters()} == {id(p) for p in group["params"]}
        how.add((batch_size, seed, group["lr"], every))
        return own(model, data, epochs, lr, batch_size, seed, first, optimizer=optimizer, after_epoch=after_epoch)
    monkeypatch.setattr(study, "train", spied)
    rows_of(kind, seed=5, lr=.02, epochs=2, rounds=2)
    assert parts == ([(0, 2), (2, 4), (4, 5), (5, 6)] if kind in RELAXED else [(0, 2)])
    assert how == {(20, 5, .02, True)}


def test_pruning_takes_its_rounds(monkeypatch):
    counts, epochs, own, fit = [], [], evolution.hold_to_masks, study._Training.fit
    def held(model, masks):
        counts.append([int(m.sum()) for m in masks.values()])
        own(model, masks)
    def fitted(self, model, n, *rest):
        epochs.append(n)
        return fit(self, model, n, *rest)
    monkeypatch.setattr(evolution, "hold_to_masks", held)
    monkeypatch.setattr(study._Training, "fit", fitted)
    rows_of("pruned dense", rounds=3)
    steps = [pruning_steps(m.numel(), int(m.sum()), 3) for m in own_masks().values()]
    assert counts == [[*c] for c in zip(*steps)] and epochs == [4, 1, 1, 2]


def test_more_rounds_than_epochs():
    table, masks = rows_of("pruned dense", rounds=5, epochs=2)
    assert table.epoch.tolist() == [1, 2, 4] and [*masks] == [4]
    assert [int(m.sum()) for m in masks[4].values()] == [int(m.sum()) for m in own_masks().values()]


def test_pruned_efcn_is_more_local_than_pruned_dense():
    local, share = own_masks(), {}
    for kind in ("pruned dense", "pruned efcn"):
        masks = next(iter(rows_of(kind, lr=.003)[1].values()))
        share[kind] = np.mean([float((m & local[name]).sum()/m.sum()) for name, m in masks.items()])
    assert share["pruned efcn"] > share["pruned dense"] + .2


def test_a_noisy_efcn_starts_from_its_cnn_with_noise_of_the_seed(monkeypatch):
    "Between the CNN's training and its own: noise outside the windows, of the norm of each layer's weights."
    starts, own = [], study._train_dense
    def seen(training, model):
        starts.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return own(training, model)
    monkeypatch.setattr(study, "_train_dense", seen)
    for kind, seed in (("pruned efcn", 1), ("pruned noisy efcn", 1), ("pruned noisy efcn", 2)):
        masks = rows_of(kind, seed, epochs=1)[1]
    (_, plain), (_, noisy), (_, other) = starts[:2], starts[2:4], starts[4:]
    for name, local in own_masks().items():
        a, b, c = (start[f"{name}.weight"] for start in (plain, noisy, other))
        assert a[local].equal(b[local]) and not a[~local].any() and b[~local].all()
        assert b[~local].norm().item() == pytest.approx(b[local].norm().item(), rel=1e-4)
        assert not b[~local].equal(c[~local])
        size = c.abs()[masks[1][name]]                                        # the masks of the start, without training
        assert size.min() >= c.abs()[~masks[1][name]].max() and len(size) == int(local.sum())


def test_what_starts_at_zero_is_pruned_first():
    "Without noise, pruned at once, the eFCN has the CNN's own masks: that it is near them is no finding."
    cnn = local_cnn((1, 8, 8), 3, 2)
    for noise in (False, True):
        efcn, own = embed(cnn, (1, 8, 8)), own_masks()
        if noise: add_off_local_noise(efcn)
        for name, local in own.items():
            largest = magnitude_mask(efcn.get_submodule(name).weight, int(local.sum()))
            assert largest.equal(local) != noise


def test_an_unknown_kind_is_not_trained():
    with pytest.raises(ValueError, match="unknown kind 'set'; known are cnn, dense"): train_kind("set", TINY, FAST)


SMALL = replace(FAST, kinds=["dense", "static random", "SET random", "SET local"], lrs=[.01], search_epochs=1, keep=[2])


@pytest.fixture(scope="module")
def runs(): return sparse_runs(TINY, SMALL)


def test_runs_of_a_study(runs):
    expected = {("static random", seed, seed, 0) for seed in range(3)}
    for seed, epoch in itertools.product(range(3), (0, 2, 4)):
        expected |= {("SET local", seed, seed, epoch), ("SET random", seed, seed, epoch),
            ("SET random", seed, 0, epoch)}
    assert len(runs.table) == 4*(4*3 + 2) and set(runs.masks) == expected
    split = Data(validation_split(TINY).train, TINY.test)
    own = pd.DataFrame(train_kind("SET random", split, SMALL, 1, 0, .01, keep=[0, 2, 4]))
    ours = runs.table.query("kind == 'SET random' and seed == 1 and start == 0")
    np.testing.assert_allclose(ours.loss, own.loss.dropna(), rtol=1e-12)
    last = masks_from_rows(own[own.bits.notna() & (own.epoch == 4)])
    for name, m in last.items(): assert m.equal(runs.masks["SET random", 1, 0, 4][name])


def test_interrupted_runs_resume(runs, tmp_path, monkeypatch):
    calls, own = [], study.train_kind
    def counted(*args):
        calls.append(args[0])
        if len(calls) == 6: raise KeyboardInterrupt
        return own(*args)
    monkeypatch.setattr(study, "train_kind", counted)
    with pytest.raises(KeyboardInterrupt): sparse_runs(TINY, SMALL, tmp_path)
    found = sparse_runs(TINY, SMALL, tmp_path)
    assert len(calls) == 14 + 1
    pd.testing.assert_frame_equal(found.table, runs.table)
    assert all(found.masks[key][n].equal(m) for key, masks in runs.masks.items() for n, m in masks.items())
    sparse_runs(TINY, SMALL, tmp_path)
    assert len(calls) == 15
    sparse_runs(Data(noise(60, 2), TINY.test), SMALL, tmp_path) # other images are another study
    assert len(calls) == 29


IDENTITIES = {"epochs": 3, "keep": [0, 1, 3], "channels": 4, "zeta": .3, "every": 1, "rounds": 4, "batch_size": 50,
              "kind": "SET random", "seed": 1, "start": 0, "lr": .003}


def test_a_stored_run_is_known_by_the_same_settings(monkeypatch):
    "What is passed to `sweep` is the name of a stored run: keys and values must stay as they are."
    seen = []
    def swept(compute, configs, folder, label, progress):
        seen.extend((label, config) for config in configs)
        table = pd.DataFrame([dict(c, epoch=c["epochs"], accuracy=.5, loss=1.) for c in configs]).drop(columns="keep")
        table.attrs["environments"] = []
        return table
    monkeypatch.setattr(study, "sweep", swept)
    sparse_runs(TINY, TopologySettings(["SET random"], epochs=3))
    split = validation_split(TINY)
    sets = dict(train_set=split.train.fingerprint, test_set=TINY.test.fingerprint)
    assert ("topology", IDENTITIES | sets) in seen
    search = dict(epochs=10, keep=[], seed=12347, start=12347, lr=.01)
    assert ("topology-search", IDENTITIES | sets | dict(test_set=split.test.fingerprint) | search) in seen
    assert len(seen) == 6 + 5


def test_the_rate_is_chosen_on_images_that_nobody_trains_on(monkeypatch):
    seen = []
    def fake(kind, data, settings, seed, start, lr, keep):
        seen.append((seed, data))
        return [dict(epoch=settings.epochs, accuracy={.1: .5, .2: .9, .3: .7}[lr], loss=1.)]
    monkeypatch.setattr(study, "train_kind", fake)
    found = sparse_runs(TINY, replace(SMALL, lrs=[.1, .3, .2]))
    assert set(found.table.lr) == {.2}
    key = lambda d: {x.numpy().tobytes() for x in d.x}
    search, final = ([d for s, d in seen if (s >= 12345) == searching] for searching in (True, False))
    assert len(search) == 4*3*3 and {s for s, _ in seen} == {0, 1, 2, 12345, 12346, 12347}
    for d in search: assert not key(d.train) & key(d.test) and key(d.train) | key(d.test) == key(TINY.train)
    assert all(key(d.train) == key(search[0].train) and d.test is TINY.test for d in final)


def test_what_diverges_is_missing(monkeypatch):
    own = study.train_kind
    def fails(kind, data, settings, seed, start, lr, keep):
        if lr > .1: raise Diverged(3)
        return own(kind, data, settings, seed, start, lr, keep)
    monkeypatch.setattr(study, "train_kind", fails)
    dense = replace(SMALL, kinds=["dense"])
    assert set(sparse_runs(TINY, replace(dense, lrs=[.01, 5.])).table.lr) == {.01}
    with pytest.raises(Diverged, match="dense: every learning rate diverged; try smaller ones than 4"):
        sparse_runs(TINY, replace(dense, lrs=[4., 5.]))
    assert sparse_runs(TINY, replace(dense, lrs=[5.])).table.accuracy.isna().all()


@pytest.mark.parametrize("out", [None, 3])
def test_a_study_without_a_folder_does_nothing(out, monkeypatch):
    monkeypatch.setattr(study, "sparse_runs", None)
    with pytest.raises(ValueError, match="out must be the path of a folder"): topology_study(TINY, out, SMALL)


@pytest.mark.parametrize("wrong, words", [
    (dict(kinds=["cnn", "FCN"]), "unknown kind 'FCN'"), (dict(kinds=["cnn", "cnn"]), "'cnn' is there twice"),
    (dict(seeds=[12345]), "seed 12345 chooses the learning rates"), (dict(lrs=[-1.]), "positive number, not -1.0"),
    (dict(keep=[-1]), "each of keep must be a whole number, 0 or more, not -1"), (dict(keep=2), "keep must be a list"),
    (dict(zeta=1), "zeta, the share of connections .* from 0 to below 1, not 1"),
    *((dict([(name, 0)]), f"{name} must be a whole number, 1 or more, not 0") for name in (
        "epochs", "search_epochs", "searches", "batch_size", "channels", "every", "rounds", "draws"))])
def test_impossible_settings(wrong, words):
    with pytest.raises(ValueError, match=words): replace(FAST, **wrong)


@pytest.mark.parametrize("keep", [(), [], [4], [9, 2]])
def test_masks_of_the_first_and_the_last_epoch_are_kept(keep):
    runs = sparse_runs(TINY, replace(SMALL, kinds=["SET local"], seeds=[0], keep=keep))
    assert [epoch for *_, epoch in runs.masks] == [0, *(e for e in keep if e == 2), 4]


# Comparisons and claims

def test_which_topologies_are_compared(runs):
    t = topology_distances(runs, draws=1)
    every = t.query("layer == 'all'")
    counts = every.groupby(["comparison", "kind", "epoch"]).size()
    pairs = {*itertools.product(("the CNN", "own start", "same start"), ("SET random", "SET local"))}
    assert set(counts) == {3} and {(c, k) for c, k, _ in counts.index} == pairs | {("other start", "SET random")}
    assert every.both.notna().equals(every.epoch == 4)
    D = every.set_index(["comparison", "kind", "seed", "epoch"]).distance
    m = lambda kind, seed, start, epoch: runs.masks[kind, seed, start, epoch]
    to_cnn = topology_distance(m("SET local", 1, 1, 2), runs.local)
    assert D["own start", "SET local", 1, 2] == to_cnn == D["the CNN", "SET local", 1, 2]
    assert D["other start", "SET random", 2, 4] == topology_distance(m("SET random", 2, 2, 4), m("SET random", 0, 0, 4))
    assert D["same start", "SET random", 1, 4] == topology_distance(m("SET random", 1, 0, 4), m("SET random", 2, 0, 4))
    assert D["same start", "SET random", 1, 0] == 0
    row = every.set_index(["comparison", "kind", "seed", "epoch"]).loc[("the CNN", "SET random", 0, 4)]
    null = null_distances(m("SET random", 0, 0, 4), runs.local, "both", draws=1, second=False)
    assert row.both == pytest.approx(null.mean(axis=1).item())
    assert row.both_relative == pytest.approx(row.distance/row.both)


@pytest.mark.parametrize("draws", [0, 2.5, True, "3"])
def test_impossible_draws(runs, draws):
    with pytest.raises(ValueError, match="draws must be a whole number, 1 or more"): topology_distances(runs, draws)


def test_two_seeds_are_one_pair(runs):
    two = runs._replace(masks={k: m for k, m in runs.masks.items() if k[1] < 2})
    counts = topology_distances(two, draws=1).query("layer == 'all' and epoch == 4").groupby("comparison").size()
    assert counts["other start"] == 1 and counts["same start"] == 2 and counts["the CNN"] == 4


def test_shares_of_the_start(runs):
    t = start_shares(runs, SMALL).set_index(["kind", "seed", "epoch", "layer"])
    assert len(t) == 2*3*3*2 and t.index.is_unique and (t.share.xs(0, level="epoch") == 1).all()
    for kind, first in (("SET local", runs.local["0"]), ("SET random", starting_masks(runs.local, "random", 1)["0"])):
        m, n = runs.masks[kind, 1, 1, 2]["0"], int(first.sum())
        assert t.share[kind, 1, 2, "0"] == float((m & first).sum())/n
        assert t.blind[kind, 1, 2, "0"] == blind_share(1., n, n, first.numel(), .3, 2)
        assert t.blind[kind, 1, 4, "0"] == blind_share(1., n, n, first.numel(), .3, 3)
    assert start_shares(runs, replace(SMALL, every=3)).query("epoch == 2").blind.eq(1).all()
    assert not len(start_shares(SimpleNamespace(table=runs.table[:0], masks={}, local={}), SMALL))


def made(gain=.05, relative=.9, share=.6, seeds=4, noise=.002, both=1.):
    "Tables whose effects are known."
    g = np.random.default_rng(0)
    better = {"SET random": gain, "static local": gain, "SET local": 2*gain}
    rows = []
    for kind, seed, epoch in itertools.product(TOPOLOGY_KINDS, range(seeds), (0, 9)):
        accuracy = .5 + better.get(kind, 0)*(epoch > 0) + noise*g.normal()
        rows.append(dict(kind=kind, seed=seed, start=seed, epoch=epoch, accuracy=accuracy))
    table = pd.DataFrame(rows)
    shared = table[table.kind == "SET random"].assign(start=99, accuracy=0.)  # does not count
    distances = made_distances(relative, seeds, lambda: noise*g.normal(), both)
    rows = []
    for (kind, x), seed, epoch, layer in itertools.product(
            (("SET local", share), ("SET random", .5)), range(seeds), (1, 9), "ab"):
        found = x + noise*g.normal() if epoch == 9 else 1 - x
        rows.append(dict(kind=kind, seed=seed, epoch=epoch, layer=layer, share=found, blind=.45 + .1*(x < .5)))
    return pd.concat([table, shared]), distances, pd.DataFrame(rows)


def made_distances(relative, seeds, noise, both):
    "Distances that end at the share `relative` of chance, a tenth farther on that side for one start, and for noise."
    kinds, names = TOPOLOGY_KINDS[3:4] + TOPOLOGY_KINDS[5:], ("the CNN", "own start", "other start", "same start")
    step, rows = -.1 if relative < 1 else .1, []
    for kind, name, seed, epoch in itertools.product(kinds, names, range(seeds), (0, 9)):
        further = (name == "same start") + (kind == "pruned noisy efcn")
        r = relative + step*further + noise() if epoch else 1/relative
        for layer, x in (("all", r), ("0", 2 - r)):
            rows.append(dict(comparison=name, kind=kind, seed=seed, epoch=epoch, layer=layer, distance=.9*x,
                             density=.9, both=.9, density_relative=x, both_relative=both*x))
    return pd.DataFrame(rows)


def test_claims_find_what_is_there():
    assert set(topology_claims(*made()).verdict) == {"holds"}
    assert set(topology_claims(*made(-.05, 1.1, .4)).verdict) == {"fails"}
    assert set(topology_claims(*made(0, .999, .5, noise=.02)).verdict) >= {"undecided"}
    assert set(topology_claims(*made(seeds=1)).verdict) == {"undecided"}
    found = topology_claims(*made(both=1.3)).set_index("claim").verdict # each claim by its own null
    assert {c[:2] for c in found.index[found == "fails"]} == {"2b", "3c", "4b"}
    assert set(found) == {"holds", "fails"}
    assert set(topology_claims(*[t[t.seed < 0] for t in made()]).verdict) == {"not judged"}


@pytest.mark.parametrize("dense, start, end, said", [
    (.9, .5, .4, ["holds", "holds"]), (.9, .5, .6, ["holds", "fails"]), (.9, .97, .95, ["fails", "holds"]),
    (.9, .9, .95, ["fails", "fails"]), (None, .5, .4, ["not judged", "holds"]), (.9, None, .4, ["holds", "not judged"]),
    (.9, .5, None, ["not judged", "not judged"])])
def test_a_noisy_efcn_is_compared_with_a_dense_network_and_with_its_own_start(dense, start, end, said):
    "The plain eFCN, whose masks are the CNN's by construction, does not count."
    rows, g = [], np.random.default_rng(0)
    ends = {("pruned dense", 8): dense, ("pruned efcn", 12): .1}
    if end is not None: ends |= {("pruned noisy efcn", 4): start, ("pruned noisy efcn", 12): end}
    for ((kind, epoch), x), seed in itertools.product(ends.items(), range(3)):
        if x is None: continue
        for layer in ("all", "0"):
            distance = x + .005*g.normal() if layer == "all" else 1 - x
            rows.append(dict(comparison="the CNN", kind=kind, seed=seed, epoch=epoch, layer=layer, distance=distance,
                             density=.9, both=.9, density_relative=distance/.9, both_relative=distance/.9))
    table, _, shares = made()
    found = topology_claims(table, pd.DataFrame(rows), shares).set_index("claim").verdict
    assert [found[[c for c in found.index if c.startswith(number)][0]] for number in ("4c", "4d")] == said


def test_effects_of_claims():
    table, distances, shares = made(noise=0.)
    found = topology_claims(table, distances, shares).set_index("claim").effect
    at = lambda number: found[[c for c in found.index if c.startswith(number)][0]]
    assert at("1a") == "+5.0 points" and at("3f") == "+5.0 points" and at("2a") == "0.810, by chance 0.900"
    assert at("4c") == "0.720, pruned dense 0.810" and at("4d") == "0.720, start 1.000"
    assert at("2c") == "0.720, else 0.810" and at("3d") == "60.0 %, else 45.0 %" and at("3e") == "60.0 %, else 50.0 %"


def test_a_study_without_anything_to_compare(tmp_path):
    tables = topology_study(TINY, tmp_path, replace(SMALL, kinds=["cnn", "static local"], seeds=[3]))
    assert not len(tables["distances"]) and not len(tables["shares"])
    assert set(tables["claims"].verdict) == {"not judged"} and tables["accuracy"].seed.unique().tolist() == [3]
