"A result is handed out if it computes the same on its own, and refused in one sentence if not."
import copy
import functools
import gc
import math
import random
import types
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efcn_nb.ladder import embedding, inspection, proof
from efcn_nb.ladder.folding import merge_batchnorm
from efcn_nb.ladder.embedding import convert, embed, nearest_cnn, reinitialize

from nets import (
    alone, BOTH, Calls, close, closure, function_with_default, made, Net, over_cases, rand, RELEASED,
    SHAPE, shape_of, untouched)

pytestmark = pytest.mark.usefixtures("one_thread")  # threads only cost time on tensors as small as these


ANOTHER = {  # name: forward pass, and where the two part
    "norm of the kernel": (lambda m, x: m.head(m.conv(x)/m.conv.weight.norm()), "at fc"),
    "sum of the biases": (lambda m, x: m.conv(x) - m.conv.bias.sum(), "at the forward pass of Net itself"),
    "type": (lambda m, x: m.head(m.conv(x).relu() if isinstance(m.conv, nn.Conv2d) else m.conv(x)), "at fc"),
    "name of the type": (lambda m, x: m.conv(x)*len(type(m.conv).__name__), "Net itself"),
    "fan-in": (lambda m, x: m.conv(x*m.conv.weight[0].numel()**-.5), "at conv"),
    "shape of the weight": (lambda m, x: m.conv(x)*m.conv.weight.shape[0], "Net itself"),
    "last axis of the weight": (lambda m, x: m.norm(m.conv(x)*m.conv.weight.shape[-1]), "at norm"),
    "kernel used again": (lambda m, x: F.conv_transpose2d(m.conv(x), m.conv.weight, padding=1),
                          "fails in the forward pass of Net itself"),
    "penalty beside the output": (lambda m, x: (m.head(m.conv(x)), sum(p.square().sum() for p in m.parameters())),
                                  "Net itself"),
    "penalty in a dictionary": (lambda m, x: {"y": m.conv(x), "more": [m.conv.weight.abs().mean()]}, "Net itself"),
    "a number": (lambda m, x: (m.conv(x), float(m.conv.weight.sum())), "Net itself"),
    "numbers of weights": (lambda m, x: m.conv(x)*sum(p.numel() for p in m.parameters()), "Net itself"),
    "the state": (lambda m, x: m.conv(x)*m.state_dict()["conv.weight"].mean(), "Net itself"),
    "an attribute that released layers lack": (lambda m, x: F.pad(m.conv(x), m.conv._reversed_padding_repeated_twice),
                                               "fails"),
    "the way it is called": (lambda m, x: m.conv._conv_forward(m.conv(x)[:, :2], m.conv.weight, m.conv.bias), "fails"),
    "an answer from except": (lambda m, x: attempt(lambda: m.conv.weight.view(3, 2, 9).sum()*m.conv(x), m.conv(x)),
                              "Net itself"),
    "once more": (lambda m, x: m.conv(m.conv(x)[:, :2]) if m.conv.weight.shape[-1] == 3 else m.conv(x), "")}


def attempt(call, other):
    try: return call()
    except RuntimeError: return other


