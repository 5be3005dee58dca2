"""Descent within the backward pass: PyTorch's SGD is the oracle, in float64; and what it must not touch."""
import copy
import itertools
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efcn_nb import fused, layers
from efcn_nb.bench import peak_memory
from efcn_nb.embedding import embed
from efcn_nb.fused import FusedSGD
from efcn_nb.geometry import ConvGeometry
from efcn_nb.layers import FullyConnected, LocallyConnected
from efcn_nb.models import make_model

KINDS = {"fcn": FullyConnected, "lcn": LocallyConnected}
kinds = pytest.mark.parametrize("kind", KINDS)
SETTINGS = [dict(lr=.3), dict(lr=.3, weight_decay=.1), dict(lr=.1, momentum=.9), dict(lr=.1, momentum=.9, weight_decay=.1)]


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch): monkeypatch.setattr(layers, "CHUNK", 2000)  # or small locally-connected layers take their ordinary path


@pytest.fixture(params=[False, True], ids=["as usual", "tiny pieces"])
def pieces(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(fused, "PIECE", 100)
        monkeypatch.setattr(layers, "CHUNK", 500)


def cnn(seed=0, bias=True, dtype=torch.float64):
    "Two convolutions with every option, drawn."
    draw = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mode = draw.choice(["zeros", "reflect", "circular", "replicate"])
        first = nn.Conv2d(2, 4, draw.choice([1, 2, 3]), stride=draw.choice([1, 2]), padding=draw.choice([0, 1]), padding_mode=mode, bias=bias)
        second = nn.Conv2d(4, 6, 2, groups=draw.choice([1, 2]), padding=1, bias=bias)
        model = nn.Sequential(first, nn.Tanh(), second, nn.Sigmoid(), nn.Flatten(), nn.LazyLinear(3))
        model(torch.randn(1, 2, 6, 5))
        return model.to(dtype)


def batches(steps=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(7, 2, 6, 5, generator=g).to(dtype), torch.randint(3, (7,), generator=g)) for _ in range(steps)]


def train(model, optimizer, steps=4, precision=None, schedule=False):
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, .7) if schedule else None
    for x, y in batches(steps, next(model.parameters()).dtype):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"): out = model(x)
        optimizer.zero_grad()
        F.cross_entropy(out.to(x.dtype), y).backward()
        optimizer.step()
        if schedule: scheduler.step()
    return model


