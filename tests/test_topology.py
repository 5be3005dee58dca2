"The study of topologies, on images of noise and made-up tables."
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from efcn_nb.materials.data import Data, Dataset, load_data
from efcn_nb.ladder.embedding import embed
from efcn_nb.ladder.masks import masks_from_rows
from efcn_nb.instruments.evolution import blind_share, local_cnn, local_masks, pruning_steps, starting_masks
from efcn_nb.instruments.topologies import null_distances, topology_distance
from efcn_nb.studies import topology as study
from efcn_nb.studies.topology import (
    KINDS, sparse_runs, start_shares, topology_claims, topology_distances, topology_study, train_kind)
from efcn_nb.training.loop import Diverged

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(seed): return torch.Generator().manual_seed(seed)


# Training

def noise(n, seed=0, size=8):
    x = torch.randint(256, (n, 1, size, size), generator=draw(seed)).to(torch.uint8)
    return Dataset(x, torch.arange(n) % 3, [*"abc"], torch.full((1,), .5), torch.full((1,), .3), "noise")


TINY = Data(noise(60), noise(30, 1))
FAST = dict(epochs=4, channels=2, batch_size=20)


def rows_of(kind, **how):
    rows = pd.DataFrame(train_kind(kind, TINY, **(FAST | how)))
    if "bits" not in rows: rows["bits"] = None
    return rows[rows.bits.isna()], {epoch: masks_from_rows(part) for epoch, part in rows[rows.bits.notna()].groupby("epoch")}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_and_follows_its_seed(kind):
    state = torch.random.get_rng_state()
    table, masks = rows_of(kind, keep=[2], rounds=2)
    assert torch.random.get_rng_state().equal(state)
    assert table.epoch.tolist() == {"pruned dense": [1, 2, 3, 4, 8], "pruned efcn": [*range(1, 9), 12]}.get(kind, [1, 2, 3, 4])
    assert [*masks] == dict(SET=[0, 2], static=[0], dense=[], cnn=[]).get(kind.split()[0], [12 if kind == "pruned efcn" else 8])
    again, other = rows_of(kind, keep=[2], rounds=2)[0], rows_of(kind, keep=[2], rounds=2, seed=1)[0]
    assert again.loss.tolist() == table.loss.tolist() != other.loss.tolist()
    local = local_masks(embed(local_cnn((1, 8, 8), 3, 2), (1, 8, 8)))
    for m in masks.values(): assert [int(x.sum()) for x in m.values()] == [int(x.sum()) for x in local.values()]


def test_when_set_evolves():
    _, masks = rows_of("SET local", keep=[1, 2, 3, 4], every=2)
    same = [all(masks[e][n].equal(masks[e-1][n]) for n in masks[e]) for e in (1, 2, 3, 4)]
    assert same == [True, False, True, True] # never after the last epoch
    starts = [rows_of("SET random", start=s, seed=7)[1][0]["0"] for s in (0, 0, 1)]
    assert starts[0].equal(starts[1]) and not starts[0].equal(starts[2])


def test_weights_and_growth_follow_the_seed(monkeypatch):
    seen, own, evolved = [], study.draw_weights, study.evolve
    monkeypatch.setattr(study, "draw_weights", lambda model, generator: seen.append(generator.initial_seed()) or own(model, generator))
    monkeypatch.setattr(study, "evolve", lambda model, zeta, generator, optimizer: seen.append(generator.initial_seed()) or evolved(model, zeta, generator, optimizer))
    for seed in (0, 0, 1): rows_of("SET local", seed=seed, epochs=2)
    assert len(seen) == 6 and len({*seen[:4]}) == 1 and seen[4] == seen[5] != seen[0]


@pytest.mark.parametrize("kind", ["cnn", "SET random", "pruned efcn"])
def test_images_come_in_the_order_of_the_seed_at_the_rate_asked_for(kind, monkeypatch):
    seen, own = [], study.train
    def spied(model, data, epochs, lr, batch_size, seed, first, optimizer, after_epoch):
        seen.append((first, epochs, batch_size, seed, optimizer.param_groups[0]["lr"], {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}))
        return own(model, data, epochs, lr, batch_size, seed, first, optimizer=optimizer, after_epoch=after_epoch)
    monkeypatch.setattr(study, "train", spied)
    rows_of(kind, seed=5, lr=.02, epochs=2, rounds=2)
    assert [s[:2] for s in seen] == ([(0, 2), (2, 4), (4, 5), (5, 6)] if kind == "pruned efcn" else [(0, 2)]) and {s[2:] for s in seen} == {(20, 5, .02, True)}


