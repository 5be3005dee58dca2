"""A member of a cohort does what it does alone, whatever the others do."""
import copy
import math

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efcn_nb.cli import efcn_bench
from efcn_nb.instruments.subspaces import shares
from efcn_nb.ladder.embedding import embed
from efcn_nb.materials.data import Data, load_data
from efcn_nb.materials.models import MaxPool2d, alexnet, make_model, small
from efcn_nb.training.cohorts import Cohort, check_cohort
from efcn_nb.training.loop import Diverged, epoch_seed, train, train_epoch

pytestmark = pytest.mark.usefixtures("one_thread")  # as a study trains them: threads can change last bits

SHAPE = (2, 9, 9)
RATES = [.1, .03, .05]
SEEDS = [4, 5, 6]


def plain(): return small(SHAPE, 5, width=3)
def with_dropout(): return nn.Sequential(*small(SHAPE, 5, width=3)[:-1], nn.Dropout(.4), nn.LazyLinear(5))


def with_batchnorm():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), MaxPool2d(2), nn.Flatten(), nn.Linear(36, 8),
                         nn.BatchNorm1d(8), nn.Linear(8, 5))


def with_groups():
    return nn.Sequential(nn.Conv2d(2, 4, 3, groups=2, bias=False), nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2, padding=1),
                         nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


def with_own_weights():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.PReLU(3), nn.GroupNorm(3, 3), nn.Flatten(), nn.LayerNorm(147),
                         nn.Linear(147, 5))


class Residual(nn.Module):
    "A forward function that uses one module twice, and functions."
    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(27, 5)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = x + F.relu(self.again(x)) + self.again(x)
        return self.last(F.adaptive_avg_pool2d(x, 3).reshape(x.shape[0], -1))


class Rescaled(nn.Module):
    "A parameter of the network's own."
    def __init__(self):
        super().__init__()
        self.body, self.scale = plain(), nn.Parameter(torch.ones(5))

    def forward(self, x): return self.body(x)*self.scale


NETWORKS = [plain, with_dropout, with_batchnorm, with_groups, with_own_weights, Residual, Rescaled]
FORMS = ["cnn", "lcn", "fcn"]


def networks(make, form, dtype, n=3):
    "Networks that differ in weights."
    found = []
    for seed in range(n):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad(): model.eval()(torch.zeros(1, *SHAPE)), model.train()
        model = model.to(dtype)
        found.append(model if form == "cnn" else embed(model, SHAPE, to=form))
    return found


class Images:
    "Images of any precision, with what training needs of a `Dataset`."
    def __init__(self, n, dtype, shape=SHAPE):
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, *shape, generator=draw, dtype=dtype)
        self.y = torch.randint(0, 5, (n,), generator=draw)

    def __len__(self): return len(self.x)
    def batch(self, index): return self.x[index], self.y[index]

    def batches(self, batch_size, generator=None):
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        return (self.batch(index) for index in order.split(batch_size))


def trained_alone(models, data, batch_size, precision="fp32", **settings):
    measured = []
    for model, lr, seed in zip(models, RATES, SEEDS):
        optimizer = torch.optim.SGD(model.parameters(), lr, **settings)
        measured.append(train_epoch(model, optimizer, data, batch_size, seed, precision=precision))
    return measured


def largest_difference(some, others):
    pairs = [(a, b) for one, other in zip(some, others)
             for a, b in zip(one.state_dict().values(), other.state_dict().values())]
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", NETWORKS)
def test_ten_steps_in_a_cohort_are_ten_steps_alone(make, form):
    data = Images(47, torch.float64)                              # ten batches, the last one smaller
    together, alone = networks(make, form, torch.float64), networks(make, form, torch.float64)
    cohort = Cohort(together, SHAPE, RATES)
    measured = cohort.train_epoch(data, 5, SEEDS)
    expected = trained_alone(alone, data, 5)
    assert largest_difference(together, alone) <= 1e-12
    for found, wanted in zip(measured, expected):
        assert found["accuracy"] == wanted["accuracy"] and abs(found["loss"] - wanted["loss"]) < 1e-6
    assert largest_difference(together[:1], networks(make, form, torch.float64)[:1]) > 1e-4   # they have moved