def distance(a, b): return max((p.double() - q.double()).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


def both(model, settings, **kw):
    "The model after some steps of ours and of PyTorch's."
    a, b = copy.deepcopy(model), copy.deepcopy(model)
    ours = FusedSGD(a, **settings)
    train(a, ours, **kw)
    train(b, torch.optim.SGD(b.parameters(), **settings), **kw)
    return a, b, ours


# Exact

@kinds
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_the_same_as_sgd(pieces, kind, settings, seed):
    start = embed(cnn(seed, bias=seed % 3 > 0), (2, 6, 5), kind)
    a, b, optimizer = both(start, settings, schedule=seed % 2 == 0)
    assert list(optimizer.fused) == ["0", "2"] and not optimizer.ordinary
    assert distance(a, b) < 1e-13 and distance(a, start) > 1e-3
    assert all(m.weight.grad is None for m in (a[0], a[2]))
    if settings.get("momentum"): assert optimizer.state[a[0].weight]["momentum_buffer"].shape == a[0].weight.shape


def test_a_wrong_update_would_be_seen(monkeypatch):
    "Negative control: the same comparison with a learning rate that is off by a thousandth."
    real = fused._Fused._settings
    monkeypatch.setattr(fused._Fused, "_settings", lambda self: (real(self)[0]*1.001, *real(self)[1:]))
    a, b, _ = both(embed(cnn(), (2, 6, 5)), SETTINGS[0])
    assert distance(a, b) > 1e-6


@kinds
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_products_in_bf16_on_weights_in_fp32(pieces, kind, settings):
    "As near to the steps in float64 as PyTorch's own, and the copy of the weights is always one of the weights."
    start = embed(cnn(dtype=torch.float32), (2, 6, 5), kind)
    a, b, optimizer = both(start, settings, precision="bf16")
    exact = copy.deepcopy(start).double()
    train(exact, torch.optim.SGD(exact.parameters(), **settings))
    assert a[0].weight.dtype == torch.float32 and 1e-7 < distance(a, exact) < 2*distance(b, exact) + 1e-3
    for f in optimizer.fused.values():
        if f.low is not None: assert torch.equal(f.low, f.weight.to(torch.bfloat16))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_step_of_a_real_network(precision):
    "SkinnyCNN's eFCN, trimmed, on one batch: each gradient is as near to float64 as PyTorch's own in the same precision (bfloat16 confuses maxima in both), but for the rounding of the weights that show it."
    start = embed(make_model("skinny", (3, 32, 32), 10, width=8), (3, 32, 32), trim=True)
    x, y = torch.randn(20, 3, 32, 32), torch.arange(20) % 10
    moved, theirs, exact = copy.deepcopy(start), copy.deepcopy(start), copy.deepcopy(start).double()
    optimizer = FusedSGD(moved, lr=1.)
    for model in (moved, theirs):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"): out = model(x)
        F.cross_entropy(out.float(), y).backward()
    optimizer.step()
    F.cross_entropy(exact(x.double()), y).backward()
    for (name, p), q, r, s in zip(start.named_parameters(), moved.parameters(), theirs.parameters(), exact.parameters()):
        ours, pytorch = ((g - s.grad).norm()/s.grad.norm() for g in ((p - q).double(), r.grad.double()))
        rounding = torch.finfo(p.dtype).eps*(1 + p.norm()/s.grad.norm())
        assert ours < 1.5*pytorch + rounding, name


def test_layers_move_in_the_order_of_the_backward_pass():
    "When the gradient reaches the first layer, its successor has moved and it has not."
    model = embed(cnn(), (2, 6, 5))
    optimizer, before, seen = FusedSGD(model), copy.deepcopy(model), []
    (x, y), = batches(1)
    h = model[0](x)
    h.register_hook(lambda grad: seen.append((torch.equal(model[0].weight, before[0].weight), torch.equal(model[2].weight, before[2].weight))))
    F.cross_entropy(model[1:](h), y).backward()
    assert seen == [(True, False)] and not torch.equal(model[0].weight, before[0].weight)


@pytest.mark.parametrize("precision, most", [("fp32", .2), ("bf16", .7)])
def test_no_gradient_is_stored(precision, most):
    "A step of a layer of 64 MB takes a fraction of that; PyTorch's SGD takes all of it."
    g = ConvGeometry.from_conv(nn.Conv2d(16, 16, 3, padding=1), (16, 16))
    x = torch.randn(8, 16, 16, 16)
    peaks = []
    for make in (FusedSGD, lambda m: torch.optim.SGD(m.parameters(), lr=.1)):
        model = nn.Sequential(FullyConnected(g))
        optimizer = make(model)
        def step():
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"): model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        step()
        peaks.append(peak_memory(step)/(4*model[0].weight.numel()))
    if not min(peaks) >= 0: pytest.skip("this system does not tell the peak of memory")
    assert peaks[0] < most and peaks[1] > .9, peaks


def test_small_locally_connected_layers_take_their_ordinary_path(monkeypatch):
    monkeypatch.setattr(layers, "CHUNK", 2**22)
    a, b, optimizer = both(embed(cnn(), (2, 6, 5), "lcn"), SETTINGS[3])
    assert distance(a, b) < 1e-13 and a[0].weight.grad is not None and list(optimizer.fused) == ["0", "2"]


# Stopping and going on

@kinds
def test_resumed_with_momentum(kind):
    settings = SETTINGS[3]
    whole = embed(cnn(), (2, 6, 5), kind)
    half = copy.deepcopy(whole)
    first = FusedSGD(half, **settings)
    data = batches(4)
    def go(model, optimizer, part):
        for x, y in part:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    go(half, first, data[:2])
    stored = copy.deepcopy(half), copy.deepcopy(first.state_dict())
    second = FusedSGD(stored[0], **settings)
    second.load_state_dict(stored[1])
    go(stored[0], second, data[2:])
    go(whole, FusedSGD(whole, **settings), data)  # nobody else holds it: the optimiser lives as long as the call
    assert distance(stored[0], whole) == 0


def test_steps_of_both_kinds_alternate():
    "The momentum of a step with a stored gradient and of a fused one is the same."
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            g = ConvGeometry.from_conv(nn.Conv2d(2, 2, 3, padding=1), (6, 5))
            self.layer, self.end, self.times = FullyConnected(g), nn.Linear(60, 3), itertools.cycle([1, 2])
        def forward(self, x):
            for _ in range(next(self.times)): x = self.layer(x).tanh()
            return self.end(x.flatten(1))
    torch.manual_seed(0)
    start = Net().double()
    a, b = copy.deepcopy(start), copy.deepcopy(start)
    with pytest.warns(UserWarning, match="layer was used 2 times"): train(a, FusedSGD(a, **SETTINGS[3]))
    train(b, torch.optim.SGD(b.parameters(), **SETTINGS[3]))
    assert distance(a, b) < 1e-13


# What is left alone

def tie(model): model[2].weight = model[0].weight
def freeze(model): model[0].weight.requires_grad_(False)
def hook(model): model[0].weight.register_hook(lambda grad: grad)
def parametrized(model): nn.utils.parametrizations.weight_norm(model[0])
def occupied(model): model[0].through = lambda layer, x: layer.product(x)


def square(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        g = ConvGeometry.from_conv(nn.Conv2d(2, 2, 3, padding=1), (6, 5))
        return nn.Sequential(FullyConnected(g), nn.Tanh(), FullyConnected(g), nn.Flatten(), nn.Linear(60, 3)).double()


@pytest.mark.parametrize("change, says", [(tie, "0, because its weight is shared; 2, because its weight is shared"), (freeze, "0, because its weight is frozen"), (hook, "0, because a hook"),
                                          (parametrized, "0, because it is not a plain layer"), (occupied, "0, because its product is computed elsewhere")], ids=lambda v: getattr(v, "__name__", ""))
def test_falls_back_and_says_so(change, says):
    models = square(), square()
    for m in models: change(m)
    with pytest.warns(UserWarning, match=f"not fused: {says}"): optimizer = FusedSGD(models[0], **SETTINGS[2])
    train(models[0], optimizer)
    train(models[1], torch.optim.SGD(models[1].parameters(), **SETTINGS[2]))
    assert distance(*models) < 1e-13


def test_frozen_later_and_replaced_later():
    models = square(), square()
    optimizers = FusedSGD(models[0], .1), torch.optim.SGD(models[1].parameters(), .1)
    for m, o in zip(models, optimizers):
        train(m, o, 1)
        m[0].weight.requires_grad_(False)
        m[2].weight = nn.Parameter(m[2].weight.detach().clone())  # no optimiser knows it
        train(m, o, 2)
    assert distance(*models) < 1e-13


def test_other_ways_to_call():
    "A single image, evaluation mode, no gradients, vmap, double backward of what is not fused."
    model = square()
    x = torch.randn(4, 2, 6, 5).double()
    wanted = model(x)
    optimizer = FusedSGD(model)
    with torch.no_grad():
        assert torch.allclose(model(x), wanted) and torch.allclose(model[0](x[0]), model[0](x)[0])
        assert torch.allclose(torch.func.vmap(model[0])(x), model[0](x))
    assert all(f.uses == 0 for f in optimizer.fused.values())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, x).sum())(dict(model.named_parameters()))
    assert gradients["0.weight"].abs().max() > 0
    assert torch.allclose(model(x), wanted), "a transform of torch.func moves nothing"