def test_pruning_takes_its_rounds(monkeypatch):
    counts, epochs, own, fit = [], [], study.hold_to_masks, study._fit
    monkeypatch.setattr(study, "hold_to_masks", lambda model, masks: counts.append([int(m.sum()) for m in masks.values()]) or own(model, masks))
    monkeypatch.setattr(study, "_fit", lambda model, data, n, *rest: epochs.append(n) or fit(model, data, n, *rest))
    rows_of("pruned dense", rounds=3)
    local = local_masks(embed(local_cnn((1, 8, 8), 3, 2), (1, 8, 8)))
    assert counts == [[*c] for c in zip(*(pruning_steps(m.numel(), int(m.sum()), 3) for m in local.values()))] and epochs == [4, 1, 1, 2]


def test_pruned_efcn_is_more_local_than_pruned_dense():
    local = local_masks(embed(local_cnn((1, 8, 8), 3, 2), (1, 8, 8)))
    share = {kind: np.mean([float((m & local[n]).sum()/m.sum()) for n, m in next(iter(rows_of(kind, lr=.003)[1].values())).items()]) for kind in ("pruned dense", "pruned efcn")}
    assert share["pruned efcn"] > share["pruned dense"] + .2


@pytest.mark.parametrize("wrong, words", [
    (dict(kind="set"), "kinds must be some of cnn, dense, .*, not 'set'"), (dict(zeta=1), "from 0 to below 1, not 1: nothing would be left"), (dict(epochs=0), "number of epochs must be 1 or more, not 0"),
    (dict(rounds=0), "rounds of pruning must be 1 or more, not 0"), (dict(every=0), "from one step of SET to the next must be 1 or more, not 0"), (dict(keep=[5]), "between 0 and 4, not 5"),
    (dict(channels=0), "channels must be 1 or more"), (dict(lr=-1), "-1")])
def test_impossible_training(wrong, words):
    with pytest.raises(ValueError, match=words): train_kind(**(dict(kind="SET random", data=TINY) | FAST | wrong))


SMALL = dict(kinds=["dense", "static random", "SET random", "SET local"], seeds=[0, 1, 2], lrs=[.01], search_epochs=1, keep=[2], progress=False) | FAST


@pytest.fixture(scope="module")
def runs(): return sparse_runs(TINY, **SMALL)


def test_runs_of_a_study(runs):
    assert len(runs.table) == 4*(4*3 + 2) and set(runs.masks) == {("static random", s, s, 0) for s in range(3)} | {(k, s, t, e) for k in ("SET random", "SET local") for s in range(3)
                                                                     for t in {s, 0 if k == "SET random" else s} for e in (0, 2, 4)}
    own = pd.DataFrame(train_kind("SET random", Data(study._split(TINY).train, TINY.test), 1, 0, .01, keep=[0, 2, 4], **FAST))
    ours = runs.table.query("kind == 'SET random' and seed == 1 and start == 0")
    np.testing.assert_allclose(ours.loss, own.loss.dropna(), rtol=1e-12)
    for name, m in masks_from_rows(own[own.bits.notna() & (own.epoch == 4)]).items(): assert m.equal(runs.masks["SET random", 1, 0, 4][name])


def test_interrupted_runs_resume(runs, tmp_path, monkeypatch):
    calls, own = [], study.train_kind
    def counted(*args, **how):
        calls.append(args[0])
        if len(calls) == 6: raise KeyboardInterrupt
        return own(*args, **how)
    monkeypatch.setattr(study, "train_kind", counted)
    with pytest.raises(KeyboardInterrupt): sparse_runs(TINY, folder=tmp_path, **SMALL)
    found = sparse_runs(TINY, folder=tmp_path, **SMALL)
    assert len(calls) == 14 + 1
    pd.testing.assert_frame_equal(found.table, runs.table)
    assert all(found.masks[key][n].equal(m) for key, masks in runs.masks.items() for n, m in masks.items())
    sparse_runs(TINY, folder=tmp_path, **SMALL)
    assert len(calls) == 15
    sparse_runs(Data(noise(60, 2), TINY.test), folder=tmp_path, **SMALL) # other images are another study
    assert len(calls) == 29


