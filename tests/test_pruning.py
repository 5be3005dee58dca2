"Pruning, against scipy's correlations, nulls enumerated to the last mask, rounds written out, and made-up tables."
import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import correlate2d
from torch import nn

import efcn_nb.studies.pruning as study
from tiny import smooth_images as images
from efcn_nb.materials.controls import permute_pixels, pixel_order
from efcn_nb.materials.data import Data
from efcn_nb.ladder.embedding import embed
from efcn_nb.ladder.layers import FullyConnected
from efcn_nb.materials.models import make_model
from efcn_nb.ladder.masks import prune_mask, shuffle_mask
from efcn_nb.studies.pruning import (
    CASES, DEFAULTS, METHODS, NETWORKS, busiest_units, displacement_histogram, expected_histogram, first_weights,
    interaction_profile, interaction_strength, interaction_table, locality_table, make_dense, mask_from_text,
    mask_to_text, near_profile, near_ratio, null_ratios, pair_strengths, profile_table, prunable, prune_rounds,
    pruning_claims, pruning_study, round_masks, step_batches, survivors)

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = dict(seeds=[0], rounds=3, steps=12, rewind=3, batch_size=30, widths=[14, 12], channels=1, relax=4)
SHAPES = [(1, 4, 5), (3, 4, 4), (2, 1, 6), (1, 6, 1)]


def seeded(seed): return torch.Generator().manual_seed(seed)


def random(units, shape, density=.4, seed=0): return torch.rand(units, math.prod(shape), generator=seeded(seed)) < density


@pytest.fixture(scope="module")
def data(): return Data(images(), images(60, seed=1))


@pytest.fixture(scope="module")
def table(data): return prune_rounds(data, ["fcn", "one-shot", "permuted", "efcn"], **FAST)


# Pairs of pixels

@pytest.mark.parametrize("shape", SHAPES)
def test_histogram_is_scipys(shape):
    mask = random(5, shape)
    same = sum(correlate2d(image, image) for unit in mask.view(-1, *shape).int().numpy() for image in unit)
    every = sum(correlate2d(a, b) for unit in mask.view(-1, *shape).int().numpy() for a, b in itertools.product(unit, repeat=2))
    different = every - same
    same[shape[1]-1, shape[2]-1] -= mask.sum().item()
    found = displacement_histogram(mask, shape)
    assert found.dtype == torch.int64 and found[0].equal(torch.from_numpy(same)) and found[1].equal(torch.from_numpy(different))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 99), st.floats(0, 1))
def test_histogram_counts_every_pair_both_ways(shape, seed, density):
    mask = random(6, shape, density, seed)
    found, k = displacement_histogram(mask, shape), mask.sum(1)
    assert found.equal(found.flip(1, 2)) and (found >= 0).all()
    assert found.sum() == (k*(k-1)).sum()
    assert found.equal(displacement_histogram(mask[torch.randperm(6, generator=seeded(seed))], shape))


def test_direction_of_displacements():
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0, 0] = mask[0, 0, 1, 3] = True
    assert displacement_histogram(mask.flatten(1), (1, 4, 4)).nonzero().tolist() == [[0, 2, 0], [0, 4, 6]]


def columns_permuted(mask):
    for orders in itertools.product(itertools.permutations(range(len(mask))), repeat=mask.shape[1]):
        yield torch.stack([mask[list(o), a] for a, o in enumerate(orders)], 1)


def rows_permuted(mask): return (m.T for m in columns_permuted(mask.T))


def anywhere(mask):
    for places in itertools.combinations(range(mask.numel()), int(mask.sum())):
        m = torch.zeros(mask.numel(), dtype=torch.bool)
        m[list(places)] = True
        yield m.view(mask.shape)


@pytest.mark.parametrize("keep,all_of", [("inputs", columns_permuted), ("units", rows_permuted), ("density", anywhere)])
@pytest.mark.parametrize("shape", [(2, 1, 2), (1, 2, 2)])
def test_expectation_over_every_mask_of_the_null(keep, all_of, shape):
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [1, 0, 1, 0]]).bool()[:3 if keep == "inputs" else 2]
    every = torch.stack([displacement_histogram(m, shape) for m in all_of(mask)]).double()
    torch.testing.assert_close(expected_histogram(mask, shape, keep), every.mean(0), atol=1e-9, rtol=0)