@BOTH
@pytest.mark.parametrize("name", ANOTHER)
def test_another_function_is_refused(to, name):
    forward, where = ANOTHER[name]
    model = Net(forward).train()
    model.fc.eval()
    before = alone(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(ValueError, match=f"Net cannot be embedded.*{where}.*layers=") as error:
            embed(model, SHAPE, to)
        assert len(str(error.value).splitlines()) == 1 and untouched(model, before)
        embed(model, SHAPE, to, check=False)
    assert untouched(model, before)


def weak(m):
    held = weakref.ref(m.fc)
    m.f = lambda x: held()(x.flatten(1))


def alias(m):
    m.double()
    w = m.fc.weight.detach()
    m.f = lambda x: x.flatten(1) @ w.T


def through_numpy(m):
    m.double()
    w = m.fc.weight.detach().numpy()
    m.f = lambda x: x.flatten(1) @ torch.from_numpy(w).T


def buffers_alone(m):
    m.plain = nn.BatchNorm2d(3, affine=False)
    m.f = lambda x: m.plain(x)


class Shared(nn.Linear):
    def __deepcopy__(self, memo): return self


def own_deepcopy(m): m.fc = m.f = Shared(75, 4)


THROUGH = dict(closure=closure, default=function_with_default, weak=weak, alias=alias, through_numpy=through_numpy,
               buffers_alone=buffers_alone)


@BOTH
@pytest.mark.parametrize("more", THROUGH.values(), ids=THROUGH)
@pytest.mark.parametrize("training", [True, False])
def test_a_copy_that_reads_the_original_is_refused(to, more, training):
    model = Net(lambda m, x: m.f(m.conv(x)), more).train(training)
    before = alone(model)
    with pytest.raises(ValueError, match="goes on using (fc.weight|fc.bias|plain.running_mean|plain.running_var) of "
                                         "the original") as error:
        embed(model, SHAPE, to)
    assert len(str(error.value).splitlines()) == 1 and untouched(model, before)


def test_a_copy_that_shares_a_module_is_refused():
    model = Net(lambda m, x: m.f(m.conv(x).flatten(1)), own_deepcopy)
    with pytest.raises(ValueError, match="goes on using fc.weight of the original"): embed(model, SHAPE)


@pytest.mark.parametrize("verb, call", [
    ("converted", lambda m: convert(m, "fcn")), ("converted", lambda m: convert(m, "lcn")), ("converted", nearest_cnn),
    ("reinitialized", lambda m: reinitialize(m, 0))])
def test_every_step_proves_itself(verb, call):
    "What changed after embedding: a closure, and a forward pass that reads a weight."
    released = embed(Net(lambda m, x: m.head(m.conv(x))), SHAPE, "lcn")
    assert call(released) is not released
    closure(released)
    released._forward = lambda m, x: m.f(m.conv(x))
    before = alone(released)
    with pytest.raises(ValueError, match=f"Net cannot be {verb}.*goes on using fc.weight of the original"):
        call(released)
    assert untouched(released, before)
    released._forward = lambda m, x: m.head(m.conv(x)*m.conv.weight.numel())
    if call is nearest_cnn:
        with pytest.raises(ValueError, match="Net cannot be converted.*first part at fc"): call(released)


@BOTH
@pytest.mark.parametrize("spoil", [lambda w: w.fill_(math.nan), lambda w: w.mul_(1.01), lambda w: w.copy_(w.flip(0, 1)),
                                   lambda w: w.zero_()])
def test_wrong_weights_are_named(monkeypatch, to, spoil):
    real = embedding.release
    def wrong(conv, *args):
        layer = real(conv, *args)
        if conv.kernel_size == (1, 1): spoil(layer.weight.data)
        return layer
    monkeypatch.setattr(embedding, "release", wrong)
    model = made(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(),
                                       nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 3))))
    with pytest.raises(ValueError, match=r"first part at 2.0 \((Fully|Locally)Connected\)"): embed(model, SHAPE, to)


@over_cases(times=120)
def test_what_is_right_is_not_refused(case):
    conv, x = case
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for to in RELEASED: convert(embed(copy.deepcopy(conv).to(dtype), shape_of(x), to), "fcn")


def compiled(m):
    m.double()
    m.fc.compile(backend="eager")
    m.fc(torch.ones(1, 75).double())


def lora(m):
    class Merging(nn.Linear):
        "Merges its low-rank update into its weight in evaluation mode, and takes it out in training mode."
        merged = False
        def train(self, mode=True):
            if self.merged is mode: self.weight.data += (-1 if mode else 1)*self.update
            self.merged = not mode
            return super().train(mode)
        def forward(self, x): return F.linear(x, self.weight if self.merged else self.weight + self.update)
    m.fc = Merging(75, 4)
    m.fc.register_buffer("update", torch.randn(4, 75))


def counts(m): m.register_buffer("calls", torch.zeros((), dtype=torch.long))


class Answer:
    def __init__(self, y): self.y = y


def per_image(m, x): return torch.vmap(lambda one: m.conv(one[None])[0])(x) if x.dim() == 4 else m.conv(x)


def with_autocast(m, x):
    with torch.autocast("cpu", torch.bfloat16): return m.head(m.conv(x).double())


def counting(m, x):
    m.calls += 1
    return m.conv(x)


def reads_attributes(m, x):
    around = m.conv.kernel_size[0]//2 - m.conv.padding[0]
    return m.conv(F.pad(x, (around,)*4))*m.conv.out_channels/m.conv.groups


def held_down(m, x):
    m.fc.weight.data = torch.renorm(m.fc.weight.data, 2, 0, .1)
    return m.head(m.conv(x))


def clamped(m, x):
    with torch.no_grad(): m.fc.weight.clamp_(-.01, .01)
    return m.head(m.conv(x))


def keeps(m, x):
    m.features = m.conv(x)
    return m.head(m.features)


def one_image(m, x):
    assert len(x) == 1
    return m.head(m.conv(x))


