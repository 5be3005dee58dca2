"Pruning, against rounds written out and made-up tables."
import itertools
from dataclasses import replace

import pandas as pd
import pytest
import torch

import efcn_nb.studies.pruning as study
from efcn_nb.ladder.embedding import embed
from tiny import smooth_images as images
from efcn_nb.materials.controls import permute_pixels, pixel_order
from efcn_nb.materials.data import Data
from efcn_nb.instruments.locality import near_profile, near_ratio
from efcn_nb.instruments.pruning_rounds import locality_table, profile_table, round_masks
from efcn_nb.materials.models import make_dense
from efcn_nb.experiments.runs import run_id
from efcn_nb.studies.pruning import (
    CASES, METHODS, PRUNING_NETWORKS, PruningSettings, interaction_table, prune_rounds, pruning_claims, pruning_study)
from efcn_nb.training import rewinding
from efcn_nb.training.arms import add_off_local_noise
from efcn_nb.training.loop import evaluate, train_steps
from efcn_nb.training.rewinding import step_batches, survivors

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = dict(seeds=[0], rounds=3, steps=12, rewind=3, batch_size=30, widths=[14, 12], channels=1, relax=4)


def fast(**changed): return PruningSettings(**(FAST | changed))



def seeded(seed): return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def data(): return Data(images(), images(60, seed=1))


@pytest.fixture(scope="module")
def table(data):
    return prune_rounds(data, ["fcn", "one-shot", "permuted", "efcn", "noisy efcn", "noisy start"], fast())


# Rounds

@pytest.mark.parametrize("call,said", [
    (lambda: make_dense((1, 4, 4), 3, [4, 0]), "each of widths must be a whole number, 1 or more, not 0"),
    (lambda: make_dense((1, 4, 4), 3, init="he"), "unknown init 'he'; known are default, glorot"),
])
def test_bad_input(call, said):
    with pytest.raises(ValueError) as e: call()
    assert said in str(e.value) and "\n" not in str(e.value)


def test_rounds_are_rewound(data, monkeypatch):
    "Every round starts from all parameters and statistics of the rewind step, but for the mask; with the same batches."
    starts, real = [], rewinding.fit
    def spy(model, batches, optimizer):
        batches = list(batches)
        state = {k: v for k, v in model.state_dict().items() if not k.endswith("mask")}
        state = {k.replace("parametrizations.", "").replace(".original", ""): v.clone() for k, v in state.items()}
        starts.append((state, [y.tolist() for _, y in batches]))
        return real(model, batches, optimizer)
    for module in (study, rewinding): monkeypatch.setattr(module, "fit", spy)
    table = prune_rounds(data, ["fcn"], fast())
    (_, first), *rounds = starts
    assert len(first) == 3 and len(rounds) == 4 and all(len(seen) == 9 and seen == rounds[0][1] for _, seen in rounds)
    early = rounds[0][0]
    for r, (start, _) in enumerate(rounds):
        masks = round_masks(table, "fcn", 0, r)
        for name, value in start.items():
            layer = name.removesuffix(".weight")
            held = layer in masks and name.endswith("weight")
            assert value.equal(early[name]*masks[layer] if held else early[name]), name


def test_one_shot_keeps_the_largest_of_the_dense_network(data, table):
    net = make_dense(data.train.shape, 3, [14, 12])
    train_steps(net.train(), torch.optim.SGD(net.parameters(), .1), step_batches(data.train, 30, 0, 12, 0))
    for r in (1, 3):
        for name, mask in round_masks(table, "one-shot", 0, r).items():
            size = net.get_submodule(name).weight.abs()
            assert size[mask].min() >= size[~mask].max()
    assert round_masks(table, "one-shot", 0, 1)["2"].equal(round_masks(table, "fcn", 0, 1)["2"])
    early = table[table["round"] < 2].groupby("case").accuracy
    assert early.get_group("one-shot").tolist() == early.get_group("fcn").tolist()