def test_the_rate_is_chosen_on_images_that_nobody_trains_on(monkeypatch):
    seen = []
    def fake(kind, data, seed, start, lr, epochs, keep, **_):
        seen.append((seed, data))
        return [dict(epoch=epochs, accuracy={.1: .5, .2: .9, .3: .7}[lr], loss=1.)]
    monkeypatch.setattr(study, "train_kind", fake)
    found = sparse_runs(TINY, **(SMALL | dict(lrs=[.1, .3, .2])))
    assert set(found.table.lr) == {.2}
    key = lambda d: {x.numpy().tobytes() for x in d.x}
    search, final = ([d for s, d in seen if (s >= 12345) == searching] for searching in (True, False))
    assert len(search) == 4*3*3 and {s for s, _ in seen} == {0, 1, 2, 12345, 12346, 12347}
    assert all(not key(d.train) & key(d.test) and key(d.train) | key(d.test) == key(TINY.train) for d in search)
    assert all(key(d.train) == key(search[0].train) and d.test is TINY.test for d in final)


def test_the_rate_is_the_best_on_average_and_never_diverges(monkeypatch):
    last = {.1: [.9, .3, .3], .2: [.6, .5, .6], .3: [.9, None, .9]}
    def fake(kind, data, seed, start, lr, epochs, keep, **_):
        if last[lr][seed % 3] is None: raise Diverged(1)
        return [dict(epoch=e, accuracy=a, loss=1.) for e, a in ((1, 1.), (2, last[lr][seed % 3]))]
    monkeypatch.setattr(study, "train_kind", fake)
    found = sparse_runs(TINY, **(SMALL | dict(lrs=[.1, .2, .3], kinds=["dense", "cnn"])))
    assert set(found.table.lr) == {.2}
    assert study._best_lrs(pd.DataFrame([dict(kind="pruned dense", lr=lr, seed=9, epoch=2, accuracy=a) for lr in (.1, .2) for a in (lr, math.nan)])) == {"pruned dense": .2} # with a row of a mask


def test_what_diverges_is_missing(monkeypatch):
    own = study.train_kind
    def fails(kind, data, seed, start, lr, **how):
        if lr > .1: raise Diverged(3)
        return own(kind, data, seed, start, lr, **how)
    monkeypatch.setattr(study, "train_kind", fails)
    assert set(sparse_runs(TINY, **(SMALL | dict(lrs=[.01, 5.], kinds=["dense"]))).table.lr) == {.01}
    with pytest.raises(Diverged, match="dense: every learning rate diverged; try smaller ones than 4"): sparse_runs(TINY, **(SMALL | dict(lrs=[4., 5.], kinds=["dense"])))
    assert sparse_runs(TINY, **(SMALL | dict(lrs=[5.], kinds=["dense"]))).table.accuracy.isna().all()


@pytest.mark.parametrize("out", [None, 3])
def test_a_study_without_a_folder_does_nothing(out, monkeypatch):
    monkeypatch.setattr(study, "sparse_runs", None)
    with pytest.raises(ValueError, match="out must be the path of a folder"): topology_study(TINY, out, **SMALL)


@pytest.mark.parametrize("wrong, words", [(dict(kinds=["cnn", "FCN"]), "not 'FCN'"), (dict(kinds=[]), "kinds must be some of"), (dict(kinds="cnn"), r"kinds must be a list, such as \['cnn'\]"), (dict(batch_size=0), "size of a batch must be 1 or more, not 0"), (dict(keep=[-1]), "not -1"),
                                          (dict(lrs=0.), r"not \[0.0\]"), (dict(epochs=2.5), "number of epochs must be 1 or more, not 2.5"), (dict(seeds=[]), "different whole numbers"), (dict(seeds=[0, 0]), "different whole"),
                                          (dict(seeds=[12345]), "from 0 to 12344 .the search uses those above"), (dict(seeds=[-1]), "from 0"), (dict(keep=["2"]), "between 0 and 4, not '2'"), (dict(keep=[2.5]), "not 2.5"), (dict(searches=0), "number of networks in the search must be 1 or more, not 0"), (dict(lrs=[.01, .01]), "all different"), (dict(seeds=[.5]), "whole numbers"), (dict(lrs=[]), "learning rates must be positive"), (dict(lrs=[0]), r"not \[0\]"),
                                          (dict(zeta=2), "zeta"), (dict(search_epochs=0), "number of epochs must be 1"), (dict(channels=0), "channels"), (dict(draws=0), "draws must be 1 or more, not 0")])