@pytest.mark.parametrize("settings", [dict(momentum=.9), dict(weight_decay=.01), dict(momentum=.5, weight_decay=.1)])
@pytest.mark.parametrize("form", FORMS)
def test_momentum_and_decay_are_those_of_a_network_alone(form, settings):
    data = Images(47, torch.float64)
    together, alone = networks(plain, form, torch.float64), networks(plain, form, torch.float64)
    Cohort(together, SHAPE, RATES, **settings).train_epoch(data, 5, SEEDS)
    trained_alone(alone, data, 5, **settings)
    assert largest_difference(together, alone) <= 1e-12


@pytest.mark.parametrize("precision, most", [("fp32", 1e-5), ("bf16", 2e-2)])
@pytest.mark.parametrize("form", FORMS)
def test_ten_steps_agree_to_rounding(form, precision, most):
    data = Images(47, torch.float32)
    together, alone = networks(plain, form, torch.float32), networks(plain, form, torch.float32)
    Cohort(together, SHAPE, RATES).train_epoch(data, 5, SEEDS, precision=precision)
    trained_alone(alone, data, 5, precision)
    assert largest_difference(together, alone) <= most


@pytest.mark.parametrize("form", FORMS)
def test_a_member_does_not_depend_on_the_others(form):
    data, models = Images(47, torch.float32), networks(plain, form, torch.float32)
    alone = copy.deepcopy(models[1])
    Cohort(models, SHAPE, RATES).train_epoch(data, 5, SEEDS)
    Cohort([alone], SHAPE, RATES[1]).train_epoch(data, 5, SEEDS[1:2])
    assert largest_difference([models[1]], [alone]) == 0


def test_alexnet_embedded_with_dropout_in_a_cohort():
    shape = 1, 32, 32
    images = Images(30, torch.float32, shape)
    def made():
        torch.manual_seed(0)
        return [embed(alexnet(shape, 10, width=1), shape) for _ in range(2)]
    together, alone = made(), made()
    Cohort(together, shape, .05).train_epoch(images, 10, [1, 2])
    for model, seed in zip(alone, [1, 2]):
        train_epoch(model, torch.optim.SGD(model.parameters(), .05), images, 10, seed)
    assert largest_difference(together, alone) < 1e-5
    assert largest_difference(together[:1], together[1:]) > 1e-5                          # other order, other dropout


def test_members_come_from_other_epochs_and_leave_when_they_arrive():
    digits = load_data("digits")
    data = Data(digits.train.thinned(90), digits.test.thinned(30))
    def made():
        found = []
        for seed in range(3):
            torch.manual_seed(seed)
            found.append(small(data.train.shape, 10, width=2))
        return found
    together, alone, seen = made(), made(), []
    cohort = Cohort(together, data.train.shape, .05)
    ends = cohort.train(data, [3, 2, 5], 20, seeds=[7, 8, 9], first=[1, 2, 2],
                        after_epoch=lambda k, epoch, step, measured: seen.append((k, epoch, step)))
    assert seen == [(0, 2, 10), (2, 3, 15), (0, 3, 15), (2, 4, 20), (2, 5, 25)]
    assert ends[1] == {} and len(cohort) == 0
    for k, (first, last) in enumerate([(1, 3), (2, 2), (2, 5)]):
        end = train(alone[k], data, last, .05, 20, seed=7 + k, first=first)
        assert end == {} or abs(end["train", "loss"] - ends[k]["train", "loss"]) < 1e-5
    assert largest_difference(together, alone) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_a_member_that_diverges_leaves_the_others_alone(form):
    data = Data(*[Images(n, torch.float32) for n in (40, 20)])
    for part in data: part.x = part.x*1.0
    models = networks(plain, form, torch.float32)
    alone = [copy.deepcopy(models[0]), copy.deepcopy(models[2])]
    ends = Cohort(models, SHAPE, [.05, 1e12, .05]).train(data, 3, 10, SEEDS)
    Cohort(alone, SHAPE, .05).train(data, 3, 10, SEEDS[::2])
    assert isinstance(ends[1], Diverged) and "try a smaller learning rate than 1000000000000.0" in str(ends[1])
    assert all(math.isfinite(ends[k]["test", "loss"]) for k in (0, 2))
    assert largest_difference(models[::2], alone) == 0