@pytest.mark.parametrize("keep", ["inputs", "units", "density"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_full_mask_is_its_own_null(keep, shape):
    mask = torch.ones(4, math.prod(shape), dtype=torch.bool)
    torch.testing.assert_close(expected_histogram(mask, shape, keep), displacement_histogram(mask, shape).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(1, 5, 6), (3, 4, 6)])
def test_profile_by_hand(shape):
    mask, place = random(7, shape), torch.cartesian_prod(*map(torch.arange, shape))
    p = near_profile(mask, shape).set_index(["colours", "distance"])
    pairs = {key: [0, 0.] for key in p.index}
    for a, b in itertools.permutations(range(mask.shape[1]), 2):
        key = ("same" if place[a,0] == place[b,0] else "different", (place[a,1:] - place[b,1:]).abs().max().item())
        pairs[key][0] += (mask[:,a] & mask[:,b]).sum().item()
        pairs[key][1] += (mask[:,a].sum() * mask[:,b].sum()).item()/7
    for key, (found, expected) in pairs.items():
        total = [sum(v[i] for k, v in pairs.items() if k[0] == key[0]) for i in (0, 1)]
        assert p.pairs[key] == found and p.expected[key] == pytest.approx(expected) and p.ratio[key] == pytest.approx(found/total[0]/(expected/total[1]))
    for colours in p.index.unique(0):
        near = [sum(v[i] for k, v in pairs.items() if k[0] == colours and k[1] <= 2)/sum(v[i] for k, v in pairs.items() if k[0] == colours) for i in (0, 1)]
        assert near_ratio(mask, shape, colours=colours) == pytest.approx(near[0]/near[1])


def test_popular_pixels_are_not_local():
    "Units that prefer the same corner: much above uniform chance, not above the null that keeps degrees, drawn or in closed form."
    weight = torch.outer(torch.linspace(.9, .02, 8), torch.linspace(.9, .02, 8)).flatten()
    mask = torch.rand(400, 64, generator=seeded(0)) < weight
    assert near_ratio(mask, (1, 8, 8), keep="density") > 1.3 and near_ratio(mask, (1, 8, 8)) == pytest.approx(1, abs=.03)
    for keep in ("inputs", "both"): assert null_ratios(mask[:60], (1, 8, 8), 6, seeded(1), keep).mean() == pytest.approx(1, abs=.06)


def test_blocks_are_local_in_their_frame_alone():
    "Units that see a block of 2 x 2 each; with pixels permuted there is nothing left, and all of it when that is undone."
    mask = torch.zeros(16, 4, 2, 4, 2, dtype=torch.bool)
    for i, (y, x) in enumerate(itertools.product(range(4), repeat=2)): mask[i, y, :, x, :] = True
    mask, order = mask.view(16, 64), pixel_order((1, 8, 8), 3)
    local = near_ratio(mask, (1, 8, 8), 1)
    assert local == pytest.approx(64*63/(2*8*7*2 + 2*7*7*2)) # all pairs are near; of the null, as many as near pairs among all places
    moved = permute_pixels(mask, (1, 8, 8), order)
    assert near_ratio(moved, (1, 8, 8), 1) < local/3 and near_ratio(permute_pixels(moved, (1, 8, 8), order.argsort()), (1, 8, 8), 1) == local


def test_no_pairs_no_ratio():
    corners = torch.zeros(3, 49, dtype=torch.bool)
    corners[0, [0, 48]] = corners[1:, [6, 42]] = True # pairs, none of them near, and none expected
    assert math.isnan(near_ratio(corners, (1, 7, 7))) and near_profile(corners, (1, 7, 7)).expected[0] == 0
    assert math.isnan(near_ratio(torch.eye(16).bool(), (1, 4, 4))) and near_profile(torch.zeros(2, 16).bool(), (1, 4, 4)).ratio.isna().all()


@pytest.mark.parametrize("call,said", [
    (lambda: displacement_histogram(torch.ones(2, 16), (1, 4, 4)), "must be a bool tensor"),
    (lambda: displacement_histogram(np.ones((2, 16), bool), (1, 4, 4)), "must be a bool tensor"),
    (lambda: displacement_histogram(torch.ones(16).bool(), (1, 4, 4)), "must be a bool tensor"),
    (lambda: near_profile(torch.ones(2, 16).bool(), (1, 4, 5)), "the mask has 16 columns, but images of shape (1, 4, 5) have 20"),
    (lambda: near_ratio(torch.ones(2, 16).bool(), (4, 4)), "not of inputs of shape (4, 4)"),
    (lambda: near_ratio(torch.ones(2, 16).bool(), (1, 4, 4), 0), "from 1 to 2, within the image, not 0"),
    (lambda: near_ratio(torch.ones(2, 16).bool(), (1, 4, 4), 1.5), "within the image, not 1.5"),
    (lambda: near_ratio(torch.ones(2, 16).bool(), (1, 4, 4), 3), "within the image, not 3"),
    (lambda: near_ratio(torch.ones(2, 16).bool(), (1, 4, 4), colours="different"), "'different' for images of several"),
    (lambda: near_ratio(torch.ones(2, 16).bool(), (1, 4, 4), keep="degree"), "not 'degree'"),
    (lambda: expected_histogram(torch.ones(2, 16).bool(), (1, 4, 4), "both"), "for 'both' draw shuffle_mask"),
    (lambda: null_ratios(torch.ones(2, 16).bool(), (1, 4, 4), 0, seeded(0)), "draws must be a whole number from 1 on"),
    (lambda: null_ratios(torch.ones(2, 16).bool(), (1, 4, 4), 2, seeded(0), "rows"), "unknown keep 'rows'; known are"),
    (lambda: busiest_units(torch.ones(2, 16).bool(), (1, 4, 4), 3), "a number of units from 1 to 2, not 3"),
    (lambda: make_dense((1, 4, 4), 3, []), "widths must be a list of numbers of hidden units"),
    (lambda: make_dense((1, 4, 4), 3, [4, 0]), "each 1 or more"),
    (lambda: make_dense((1, 4, 4), 3, init="he"), "unknown init 'he'; known are default, glorot"),
    (lambda: mask_from_text(["xff"], (3, 3)), "a mask of shape (3, 3) is stored as 4 digits, not 2"),
])
def test_bad_input(call, said):
    with pytest.raises(ValueError) as e: call()
    assert said in str(e.value) and "\n" not in str(e.value)


def test_busiest_units_come_in_order():
    mask = torch.arange(6)[:,None] % 4 >= torch.arange(4)
    assert busiest_units(mask, (1, 2, 2), 3).flatten(1).equal(mask[[3, 2, 1]]) and busiest_units(mask, (1, 2, 2), 4)[3].flatten().equal(mask[5])


# Rounds

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.floats(0, .999), st.integers(0, 12))
def test_survivors_are_those_that_prune_mask_leaves(size, fraction, rounds):
    try: left = survivors(size, fraction, rounds)
    except ValueError: return
    weight, mask = torch.randn(size, generator=seeded(0)), torch.ones(size, dtype=torch.bool)
    for n in left:
        assert mask.sum() == n > 0
        mask = prune_mask(weight, mask, fraction) if n is not left[-1] else mask