def swallowed(m, x):
    try: m.norm(x[:, :1])
    except RuntimeError: pass
    return m.conv(x)


RIGHT = {  # networks that embed, however odd: forward pass, and what else they have
    "tuple": (lambda m, x: (m.conv(x), [m.head(m.conv(x)), None], "word"),),
    "object": (lambda m, x: Answer(m.conv(x)),),
    "classes": (lambda m, x: m.head(m.conv(x)).argmax(1),),
    "sparse": (lambda m, x: m.head(m.conv(x)).relu().to_sparse(),),
    "dropout": (lambda m, x: m.head(F.dropout(m.conv(x))),),
    "numpy's noise": (lambda m, x: m.conv(x) + np.random.rand() + random.random(),),
    "in place": (lambda m, x: m.norm(m.conv(x).relu_().add_(1)),), "input in place": (lambda m, x: m.conv(x.mul_(2)),),
    "only positive numbers": (lambda m, x: m.conv(x.log() if (x > 0).all() else 1/0),),
    "logarithm": (lambda m, x: m.conv(x.log()),),
    "table of grey values": (lambda m, x: m.conv(m.table[(x*255).long()]),
                             lambda m: m.register_buffer("table", torch.randn(256))),
    "one image": (one_image,),
    "squeeze": (lambda m, x: m.one(m.conv(x).mean((2, 3), keepdim=True).squeeze()),
                lambda m: setattr(m, "one", nn.BatchNorm1d(3))),
    "vmap": (per_image,), "autocast": (with_autocast,), "writes a count": (counting, counts),
    "holds a weight down": (held_down,), "clamps": (clamped,),
    "stores an activation": (keeps,), "swallows an error": (swallowed,),
    "merges in evaluation mode": (lambda m, x: m.head(m.conv(x)), lora),
    "bound method": (lambda m, x: m.f(m.conv(x).flatten(1)), lambda m: setattr(m, "f", m.fc.forward)),
    "partial": (lambda m, x: m.f(m.conv(x).flatten(1)),
                lambda m: setattr(m, "f", functools.partial(nn.Linear.forward, m.fc))),
    "partial with a weight": (lambda m, x: m.f(m.conv(x).flatten(1)),
                              lambda m: setattr(m, "f", functools.partial(F.linear, weight=m.double().fc.weight))),
    "lambda without a hold": (lambda m, x: m.f(m, m.conv(x)), lambda m: setattr(m, "f", lambda m, x: m.head(x))),
    "lambda that is not called": (lambda m, x: m.conv(x), lambda m: setattr(m, "f", lambda: m.fc.weight)),
    "a Python module": (lambda m, x: m.F.relu(m.conv(x)), lambda m: setattr(m, "F", F)),
    "a generator of numbers": (lambda m, x: m.conv(x), lambda m: setattr(m, "g", torch.Generator())),
    "compiled part that ran": (lambda m, x: m.fc(m.conv(x).flatten(1)), compiled),
    "checkpoint": (lambda m, x: torch.utils.checkpoint.checkpoint(m.conv, x, use_reentrant=False),),
    "cond": (lambda m, x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (m.conv(x),)),),
    "cancels": (lambda m, x: m.conv(x + 1e6),), "zeros": (lambda m, x: m.conv(x*0),),
    "nothing finite": (lambda m, x: m.conv(x*math.nan),),
    "empty": (lambda m, x: m.conv(x[:0]),),
    "long chain": (lambda m, x: functools.reduce(lambda y, _: m.conv(y.tanh())[:, :2]*50, range(30), x),),
    "reads attributes": (reads_attributes,)}


@pytest.mark.filterwarnings("ignore::UserWarning")
@BOTH
@pytest.mark.parametrize("name", RIGHT)
def test_odd_networks_are_embedded(to, name):
    forward, *more = RIGHT[name]
    model = Net(forward, *more)
    if name == "stores an activation": model(rand(2, *SHAPE))
    model.norm.eval()
    before = alone(model)
    released = embed(model, SHAPE, to)
    assert untouched(model, before) and [m.training for m in released.modules()] == before[1]
    assert type(released.conv) is RELEASED[to]
    assert all(torch.equal(v, before[0][k][3]) for k, v in released.state_dict().items() if not k.startswith("conv"))
    near = nearest_cnn(released)
    for step in near, convert(released, "lcn"), reinitialize(released, 0):
        assert [m.training for m in step.modules()] == before[1]
    x, answers = rand(1 if name == "one image" else 2, *SHAPE, seed=5).abs()/4, []
    for m in model, released, near:
        with torch.random.fork_rng():
            torch.manual_seed(3), np.random.seed(3), random.seed(3)
            answers.append(inspection.tensors_in(m.eval()(x.clone())))
    for y, *others in zip(*answers, strict=True):
        if y.isfinite().any():
            assert all(close(o.to_dense().double(), y.to_dense().double(), 1e-2 if name == "autocast" else 1e-6)
                       for o in others)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64, torch.complex128], ids=str)