def test_entries_that_are_held_stay():
    data, models = Images(47, torch.float32), networks(plain, "fcn", torch.float32, 2)
    before = copy.deepcopy(models)
    cohort = Cohort(models, SHAPE, .05)
    mask = torch.rand_like(models[0][0].weight) < .5
    cohort.hold(0, "0.weight", mask)
    cohort.train_epoch(data, 5, SEEDS[:2])
    moved = models[0][0].weight != before[0][0].weight
    assert not moved[mask].any() and moved[~mask].any()
    assert (models[1][0].weight != before[1][0].weight)[mask].any()
    cohort.close()


@pytest.mark.parametrize("precision, most", [("fp32", 1e-5), ("bf16", 2e-2)])
@pytest.mark.parametrize("settings", [{}, dict(momentum=.5, weight_decay=.1)], ids=["plain", "momentum and decay"])
@pytest.mark.parametrize("form", FORMS)
def test_holding_some_entries_is_putting_them_back_after_each_step(form, settings, precision, most):
    "Without loss of accuracy in fused layers, too, whose copy in bf16 follows."
    data, models = Images(47, torch.float32), networks(plain, form, torch.float32, 2)
    before, (alone, _) = copy.deepcopy(models), copy.deepcopy(models)
    masks = {n: torch.rand_like(p) < .5 for n, p in models[0].named_parameters() if n in ("0.weight", "3.bias")}
    cohort = Cohort(models, SHAPE, .05, **settings)
    for name, mask in masks.items(): cohort.hold(0, name, mask)
    cohort.train_epoch(data, 5, SEEDS[:2], precision=precision)
    def put_back():
        with torch.no_grad():
            for name, mask in masks.items():
                p = alone.get_parameter(name)
                p.copy_(torch.where(mask, before[0].get_parameter(name), p))
    optimizer = torch.optim.SGD(alone.parameters(), .05, **settings)
    train_epoch(alone, optimizer, data, 5, SEEDS[0], precision=precision, after_step=put_back)
    for name, mask in masks.items():
        new, old = models[0].get_parameter(name), before[0].get_parameter(name)
        assert torch.equal(new[mask], old[mask]) and (new != old)[~mask].any()
    assert largest_difference(models[:1], [alone]) < most
    cohort.close()
    x, _ = data.batch(torch.arange(9))
    assert torch.equal(models[0](x), copy.deepcopy(models[0])(x)), "no copy of old weights is left"


@pytest.mark.parametrize("form", FORMS)
def test_members_with_images_of_their_own(form):
    "Each computes what it computes alone with its images, which may be those of another."
    images = load_data("digits").train.thinned(60)
    sets = [images.picked(range(0, 20)), images.picked(range(20, 40)), images.picked(range(20, 40))]
    test, shape = images.picked(range(40, 60)), images.shape
    cnns = [make_model("small", shape, 10, seed, 2) for seed in range(3)]
    models = cnns if form == "cnn" else [embed(model, shape, to=form) for model in cnns]
    copies = copy.deepcopy(models)
    cohort = Cohort(models, shape, RATES)
    found = cohort.train([Data(s, test) for s in sets], 2, 8, SEEDS)
    for k, model in enumerate(copies):
        alone = Cohort([model], shape, RATES[k]).train(Data(sets[k], test), 2, 8, SEEDS[k])
        assert alone == [found[k]] and largest_difference([model], [models[k]]) == 0
    assert found[1] != found[2]


@pytest.mark.parametrize("sizes, said", [
    ([20, 19], "a list of one for each of 2 networks and all of one size, not 2 of 19, 20 images"),
    ([20], "not 1 of 20 images"), ([20, 20, 20], "not 3 of 20 images"), ([], "not 0 of")])
def test_images_that_do_not_fit_the_members_are_refused(sizes, said):
    models = networks(plain, "cnn", torch.float32, 2)
    before, cohort = copy.deepcopy(models), Cohort(models, SHAPE)
    sets = [Images(n, torch.float32) for n in sizes]
    with pytest.raises(ValueError, match=said): cohort.train_epoch(sets, 5, [0, 1])
    with pytest.raises(ValueError, match=said): cohort.train([Data(s, s) for s in sets], 1, 5, [0, 1])
    assert largest_difference(before, models) == 0


class Mixing(nn.Module):
    def forward(self, x): return x - x.mean(0)


class Drawing(nn.Module):
    def forward(self, x): return F.dropout(x, .5, self.training)


class Counting(nn.Module):
    "Divides by what it has counted."
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.ones(1))

    def forward(self, x):
        self.seen += len(x)
        return x/self.seen