@pytest.mark.parametrize("fraction", [-.1, 1, 1., 7, "half", True, math.nan, None])
def test_impossible_fractions(fraction):
    with pytest.raises(ValueError, match="the fraction to prune must be a number from 0 to below 1"): survivors(100, fraction, 1)


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 13), (40, 70)])
def test_text_is_numpys_packbits(shape):
    mask = random(shape[0], (1, 1, shape[1]))
    assert "".join(part[1:] for part in mask_to_text(mask, most=10)) == np.packbits(mask.numpy()).tobytes().hex()
    assert mask_from_text(mask_to_text(mask), shape).equal(mask) and mask_from_text(mask_to_text(mask, most=10), shape).equal(mask)


def test_steps_go_through_all_images_in_each_pass(data):
    seen = [x for x, _ in step_batches(data.train, 30, 0, 9, seed=2)]
    key = lambda xs: sorted(x.sum().item() for x in torch.cat(xs))
    assert len(seen) == 9 and key(seen[:3]) == key(seen[3:6]) == key(list(data.train.x.split(30))) and not seen[0].equal(seen[3])
    assert all(a.equal(b) for a, (b, _) in zip(seen[4:], step_batches(data.train, 30, 4, 9, seed=2)))
    assert not seen[0].equal(next(step_batches(data.train, 30, 0, 1, seed=3))[0])
    assert len([*step_batches(data.train, 40, 0, 5, seed=2)]) == 5 # what fills no batch is left out


def test_what_is_pruned():
    net = make_dense((1, 4, 4), 3, [6, 5])
    assert [net.get_submodule(n).weight.shape for n in prunable(net)] == [(6, 16), (5, 6)] and len(prunable(net, last=True)) == 3
    net = embed(make_model("small", (1, 16, 16), 3, width=1), (1, 16, 16))
    assert [type(net.get_submodule(n)) for n in prunable(net, True)] == [FullyConnected, FullyConnected, nn.Linear]


@pytest.mark.parametrize("case", ["fcn", "one-shot", "permuted", "efcn"])
def test_masks_shrink_by_the_fraction(table, case):
    masks = [round_masks(table, case, 0, r) for r in range(4)]
    for name in masks[0]: assert [int(m[name].sum()) for m in masks] == survivors(masks[0][name].numel(), .3, 3)
    if case != "one-shot": assert not any((b[name] & ~a[name]).any() for a, b in zip(masks, masks[1:]) for name in a)


