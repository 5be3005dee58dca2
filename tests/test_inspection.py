"What a network calls is found without a trace left in it, and what cannot be embedded is refused in one sentence."
import copy
import functools
import os
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from efcn_nb.ladder.inspection import conv_geometries
from efcn_nb.ladder.folding import merge_batchnorm
from efcn_nb.ladder.embedding import embed, nearest_cnn, reinitialize

from nets import (
    alone, as_buffers, BOTH, Calls, close, Net, OwnConv, plain, rand, RELEASED, residual, SHAPE,
    untouched)

pytestmark = pytest.mark.usefixtures("one_thread")  # threads only cost time on tensors as small as these


def test_a_model_that_draws_numbers_leaves_the_random_state_alone():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)
        def forward(self, x): return self.conv(F.dropout(x))
    model, state = Noisy(), torch.get_rng_state()
    embed(model, (1, 5, 5))
    assert torch.equal(state, torch.get_rng_state())


def test_geometries_by_name(residual):
    assert {name: g.out_shape for name, g in conv_geometries(residual, (2, 5, 5)).items()} == {
        "stem.0": (4, 5, 5), "blocks.a.0": (4, 5, 5), "blocks.skip": (4, 5, 5), "twice": (4, 5, 5)}


@BOTH
def test_lazy_modules_after_their_first_batch(to):
    model = nn.Sequential(nn.LazyConv2d(3, 3, padding=1), nn.ReLU(), nn.LazyConvTranspose2d(2, 2), nn.Flatten(),
                          nn.LazyLinear(4))
    x = rand(2, 2, 4, 5).float()
    with pytest.raises(ValueError, match="let it process one batch first"): embed(model, (2, 4, 5), to)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model(x)
    assert close(embed(model, (2, 4, 5), to)(x), model(x), 1e-5)


class Halves(nn.Module):
    "One convolution called with two shapes, and one that is never called."
    def __init__(self, unused):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.other = plain() if unused else None
    def forward(self, x): return self.conv(x) if self.other else self.conv(F.max_pool2d(self.conv(x), 2))


def after_a_step(model):
    model(torch.ones(1, 3, 8, 8))
    return model


def hooked():
    model = plain()
    model.register_forward_hook(lambda module, args, output: 2*output)
    return model


class Asserts(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = plain()
    def forward(self, x):
        assert x.shape[-1] == 4, "only four pixels"
        return self.conv(x)


def pruned():
    model = nn.Sequential(plain())
    prune.l1_unstructured(model[0], "weight", .5)
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make, shape, kw, says", [
    (lambda: nn.Linear(3, 3), (3, 8, 8), {}, "no convolution"),
    (lambda: nn.Sequential(nn.ReLU()), (3, 8, 8), {}, "no convolution"),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(5, 2)), (3, 8, 8), {}, "does not fit"),
    (plain, (1, 8, 8), {}, "does not fit"),
    (plain, (2, 3, 8, 8), {}, "batch axis"),
    (plain, (3, 0, 8), {}, "does not fit"),
    (plain, 8, {}, "input_shape"),
    (lambda: nn.Conv2d(3, 4, 9), (3, 8, 8), {}, "does not fit"),
    (Asserts, (3, 8, 8), {}, "does not fit"),
    (lambda: Halves(False), (3, 8, 8), {}, r"conv is called with shapes \(3, 4, 4\) and \(3, 8, 8\)"),
    (lambda: Halves(True), (3, 8, 8), {}, "other is never called"),
    (lambda: OwnConv(3, 4, 3), (3, 8, 8), {}, "OwnConv"),
    (lambda: nn.LazyConv2d(4, 3), (3, 8, 8), {}, "the model is lazy; let it process one batch first"),
    (lambda: nn.Sequential(plain(), nn.LazyLinear(4)), (3, 8, 8), {},
     "1.weight has no shape yet, because the model is lazy"),
    (lambda: parametrizations.weight_norm(plain()), (3, 8, 8), {}, "parametriz"),
    (lambda: parametrizations.spectral_norm(plain()), (3, 8, 8), {}, "parametriz"),
    (lambda: nn.Sequential(weight_norm(plain())), (3, 8, 8), {}, "plain convolution"),
    (lambda: after_a_step(nn.Sequential(spectral_norm(plain()))), (3, 8, 8), {}, "plain convolution"),
    (pruned, (3, 8, 8), {}, "plain convolution"),
    (hooked, (3, 8, 8), {}, "plain convolution"),
    (lambda: nn.Conv2d(3, 4, 3, padding=8, padding_mode="reflect"), (3, 8, 8), {}, "does not fit"),
    (lambda: nn.Conv2d(3, 4, 3, padding=9, padding_mode="circular"), (3, 8, 8), {}, "does not fit"),
    (plain, (3, 8, 8), dict(to="mlp"), "'fcn' or 'lcn'"),
    (lambda: nn.Sequential(plain()), (3, 8, 8), dict(layers=["first"]), "'first'.*'0'"),
])
def test_refusals(make, shape, kw, says):
    with pytest.raises(ValueError, match=says) as error: embed(make(), shape, **kw)
    assert len(str(error.value).splitlines()) == 1