ODD = [(lambda: nn.Sequential(plain(), Mixing()), "its output differs when the network is trained in a cohort"),
       (lambda: nn.Sequential(Drawing(), plain()), "its output differs when the network is trained in a cohort"),
       (lambda: nn.Sequential(*plain()[:-1], nn.Unflatten(1, (1, -1)), nn.LSTM(3, 5, batch_first=True)),
        "the network cannot be trained in a cohort"),
       (lambda: nn.Sequential(nn.Flatten(), nn.ReLU()), "the network has nothing to train")]


@pytest.mark.parametrize("make, said", ODD)
def test_networks_that_a_cohort_would_change_are_refused(make, said):
    with pytest.raises(ValueError, match=said): check_cohort(make(), SHAPE)


def test_what_a_module_keeps_of_its_own_is_each_members():
    data = Images(20, torch.float64)
    def made(): return [m.double() for m in (nn.Sequential(Counting(), plain()), nn.Sequential(Counting(), plain()))]
    together = made()
    Cohort(together, SHAPE, .01).train_epoch(data, 5, SEEDS[:2])
    assert [float(m[0].seen) for m in together] == [21, 21]


def other(**changed): return small(changed.pop("shape", SHAPE), 5, **dict(dict(width=3), **changed))


UNLIKE = [([plain(), other(width=4)], "network 1 has another architecture than network 0"),
          ([plain(), nn.Sequential(*plain(), nn.ReLU())], "network 1 has another architecture than network 0"),
          ([plain(), plain().double()], "network 1 has another architecture than network 0"),
          ([], "a cohort needs at least one network")]


@pytest.mark.parametrize("models, said", UNLIKE)
def test_networks_that_differ_are_refused(models, said):
    with pytest.raises(ValueError, match=said): Cohort(models, SHAPE)


def test_bad_input():
    model = plain()
    with pytest.raises(ValueError, match="a network stands twice"): Cohort([model, model], SHAPE)
    with pytest.raises(ValueError, match="one learning rate for each of 2 networks, not 3"):
        Cohort([plain(), plain()], SHAPE, [.1, .1, .1])
    cohort = Cohort([plain()], SHAPE)
    with pytest.raises(ValueError, match="batch_size"): cohort.train_epoch(Images(5, torch.float32), 0, [0])
    with pytest.raises(ValueError, match="there is no parameter"): cohort.hold(0, "weight", torch.ones(3) > 0)
    with pytest.raises(ValueError, match=r"the mask of 0.weight must be bool of shape \(3, 2, 5, 5\)"):
        cohort.hold(0, "0.weight", torch.ones(3))
    with pytest.raises(ValueError, match="one seed for each of 1 networks"):
        cohort.train_epoch(Images(5, torch.float32), 5, [0, 1])


def test_the_console_tells_what_a_cohort_costs(tmp_path, capsys):
    flags = "cohort --members 1,2 --images 50 --width 2 --repeat 1 --out".split()
    efcn_bench([*flags, str(tmp_path/"kept")])
    table = pd.read_csv(tmp_path/"kept/cohort.csv")
    assert list(table.groupby(["network", "precision"]).members.agg(list).map(tuple).unique()) == [(1, 2)]
    assert set(table.network) == {"cnn", "elcn", "efcn", "fcn"} and (table["cohort (s)"] > 0).all()
    assert "alone / cohort" in capsys.readouterr().out
    assert "efcn_bench cohort" in (tmp_path/"kept/command.txt").read_text()


@pytest.mark.parametrize("flags, said", [("--members 0,2", "members must be a list of numbers from 1"),
                                         ("--batch 0", "batch must be 1 or more"),
                                         ("--images 5", "images must fill a batch of 25"),
                                         ("--repeat 0", "repeat must be 1 or more")])
def test_what_cannot_be_timed_is_refused(flags, said):
    with pytest.raises(SystemExit, match=said): efcn_bench(["cohort", *flags.split()])


def test_shares_of_a_trained_member_are_those_of_the_network_alone():
    data, models = Images(47, torch.float32), networks(plain, "fcn", torch.float32)
    alone = copy.deepcopy(models)
    Cohort(models, SHAPE, RATES).train_epoch(data, 5, SEEDS)
    trained_alone(alone, data, 5)
    for a, b in zip(models, alone):
        pd_a, pd_b = shares(a), shares(b)
        assert abs(pd_a - pd_b).to_numpy().max() < 1e-5
    assert epoch_seed(0, 1) != epoch_seed(1, 1)