def test_rounds_are_rewound(data, monkeypatch):
    "Every round starts from the weights of the rewind step, all parameters and statistics, but for the mask; with the same batches."
    starts, real = [], study.train_steps
    def spy(model, optimizer, batches):
        batches = list(batches)
        starts.append((copy.deepcopy({k.replace("parametrizations.", "").replace(".original", ""): v for k, v in model.state_dict().items() if not k.endswith("mask")}), [y.tolist() for _, y in batches]))
        return real(model, optimizer, batches)
    monkeypatch.setattr(study, "train_steps", spy)
    table = prune_rounds(data, ["fcn"], **FAST)
    (_, first), *rounds = starts
    assert len(first) == 3 and len(rounds) == 4 and all(len(seen) == 9 and seen == rounds[0][1] for _, seen in rounds)
    early = rounds[0][0]
    for r, (start, _) in enumerate(rounds):
        masks = round_masks(table, "fcn", 0, r)
        for name, value in start.items():
            layer = name.removesuffix(".weight")
            assert value.equal(early[name]*masks[layer] if layer in masks and name.endswith("weight") else early[name]), name


def test_one_shot_keeps_the_largest_of_the_dense_network(data, table):
    net = make_dense(data.train.shape, 3, [14, 12])
    study.train_steps(net.train(), torch.optim.SGD(net.parameters(), .1), step_batches(data.train, 30, 0, 12, 0))
    for r in (1, 3):
        for name, mask in round_masks(table, "one-shot", 0, r).items():
            size = net.get_submodule(name).weight.abs()
            assert size[mask].min() >= size[~mask].max()
    assert round_masks(table, "one-shot", 0, 1)["2"].equal(round_masks(table, "fcn", 0, 1)["2"])
    assert table[(table.case == "one-shot") & (table["round"] < 2)].accuracy.tolist() == table[(table.case == "fcn") & (table["round"] < 2)].accuracy.tolist()


def test_the_last_layer_is_pruned_on_demand(data):
    masks = round_masks(prune_rounds(data, last=True, **FAST), "fcn", 0, 3)
    assert [m.shape for m in masks.values()] == [(14, 128), (12, 14), (3, 12)] and masks["8"].sum() == survivors(36, .3, 3)[-1]


def test_an_efcn_starts_as_its_cnn(data):
    run = study._Run(data, DEFAULTS | {k: v for k, v in FAST.items() if k in DEFAULTS} | dict(seed=0, start="efcn"))
    torch.testing.assert_close(run.at_start(4).eval()(data.test.x), run.cnn(4).eval()(data.test.x))
    assert not torch.equal(run.cnn(4)[0].weight, run.cnn(0)[0].weight)


def test_nothing_but_the_seed_decides(data, table):
    state = torch.get_rng_state()
    again = prune_rounds(data, ["permuted", "fcn"], **FAST)
    assert torch.get_rng_state().equal(state)
    for case in ("permuted", "fcn"): assert again[again.case == case].values.tolist() == table[table.case == case].values.tolist()
    other = prune_rounds(data, ["fcn"], **(FAST | dict(seeds=[1])))
    assert not round_masks(other, "fcn", 1, 3)["2"].equal(round_masks(table, "fcn", 0, 3)["2"])


def test_interrupted_and_resumed(data, table, tmp_path, monkeypatch):
    "Ctrl-C in round 2; the rounds before are kept, and the end is the same."
    calls, real = [], study.evaluate
    def stops(*args):
        calls.append(args)
        if len(calls) == 3: raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(study, "evaluate", stops)
    with pytest.raises(KeyboardInterrupt): prune_rounds(data, ["fcn"], folder=tmp_path, **FAST)
    found = prune_rounds(data, ["fcn"], folder=tmp_path, **FAST)
    assert len(calls) == 5 and found.values.tolist() == table[table.case == "fcn"].values.tolist()
    assert prune_rounds(data, ["fcn"], folder=tmp_path, **FAST).equals(found) and len(calls) == 5
    more = prune_rounds(data, ["fcn"], folder=tmp_path, **(FAST | dict(rounds=5)))
    assert len(calls) == 7 and more[more["round"] < 4].values.tolist() == found.values.tolist()