@pytest.mark.parametrize("first", [False, True], ids=["read after the layer", "read before it"])
def test_a_penalty_on_the_weights_is_right_or_refused(first):
    "A term that reads the weights directly hands its gradient to step(); if it still needs them after they have moved, autograd complains."
    def loss(model):
        (x, y), = batches(1)
        early = model[0].weight.pow(3).sum() if first else 0
        late = F.cross_entropy(model(x), y)
        return late + (early if first else model[0].weight.pow(3).sum())
    models = square(), square()
    ours, theirs = FusedSGD(models[0]), torch.optim.SGD(models[1].parameters(), .1)
    try: loss(models[0]).backward()
    except RuntimeError as error:
        assert first and "modified by an inplace operation" in str(error)
        return
    loss(models[1]).backward()
    ours.step(), theirs.step()
    assert not first and distance(*models) < 1e-13


def test_gradients_of_several_passes_are_refused():
    model = square()
    optimizer = FusedSGD(model)
    (x, y), = batches(1)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"call step\(\) before the next forward pass, and use torch.optim.SGD"): model(x)


@kinds
@pytest.mark.parametrize("of", ["the images", "the weights", "both"])
def test_a_gradient_that_is_asked_for_moves_nothing(kind, of):
    "The gradient is PyTorch's, and training goes on as if nobody had asked."
    start = embed(cnn(), (2, 6, 5), kind)
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    optimizer = FusedSGD(ours, .1)
    (x, y), = batches(1)
    found = []
    for model in ours, theirs:
        image = x.clone().requires_grad_()
        wanted = dict(zip(["the images", "the weights"], [[image], [model[0].weight, model[2].weight]])).get(of) or [image, model[0].weight]
        found.append(torch.autograd.grad(F.cross_entropy(model(image), y), wanted))
    assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(*found)) and distance(ours, start) == 0
    optimizer.step()
    train(ours, optimizer)
    train(theirs, torch.optim.SGD(theirs.parameters(), .1))
    assert distance(ours, theirs) < 1e-13