def test_the_last_layer_is_pruned_on_demand(data):
    masks = round_masks(prune_rounds(data, settings=fast(last=True)), "fcn", 0, 3)
    assert [m.shape for m in masks.values()] == [(14, 128), (12, 14), (3, 12)]
    assert masks["8"].sum() == survivors(36, .3, 3)[-1]


def test_an_efcn_starts_as_its_cnn(data):
    run = study._Run(data, fast(start="efcn"), 0)
    torch.testing.assert_close(run.at_start(4).eval()(data.test.x), run.cnn(4).eval()(data.test.x))
    assert not torch.equal(run.cnn(4)[0].weight, run.cnn(0)[0].weight)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_noisy_efcn_starts_with_as_much_outside_the_windows_as_within(data, seed):
    "Noise of the norm of the weights, drawn with the seed of the run."
    run = study._Run(data, fast(start="noisy efcn"), seed)
    start, plain = run.at_start(4), study._Run(data, fast(start="efcn"), seed).at_start(4)
    again, other = run.at_start(4), embed(run.cnn(4), run.shape)
    weight, local = start[0].weight, start[0].geometry.mask
    assert weight[local].equal(plain[0].weight[local]) and weight[~local].all()
    assert weight[~local].norm().item() == pytest.approx(weight[local].norm().item(), rel=1e-4)
    assert weight.equal(again[0].weight)
    add_off_local_noise(other, seed=seed + 1)
    assert not weight.equal(other[0].weight)


def test_the_noisy_start_is_pruned_without_training(data, table):
    "The largest weights of the start are left, as many as of the network that is trained; and nothing has moved."
    start = study._Run(data, fast(start="noisy efcn"), 0).at_start(4).eval()
    for r in range(4):
        found = round_masks(table, "noisy start", 0, r)
        for name, mask in found.items():
            size = start.get_submodule(name).weight.abs()
            assert not r or size[mask].min() >= size[~mask].max()
            assert mask.sum() == round_masks(table, "noisy efcn", 0, r)[name].sum()
    with torch.no_grad():
        for name, mask in found.items(): start.get_submodule(name).weight.mul_(mask)
    row = table[(table.case == "noisy start") & (table["round"] == 3)].iloc[0]
    assert row.accuracy == evaluate(start, data.test)["accuracy"]
    noisy = round_masks(table, "noisy efcn", 0, 3)["0"]
    assert not noisy.equal(found["0"])


# What cannot come out otherwise

def test_a_dense_network_cannot_tell_whether_pixels_are_permuted(data, monkeypatch):
    """With the columns of its first weights in the order of the pixels, every round leaves the same masks, permuted.

    Initial weights are independent, so that any order of columns is as likely: locality of permuted pixels is that of
    masks with permuted columns, and once undone it is that of the images."""
    order, own_batches = pixel_order((2, 8, 8), 0), study.step_batches
    def doubled(*args): return ((x.double(), y) for x, y in own_batches(*args))
    monkeypatch.setattr(study, "step_batches", doubled)
    monkeypatch.setattr(study, "evaluate", lambda *args: dict(accuracy=0., loss=0.))
    def dense(columns):
        def made(*args):
            net = make_dense(*args).double()
            net[2].weight.data = net[2].weight.data[:,columns]
            return net
        return made
    monkeypatch.setattr(study, "make_dense", dense(torch.arange(128)))
    plain = prune_rounds(data, ["fcn"], fast())
    columns = torch.arange(128).view(2, 64)[:,order].flatten()
    monkeypatch.setattr(study, "make_dense", dense(columns))
    permuted = prune_rounds(data, ["permuted"], fast())
    for r in range(4):
        seen, first = round_masks(permuted, "permuted", 0, r)["2"], round_masks(plain, "fcn", 0, r)["2"]
        assert seen.equal(first[:,columns])
    shape = (2, 8, 8)
    undone, near = locality_table(permuted, shape).undone, locality_table(plain, shape).near
    assert undone.tolist() == near.tolist() and near.nunique() == 4