@pytest.mark.parametrize("how,said", [
    (dict(fraction=1.), "the fraction to prune must be a number from 0 to below 1, not 1.0"),
    (dict(fraction=-.5), "not -0.5"),
    (dict(rounds=40), "is less than one: prune fewer rounds or another fraction"),
    (dict(fraction=.999, rounds=3), "of which 0.999 is less than one"),
    (dict(rounds=-1), "rounds must be a whole number from 0 on, not -1"),
    (dict(rounds=2.5), "not 2.5"),
    (dict(rewind=12), "the step to rewind to must lie before the end of the round: 12 is not below 12"),
    (dict(rewind=-1), "rewind must be a whole number from 0 on, not -1"),
    (dict(steps=0, rewind=0), "steps must be a whole number from 1 on, not 0"),
    (dict(batch_size=91), "a batch of 91 images is more than the 90"),
    (dict(batch_size=1), "batch_size must be a whole number from 2 on"),
    (dict(lr=0), "the learning rate must be a positive number, not 0"),
    (dict(lr="0.1"), "the learning rate must be a positive number, not '0.1'"),
    (dict(seeds=[]), "seeds must be a list of different whole numbers"),
    (dict(seeds=3), "not 3"),
    (dict(seeds=[0, .5]), "seeds must be a list"),
    (dict(widths=[4, -1]), "widths must be a list of numbers of hidden units"),
    (dict(widths=5), "widths must be a list"),
    (dict(widths=[4.5]), "not [4.5]"),
    (dict(widths=None), "not None"),
    (dict(last="no"), "last must be True or False, not 'no'"),
    (dict(variant="permuted"), "variant is what cases differ in: give cases, such as {\"mine\": dict(variant='permuted')}"),
    (dict(start="efcn"), "start is what cases differ in"),
    (dict(method="one-shot"), "method is what cases differ in"),
    (dict(cases={"a": None}), "what differs in a case must be a dict of settings"),
    (dict(momentum=.9), "unknown setting 'momentum'"),
    (dict(cases="fcn"), "cases must be a list of names, or a dict of names and settings, not 'fcn'"),
    (dict(cases=[]), "cases must be a list"),
    (dict(cases=["fcn", "efnc"]), "unknown case 'efnc'; known are fcn, one-shot"),
    (dict(cases={"a": dict(variant="scrambled")}), "unknown variant 'scrambled'"),
    (dict(cases={"a": dict(start="cnn")}), "unknown start 'cnn'; known are fcn, efcn"),
    (dict(cases={"a": dict(method="oneshot")}), f"known are {', '.join(METHODS)}"),
    (dict(cases={"a": dict(init="he")}), "unknown init 'he'"),
    (dict(cases={"a": {}, "b": dict(rewnd=3)}), "unknown setting 'rewnd'"),
])
def test_nothing_is_done_in_vain(data, tmp_path, how, said):
    with pytest.raises(ValueError) as e: prune_rounds(data, folder=tmp_path/"new", **(FAST | how))
    assert said in str(e.value) and "\n" not in str(e.value) and not (tmp_path/"new").exists()


def test_no_images():
    rows = replace(images(), x=images().x.flatten(2))
    with pytest.raises(ValueError, match="pruning looks at images"): prune_rounds(Data(rows, rows), **FAST)


@pytest.mark.parametrize("change", [lambda x: x[:0], lambda x: x[:,:,:7], lambda x: x[:,:1]])
def test_images_to_test_on_that_do_not_fit(data, tmp_path, change):
    x = change(data.test.x)
    test = replace(data.test, x=x, y=data.test.y[:len(x)], mean=data.test.mean[:x.shape[1]], std=data.test.std[:x.shape[1]])
    with pytest.raises(ValueError, match=r"there must be test images, of the shape \(2, 8, 8\)"): prune_rounds(Data(data.train, test), folder=tmp_path/"new", **FAST)
    assert not (tmp_path/"new").exists()


def test_cases_whose_pixels_are_not_known(table):
    with pytest.raises(ValueError, match="whether the pixels of case 'mine' were permuted is not known"): locality_table(table.assign(case="mine"), (2, 8, 8))


def test_rounds_that_are_not_there(table):
    with pytest.raises(ValueError, match="no round 7 of case 'fcn' with seed 0"): round_masks(table, "fcn", 0, 7)
    with pytest.raises(ValueError, match="none of the rounds"): profile_table(table, (2, 8, 8), [9])


def test_locality_of_rounds(table):
    found = locality_table(table, (2, 8, 8)).set_index(["case", "round"])
    for case in ("fcn", "permuted", "efcn"):
        mask, row = next(iter(round_masks(table, case, 0, 3).values())), found.loc[case, 3]
        assert row.near == near_ratio(mask, (2, 8, 8)) and row.near_different == near_ratio(mask, (2, 8, 8), colours="different") and row.near_chance == near_ratio(mask, (2, 8, 8), keep="density")
        assert row.density == pytest.approx(mask.float().mean().item()) and row.connected == pytest.approx((mask.sum(1) > 0).float().mean().item())
    back = torch.zeros_like(m := round_masks(table, "permuted", 0, 3)["2"].view(14, 2, 64))
    back[:,:,pixel_order((2, 8, 8), 0)] = m
    assert found.undone["permuted", 3] == near_ratio(back.flatten(1), (2, 8, 8)) != found.near["permuted", 3] and found.undone["fcn", 3] == found.near["fcn", 3]
    profile = profile_table(table, (2, 8, 8), [3]).query("case == 'permuted'").drop(columns=["case", "seed", "round"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(profile, near_profile(back.flatten(1), (2, 8, 8)))
    own = locality_table(table[table.case == "permuted"].assign(case="mine"), (2, 8, 8), {"mine": dict(variant="permuted")})
    assert own.undone.tolist() == found.undone["permuted"].tolist()


# Interactions

def test_strengths_by_every_path():
    "Influence is the sum over all paths to an output of the products of absolute weights."
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Dropout(.5), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    w1, w2, w3 = (net[i].weight.detach().abs().numpy() for i in (1, 4, 6))
    want = np.zeros((4, 4))
    for a, b, i, j, k in itertools.product(range(4), range(4), range(3), range(5), range(2)): want[a, b] += min(w1[i, a], w1[i, b])*w2[j, i]*w3[k, j]
    np.testing.assert_allclose(interaction_strength(net, (1, 2, 2)), want, rtol=1e-4)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(3, 1), nn.MaxPool2d((1, 3), (2, 1))])