def test_inputs_of_a_backward_pass():
    models = square(), square()
    optimizer = FusedSGD(models[0], .1)
    (x, y), = batches(1)
    images = [x.clone().requires_grad_() for _ in models]
    for m, image in zip(models, images): F.cross_entropy(m(image), y).backward(inputs=[image])
    assert distance(*models) == 0 and torch.allclose(images[0].grad, images[1].grad)
    optimizer.step()
    for m in models: F.cross_entropy(m(x), y).backward(inputs=[m[2].weight])
    optimizer.step()
    torch.optim.SGD(models[1].parameters(), .1).step()
    assert distance(*models) < 1e-13


def test_weights_changed_between_forward_and_backward():
    model = square()
    optimizer = FusedSGD(model)
    (x, y), = batches(1)
    loss = F.cross_entropy(model(x), y)
    with torch.no_grad(): model[2].weight.mul_(3)
    with pytest.raises(RuntimeError, match="weights of 2 were changed between the forward and the backward pass"): loss.backward()
    assert optimizer.fused


def test_an_optimizer_that_is_gone_before_the_backward_pass():
    models = square(), square()
    (x, y), = batches(1)
    optimizer = FusedSGD(models[0])
    losses = [F.cross_entropy(m(x), y) for m in models]
    del optimizer
    for loss in losses: loss.backward()
    assert torch.allclose(models[0][0].weight.grad, models[1][0].weight.grad)


@kinds
def test_inference_in_between(kind):
    "In inference mode, in bf16 too, the layer goes its own way, and training goes on as before."
    start = embed(cnn(dtype=torch.float32), (2, 6, 5), kind)
    a, b = copy.deepcopy(start), copy.deepcopy(start)
    first, second = FusedSGD(a, .1), FusedSGD(b, .1)
    x = batches(1, torch.float32)[0][0]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16): a(x)
    for m, o in (a, first), (b, second): train(m, o, precision="bf16")
    assert distance(a, b) == 0 and distance(a, start) > 1e-3
    with torch.inference_mode(): a(x)


@kinds
def test_many_gradients_at_once(kind):
    model = embed(cnn(), (2, 6, 5), kind)
    x = batches(1)[0][0]
    wanted = torch.autograd.functional.jacobian(model, x)
    optimizer = FusedSGD(model)
    assert torch.allclose(torch.autograd.functional.jacobian(model, x, vectorize=True), wanted, atol=1e-13) and optimizer.fused


def test_an_optimizer_is_not_copied():
    optimizer = FusedSGD(square())
    with pytest.raises(TypeError, match="belongs to its model and cannot be copied or pickled"): copy.deepcopy(optimizer)


def test_what_cannot_be_done_without_gradients_is_refused():
    model = square()
    optimizer = FusedSGD(model, momentum=.9)
    optimizer.param_groups[0]["nesterov"] = True
    (x, y), = batches(1)
    with pytest.raises(ValueError, match="not nesterov, dampening or maximize; use torch.optim.SGD"): F.cross_entropy(model(x), y).backward()
    class Replica(nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module
    with pytest.raises(ValueError, match="DistributedDataParallel averages gradients"): FusedSGD(Replica(square()))


def test_units_lie_side_by_side():
    "What all images make of one unit is one line of memory, through pooling and ReLU, forwards and back."
    model = embed(make_model("skinny", (3, 32, 32), 10, width=2), (3, 32, 32))
    optimizer, strides = FusedSGD(model), []
    x = torch.randn(6, 3, 32, 32)
    for m in list(model)[:6]:
        x = m(x)
        x.register_hook(lambda grad: strides.append(grad.stride(0)))
        assert x.stride(0) == 1
    model[6:](x).sum().backward()
    assert strides == [1]*6 and optimizer.fused


@kinds
def test_a_step_with_a_closure(kind):
    start = embed(cnn(), (2, 6, 5), kind)
    models = copy.deepcopy(start), copy.deepcopy(start)
    for m, o in zip(models, (FusedSGD(models[0], .1), torch.optim.SGD(models[1].parameters(), .1))):
        for x, y in batches(2):
            def closure():
                o.zero_grad()
                loss = F.cross_entropy(m(x), y)
                loss.backward()
                return loss
            assert o.step(closure) > 0
    assert distance(*models) < 1e-13


def test_nothing_is_said_of_a_network_without_released_layers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a, b, optimizer = both(cnn(), SETTINGS[2])
    assert distance(a, b) == 0 and not optimizer.fused