def test_a_start_of_zeros_outside_the_windows_loses_those_first(data):
    "Pruned at its start, an eFCN keeps local weights alone, unless there is noise outside the windows."
    for start, kept in (("efcn", False), ("noisy efcn", True)):
        cases = {"start": dict(start=start, method="untrained")}
        mask = round_masks(prune_rounds(data, cases, fast(rounds=6)), "start", 0, 6)["0"]
        local = study._Run(data, fast(start="efcn"), 0).at_start(4)[0].geometry.mask
        assert mask.sum() < local.sum() and bool((mask & ~local).any()) == kept


def test_nothing_but_the_seed_decides(data, table):
    state = torch.get_rng_state()
    again = prune_rounds(data, ["permuted", "fcn"], fast())
    assert torch.get_rng_state().equal(state)
    for case in ("permuted", "fcn"):
        assert again[again.case == case].values.tolist() == table[table.case == case].values.tolist()
    other = prune_rounds(data, ["fcn"], fast(seeds=[1]))
    assert not round_masks(other, "fcn", 1, 3)["2"].equal(round_masks(table, "fcn", 0, 3)["2"])


def test_interrupted_and_resumed(data, table, tmp_path, monkeypatch):
    "Ctrl-C in round 2; the rounds before are kept, and the end is the same."
    calls, real = [], study.evaluate
    def stops(*args):
        calls.append(args)
        if len(calls) == 3: raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(study, "evaluate", stops)
    with pytest.raises(KeyboardInterrupt): prune_rounds(data, ["fcn"], fast(), tmp_path)
    found = prune_rounds(data, ["fcn"], fast(), tmp_path)
    assert len(calls) == 5 and found.values.tolist() == table[table.case == "fcn"].values.tolist()
    assert prune_rounds(data, ["fcn"], fast(), tmp_path).equals(found) and len(calls) == 5
    more = prune_rounds(data, ["fcn"], fast(rounds=5), tmp_path)
    assert len(calls) == 7 and more[more["round"] < 4].values.tolist() == found.values.tolist()


@pytest.mark.parametrize("how,said", [
    (dict(fraction=1.), "fraction must be below 1, so that weights remain, not 1.0"),
    (dict(fraction=-.5), "fraction must be a number, 0 or more, not -0.5"),
    (dict(rounds=-1), "rounds must be a whole number, 0 or more, not -1"),
    (dict(rewind=12), "rewind must be a whole number from 0 to 11, not 12"),
    (dict(steps=0, rewind=0), "steps must be a whole number, 1 or more, not 0"),
    (dict(batch_size=1), "batch_size must be a whole number, 2 or more"),
    (dict(lr=0), "lr must be a positive number, not 0"), (dict(seeds=[1, 1]), "1 is there twice"),
    (dict(widths=[4, -1]), "each of widths must be a whole number, 1 or more, not -1"),
    (dict(widths=[]), "widths must be a list"),
    (dict(last="no"), "last must be True or False, not 'no'"), (dict(init="he"), "unknown init 'he'"),
    (dict(variant="scrambled"), "unknown variant 'scrambled'"),
    (dict(start="cnn"), "unknown start 'cnn'; known are fcn, efcn, noisy efcn"),
    (dict(method="oneshot"), f"known are {', '.join(METHODS)}"),
])
def test_impossible_settings(how, said):
    with pytest.raises(ValueError) as e: fast(**how)
    assert said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("cases,how,said", [
    (["fcn"], dict(rounds=40), "is less than one: prune fewer rounds or another fraction"),
    (["fcn"], dict(fraction=.999, rounds=3), "of which 0.999 is less than one"),
    (["fcn"], dict(batch_size=91), "batch_size must be a whole number from 2 to 90, not 91"),
    (["fcn"], dict(variant="permuted"), "variant is what cases differ in: give cases, such as {\"mine\": dict("),
    (["fcn"], dict(start="efcn"), "start is what cases differ in"),
    (["fcn"], dict(method="one-shot"), "method is what cases differ in"),
    ("fcn", {}, "cases must be a list, such as ['fcn'], not 'fcn'"), ([], {}, "cases must hold at least one value"),
    (["fcn", "efnc"], {}, "'efnc'; known are fcn, one-shot"), (["fcn", "fcn"], {}, "'fcn' is there twice"),
    ({"a": {}, "b": dict(variant="scrambled")}, {}, "unknown variant 'scrambled'"),
])
def test_nothing_is_done_in_vain(data, tmp_path, cases, how, said):
    with pytest.raises(ValueError) as e: prune_rounds(data, cases, fast(**how), tmp_path/"new")
    assert said in str(e.value) and "\n" not in str(e.value) and not (tmp_path/"new").exists()