def test_impossible_studies_do_nothing(wrong, words, tmp_path):
    with pytest.raises(ValueError, match=words): topology_study(TINY, tmp_path/"new", **(SMALL | wrong))
    assert not (tmp_path/"new").exists()


# Comparisons and claims

def test_which_topologies_are_compared(runs):
    t = topology_distances(runs, draws=1)
    every = t.query("layer == 'all'")
    counts = every.groupby(["comparison", "kind", "epoch"]).size()
    assert set(counts) == {3} and {(c, k) for c, k, _ in counts.index} == {("the CNN", "SET random"), ("the CNN", "SET local"), ("own start", "SET random"), ("own start", "SET local"),
                                                                          ("same start", "SET random"), ("same start", "SET local"), ("other start", "SET random")}
    assert every.both.notna().equals(every.epoch == 4)
    D = every.set_index(["comparison", "kind", "seed", "epoch"]).distance
    m = lambda kind, seed, start, epoch: runs.masks[kind, seed, start, epoch]
    assert D["own start", "SET local", 1, 2] == topology_distance(m("SET local", 1, 1, 2), runs.local) == D["the CNN", "SET local", 1, 2]
    assert D["other start", "SET random", 2, 4] == topology_distance(m("SET random", 2, 2, 4), m("SET random", 0, 0, 4))
    assert D["same start", "SET random", 1, 4] == topology_distance(m("SET random", 1, 0, 4), m("SET random", 2, 0, 4)) and D["same start", "SET random", 1, 0] == 0
    row = every.set_index(["comparison", "kind", "seed", "epoch"]).loc[("the CNN", "SET random", 0, 4)]
    null = null_distances(m("SET random", 0, 0, 4), runs.local, "both", draws=1, second=False)
    assert row.both == pytest.approx(null.mean(axis=1).item()) and row.both_relative == pytest.approx(row.distance/row.both)


@pytest.mark.parametrize("draws", [0, 2.5, True, "3"])
def test_impossible_draws(runs, draws):
    with pytest.raises(ValueError, match="number of draws must be 1 or more"): topology_distances(runs, draws)


@pytest.mark.parametrize("zeta, every, words", [(5, 1, "zeta"), (.3, 0, "from one step of SET to the next must be 1 or more")])
def test_impossible_shares(runs, zeta, every, words):
    with pytest.raises(ValueError, match=words): start_shares(runs, zeta, every)


def test_two_seeds_are_one_pair(runs):
    two = runs._replace(masks={k: m for k, m in runs.masks.items() if k[1] < 2})
    counts = topology_distances(two, draws=1).query("layer == 'all' and epoch == 4").groupby("comparison").size()
    assert counts["other start"] == 1 and counts["same start"] == 2 and counts["the CNN"] == 4


def test_shares_of_the_start(runs):
    t = start_shares(runs, .3, 1).set_index(["kind", "seed", "epoch", "layer"])
    assert len(t) == 2*3*3*2 and t.index.is_unique and (t.share.xs(0, level="epoch") == 1).all()
    for kind, first in (("SET local", runs.local["0"]), ("SET random", starting_masks(runs.local, "random", 1)["0"])):
        m, n = runs.masks[kind, 1, 1, 2]["0"], int(first.sum())
        assert t.share[kind, 1, 2, "0"] == float((m & first).sum())/n and t.blind[kind, 1, 2, "0"] == blind_share(1., n, n, first.numel(), .3, 2)
        assert t.blind[kind, 1, 4, "0"] == blind_share(1., n, n, first.numel(), .3, 3)
    assert start_shares(runs, .3, 3).query("epoch == 2").blind.eq(1).all()
    assert not len(start_shares(SimpleNamespace(table=runs.table[:0], masks={}, local={}), .3, 1))