class Simple(nn.Conv2d):
    "A subclass that only chooses its options, as torchvision's video networks have them."
    def __init__(self, ci, co): super().__init__(ci, co, 3, padding=1, bias=False)


@BOTH
def test_a_subclass_that_computes_the_same_is_embedded(to):
    model, x = nn.Sequential(Simple(2, 3)).double(), rand(2, 2, 5, 5)
    assert close(embed(model, (2, 5, 5), to)(x), model(x), 1e-12)
    assert type(nearest_cnn(embed(model, (2, 5, 5), to))[0]) is nn.Conv2d


@pytest.mark.parametrize("make", [
    lambda: Net(lambda m, x: m.f(x), lambda m: setattr(m, "f", lambda x: m.conv(x))),
    lambda: Net(lambda m, x: m.conv.forward(x)),
    lambda: Net(lambda m, x: F.conv2d(x, m.conv.weight)),
    lambda: Net(lambda m, x: type(m.conv).__call__(m.conv, x) if m.training
                else m.conv._conv_forward(x, m.conv.weight, None))])
def test_a_convolution_that_is_not_called_is_not_blamed_for_it(make):
    with pytest.raises(ValueError, match="conv is used without being called as a module"): embed(make(), SHAPE)


def interrupted(m, x):
    m.seen.append(1)
    if len(m.seen) == 2: raise KeyboardInterrupt
    return m.head(m.conv(x))


def test_an_interrupted_proof_leaves_the_original_alone():
    model = Net(interrupted, lambda m: setattr(m, "seen", Calls()))
    before = alone(model)
    with pytest.raises(KeyboardInterrupt): embed(model, SHAPE)
    assert untouched(model, before) and len(model.seen) == 2 and not model.fc.weight.isnan().any()


@BOTH
def test_compiled_networks_that_ran_before(to):
    for wrap in (lambda m: torch.compile(m, backend="eager"), lambda m: m.compile(backend="eager") or m):
        model, x = wrap(Net(lambda m, x: m.head(m.conv(x)))), rand(2, *SHAPE)
        y = model(x)
        released = embed(model, SHAPE, to)
        assert close(released(x), y, 1e-12) and close(model(x), y, 1e-12) and close(nearest_cnn(released)(x), y, 1e-12)
        with torch.no_grad():
            for p in released.parameters(): p.zero_()
        assert not released(x).any()


def test_a_network_without_parameters():
    model = as_buffers(nn.Conv2d(2, 3, 3), "weight", "bias")
    assert close(embed(model, SHAPE)(torch.ones(1, *SHAPE)), model(torch.ones(1, *SHAPE)), 1e-5)
    assert not list(embed(model, SHAPE).parameters())


@pytest.mark.parametrize("name, make, says", [
    ("loader", lambda: (i for i in range(3)), "loader holds a generator"),
    ("lock", threading.Lock, "lock holds a lock"), ("file", lambda: open(os.devnull), "file holds a TextIOWrapper"),
    ("pool", lambda: dict(of=[threading.RLock()]), "pool holds a dict")])