def test_influence_through_pooling_by_hand(pool):
    "The windows that PyTorch's own pooling reads, one pixel alight at a time."
    norm = nn.BatchNorm2d(2)
    with torch.no_grad(): norm.weight.copy_(torch.tensor([-2., .5])), norm.running_var.copy_(torch.tensor([4., 9.]))
    cnn = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), norm, nn.ReLU(), pool, nn.Flatten())
    cnn.append(nn.Linear(cnn(torch.zeros(2, 1, 5, 5)).shape[1], 3)).eval()
    out = cnn[5].weight.detach().abs().sum(0)
    alight = torch.eye(50).view(50, 2, 5, 5)
    reads = (pool(alight) > 0).flatten(1).float() # max of one bright pixel: 1 where the window holds it
    scale = (norm.weight.abs()/(norm.running_var + norm.eps).sqrt()).detach().repeat_interleave(25)
    torch.testing.assert_close(first_weights(cnn, (1, 5, 5))[1], reads @ out * scale, atol=1e-5, rtol=1e-5)


def test_scale_of_inputs_counts():
    net = make_dense((1, 3, 3), 4, [6])
    net(torch.randn(50, 1, 3, 3, generator=seeded(0))*torch.linspace(.1, 5, 9).view(1, 1, 3, 3))
    scale = 1/(net[1].running_var + net[1].eps).sqrt()
    torch.testing.assert_close(first_weights(net, (1, 3, 3))[0], net[2].weight.detach().abs()*scale)


def test_chance_is_the_mean_over_all_pairs_of_units():
    w, z = torch.rand(9, 7, generator=seeded(0))**3, torch.rand(9, generator=seeded(1))
    want = z.sum()*torch.minimum(w[:,None,:,None], w[None,:,None,:]).mean((0, 1))
    torch.testing.assert_close(study._chance_strengths(w, z), want, atol=2e-3, rtol=1e-3)


def test_memory_does_not_change_strengths():
    w, z = torch.rand(20, 11, generator=seeded(0)), torch.rand(20, generator=seeded(1))
    torch.testing.assert_close(pair_strengths(w, z, most=1), pair_strengths(w, z))


def test_cnn_and_its_efcn_interact_alike_and_within_windows():
    cnn = make_model("small", (2, 12, 12), 3, width=3)
    a, b = interaction_profile(cnn, (2, 12, 12)), interaction_profile(embed(cnn, (2, 12, 12)), (2, 12, 12))
    pd.testing.assert_frame_equal(a, b)
    a = a.set_index("distance")
    assert a.strength[1] > a.strength[4] > 0 == a.strength[5] == a.ratio[11]


def test_interactions_of_permuted_pixels_are_put_back():
    net, order = make_dense((2, 5, 5), 3, [8]), pixel_order((2, 5, 5), 1)
    moved = copy.deepcopy(net)
    with torch.no_grad(): moved[2].weight.copy_(permute_pixels(net[2].weight, (2, 5, 5), order))
    a, b = interaction_profile(net, (2, 5, 5)), interaction_profile(moved, (2, 5, 5), order)
    pd.testing.assert_frame_equal(a, b, rtol=1e-4)
    assert not np.allclose(a.strength, interaction_profile(moved, (2, 5, 5)).strength, rtol=1e-3)


def test_profile_is_the_mean_over_pairs_of_one_colour():
    shape, net = (2, 3, 4), make_dense((2, 3, 4), 3, [5])
    S, place = interaction_strength(net, shape), torch.cartesian_prod(*map(torch.arange, shape))
    by = {}
    for a, b in itertools.permutations(range(24), 2):
        if place[a,0] == place[b,0]: by.setdefault((place[a,1:] - place[b,1:]).abs().max().item(), []).append(S[a, b].item())
    mean = np.mean(sum(by.values(), []))
    np.testing.assert_allclose(interaction_profile(net, shape).strength, [np.mean(by[d])/mean for d in (1, 2, 3)], rtol=1e-4)