def test_deep_networks_of_low_precision_and_complex_ones_prove_themselves(to, dtype):
    def norm(): return nn.Identity() if dtype.is_complex else nn.LayerNorm((6, 6))
    model = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Conv2d(4, 4, 3, padding=1), norm())))
    model = model.to(dtype)
    assert type(embed(model, (4, 6, 6), to)[0]) is RELEASED[to]
    wrong = Net(lambda m, x: m.conv(x)*m.conv.weight.shape[-1])
    with pytest.raises(ValueError, match="another function"): embed(wrong.to(dtype), SHAPE, to)


def test_outputs_of_every_kind_are_compared():
    for wrap in (lambda y: y, lambda y: (1, {"a": [y]}), Answer, lambda y: y.detach().numpy(), lambda y: y.to_sparse(),
                 lambda y: torch.distributions.Normal(y, 1),
                 lambda y: types.SimpleNamespace(y=y), float, lambda y: y.argmax()):
        def forward(m, x):
            sign = 1 if m.conv.weight.shape[-1] == 3 else -1
            return wrap((m.conv(x)[:, 0]*sign).sum((1, 2))[:1 if wrap is float else None])
        model = Net(forward)
        with pytest.raises(ValueError, match="another function"): embed(model, SHAPE)


def test_many_channels_and_positions_are_proved_in_part():
    "A layer of more weights than the proof reads: each position, or some, by one channel."
    model = made(lambda: nn.Sequential(nn.Conv2d(2, 40, 3, padding=1), nn.Conv2d(40, 30, 3, padding=1, groups=2)))
    for to in RELEASED:
        good = embed(model, (2, 12, 12), to)
        assert good[1].weight.numel() > proof.SAMPLE or to == "lcn"
        with torch.no_grad(): good[1].weight.mul_(1.001)
        trace = inspection.traced_geometries(model, (2, 12, 12))[1]
        with pytest.raises(ValueError, match="first part at 1"): proof.prove(trace, good, "embedded", trace.calls)


@BOTH
def test_without_the_check_the_network_runs_once(to):
    "One pass to listen, and one for the proof."
    for check, passes in (True, 2), (False, 1):
        model = Net(lambda m, x: m.seen.append(1) or m.conv(x), lambda m: setattr(m, "seen", Calls()))
        embed(model, SHAPE, to, check=check)
        assert len(model.seen) == passes


def test_the_proof_keeps_no_weights():
    "No circle of references holds the result, or the original, until Python looks for circles."
    gc.collect()
    gc.disable()
    try:
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).eval()
        steps = [embed(model, SHAPE, "lcn"), embed(model, SHAPE, fold_batchnorm=True)]
        steps += [nearest_cnn(steps[0]), convert(steps[0], "fcn"), convert(steps[1], "lcn"), reinitialize(steps[0], 0),
                  model]
        held = [weakref.ref(p) for m in steps for p in m.parameters()]
        del model, steps
        assert not [ref for ref in held if ref() is not None]
    finally: gc.enable()


# What a proof may say, and what it may not

def spoilt(change, which=None):
    "A small network in single precision after `change` of all parameters, or of one."
    model = made(lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, stride=2),
                                       nn.Tanh() if which == "tanh" else nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)))
    with torch.no_grad():
        for name, p in model.float().named_parameters():
            if which in (None, "tanh", name): change(p)
    return model


def one_entry(value): return lambda p: p.view(-1)[:1].fill_(value)


BEYOND = {  # weights of which roundings, overflows and what is not finite decide
    **{f"scaled by 1e{e}": (lambda p, e=e: p.mul_(10.**e), None) for e in (8, 15, 19, 22, 30, 37)},
    "huge before tanh": (lambda p: p.mul_(1e19), "tanh"),
    **{f"{value} in {name}": (one_entry(value), name) for value in (math.nan, math.inf, -math.inf)
       for name in ("0.weight", "0.bias", "2.weight", "2.bias", "5.weight")},
    "nothing but NaN": (lambda p: p.fill_(math.nan), None), "nothing but infinity": (lambda p: p.fill_(math.inf), None),
    "largest numbers": (lambda p: p.fill_(3e38), None),
    "sums that overflow": (lambda p: p.copy_(3e38*p.sign()), "0.weight"), "tiny": (lambda p: p.mul_(1e-38), None)}