def test_settings_that_do_not_exist(data):
    with pytest.raises(TypeError, match="momentum"): fast(momentum=.9)
    with pytest.raises(TypeError, match="rewnd"): prune_rounds(data, {"a": {}, "b": dict(rewnd=3)}, fast())


def test_no_images():
    rows = replace(images(), x=images().x.flatten(2))
    with pytest.raises(ValueError, match="pruning looks at images"): prune_rounds(Data(rows, rows), settings=fast())


@pytest.mark.parametrize("change", [lambda x: x[:0], lambda x: x[:,:,:7], lambda x: x[:,:1]])
def test_images_to_test_on_that_do_not_fit(data, tmp_path, change):
    x = change(data.test.x)
    channels = x.shape[1]
    test = replace(data.test, x=x, y=data.test.y[:len(x)], mean=data.test.mean[:channels], std=data.test.std[:channels])
    with pytest.raises(ValueError, match=r"there must be test images, of the shape \(2, 8, 8\)"):
        prune_rounds(Data(data.train, test), settings=fast(), folder=tmp_path/"new")
    assert not (tmp_path/"new").exists()


def test_rounds_that_are_not_there(table):
    with pytest.raises(ValueError, match="no round 7 of case 'fcn' with seed 0"): round_masks(table, "fcn", 0, 7)
    with pytest.raises(ValueError, match="none of the rounds"): profile_table(table, (2, 8, 8), [9])


def test_locality_of_rounds(table):
    shape, found = (2, 8, 8), locality_table(table, (2, 8, 8)).set_index(["case", "round"])
    for case in ("fcn", "permuted", "efcn"):
        mask, row = next(iter(round_masks(table, case, 0, 3).values())), found.loc[case, 3]
        assert row.near == near_ratio(mask, shape) and row.near_chance == near_ratio(mask, shape, keep="density")
        assert row.near_different == near_ratio(mask, shape, colours="different")
        assert row.density == pytest.approx(mask.float().mean().item())
        assert row.connected == pytest.approx((mask.sum(1) > 0).float().mean().item())
    back = torch.zeros_like(m := round_masks(table, "permuted", 0, 3)["2"].view(14, 2, 64))
    back[:,:,pixel_order(shape, 0)] = m
    assert found.undone["permuted", 3] == near_ratio(back.flatten(1), shape) != found.near["permuted", 3]
    assert found.undone["fcn", 3] == found.near["fcn", 3]
    profile = profile_table(table, shape, [3]).query("case == 'permuted'").drop(columns=["case", "seed", "round"])
    pd.testing.assert_frame_equal(profile.reset_index(drop=True), near_profile(back.flatten(1), shape))
    own = locality_table(table[table.case == "permuted"].assign(case="mine"), shape)
    assert own.undone.tolist() == found.undone["permuted"].tolist()


# Networks

def test_interaction_table(data, tmp_path):
    table = interaction_table(data, settings=fast(), folder=tmp_path)
    assert table.groupby("network").size().to_dict() == {name: 7 for name in PRUNING_NETWORKS}
    assert table.equals(interaction_table(data, settings=fast(), folder=tmp_path))
    rounds = prune_rounds(data, ["fcn", "permuted"], fast(), tmp_path).groupby(["case", "round"]).accuracy.first()
    found = table.groupby("network").accuracy.first()
    assert found["fcn"] == rounds["fcn", 0] and found["fcn permuted"] == rounds["permuted", 0]
    assert found["fcn pruned"] == rounds["fcn", 3]
    for wrong, said in ((["mlp"], "unknown each of networks 'mlp'"), ("fcn", "must be a list"), ([], "at least one")):
        with pytest.raises(ValueError, match=said): interaction_table(data, wrong, fast())