def made(gain=.05, relative=.9, share=.6, seeds=4, noise=.002, both=1.):
    "Tables whose effects are known."
    g = np.random.default_rng(0)
    better = {"SET random": 1, "static local": 1, "SET local": 2}
    table = pd.DataFrame([dict(kind=k, seed=s, start=s, epoch=e, accuracy=.5 + gain*better.get(k, 0)*(e > 0) + noise*g.normal()) for k in KINDS for s in range(seeds) for e in (0, 9)])
    table = pd.concat([table, table[table.kind == "SET random"].assign(start=99, accuracy=0.)]) # from a shared mask: does not count
    step = -.1 if relative < 1 else .1
    rows = []
    for kind, c, s, e in itertools.product(("SET random", "SET local", "pruned dense", "pruned efcn"), ("the CNN", "own start", "other start", "same start"), range(seeds), (0, 9)):
        r = relative + step*(c == "same start") + noise*g.normal() if e else 1/relative
        rows += [dict(comparison=c, kind=kind, seed=s, epoch=e, layer=layer, distance=.9*x, density=.9, both=.9, density_relative=x, both_relative=both*x) for layer, x in (("all", r), ("0", 2 - r))]
    shares = pd.DataFrame([dict(kind=k, seed=s, epoch=e, layer=l, share=x + noise*g.normal() if e == 9 else 1 - x, blind=.45 + .1*(x < .5)) for k, x in (("SET local", share), ("SET random", .5))
                           for s in range(seeds) for e in (1, 9) for l in "ab"])
    return table, pd.DataFrame(rows), shares


def test_claims_find_what_is_there():
    assert set(topology_claims(*made()).verdict) == {"holds"}
    assert set(topology_claims(*made(-.05, 1.1, .4)).verdict) == {"fails"}
    assert set(topology_claims(*made(0, .999, .5, noise=.02)).verdict) >= {"undecided"}
    assert set(topology_claims(*made(seeds=1)).verdict) == {"undecided"}
    found = topology_claims(*made(both=1.3)).set_index("claim").verdict # each claim by its own null
    assert {c[:2] for c in found.index[found == "fails"]} == {"2b", "3c", "4b", "4c"} and set(found) == {"holds", "fails"}
    assert set(topology_claims(*[t[t.seed < 0] for t in made()]).verdict) == {"not judged"}


def test_effects_of_claims():
    table, distances, shares = made(noise=0.)
    found = topology_claims(table, distances, shares).set_index("claim").effect
    at = lambda number: found[[c for c in found.index if c.startswith(number)][0]]
    assert at("1a") == "+5.0 points" and at("3f") == "+5.0 points" and at("2a") == "0.810, by chance 0.900" and at("2c") == "0.720, else 0.810" and at("3d") == "60.0 %, else 45.0 %" and at("3e") == "60.0 %, else 50.0 %"


def test_a_study_writes_its_tables(tmp_path):
    data = load_data("digits")
    few = Data(data.train.thinned(100), data.test.thinned(40))
    how = dict(kinds=["static random", "SET random"], seeds=[0, 1], lrs=[.01], epochs=2, search_epochs=1, keep=[1], channels=1, draws=1, progress=False)
    tables = topology_study(few, tmp_path, **how)
    assert {p.stem for p in tmp_path.glob("*.csv")} == {"accuracy", "distances", "shares", "claims"} == set(tables)
    again = topology_study(few, tmp_path, **how)
    for name in tables: pd.testing.assert_frame_equal(tables[name], again[name])
    assert tables["claims"].verdict.iloc[0] in ("holds", "fails", "undecided") and "not judged" in set(tables["claims"].verdict)


def test_a_study_without_anything_to_compare(tmp_path):
    how = dict(kinds=["cnn", "static local"], seeds=[3], lrs=[.01], search_epochs=1, progress=False) | FAST
    tables = topology_study(TINY, tmp_path, **how)
    assert not len(tables["distances"]) and not len(tables["shares"]) and set(tables["claims"].verdict) == {"not judged"} and tables["accuracy"].seed.unique().tolist() == [3]
