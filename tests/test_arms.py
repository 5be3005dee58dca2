"""Every arm starts at the CNN's function, and moves as it says."""
import copy, math

import pytest
import torch
import torch.nn.functional as F
from nets import conv_of, rand
from torch import nn

from efcn_nb.experiments.acceptance import content_digest
from efcn_nb.instruments.subspaces import released_layers
from efcn_nb.ladder.embedding import embed, nearest_cnn
from efcn_nb.ladder.layers import FullyConnected
from efcn_nb.training.arms import (
    ARMS, WithOffLocal, add_off_local, add_off_local_noise, check_arms, held_masks, make_arm, merge_off_local,
    moving_average)
from efcn_nb.ladder.inspection import conv_geometries
from efcn_nb.training.cohorts import Cohort
from efcn_nb.training.fused import FusedSGD
from efcn_nb.training.loop import train_steps

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:not fused")]

SHAPE, CLASSES, IMAGES = (2, 7, 7), 4, 12


def headed(*body, shape=SHAPE):
    body = nn.Sequential(*body, nn.Flatten()).double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return body.append(nn.Linear(body.eval()(torch.zeros(1, *shape).double()).shape[1], CLASSES).double()).train()


class Reused(nn.Module):
    "One convolution called twice, which has two names, and two convolutions with one kernel."
    def __init__(self):
        super().__init__()
        self.first = conv_of(2, 2, 3, 3)
        self.again = self.alias = conv_of(2, 3, 3, 3, padding=1, seed=1)
        self.tied = conv_of(2, 3, 3, 3, padding=1, seed=2)
        self.tied.weight = self.again.weight
        self.head = nn.Linear(75, CLASSES).double()

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.head((x + torch.tanh(self.again(x)) + self.tied(self.alias(x))).flatten(1))


class Sized(nn.Module):
    "A transposed convolution that is told its output's size."
    def __init__(self):
        super().__init__()
        self.down, self.up = conv_of(2, 2, 3, 3, stride=2), conv_of(2, 3, 2, 3, stride=2, transposed=True, seed=1)
        self.head = nn.Linear(128, CLASSES).double()

    def forward(self, x):
        return self.head(torch.tanh(self.up(torch.tanh(self.down(x)), output_size=[8, 8])).flatten(1))


def frozen_first(model):
    model[0].requires_grad_(False)
    return model