# Claims and study

HIGH = dict(zip(CASES, [.9, .2, .02, .05, .6, .03, 1., 3., 3., 2., .3])) # excess at the end, case by case


def made(excess, loss=0., seeds=4, noise=.01):
    "A table of rounds by formula, with noise."
    draw = seeded(0)
    e = lambda: noise*torch.randn(1, generator=draw).item()
    rows = []
    for c, s, r in itertools.product(excess, range(seeds), range(12)):
        rows.append(dict(case=c, seed=s, round=r, near=1 + excess[c]*r/11 + e(),
                         accuracy=.5 - (loss if c == "fcn" else .1)*r/11 + e()/10))
    return pd.DataFrame(rows)


def verdicts(table): return {row.claim.split()[0]: row.verdict for row in pruning_claims(table).itertuples()}


def test_claims_on_made_up_tables():
    assert list(HIGH) == ["fcn", "one-shot", "permuted", "gaussian", "white", "white-gaussian", "gaussian-class",
                          "efcn", "noisy efcn", "noisy start", "glorot"]
    names = ("1a", "1b", "2a", "2b", "2c", "2d", "3a", "3b", "4a", "4b")
    assert verdicts(made(HIGH)) == {k: "fails" if k == "2b" else "holds" for k in names}
    assert verdicts(made(HIGH | dict(gaussian=-.9)))["2a"] == "fails" # an excess of the other sign has not vanished
    lossy = verdicts(made(HIGH, loss=.2))
    assert lossy["3a"] == lossy["3b"] == "fails" and lossy["1a"] == "holds"
    assert verdicts(made(HIGH, loss=.05))["3a"] == "fails"            # five points are more than the margin
    inverse = verdicts(made(HIGH | dict(fcn=-.3)))
    assert [inverse[k] for k in ("1a", "2a", "2b")] == ["fails"] + 2*["not judged"]
    assert {*verdicts(made({"fcn": .9})).values()} == {"holds", "not judged"}
    assert verdicts(made(HIGH, seeds=1))["1a"] == verdicts(made(HIGH, noise=3.))["1a"] == "undecided"


@pytest.mark.parametrize("noisy, start, said", [
    (3., 2., ["holds", "holds"]), (3., 4., ["holds", "fails"]),
    (.5, .2, ["fails", "holds"]), (.1, .3, ["fails", "fails"]),
    (3., None, ["holds", "not judged"]), (None, 2., ["not judged", "not judged"])])
def test_a_noisy_efcn_is_compared_with_the_fcn_and_with_its_own_start(noisy, start, said):
    "The plain eFCN, whose masks are local by construction, does not count."
    excess = HIGH | {"noisy efcn": noisy, "noisy start": start}
    found = verdicts(made({case: x for case, x in excess.items() if x is not None}))
    assert [found["4a"], found["4b"]] == said


def test_claims_by_hand():
    rows = pruning_claims(made(HIGH, noise=0.)).effect.tolist()
    assert rows[0] == "+73.6 points in round 9, the least sure of 3"
    assert rows[1] == "+57.3 points in round 9, the least sure of 3"
    assert rows[2] == "margin +17.5 points: +0.05 left of +0.90"
    assert rows[5] == "margin +12.0 points: +0.03 left of +0.60" and rows[6:8] == ["+0.0 points", "+10.0 points"]
    assert rows[8:] == ["near ratio 4.00, FCN 1.90", "near ratio 4.00, start 3.00"]


@pytest.mark.parametrize("last", [0, 12])
def test_claims_about_rounds_there_are_not(last):
    with pytest.raises(ValueError, match=f"last must be a whole number from 1 to 11, not {last}"):
        pruning_claims(made(HIGH), last)