@BOTH
@pytest.mark.parametrize("name", BEYOND)
def test_weights_beyond_what_numbers_hold_are_not_refused(to, name):
    model = spoilt(*BEYOND[name])
    released = embed(model, SHAPE, to)
    for step in (nearest_cnn, lambda m: convert(m, "lcn"), lambda m: convert(m, "fcn"), lambda m: reinitialize(m, 0)):
        step(released)
    merge_batchnorm(nn.Sequential(model[0], nn.BatchNorm2d(3), *model[1:]).eval(), SHAPE)


@BOTH
def test_wrong_weights_beside_huge_or_broken_ones_are_noticed(to):
    for change in (lambda p: p.mul_(1e19), lambda p: p.mul_(1e15), one_entry(math.nan)):
        model = spoilt(change, "0.weight")
        trace, good = inspection.traced_geometries(model, SHAPE)[1], embed(model, SHAPE, to)
        for spoil in (lambda w: w.mul_(1.1), lambda w: w.fill_(math.nan), lambda w: w.fill_(math.inf)):
            wrong = copy.deepcopy(good)
            with torch.no_grad(): spoil(wrong[0].weight)
            with pytest.raises(ValueError, match="first part at 0"): proof.prove(trace, wrong, "embedded", trace.calls)


READS = {  # reads of a released weight that move the outputs by little
    "mean": lambda m, x: m.head((m.conv(x) + .01*m.conv.weight.abs().mean()).relu()),
    "less": lambda m, x: m.head((m.conv(x) + 1e-4*m.conv.weight.abs().mean()).relu()),
    "norm": lambda m, x: m.head(m.conv(x))*(1 + 1e-4*m.conv.weight.norm()),
    "bias": lambda m, x: m.head(m.conv(x) + 1e-3*m.conv.bias.sum()),
    "input": lambda m, x: m.head(m.conv(x + 1e-4*m.conv.weight.norm())),
    "type": lambda m, x: m.head(m.conv(x)) + (1e-4 if isinstance(m.conv, nn.Conv2d) else 0)}


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", READS)
def test_small_reads_of_a_released_weight_are_refused(to, name, dtype):
    with pytest.raises(ValueError, match="another function"): embed(Net(READS[name]).to(dtype), SHAPE, to)


class Energy(nn.Module):
    "The gradient of an energy with respect to the image, and with `both` the energy too."
    def __init__(self, both, wrong=False):
        super().__init__()
        self.both, self.wrong = both, wrong
        self.a, self.b, self.f = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 1)
    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = self.f(self.b(self.a(x).tanh()).tanh().flatten(1))
            if self.wrong: y = y*self.a.weight.norm()
            g = torch.autograd.grad((y + x.pow(2).sum()*self.both).sum(), x)[0]
        return (y.detach(), g) if self.both else g


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("both", [False, True])
def test_networks_that_differentiate_are_embedded(to, both, dtype):
    model, x = made(lambda: Energy(both)).to(dtype), rand(2, *SHAPE, dtype=dtype)
    released = embed(model, SHAPE, to)
    for m in released, nearest_cnn(released), convert(released, "fcn"), convert(released, "lcn"):
        assert all(close(a, b, .1 if dtype == torch.bfloat16 else 1e-5)
                   for a, b in zip(inspection.tensors_in(m(x)), inspection.tensors_in(model(x))))
    reinitialize(released, 0)
    with pytest.raises(ValueError, match="another function"):
        embed(made(lambda: Energy(both, wrong=True)).to(dtype), SHAPE, to)


@pytest.mark.parametrize("forward", [
    lambda m, x: m.conv(x) + np.random.default_rng().normal(),
    lambda m, x: m.conv(x + np.random.default_rng().normal(size=(5, 5))),
    lambda m, x: m.head(m.conv(x)*random.Random().random())], ids=["after", "before", "factor"])
def test_noise_of_ones_own_is_no_other_function(forward):
    with pytest.warns(UserWarning, match="embedded without a proof, because its own outputs") as said:
        embed(Net(forward), SHAPE)
    assert said[0].filename == __file__
    wrong = Net(lambda m, x: m.conv(x + 1e-6*np.random.default_rng().normal())*m.conv.weight.shape[-1])
    with pytest.raises(ValueError, match="another function"): embed(wrong, SHAPE)