@pytest.mark.parametrize("net,said", [
    (nn.Linear(4, 2), "an nn.Sequential, not from a Linear"),
    (nn.Sequential(nn.Flatten()), "no layer with weights"),
    (nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Softmax(1), nn.Linear(3, 2)), "through Softmax is not known"),
    (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)), "without running statistics"),
    (nn.Sequential(nn.Conv2d(1, 1, 1), nn.MaxPool2d(2, 1, dilation=1), nn.MaxPool2d(1, dilation=2), nn.Flatten(), nn.Linear(1, 1)), "through MaxPool2d is not known"),
])
def test_networks_that_cannot_be_read(net, said):
    with pytest.raises(ValueError) as e: interaction_profile(net, (1, 2, 2))
    assert said in str(e.value)


def test_interactions_of_no_image():
    with pytest.raises(ValueError, match="not in inputs of shape"): interaction_profile(nn.Sequential(nn.Linear(4, 2)), (4,))


def test_interaction_table(data, tmp_path):
    how = dict(folder=tmp_path, **FAST)
    table = interaction_table(data, **how)
    assert table.groupby("network").size().to_dict() == {name: 7 for name in NETWORKS} and table.equals(interaction_table(data, **how))
    rounds = prune_rounds(data, ["fcn", "permuted"], **how)
    accuracy = lambda case, r: rounds[(rounds.case == case) & (rounds["round"] == r)].accuracy.iloc[0]
    found = table.groupby("network").accuracy.first()
    assert [found["fcn"], found["fcn permuted"], found["fcn pruned"]] == [accuracy("fcn", 0), accuracy("permuted", 0), accuracy("fcn", 3)]
    for wrong in (["mlp"], "fcn", []):
        with pytest.raises(ValueError, match="networks must be a list of some of cnn, efcn"): interaction_table(data, wrong, **FAST)


# Claims and study

HIGH = dict(zip(CASES, [.9, .2, .02, .05, .6, .03, 1., 3., .3])) # excess at the end, case by case


def made(excess, loss=0., seeds=4, noise=.01):
    "A table of rounds by formula, with noise."
    draw = seeded(0)
    e = lambda: noise*torch.randn(1, generator=draw).item()
    return pd.DataFrame([dict(case=c, seed=s, round=r, near=1 + x*r/11 + e(), undone=1 + (excess["fcn"] if c == "permuted" else x)*r/11 + e(),
                              accuracy=.5 - (loss if c == "fcn" else .1)*r/11 + e()/10) for c, x in excess.items() for s in range(seeds) for r in range(12)])


def verdicts(table): return {row.claim.split()[0]: row.verdict for row in pruning_claims(table).itertuples()}


def test_claims_on_made_up_tables():
    assert list(HIGH) == ["fcn", "one-shot", "permuted", "gaussian", "white", "white-gaussian", "gaussian-class", "efcn", "glorot"]
    assert verdicts(made(HIGH)) == {k: "fails" if k == "3b" else "holds" for k in ("1a", "1b", "2a", "2b", "3a", "3b", "3c", "3d", "4a", "4b", "5")}
    assert verdicts(made(HIGH | dict(gaussian=-.9)))["3a"] == "fails" # an excess of the other sign has not vanished
    assert verdicts(made(HIGH, loss=.2)) | {"4a": "fails", "4b": "fails"} == verdicts(made(HIGH, loss=.2))
    assert {k: verdicts(made(HIGH | dict(fcn=-.3)))[k] for k in ("1a", "2a", "2b", "3a")} == {"1a": "fails"} | dict.fromkeys(("2a", "2b", "3a"), "not judged") and verdicts(made(HIGH | dict(efcn=.1)))["5"] == "fails"
    assert {*verdicts(made({"fcn": .9})).values()} == {"holds", "not judged"} and verdicts(made(HIGH, seeds=1))["1a"] == "undecided"
    assert verdicts(made(HIGH, noise=3.))["1a"] == "undecided"
    rows = pruning_claims(made(HIGH, noise=0.)).effect.tolist() # the numbers that are judged, by hand
    assert rows[2] == "margin +20.5 points: +0.02 left of +0.90" and rows[4] == "margin +17.5 points: +0.05 left of +0.90" and rows[7] == "margin +12.0 points: +0.03 left of +0.60"
    assert rows[0].startswith("+73.6 points in round 9") and rows[1].startswith("+57.3 points in round 9") and rows[8:10] == ["+0.0 points", "+10.0 points"]


@pytest.mark.parametrize("last", [0, 12])
def test_claims_about_rounds_there_are_not(last):
    with pytest.raises(ValueError, match=f"of which the last {last} cannot be judged"): pruning_claims(made(HIGH), last)