def test_what_cannot_be_copied_is_named(name, make, says):
    model = nn.Sequential(nn.Sequential(nn.Conv2d(2, 3, 3)))
    setattr(model[0], name, make())
    for call in (lambda: embed(model, SHAPE), lambda: merge_batchnorm(model, SHAPE), lambda: reinitialize(model),
                 lambda: conv_geometries(model, SHAPE)):
        with pytest.raises(ValueError, match=rf"Sequential cannot be copied, because 0\.{says} \(cannot "
                                             rf"pickle.*delete it first") as error:
            call()
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")
@BOTH
@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
@pytest.mark.parametrize("used", [True, False])
def test_old_weight_norm_beside_the_convolutions(to, norm, used):
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), norm(nn.Linear(27, 4))).eval(), rand(2, *SHAPE).float()
    if used: model(x)
    released = embed(model, SHAPE, to)
    assert close(released(x), model(x), 1e-5)
    with torch.no_grad():
        for p in released.parameters(): p.zero_().add_(1e-3)
    assert not close(released(x), model(x), 1e-2)


def test_images_in_place_of_noise():
    "A network that takes only images of its own kind: without them the refusal says what to give."
    def picky(m, x):
        assert x.min() > 5, "too dark"
        return m.conv(x)*(1 if m.conv.weight.shape[-1] == 3 else 2) if m.wrong else m.conv(x)
    model, images = Net(picky, lambda m: setattr(m, "wrong", False)), 6 + rand(3, *SHAPE).abs()
    with pytest.raises(ValueError, match="too dark"): embed(model, SHAPE)
    assert close(embed(model, SHAPE, images=images)(images), model(images), 1e-12)
    assert conv_geometries(model, SHAPE, images=images)
    model.wrong = True
    with pytest.raises(ValueError, match="another function"): embed(model, SHAPE, images=images)
    for wrong in (images[:, :1], images[0], images[:0], images[..., :3]):
        with pytest.raises(ValueError, match=r"images must be a batch of shape \(N, 2, 5, 5\)"):
            embed(model, SHAPE, images=wrong)


class FrozenNorm(nn.Sequential):
    "Keeps its BatchNorm in evaluation mode; returns nothing, as many a `train` of one's own."
    def train(self, mode=True):
        super().train(mode)
        self[1].eval()


def test_a_train_of_ones_own_that_returns_nothing():
    model, x = FrozenNorm(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), rand(2, *SHAPE).float()
    model.train(False)
    released = embed(model, SHAPE, fold_batchnorm=True)
    assert type(released[1]) is nn.Identity and close(released(x), model(x), 1e-5)
    assert type(merge_batchnorm(model, SHAPE)[1]) is nn.Identity


@pytest.mark.parametrize("given", [
    [*SHAPE], torch.Size(SHAPE), np.array(SHAPE), torch.tensor(SHAPE), rand(7, *SHAPE), rand(1, *SHAPE).numpy(),
    rand(0, *SHAPE)], ids=["list", "Size", "array", "tensor", "batch", "batch of one, an array", "empty batch"])
def test_the_shape_of_an_input_is_told_in_many_ways(given):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).eval()
    assert conv_geometries(model, given) == conv_geometries(model, SHAPE) and merge_batchnorm(model, given)
    released = embed(model, given, trim=True, fold_batchnorm=True)
    assert released[0].geometry.in_shape == released[0].image_shape == SHAPE