def seeded(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind()


NETWORKS = dict(
    plain=lambda: headed(conv_of(2, 2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), conv_of(2, 3, 2, 2, seed=1)),
    trimmed=lambda: headed(conv_of(2, 2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3), conv_of(2, 3, 2, 2, seed=1)),
    groups=lambda: headed(conv_of(2, 2, 4, 3, groups=2, bias=False), nn.Tanh(), conv_of(2, 4, 4, 3, groups=4, seed=1)),
    reflect=lambda: headed(conv_of(2, 2, 3, 5, padding=2, padding_mode="reflect"), nn.Tanh()),
    circular=lambda: headed(conv_of(2, 2, 3, (3, 4), padding="same", padding_mode="circular"), nn.Tanh()),
    replicate=lambda: headed(conv_of(2, 2, 3, 3, padding=2, stride=2, padding_mode="replicate"), nn.Tanh()),
    stride_and_dilation=lambda: headed(conv_of(2, 2, 3, (3, 2), stride=(2, 3), dilation=(2, 1), padding=1), nn.Tanh()),
    transposed=lambda: headed(conv_of(2, 2, 3, 3, stride=3), conv_of(2, 3, 2, 3, stride=2, padding=1, transposed=True,
                                                                    output_padding=1, seed=1), nn.Tanh()),
    sized=lambda: seeded(Sized),
    batchnorm=lambda: headed(conv_of(2, 2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), conv_of(2, 3, 2, 3, seed=1),
                             nn.BatchNorm2d(2, momentum=None)),
    larger_than_the_image=lambda: headed(conv_of(2, 2, 3, 9, padding=4), nn.Tanh()),
    reused=lambda: seeded(Reused),
    frozen=lambda: frozen_first(headed(conv_of(2, 2, 3, 3), nn.Tanh(), conv_of(2, 3, 2, 3, seed=1))),
    frozen_bias=lambda: headed(conv_of(2, 2, 3, 3).requires_grad_(False), nn.Tanh(), conv_of(2, 3, 2, 3, seed=1)))
ALL = pytest.mark.parametrize("name", NETWORKS)
QUIET = [arm for arm in ARMS if not arm.startswith("noise")]


def batch(dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return rand(IMAGES, *SHAPE, seed=seed).to(dtype), torch.randint(CLASSES, (IMAGES,), generator=draw)


def ten_steps(model, lr=.05, optimizer=torch.optim.SGD, after_step=None, precision="fp32", **settings):
    "`model` after ten steps; entries that it holds are put back to zero after each."
    free = model if optimizer is FusedSGD else [p for p in model.parameters() if p.requires_grad]
    masks = {model.get_parameter(name): mask for name, mask in held_masks(model).items()}
    def after():
        with torch.no_grad():
            for p, mask in masks.items(): p.masked_fill_(mask, 0)
        if after_step: after_step()
    train_steps(model, optimizer(free, lr, **settings), [batch(next(model.parameters()).dtype)]*10, F.cross_entropy,
                precision, after)
    return model


def outputs(model):
    x, _ = batch(next(model.parameters()).dtype)
    with torch.no_grad(): return copy.deepcopy(model).eval()(x)


@pytest.mark.parametrize("arm", QUIET)
@pytest.mark.parametrize("name, trim", [*((name, True) for name in NETWORKS), ("trimmed", False)])
def test_every_arm_starts_at_the_function_of_the_cnn(name, trim, arm):
    made = make_arm(arm, NETWORKS[name](), SHAPE, trim)
    torch.testing.assert_close(outputs(made), outputs(NETWORKS[name]()), atol=1e-11, rtol=0)


@pytest.mark.parametrize("arm", QUIET)
def test_an_arm_of_a_convolution_that_is_the_whole_network(arm):
    conv, x = conv_of(2, 2, 3, 3, stride=2, padding=1), rand(3, *SHAPE)
    made = make_arm(arm, copy.deepcopy(conv), SHAPE)
    torch.testing.assert_close(made(x), conv(x), atol=1e-12, rtol=0)
    assert list(held_masks(made)) == ["beyond.weight"]*arm.endswith("off_local")
    if held_masks(made): torch.testing.assert_close(merge_off_local(made)(x), conv(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("arm, ratio", [("noise_1", 1), ("noise_3", 3)])
@ALL
def test_noise_has_its_norm_and_lies_outside_the_windows(name, arm, ratio):
    "Each matrix once, also where layers share it; other seeds draw other noise; what is frozen has none."
    start = embed(NETWORKS[name](), SHAPE, trim=True)
    made, other = (make_arm(arm, NETWORKS[name](), SHAPE, seed=seed) for seed in (0, 1))
    changed = 0
    for n, layer in released_layers(start).items():
        added, again = (m.get_submodule(n).weight - layer.weight for m in (made, other))
        mask = layer.geometry.mask
        assert not added[mask].any()
        has = bool((~mask).any()) and layer.weight.requires_grad
        changed += has
        torch.testing.assert_close(added.norm(), ratio*layer.weight.norm()*has, atol=1e-9, rtol=1e-6)
        assert torch.equal(added, again) != has
    assert changed or name in ("larger_than_the_image",)
    assert states(made).keys() == states(start).keys()


@pytest.mark.parametrize("ratio", [0, -1, math.nan, "1", None])
def test_a_ratio_that_cannot_be(ratio):
    with pytest.raises(ValueError, match="ratio must be a positive number"):
        add_off_local_noise(embed(NETWORKS["plain"](), SHAPE), ratio)


@pytest.mark.parametrize("name, settings", [*((name, {}) for name in NETWORKS), *(
    (name, dict(momentum=.8, weight_decay=.1)) for name in ("trimmed", "reflect", "batchnorm", "frozen_bias"))])
def test_tied_equals_slowed(name, settings):
    "The null of all comparisons, over ten steps that change the function."
    start = outputs(NETWORKS[name]())
    slowed, tied = (outputs(ten_steps(make_arm(arm, NETWORKS[name](), SHAPE), **settings))
                    for arm in ("slowed", "tied"))
    torch.testing.assert_close(slowed, tied, atol=1e-10, rtol=0)
    assert (slowed - start).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["plain", "groups", "circular", "batchnorm"])
def test_the_fused_optimiser_moves_tied_layers_likewise(name):
    fused, plain = (ten_steps(make_arm("tied", NETWORKS[name](), SHAPE), optimizer=o)
                    for o in (FusedSGD, torch.optim.SGD))
    torch.testing.assert_close(outputs(fused), outputs(plain), atol=1e-11, rtol=0)


def test_slowed_is_not_annealed():
    a, b = (outputs(ten_steps(make_arm(arm, NETWORKS["plain"](), SHAPE))) for arm in ("annealed", "slowed"))
    assert (a - b).abs().max() > 1e-2


def states(model):
    "Parameters and buffers, each once."
    return {k: v.detach().clone() for k, v in (*model.named_parameters(), *model.named_buffers())}


OPTIMISERS = dict(plain={}, momentum_and_decay=dict(momentum=.9, weight_decay=.1))


@pytest.mark.parametrize("settings", OPTIMISERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arm", ["off_local", "tied_off_local"])
@pytest.mark.parametrize("name", ["plain", "trimmed", "groups", "batchnorm", "reused", "frozen"])
def test_entries_within_the_windows_stay_zero(name, arm, precision, settings):
    "Alone and in a cohort, which compute the same; `off_local` moves nothing else, not even a running mean."
    settings = OPTIMISERS[settings]
    start = make_arm(arm, NETWORKS[name]().float(), SHAPE)
    alone = ten_steps(copy.deepcopy(start), optimizer=FusedSGD, precision=precision, **settings)
    members = [copy.deepcopy(start) for _ in range(2)]
    cohort = Cohort(members, SHAPE, .05, **settings, check=False)
    for k in range(2):
        for n, mask in held_masks(members[k]).items(): cohort.hold(k, n, mask)
    x, y = batch(torch.float32)
    for _ in range(10): cohort._step(x.repeat(2, 1, 1, 1), y.repeat(2), precision)
    cohort._settle()
    cohort.close()
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    before = states(start)
    for model in (alone, *members):
        masks, after = held_masks(model), states(model)
        free = {n for n, mask in masks.items() if model.get_parameter(n).requires_grad and not mask.all()}
        assert not any(after[n][mask].any() for n, mask in masks.items())
        moved = {n for n in before if not torch.equal(before[n], after[n])}
        assert moved == free if arm == "off_local" else moved > free
        torch.testing.assert_close(outputs(model), outputs(alone), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("arm", ["tied", "slowed"])
@pytest.mark.parametrize("name", ["plain", "groups", "circular"])
def test_hooks_work_in_a_cohort_too(name, arm):
    members = [make_arm(arm, NETWORKS[name](), SHAPE) for _ in range(2)]
    cohort, (x, y) = Cohort(members, SHAPE, .05), batch()
    for _ in range(10): cohort._step(x.repeat(2, 1, 1, 1), y.repeat(2), "fp32")
    cohort._settle()
    cohort.close()
    alone = outputs(ten_steps(make_arm(arm, NETWORKS[name](), SHAPE)))
    for model in members: torch.testing.assert_close(outputs(model), alone, atol=1e-10, rtol=0)


@ALL
def test_merging_is_exact(name):
    model = make_arm("tied_off_local", NETWORKS[name](), SHAPE)
    with torch.no_grad():
        for n, mask in held_masks(model).items(): model.get_parameter(n).copy_(rand(*mask.shape)).masked_fill_(mask, 0)
    before, merged = states(model), merge_off_local(model)
    torch.testing.assert_close(outputs(merged), outputs(model), atol=1e-10, rtol=0)
    assert not any(isinstance(m, WithOffLocal) for m in merged.modules()) and released_layers(merged)
    assert all(torch.equal(before[k], v) for k, v in states(model).items())
    torch.testing.assert_close(outputs(nearest_cnn(merged)), outputs(NETWORKS[name]()), atol=1e-10, rtol=0)


@pytest.mark.parametrize("trim", [True, False])
def test_merged_and_embedded_layers_have_one_shape(trim):
    merged = merge_off_local(make_arm("off_local", NETWORKS["trimmed"](), SHAPE, trim))
    whole = embed(NETWORKS["trimmed"](), SHAPE, trim=trim)
    assert [m.weight.shape for m in released_layers(merged).values()] == [
        m.weight.shape for m in released_layers(whole).values()]


@ALL
def test_making_off_local_weights_leaves_the_cnn_alone(name):
    cnn = NETWORKS[name]()
    before, flags = content_digest(cnn), [(p.requires_grad, m.training) for m in cnn.modules() for p in m.parameters()]
    model = add_off_local(cnn, SHAPE, frozen=True)
    assert content_digest(cnn) == before
    assert flags == [(p.requires_grad, m.training) for m in cnn.modules() for p in m.parameters()]
    assert not {id(t) for t in cnn.parameters()} & {id(t) for t in model.parameters()}


def test_what_convolutions_share_stays_shared():
    model = make_arm("tied_off_local", seeded(Reused), SHAPE)
    assert model.again is model.alias and model.again.conv.weight is model.tied.conv.weight
    assert len(held_masks(model)) == 3


def test_groups_are_set_free_from_each_other():
    layer, = [m for m in make_arm("off_local", headed(conv_of(2, 2, 2, 3, groups=2)), SHAPE).modules()
              if isinstance(m, WithOffLocal)]
    free = ~layer.beyond.geometry.mask.unflatten(0, (2, -1)).unflatten(2, (2, -1))
    assert free[0, :, 1].all() and free[1, :, 0].all() and not free[0, :, 0].all()


@pytest.mark.parametrize("name", ["plain", "batchnorm", "reused"])
def test_the_moving_average_is_a_plain_loop(name):
    model = NETWORKS[name]()
    average, plain = moving_average(model, .9), None
    torch.testing.assert_close(outputs(average.module), outputs(model), atol=0, rtol=0)
    def update():
        nonlocal plain
        average.update_parameters(model)
        new = states(model)
        if plain is None: plain = new
        else: plain = {k: (.9*old + .1*new[k]).to(old.dtype) for k, old in plain.items()}
    ten_steps(model, after_step=update)
    found, (first, *_) = states(average.module), plain
    assert found.keys() == plain.keys() and not torch.equal(found[first], states(model)[first])
    for k, v in plain.items(): torch.testing.assert_close(found[k], v, atol=1e-14, rtol=1e-12)


def all_frozen(): return frozen_first(headed(conv_of(2, 2, 3, 3)))


REFUSED = dict(
    unknown=("frozen", NETWORKS["plain"], "unknown arm 'frozen'; known are annealed"),
    no_string=(None, NETWORKS["plain"], "unknown arm None"),
    nothing_to_train=("off_local", all_frozen, "all convolutions of the network are frozen"))


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_an_arm_is_refused(case):
    arm, make, says = REFUSED[case]
    cnn = make()
    with pytest.raises(ValueError, match=says) as error: make_arm(arm, cnn, SHAPE)
    with pytest.raises(ValueError, match=says): check_arms([arm], cnn, conv_geometries(cnn, SHAPE))
    assert len(str(error.value).splitlines()) == 1


def test_fully_connected_layers_without_hooks_are_still_fused():
    members = [make_arm("off_local", NETWORKS["plain"](), SHAPE) for _ in range(2)]
    cohort = Cohort(members, SHAPE)
    assert len(cohort._dense) == sum(isinstance(m, FullyConnected) for m in members[0].modules())
    cohort.close()