def test_study_writes_what_it_returns(data, tmp_path):
    tables = pruning_study(data, tmp_path, ["fcn", "permuted"], networks=["fcn"], units=3, **FAST)
    assert sorted(tables) == sorted(p.stem for p in tmp_path.glob("*.csv")) == ["claims", "interactions", "profiles", "rounds", "units"]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/"rounds.csv"), tables["rounds"])
    mask = round_masks(prune_rounds(data, ["permuted"], folder=tmp_path, **FAST), "permuted", 0, 3)["2"]
    drawn = [mask_from_text([text], (1, 128)) for text in tables["units"].query("case == 'permuted'")["mask"]]
    assert torch.cat(drawn).equal(busiest_units(mask, (2, 8, 8), 3).flatten(1))


@pytest.mark.parametrize("how,said", [(dict(rounds=2), "rounds must be 3 or more, not 2"), (dict(units=15), "units must be a number from 1 to 14"), (dict(networks=["mlp"]), "networks must be a list"),
                                      (dict(fraction=1), "the fraction to prune"), (dict(cases=["mine"]), "unknown case 'mine'"), (dict(units=2.5), "from 1 to 14, the units"),
                                      (dict(networks="fcn"), "networks must be a list")])
def test_a_study_that_is_impossible(data, tmp_path, how, said):
    with pytest.raises(ValueError) as e: pruning_study(data, tmp_path/"new", **(FAST | dict(units=3) | how))
    assert said in str(e.value) and not (tmp_path/"new").exists()


def test_a_null_keeps_what_it_says():
    "What the study's null rests on: columns keep their sums, and nothing else."
    mask = random(20, (1, 5, 5), .3)
    shuffled = shuffle_mask(mask, "inputs", seeded(0))
    assert shuffled.sum(0).equal(mask.sum(0)) and not shuffled.sum(1).equal(mask.sum(1))


@pytest.mark.parametrize("size,networks,said", [(4, ["efcn"], "do not fit this network"), (3, None, "four pixels wide or high")])
def test_images_too_small_for_what_comes_last(data, tmp_path, size, networks, said):
    "Nothing is pruned before an impossible table at the end is found to be so."
    small = Data(*(replace(d, x=d.x[:,:,:size,:size].contiguous()) for d in data))
    with pytest.raises(ValueError, match=said): pruning_study(small, tmp_path/"new", ["fcn"], networks=networks, units=3, **FAST)
    assert not (tmp_path/"new").exists()
    if size == 4: assert "interactions" not in pruning_study(small, tmp_path, ["fcn"], networks=None, units=3, **FAST)


def test_what_a_cell_is_made_of(data, tmp_path):
    "Data and rounds name a cell; a seed other than 0 has its own order of pixels, draws and batches."
    how = dict(folder=tmp_path) | FAST | dict(seeds=[0, 1])
    table = prune_rounds(data, ["permuted"], **how)
    back = permute_pixels(next(iter(round_masks(table, "permuted", 1, 3).values())), (2, 8, 8), pixel_order((2, 8, 8), 1).argsort())
    assert locality_table(table, (2, 8, 8)).set_index(["seed", "round"]).undone[1, 3] == near_ratio(back, (2, 8, 8))
    run = lambda seed, variant: study._Run(data, DEFAULTS | dict(seed=seed, variant=variant)).images.train.fingerprint
    assert run(0, "permuted") != run(1, "permuted") and run(0, "gaussian") != run(1, "gaussian")
    turned = Data(data.train, replace(data.test, x=-data.test.x))
    assert not prune_rounds(turned, ["permuted"], **how).loss.equals(table.loss)
    first, other = (interaction_table(d, ["fcn"], **how) for d in (data, turned))
    assert not first.accuracy.equals(other.accuracy)
    more = interaction_table(data, ["fcn pruned"], **how), interaction_table(data, ["fcn pruned"], **(how | dict(rounds=5)))
    assert not more[0].strength.equals(more[1].strength)


def test_glorot_is_normal_without_biases():
    net = make_dense((3, 16, 16), 10, init="glorot")
    w = net[2].weight.detach()
    assert ((w - w.mean())**4).mean()/w.var()**2 == pytest.approx(3, abs=.1) and not net[2].bias.any()


def test_share_left_of_all_weights(table):
    masks = round_masks(table, "fcn", 0, 3).values()
    assert locality_table(table, (2, 8, 8)).query("case == 'fcn' and round == 3").left.iloc[0] == pytest.approx(sum(int(m.sum()) for m in masks)/sum(m.numel() for m in masks))


def test_a_loss_of_five_points_is_no_margin(): assert verdicts(made(HIGH, loss=.05))["4a"] == "fails"