@pytest.mark.parametrize("settings,how,said", [
    (dict(rounds=2), {}, "rounds must be a whole number, 3 or more, not 2"),
    ({}, dict(units=15), "units must be a whole number from 1 to 14"), ({}, dict(units=2.5), "from 1 to 14"),
    ({}, dict(networks=["mlp"]), "known are cnn, efcn"), ({}, dict(networks="fcn"), "networks must be a list"),
    ({}, dict(cases=["mine"]), "known are fcn, one-shot"),
])
def test_a_study_that_is_impossible(data, tmp_path, settings, how, said):
    with pytest.raises(ValueError) as e:
        pruning_study(data, tmp_path/"new", settings=fast(**settings), **(dict(units=3) | how))
    assert said in str(e.value) and not (tmp_path/"new").exists()


@pytest.mark.parametrize("size,networks,said", [
    (4, ["efcn"], "do not fit this network"), (3, None, "four pixels wide or high")])
def test_images_too_small_for_what_comes_last(data, tmp_path, size, networks, said):
    "Nothing is pruned before an impossible table at the end is found to be so."
    small = Data(*(replace(d, x=d.x[:,:,:size,:size].contiguous()) for d in data))
    with pytest.raises(ValueError, match=said): pruning_study(small, tmp_path/"new", ["fcn"], fast(), networks, 3)
    assert not (tmp_path/"new").exists()
    if size == 4: assert "interactions" not in pruning_study(small, tmp_path, ["fcn"], fast(), None, 3)


def test_what_a_cell_is_made_of(data, tmp_path):
    "Data and rounds name a cell; a seed other than 0 has its own order of pixels, draws and batches."
    two = fast(seeds=[0, 1])
    table = prune_rounds(data, ["permuted"], two, tmp_path)
    mask = next(iter(round_masks(table, "permuted", 1, 3).values()))
    back = permute_pixels(mask, (2, 8, 8), pixel_order((2, 8, 8), 1).argsort())
    undone = locality_table(table, (2, 8, 8)).set_index(["seed", "round"]).undone
    assert undone[1, 3] == near_ratio(back, (2, 8, 8))
    for variant in ("permuted", "gaussian"):
        images = [study._Run(data, fast(variant=variant), seed).images.train for seed in (0, 1)]
        assert images[0].fingerprint != images[1].fingerprint
    turned = Data(data.train, replace(data.test, x=-data.test.x))
    assert not prune_rounds(turned, ["permuted"], two, tmp_path).loss.equals(table.loss)
    first, other = (interaction_table(d, ["fcn"], two, tmp_path) for d in (data, turned))
    assert not first.accuracy.equals(other.accuracy)
    more = [interaction_table(data, ["fcn pruned"], fast(rounds=r), tmp_path) for r in (3, 5)]
    assert not more[0].strength.equals(more[1].strength)


def test_stored_runs_keep_their_names(data):
    "A stored table is found by the hash of what determines it."
    run = study._Run(data, PruningSettings(), 0)
    config = run.config_of_round(2) | dict(train="a", test="b")
    assert run_id(config) == "b207255a4849" and run_id(config | dict(method="one-shot")) == "c33408719fa3"
    start = study._Run(data, PruningSettings(start="noisy efcn", method="untrained"), 0)
    assert [start.config_of_round(r)["method"] for r in range(3)] == 3*["untrained"] # none is a cell of another method
    once = study._Run(data, PruningSettings(method="one-shot"), 0)
    assert [once.config_of_round(r)["method"] for r in range(3)] == ["iterative", "iterative", "one-shot"]


def test_glorot_is_normal_without_biases():
    net = make_dense((3, 16, 16), 10, init="glorot")
    w = net[2].weight.detach()
    assert ((w - w.mean())**4).mean()/w.var()**2 == pytest.approx(3, abs=.1) and not net[2].bias.any()


def test_share_left_of_all_weights(table):
    masks = round_masks(table, "fcn", 0, 3).values()
    left = locality_table(table, (2, 8, 8)).query("case == 'fcn' and round == 3").left.iloc[0]
    assert left == pytest.approx(sum(int(m.sum()) for m in masks)/sum(m.numel() for m in masks))