@pytest.mark.parametrize("call, says", [
    (lambda m, x: embed(m, SHAPE, images=[x[0]]), "images must be a tensor.*not a list.*torch.stack"),
    (lambda m, x: conv_geometries(m, SHAPE, images=x.numpy()), "images must be a tensor.*not a ndarray"),
    (lambda m, x: embed(m, SHAPE, layers=nn.Conv2d), "names of convolutions or a predicate.*not the class Conv2d"),
    (lambda m, x: embed(m, SHAPE, layers=3), "not a int"),
    (lambda m, x: embed(m, SHAPE, layers=m.conv), "not a Conv2d; its name stands for all in it"),
    (lambda m, x: embed(m, SHAPE, layers=lambda: True), "a predicate must take a module.*not 0 arguments"),
    (lambda m, x: embed(m, SHAPE, layers=lambda a, b, c: True), "not 3 arguments"),
    (lambda m, x: embed(m, SHAPE, layers="con"), "no convolution is called 'con', and no module with one"),
    (lambda m, x: embed(m, x[0]), r"a Tensor of shape \(2, 5, 5\) could be one input.*give the batch x\[None\]"),
    (lambda m, x: conv_geometries(m, (x, x)), "not a tuple of them; a network of several inputs must be wrapped"),
    (lambda m, x: merge_batchnorm(m, dict(image=x)), "not a dict of them"),
    (lambda m, x: embed(m, "cat.png"), "input_shape must be the shape of one input, such as .*, not a str"),
    (lambda m, x: embed(m, 8), "not a int"),
    (lambda m, x: embed(m, (1, 8., 8)), r"not \(1, 8.0, 8\)"),
    (lambda m, x: embed(m, (1, -8, 8)), r"input_shape=\(1, -8, 8\) does not fit"),
    (lambda m, x: embed(m, torch.rand(3)), "not a Tensor"),
    (lambda m, x: embed(lambda x: x, SHAPE), "torch.nn.Module with convolutions, not a function"),
    (lambda m, x: embed(Net, SHAPE, trim=True), "not the class Net"),
    (lambda m, x: embed(m, SHAPE, layers=lambda name, m: False), r"layers chooses no convolution.*\['conv'\]"),
    (lambda m, x: embed(m, SHAPE, layers=[m.conv]), "no convolution is called Conv2d"),
    (lambda m, x: embed(m, SHAPE, layers=""), "no convolution is called ''")])
def test_arguments_of_another_kind_are_refused(call, says):
    with pytest.raises(ValueError, match=says) as error: call(Net(lambda m, x: m.head(m.conv(x))), rand(2, *SHAPE))
    assert len(str(error.value).splitlines()) == 1


@BOTH
@pytest.mark.parametrize("options", [{}, dict(trim=True), dict(fold_batchnorm=True)], ids=str)
def test_images_show_convolutions_that_few_call(to, options):
    route = lambda m, x: m.norm(m.conv(x)) if x.mean() < 5 else m.other(x)*m.factor()
    def more(m): m.other, m.factor = nn.Conv2d(2, 3, 3), lambda: 1
    model = Net(route, more).eval()
    images = torch.cat([rand(5, *SHAPE), 10 + rand(1, *SHAPE)])
    with pytest.raises(ValueError, match="other is never called in evaluation mode for the images tried.*give images="):
        embed(model, SHAPE, to)
    released = embed(model, SHAPE, to, images=images, **options)
    assert type(released.other) is RELEASED[to]
    assert all(close(released(x), model(x), 1e-10) for x in (images[:2], images[5:]))
    wrong = Net(lambda m, x: m.conv(x) if x.mean() < 5 else m.other(x)*m.other.weight.shape[-1], more)
    with pytest.raises(ValueError, match="another function"): embed(wrong, SHAPE, to, images=images)


class Plain(nn.Module):
    "Holds numbers alone."
    def __init__(self):
        super().__init__()
        self.factor, self.name = 2, "plain"
    def forward(self, x): return x*self.factor


class Marked(Plain):
    "Its class has a way of its own to be copied."
    def __deepcopy__(self, memo):
        twin = type(self)()
        twin.factor, twin.copied = self.factor, True
        return twin


@pytest.mark.parametrize("kind", [nn.ReLU, nn.Dropout, functools.partial(nn.MaxPool2d, 1), Plain, Marked])
def test_modules_that_hold_numbers_alone_are_copied_like_others(kind):
    model = Net(lambda m, x: m.head(m.plain(m.conv(x))), lambda m: setattr(m, "plain", kind())).eval()
    model.again = model.plain
    twin = embed(model, SHAPE).plain
    expected = copy.deepcopy(model.plain)
    assert type(twin) is type(expected) and vars(twin) == vars(expected)
    assert not {id(x) for x in vars(twin).values() if isinstance(x, dict)} & {id(x) for x in vars(model.plain).values()}
    twin.extra, twin.training = 1, True
    twin.register_forward_hook(lambda *call: None)
    assert not hasattr(model.plain, "extra") and not model.plain.training and not model.plain._forward_hooks
    assert embed(model, SHAPE).again is not model.plain


def test_a_plain_module_in_two_places_stays_one():
    model = Net(lambda m, x: m.head(m.again(m.plain(m.conv(x)))), lambda m: setattr(m, "plain", Plain()))
    model.again = model.plain
    released = embed(model, SHAPE)
    assert released.again is released.plain
