"""Descent without stored gradients: PyTorch's SGD is the oracle, in float64,
over a table of usages; and what is refused."""
import copy
import functools
import io
import pickle
import random
import warnings

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

from efcn_nb.ladder import layers
from efcn_nb.training import fused
from efcn_nb.service.timing import peak_memory
from efcn_nb.ladder.embedding import embed
from efcn_nb.training.fused import FusedSGD
from efcn_nb.ladder.geometry import ConvGeometry
from efcn_nb.ladder.layers import FullyConnected, LocallyConnected
from efcn_nb.materials.models import make_model

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = {"fcn": FullyConnected, "lcn": LocallyConnected}
kinds = pytest.mark.parametrize("kind", KINDS)
SETTINGS = [dict(lr=.3), dict(lr=.3, weight_decay=.1), dict(lr=.1, momentum=.9),
            dict(lr=.1, momentum=.9, weight_decay=.1)]


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch):
    monkeypatch.setattr(layers, "CHUNK", 2000)  # or small locally-connected layers take their ordinary path


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
        first = nn.Conv2d(2, 4, draw.choice([1, 2, 3]), stride=draw.choice([1, 2]), padding=draw.choice([0, 1]),
                          padding_mode=mode, bias=bias)
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


def distance(a, b):
    return max((p.double() - q.double()).abs().max().item()
               for p, q in zip(a.parameters(), b.parameters(), strict=True))


def both(model, settings, **kw):
    "The model after some steps of ours and of PyTorch's."
    a, b = copy.deepcopy(model), copy.deepcopy(model)
    ours = FusedSGD(a, **settings)
    train(a, ours, **kw)
    train(b, torch.optim.SGD(b.parameters(), **settings), **kw)
    return a, b, ours


def stored(weight): return torch._C.TensorBase.grad.__get__(weight)  # looking at weight.grad would store it


# Exact

@kinds
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_the_same_as_sgd(pieces, kind, settings, seed):
    start = embed(cnn(seed, bias=seed % 3 > 0), (2, 6, 5), kind)
    a, b, optimizer = both(start, settings, schedule=seed % 2 == 0)
    assert list(optimizer.fused) == ["0", "2"] and not optimizer.ordinary
    assert distance(a, b) < 1e-13 and distance(a, start) > 1e-3
    assert all(stored(m.weight) is None and m.weight in fused._waiting for m in (a[0], a[2]))
    if settings.get("momentum"): assert optimizer.state[a[0].weight]["momentum_buffer"].shape == a[0].weight.shape


@pytest.mark.parametrize("settings", SETTINGS[1::2], ids=str)
def test_slots_that_no_pixel_fills_decay_as_well(pieces, settings):
    start = embed(cnn(2), (2, 6, 5), "lcn")
    with torch.no_grad():
        for m in start[0], start[2]: m.weight.fill_(.1)
    a, b, _ = both(start, settings)
    assert any((m.geometry.reads < 0).any() for m in (a[0], a[2])) and distance(a, b) < 1e-13


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
    """SkinnyCNN's eFCN, trimmed, on one batch: each gradient as the weights show it, that is to the rounding of the
    weights, is as near to float64 as PyTorch's own (in bfloat16 both are far, because maxima are confused)."""
    start = embed(make_model("skinny", (3, 32, 32), 10, width=8), (3, 32, 32), trim=True)
    x, y = torch.randn(20, 3, 32, 32), torch.arange(20) % 10
    moved, theirs, exact = copy.deepcopy(start), copy.deepcopy(start), copy.deepcopy(start).double()
    optimizer = FusedSGD(moved, lr=1.)
    for model in (moved, theirs):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"): out = model(x)
        F.cross_entropy(out.float(), y).backward()
    optimizer.step()
    F.cross_entropy(exact(x.double()), y).backward()
    for (name, p), q, r, s in zip(start.named_parameters(), moved.parameters(), theirs.parameters(),
                                  exact.parameters()):
        ours, pytorch = ((g - s.grad).norm() for g in ((p - q).double(), r.grad.double()))
        assert ours < 2*pytorch + torch.finfo(p.dtype).eps*(p.double().norm() + s.grad.norm()), name


def test_nothing_moves_before_the_step():
    "Neither in the backward pass nor when a gradient is looked at; then everything does."
    model = embed(cnn(), (2, 6, 5))
    optimizer, before = FusedSGD(model), copy.deepcopy(model)
    (x, y), = batches(1)
    F.cross_entropy(model(x), y).backward()
    assert distance(model, before) == 0 and model[0].weight.grad.abs().max() > 0 and distance(model, before) == 0
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))


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
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        step()
        peaks.append(peak_memory(step)/(4*model[0].weight.numel()))
    if not min(peaks) >= 0: pytest.skip("this system does not tell the peak of memory")
    assert peaks[0] < most and peaks[1] > .9, peaks


def test_small_locally_connected_layers_take_their_ordinary_path(monkeypatch):
    monkeypatch.setattr(layers, "CHUNK", 2**22)
    a, b, optimizer = both(embed(cnn(), (2, 6, 5), "lcn"), SETTINGS[3])
    assert distance(a, b) < 1e-13 and stored(a[0].weight) is not None and list(optimizer.fused) == ["0", "2"]


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


@kinds
def test_steps_of_both_kinds_alternate(kind):
    "The momentum of a step with a stored gradient and of a fused one is the same."
    start = embed(cnn(), (2, 6, 5), kind)
    a, b = copy.deepcopy(start), copy.deepcopy(start)
    ours, theirs = FusedSGD(a, **SETTINGS[3]), torch.optim.SGD(b.parameters(), **SETTINGS[3])
    for i, (x, y) in enumerate(batches(6)):
        for m, o in (a, ours), (b, theirs):
            o.zero_grad()
            F.cross_entropy(m(x), y).backward()
            if i % 2: nn.utils.clip_grad_norm_(m.parameters(), .1)
            assert m is b or (stored(a[0].weight) is None) == (i % 2 == 0)
            o.step()
    assert distance(a, b) < 1e-13


@kinds
@pytest.mark.parametrize("order", ["bf16 fp32", "fp32 bf16", "bf16 fp32 fp32 bf16 bf16"])
def test_precisions_alternate(kind, order):
    "The copy in lower precision never lags behind: the last step starts from the weights that there are."
    model = embed(cnn(dtype=torch.float32), (2, 6, 5), kind)
    optimizer = FusedSGD(model, .3)
    for precision in order.split()*2: train(model, optimizer, 1, precision)
    x = batches(1, torch.float32)[0][0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): assert torch.equal(model(x), copy.deepcopy(model)(x))


READS = {"nothing": lambda m: None, "state_dict": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())),
         "save": lambda m: torch.save(m, io.BytesIO()), "deepcopy": copy.deepcopy, "repr": lambda m: repr(m[0].weight),
         "to": lambda m: m.to("cpu").float(), "clip": lambda m: nn.utils.clip_grad_norm_(m.parameters(), .1),
         "average": lambda m: torch.optim.swa_utils.AveragedModel(m).update_parameters(m),
         "parameters": lambda m: [isinstance(p, nn.Parameter) and p.detach() for p in m.parameters()]}


@kinds
@pytest.mark.parametrize("read", READS)
def test_the_copy_outlives_what_only_reads(kind, read):
    "Nobody has taken `.data`, and the copy of the weights in lower precision is made but once."
    model = embed(cnn(dtype=torch.float32), (2, 6, 5), kind)
    optimizer = FusedSGD(model, .3)
    train(model, optimizer, 2, "bf16")
    low = optimizer.fused["2"].low
    READS[read](model)
    train(model, optimizer, 2, "bf16")
    assert model[2].weight not in fused._exposed and (optimizer.fused["2"].low is low or read == "state_dict")


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


@pytest.mark.parametrize("change, says", [(tie, "0, because its weight is shared; 2, because its weight is shared"),
                                          (freeze, "0, because its weight is frozen"), (hook, "0, because a hook"),
                                          (parametrized, "0, because it is not a plain layer"),
                                          (occupied, "0, because its product is computed elsewhere")],
                         ids=lambda v: getattr(v, "__name__", ""))
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
    assert all(f.weight not in fused._waiting for f in optimizer.fused.values())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, x).sum())(dict(model.named_parameters()))
    assert gradients["0.weight"].abs().max() > 0
    assert torch.allclose(model(x), wanted), "a transform of torch.func moves nothing"


@pytest.mark.parametrize("first", [False, True], ids=["read after the layer", "read before it"])
def test_a_penalty_on_the_weights(first):
    "A term that reads the weights directly adds its gradient, whichever comes first."
    def loss(model):
        (x, y), = batches(1)
        early = model[0].weight.pow(3).sum() if first else 0
        late = F.cross_entropy(model(x), y)
        return late + (early if first else model[0].weight.pow(3).sum())
    models = square(), square()
    optimizers = FusedSGD(models[0]), torch.optim.SGD(models[1].parameters(), .1)
    for m, o in zip(models, optimizers):
        loss(m).backward()
        o.step()
    assert distance(*models) < 1e-13


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
        wanted = (dict(zip(["the images", "the weights"], [[image], [model[0].weight, model[2].weight]])).get(of)
                  or [image, model[0].weight])
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
    assert torch.allclose(torch.autograd.functional.jacobian(model, x, vectorize=True), wanted, atol=1e-13)
    assert optimizer.fused


# What is refused, with one sentence, before any weight has moved

def weights_changed(m, o, x, y):
    loss = F.cross_entropy(m(x), y)
    with torch.no_grad(): m[2].weight.copy_(m[2].weight.clone())
    loss.backward()
def input_changed(m, o, x, y):
    h = m[:2](x)
    F.cross_entropy(m[2:](h), y).backward()
    with torch.no_grad(): h.zero_()
    o.step()
def input_changed_before_a_look(m, o, x, y):
    h = m[:2](x)
    F.cross_entropy(m[2:](h), y).backward()
    with torch.no_grad(): h.zero_()
    nn.utils.clip_grad_norm_(m.parameters(), 1.)
def input_changed_before_another_pass(m, o, x, y):
    h = m[:2](x)
    F.cross_entropy(m[2:](h), y).backward()
    with torch.no_grad(): h.zero_()
    F.cross_entropy(m(x), y).backward()
def input_changed_in_a_hook(m, o, x, y):
    h = m[:2](x)
    o.register_step_pre_hook(lambda *_: h.detach().zero_().sum().item() or None)
    F.cross_entropy(m[2:](h), y).backward()
    o.step()
def output_gradient_changed(m, o, x, y):
    h, g = m[:3](x).flatten(1), torch.ones(len(x), m[:3](x)[0].numel(), dtype=x.dtype)
    h.backward(g)
    g.zero_()
    o.step()
def copied(m, o, x, y): copy.deepcopy(o)
def pickled(m, o, x, y): pickle.dumps(o)
def replicated(m, o, x, y):
    class Replica(nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module
    FusedSGD(Replica(m))


LAID_OUT = input_changed, input_changed_before_a_look, input_changed_before_another_pass, input_changed_in_a_hook
LOST = (RuntimeError, r"the input of [02], or the gradient of its output, was changed in place after backward\(\), .*; "
                      r"change it after step\(\), or use torch.optim.SGD$")
REFUSED = [(weights_changed, RuntimeError,
            "the weights of 2 were changed between the forward and the backward pass; call backward"),
           *((f, *LOST) for f in (*LAID_OUT, output_gradient_changed)),
           (copied, TypeError, "belongs to its model and cannot be copied or pickled; make one for the copy"),
           (pickled, TypeError, "belongs to its model and cannot be copied or pickled"),
           (replicated, ValueError,
            "DistributedDataParallel averages gradients over processes, .*; use torch.optim.SGD, or shard the layers")]


@pytest.mark.parametrize("kind, usage, error, says",
                         [(kind, *r) for kind in KINDS for r in REFUSED if kind == "fcn" or r[0] not in LAID_OUT],
                         ids=lambda v: getattr(v, "__name__", v if v in KINDS else ""))
def test_refused_before_anything_moves(kind, usage, error, says):
    "Bit for bit; and afterwards training goes on as if nothing had been tried."
    model = copy.deepcopy(embedded(kind, torch.float64))
    optimizer, (x, y) = FusedSGD(model, **SETTINGS[3]), batches(1)[0]
    train(model, optimizer, 1)
    optimizer.zero_grad()
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=says): usage(model, optimizer, x, y)
    assert distance(model, before) == 0
    optimizer._optimizer_step_pre_hooks.clear()
    other = FusedSGD(before, **SETTINGS[3])
    other.load_state_dict(state)
    train(model, optimizer), train(before, other)
    assert distance(model, before) == 0


@pytest.mark.parametrize("usage", LAID_OUT, ids=lambda f: f.__name__)
def test_locally_connected_layers_have_laid_out_their_inputs(usage):
    "So that nobody can write over them: what is refused elsewhere is right here."
    models = [copy.deepcopy(embedded("lcn", torch.float64)) for _ in range(2)]
    for m, o in zip(models, (FusedSGD(models[0], .1), torch.optim.SGD(models[1].parameters(), .1))):
        usage(m, o, *batches(1)[0])
        o.step()
    assert distance(*models) < 1e-13


def test_tracing_sees_the_ordinary_product():
    model = square()
    optimizer = FusedSGD(model)
    train(model, optimizer, 1)
    x = batches(1)[0][0]
    assert torch.allclose(torch.jit.trace(model, x, check_trace=False)(x), model(x))


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


# Usages: whatever people do with torch.optim.SGD does the same here. A usage takes a model, a function that makes an
# optimizer of a model, and a `Data`; what it returns is compared, too.

class Data:
    "Fixed random batches in the type of a model."
    def __init__(self, dtype):
        self.dtype, self.g, self.y = dtype, torch.Generator().manual_seed(1), torch.arange(7) % 3

    def x(self): return torch.randn(7, 2, 6, 5, generator=self.g, dtype=torch.float64).to(self.dtype)
    def loss(self, model, x=None): return F.cross_entropy(model(self.x() if x is None else x), self.y)
    def backward(self, model): self.loss(model).backward()

    def steps(self, model, optimizer, count=2):
        for _ in range(count):
            optimizer.zero_grad()
            self.backward(model)
            optimizer.step()


def between(act, zero=True):
    "The usage in which `act` happens between backward pass and step."
    def usage(model, make, data):
        optimizer, seen = make(model), []
        for _ in range(3):
            data.backward(model)
            seen.append(act(model, optimizer, data))
            optimizer.step()
            if zero: optimizer.zero_grad()
        return seen
    return usage


def settings(**kw):
    "The usage in which a group of parameters gets other settings after a step, and again before a step."
    def usage(model, make, data):
        optimizer = make(model)
        data.steps(model, optimizer)
        optimizer.param_groups[0].update(kw)
        data.steps(model, optimizer)
        data.backward(model)
        optimizer.param_groups[0].update({k: v for k, v in dict(lr=.02, momentum=.5, weight_decay=.2).items()
                                          if k not in kw})
        optimizer.step()
    return usage


def each_step(act):
    "The usage in which `act` is the whole step."
    def usage(model, make, data):
        optimizer = make(model)
        return [act(model, optimizer, data) for _ in range(3)]
    return usage


def released(model): return [m for m in model if isinstance(m, (FullyConnected, LocallyConnected))]


def nothing(m, o, d): pass
def set_lr(m, o, d): o.param_groups[0]["lr"] *= .3
def set_all(m, o, d): o.param_groups[0].update(lr=.02, momentum=.5, weight_decay=.3)
def lr_zero(m, o, d): o.param_groups[0]["lr"] = 0.
def lr_tensor(m, o, d): o.param_groups[0]["lr"] = torch.tensor(.25)
def backward_again(m, o, d): d.backward(m)
def clip_norm(m, o, d): return nn.utils.clip_grad_norm_(m.parameters(), .01)
def clip_value(m, o, d): nn.utils.clip_grad_value_(m.parameters(), .001)
def log_norms(m, o, d): return [p.grad.norm() for p in m.parameters()]
def halve(m, o, d): [p.grad.mul_(.5) for p in m.parameters()]
def signs(m, o, d): [setattr(p, "grad", p.grad.sign()) for p in m.parameters()]
def forget_one(m, o, d): m[0].weight.grad = None
def delete_one(m, o, d): del m[0].weight.grad
def step_before(m, o, d): o.step()
def look(m, o, d):
    with torch.no_grad(): return m.eval()(d.x())
def infer(m, o, d):
    with torch.inference_mode(): m(d.x())
def ask(m, o, d): return torch.autograd.grad(d.loss(m), list(m.parameters()))
def ask_functional(m, o, d):
    return torch.func.grad(lambda p: torch.func.functional_call(m, p, d.x()).square().sum())(
        dict(m.named_parameters()))["0.weight"]
def freeze_late(m, o, d): m[0].weight.requires_grad_(False)
def to_double(m, o, d):
    m.double()
    d.dtype = torch.float64
def hook_late(m, o, d): m[0].weight.register_hook(lambda g: g*.5)
def post_hook_late(m, o, d):
    def halve(p): p.grad.mul_(.5)
    m[2].weight.register_post_accumulate_grad_hook(halve)
def change_weights(m, o, d):
    with torch.no_grad(): m[0].weight.clamp_(-.1, .1)
def load_weights(m, o, d): m.load_state_dict({k: v*.9 for k, v in m.state_dict().items()})
def load_state(m, o, d):
    state = copy.deepcopy(o.state_dict())
    state["param_groups"][0]["lr"] = .04
    o.load_state_dict(state)
def copy_model(m, o, d):
    twin = copy.deepcopy(m)
    d.backward(twin)
    return [p.grad for p in twin.parameters()]
def save_model(m, o, d):
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert all(type(p) is nn.Parameter and p.grad is None for p in twin.parameters())
    return list(twin.parameters())
def close(m, o, d):
    if isinstance(o, FusedSGD): o.close()
def other_optimizer(m, o, d): torch.optim.SGD(m.parameters(), .03).step()
def other_zeroes(m, o, d):
    torch.optim.SGD(m.parameters(), .03).zero_grad()
    d.backward(m)
def zero_with_zeros(m, o, d): o.zero_grad(set_to_none=False)
def model_zeroes(m, o, d):
    m.zero_grad()
    d.backward(m)
def model_zeroes_with_zeros(m, o, d):
    m.zero_grad(set_to_none=False)
    d.backward(m)


def zero_before_forward(m, o, d):
    o.zero_grad()
    d.backward(m)
    o.step()
def zero_after_forward(m, o, d):
    loss = d.loss(m)
    o.zero_grad()
    loss.backward()
    o.step()
def model_zero_grad(m, o, d):
    d.backward(m)
    o.step()
    m.zero_grad()
def zeros_after_step(m, o, d):
    d.backward(m)
    o.step()
    o.zero_grad(set_to_none=False)
def zeroed_every_second_time(m, o, d):
    for _ in range(2):
        d.backward(m)
        o.step()
    o.zero_grad()
def several_batches(m, o, d):
    for _ in range(12): (d.loss(m)/12).backward()
    o.step()
    o.zero_grad()
def one_buffer(m, o, d):
    x = d.x()
    for _ in range(2):
        x.copy_(d.x())
        d.loss(m, x).backward()
    x.zero_()
    o.step()
    o.zero_grad()
def a_leaf_that_is_changed(m, o, d):
    x = d.x().requires_grad_()
    d.loss(m, x).backward()
    x.data += x.grad.sign()
    o.step()
    o.zero_grad()
    return x
def two_graphs(m, o, d):
    losses = [d.loss(m), d.loss(m)]
    for loss in losses: loss.backward()
    o.step()
    o.zero_grad()
def one_sum(m, o, d):
    (d.loss(m) + 2*d.loss(m)).backward()
    o.step()
    o.zero_grad()
def retained(m, o, d):
    loss = d.loss(m)
    loss.backward(retain_graph=True)
    loss.backward()
    o.step()
    o.zero_grad()
def autocast_and_not(m, o, d):
    with torch.autocast("cpu", torch.bfloat16, enabled=False): d.backward(m)
    d.backward(m)
    o.step()
    o.zero_grad()
def closure(m, o, d):
    def evaluate():
        o.zero_grad()
        loss = d.loss(m)
        loss.backward()
        return loss
    return o.step(evaluate)
def closure_several_times(m, o, d):
    x = d.x()
    def evaluate():
        for _ in range(3):
            o.zero_grad()
            loss = d.loss(m, x)
            loss.backward()
        return loss
    return o.step(evaluate)
def closure_that_adds_up(m, o, d):
    def evaluate():
        loss = d.loss(m)
        loss.backward()
        return loss
    return o.step(closure=evaluate)
def scaled_by_hand(m, o, d):
    (d.loss(m)*1024).backward()
    for p in m.parameters(): p.grad /= 1024
    o.step()
    o.zero_grad()
def skipped(m, o, d):
    d.backward(m)
    o.zero_grad()
    o.step()
    d.steps(m, o, 1)
def failing(m, o, d):
    def fail(grad): raise KeyError("midway")
    o.zero_grad()
    h = m[:2](d.x())
    h.register_hook(fail)
    with pytest.raises(KeyError, match="midway"): F.cross_entropy(m[2:](h), d.y).backward()
    o.step()
    o.zero_grad()
    d.steps(m, o, 1)
def frozen_between(m, o, d):
    o.zero_grad()
    loss = d.loss(m)
    m[0].weight.requires_grad_(False)
    loss.backward()
    o.step()
    m[0].weight.requires_grad_(True)
def frozen_for_a_step(m, o, d):
    m[2].weight.requires_grad_(False)
    d.steps(m, o, 1)
    m[2].weight.requires_grad_(True)
    d.steps(m, o, 1)
def checkpointed(reentrant):
    def act(m, o, d):
        o.zero_grad()
        x = d.x().requires_grad_(reentrant)
        F.cross_entropy(m[3:](checkpoint(m[:3], x, use_reentrant=reentrant)), d.y).backward()
        o.step()
    return act
def on_the_cpu(m, o, d):
    o.zero_grad()
    with torch.autograd.graph.save_on_cpu(): loss = d.loss(m)
    loss.backward()
    o.step()
def penalised(m, o, d):
    o.zero_grad()
    x = d.x().requires_grad_()
    loss = d.loss(m, x)
    g, = torch.autograd.grad(loss, x, create_graph=True)
    (loss + g.square().sum()).backward()
    o.step()
def twice_differentiable(m, o, d):
    o.zero_grad()
    d.loss(m).backward(create_graph=True)
    sum(p.grad.square().sum() for p in m.parameters()).backward(inputs=[m[0].weight])
    o.step()
def forward_mode(m, o, d):
    d.steps(m, o, 1)
    with fwAD.dual_level(): return fwAD.unpack_dual(m(fwAD.make_dual(d.x(), d.x()))).tangent
def weight_decay_as_a_loss(m, o, d):
    o.zero_grad()
    (m[0].weight.pow(3).sum() + d.loss(m) + m[2].weight.square().sum()).backward()
    o.step()
def some_inputs(m, o, d):
    o.zero_grad()
    d.loss(m).backward(inputs=[m[2].weight, m[0].bias])
    o.step()
def full_backward_hooks(m, o, d):
    handle = m[2].register_full_backward_hook(lambda layer, before, after: tuple(g*.5 for g in before))
    d.steps(m, o, 1)
    handle.remove()
def retained_gradients(m, o, d):
    o.zero_grad()
    h = m[:2](d.x())
    h.retain_grad()
    F.cross_entropy(m[2:](h), d.y).backward()
    h.grad.zero_()
    o.step()
def hooks_for_a_while(m, o, d):
    seen = []
    loss = d.loss(m)
    handles = [m[0].weight.register_hook(lambda g: seen.append(g.norm()) and None),
               m[2].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm()) and None)]
    o.zero_grad()
    loss.backward()
    for h in handles: h.remove()
    d.backward(m)
    o.step()
    return seen
def multi_hook(m, o, d):
    seen = []
    with torch.autograd.graph.register_multi_grad_hook([m[0].weight, m[2].weight],
                                                       lambda grads: seen.extend(g.norm() for g in grads)):
        d.steps(m, o, 1)
    return seen
def anomalies(m, o, d):
    with torch.autograd.detect_anomaly(check_nan=True): d.steps(m, o, 1)
def given_gradients(m, o, d):
    for p in m.parameters(): p.grad = torch.ones_like(p)
    d.backward(m)
    o.step()
def data_replaced(m, o, d):
    d.steps(m, o, 1)
    m[0].weight.data = m[0].weight.data*.5
    d.steps(m, o, 1)


def read_in_inference(m, o, d):
    with torch.inference_mode(): return [p.grad.norm() for p in m.parameters()]
def read_in_inference_and_halve(m, o, d):
    read_in_inference(m, o, d)
    halve(m, o, d)
def read_in_inference_and_add(m, o, d):
    read_in_inference(m, o, d)
    d.backward(m)
    return read_in_inference(m, o, d)
def read_in_inference_and_clip(m, o, d): return read_in_inference(m, o, d), clip_norm(m, o, d)
def read_in_inference_and_zero(m, o, d):
    with torch.inference_mode(): o.zero_grad(set_to_none=False)
    read_in_inference_and_add(m, o, d)


class Turned(torch.autograd.Function):
    "A view made within a function of its own, and its gradient turned."
    @staticmethod
    def forward(ctx, x): return x.view_as(x)
    @staticmethod
    def backward(ctx, g): return -g
class Bare(Turned):
    "The memory of the input, and no view of it."
    @staticmethod
    def forward(ctx, x): return x.data


def learned(seen, move=None):
    """The usage in which the input of the first layer is a parameter, `seen` through a view,
    that the step moves, and `move` before it."""
    def usage(model, make, data):
        model.constant = nn.Parameter(data.x())
        net, optimizer = nn.Sequential(*list(model.children())), make(model)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(net[:6](seen(model.constant)), data.y).backward()
            if move: move(model.constant)
            optimizer.step()
        constant = model.constant
        del model.constant
        return constant, constant.grad
    return usage
def signs_off(p): p.data.sub_(p.grad.sign())
def plain_step_off(p): torch.optim.SGD([p], .1).step()
def weight_as_input(m, o, d):
    "Weights of one fused layer are the input of another."
    o.zero_grad()
    images = m[2].weight.flatten()[:2*60].view(2, 2, 6, 5)
    F.cross_entropy(m(images), d.y[:2]).backward()
    o.step()
def weight_as_gradient(m, o, d):
    "The gradient of a layer's output is the memory of a parameter."
    o.zero_grad()
    out = m[0](d.x()).flatten(1)
    out.backward(m[0].bias.detach().expand(len(out), -1))
    o.step()


SMALL = .02
def through_copy(p): p.data.copy_(torch.full_like(p, SMALL))
def through_clamp(p): p.data.clamp_(-SMALL, SMALL)
def through_mul(p): p.data.mul_(.5)
def through_foreach(p): torch._foreach_mul_([p.data], .5)
def through_numpy(p): p.data.numpy()[:] *= .5
def through_given(p):
    given = p.detach()*.5
    p.data = given
    given.mul_(.5)
def through_vector(p):
    vector = nn.utils.parameters_to_vector([p]).detach()*.5
    nn.utils.vector_to_parameters(vector, [p])
    vector.mul_(.5)
def through_shallow_copy(p):
    with torch.no_grad(): copy.copy(p).mul_(.5)
def through_shared_memory(p):
    "As another process that has got the shared memory."
    p.share_memory_()
    torch.Tensor.data.__get__(p).mul_(.5)
def through_what_it_holds():
    "The memory that was given to a parameter, by whoever holds it, for as long as there are steps."
    holds = {}
    def write(p):
        if p in holds: holds[p].mul_(.5)
        else: p.data = holds[p] = p.detach()*.5
    return write
def through_detached(p): p.detach().mul_(.5)


def stale(write, kept=False):
    """The usage that sees how far products in bf16 are from those of a copy of the model, which has no other weights
    than it shows, after a step and a `write`; `kept`: through a `.data` of the first step."""
    def usage(model, make, data):
        optimizer, before, seen, bare = make(model), copy.deepcopy(model.state_dict()), [], []
        def autocast(): return torch.autocast("cpu", torch.bfloat16, enabled=data.dtype == torch.float32)
        for i in range(3):
            optimizer.zero_grad()
            with autocast(): loss = data.loss(model)
            loss.backward()
            optimizer.step()
            if kept and not i: bare = [p.data for p in model.parameters()]
            for p in bare or model.parameters(): write(p)
            with torch.no_grad(), autocast():
                x = data.x()
                seen.append((model(x) - copy.deepcopy(model)(x)).abs().max())
        optimizer.zero_grad()
        model.load_state_dict(before)
        return seen
    return usage


def scaler(act=None, scale=2.**10):
    def usage(model, make, data):
        optimizer, scaler, seen = make(model), torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2), []
        for i in range(4):
            optimizer.zero_grad()
            loss = scaler.scale(data.loss(model))
            (loss if i != 2 else loss*float("inf")).backward()
            if act: seen.append(act(scaler, optimizer, model))
            scaler.step(optimizer)
            scaler.update()
            seen.append(scaler.get_scale())
        return [s for s in seen if s is not None]
    return usage
def unscale_and_clip(s, o, m):
    s.unscale_(o)
    nn.utils.clip_grad_norm_(m.parameters(), .01)

def finite(s, o, m):
    "As trainers look for overflows."
    with torch.inference_mode(): return [p.grad.isfinite().all() for p in m.parameters()]


def scheduled(late, make_scheduler):
    def usage(model, make, data):
        optimizer = make(model)
        schedule = make_scheduler(optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            data.backward(model)
            if not late: schedule.step()
            optimizer.step()
            if late: schedule.step()
        return [schedule.get_last_lr()]
    return usage
def warmup(o): return torch.optim.lr_scheduler.LambdaLR(o, lambda i: i/4)
def one_cycle(o): return torch.optim.lr_scheduler.OneCycleLR(o, .3, total_steps=8)


def step_hooks(model, make, data):
    "Own and global hooks, one of which clips, after somebody has made a plain SGD."
    torch.optim.SGD(model.parameters(), .1)
    optimizer, seen = make(model), []
    optimizer.register_step_pre_hook(
        lambda o, args, kw: seen.append(1) or nn.utils.clip_grad_norm_(model.parameters(), .01) and None)
    optimizer.register_step_post_hook(lambda o, args, kw: seen.append(2))
    register = register_optimizer_step_pre_hook, register_optimizer_step_post_hook
    handles = [f(lambda o, args, kw, i=i: seen.append(i)) for i, f in enumerate(register, 3)]
    torch.optim.SGD(model.parameters(), .1)
    try: data.steps(model, optimizer, 3)
    finally: [h.remove() for h in handles]
    return seen
def hooks_that_give_a_closure(model, make, data):
    optimizer = make(model)
    optimizer.register_step_pre_hook(lambda o, args, kw: ((o, lambda: data.loss(model)), {}))
    data.backward(model)
    return optimizer.step()
def two_optimizers(model, make, data):
    optimizers = make(model), make(model, lr=.02, momentum=.5)
    for i in range(4):
        for o in optimizers: o.zero_grad()
        data.backward(model)
        for o in optimizers[:i] or optimizers: o.step()
def the_second_is_closed(model, make, data):
    first, second = make(model), make(model, lr=.02)
    data.steps(model, first, 1)
    close(model, second, data)
    del second
    data.steps(model, first)
def made_again(model, make, data):
    for _ in range(3):
        optimizer = make(model)
        data.backward(model)
        optimizer.step()
def made_late(model, make, data):
    data.backward(model)
    optimizer = make(model)
    optimizer.step()
    data.steps(model, optimizer, 1)
def gone(model, make, data):
    optimizer = make(model)
    data.backward(model)
    del optimizer
    data.backward(model)
    torch.optim.SGD(model.parameters(), .1).step()
def handed_over(model, make, data):
    "State saved midway, and loaded by PyTorch's SGD, and back."
    optimizer = make(model, momentum=.9)
    data.steps(model, optimizer)
    for other in (torch.optim.SGD(model.parameters(), .1), make(model)):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        data.steps(model, other)
        optimizer = other
    return [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
def another_group(model, make, data):
    optimizer, extra = make(model), nn.Parameter(torch.ones(3, dtype=data.dtype))
    optimizer.add_param_group(dict(params=[extra], lr=.5))
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(data.x())*extra, data.y).backward()
        optimizer.step()
    return extra
def own_groups(model, make, data):
    optimizer = make(model)
    weight = model[0].weight
    optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p is not weight]
    data.steps(model, optimizer, 1)
    optimizer.add_param_group(dict(params=[weight], lr=.01, momentum=.3))
    data.steps(model, optimizer)
def a_parameter_replaced(model, make, data):
    optimizer, old = make(model), model[0].weight
    data.backward(model)
    model[0].weight = nn.Parameter(old.detach()*.5)
    optimizer.step()
    optimizer.zero_grad()
    data.steps(model, optimizer)
    return old
def shared_between_models(model, make, data):
    other = nn.Sequential(*model[:3], nn.Flatten(1), copy.deepcopy(model[-1]))
    optimizers = make(model), make(other, lr=.05)
    for m, o in zip((model, other)*2, optimizers*2):
        m.zero_grad()
        data.backward(m)
        o.step()
    return list(other.parameters())
def used_twice(model, make, data):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model
        def forward(self, x): return self.net(x) + self.net(x.flip(-1))
    two = Two()
    optimizer = make(two)
    data.steps(two, optimizer, 3)
def a_parametrization_later(model, make, data):
    optimizer = make(model)
    data.steps(model, optimizer, 1)
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    data.steps(model, optimizer)
def averaged(model, make, data):
    optimizer, average = make(model), torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        data.steps(model, optimizer, 1)
        average.update_parameters(model)
    return list(average.parameters())


USAGES = {f.__name__: each_step(f) for f in (
    zero_before_forward, zero_after_forward, model_zero_grad, zeros_after_step, zeroed_every_second_time,
    several_batches, one_buffer, a_leaf_that_is_changed, two_graphs, one_sum, retained,
    autocast_and_not, closure, closure_several_times, closure_that_adds_up, scaled_by_hand, skipped, failing,
    frozen_between, frozen_for_a_step, on_the_cpu, penalised, twice_differentiable,
    forward_mode, weight_decay_as_a_loss, some_inputs, full_backward_hooks, retained_gradients, hooks_for_a_while,
    multi_hook, anomalies, given_gradients, data_replaced)}
USAGES |= {f"{f.__name__} between": between(f) for f in (
    nothing, set_lr, set_all, lr_zero, lr_tensor, backward_again, clip_norm, clip_value, log_norms, halve, signs,
    forget_one, delete_one, step_before, look, infer, ask, ask_functional, freeze_late,
    to_double, hook_late, post_hook_late, change_weights, load_weights, load_state, copy_model, save_model, close,
    other_optimizer, other_zeroes, zero_with_zeros, model_zeroes, model_zeroes_with_zeros)}
USAGES |= {f"{f.__name__} between, never zeroed": between(f, zero=False)
           for f in (nothing, set_lr, clip_norm, look, log_norms, forget_one, close)}
USAGES |= {str(kw): settings(**kw) for kw in (
    dict(lr=0.), dict(lr=torch.tensor(.2)), dict(lr=.03, weight_decay=.2), dict(momentum=.5), dict(momentum=0),
    dict(momentum=.5, nesterov=True), dict(momentum=.5, dampening=.3), dict(maximize=True),
    dict(foreach=True), dict(foreach=False), dict(fused=True), dict(differentiable=True))}
USAGES |= {f.__name__: f for f in (
    step_hooks, hooks_that_give_a_closure, two_optimizers, the_second_is_closed, made_again, made_late, gone,
    handed_over, another_group, own_groups, a_parameter_replaced, shared_between_models, used_twice,
    a_parametrization_later, averaged)}
USAGES |= {"checkpointed": each_step(checkpointed(False)), "checkpointed, reentrant": each_step(checkpointed(True)),
           "scaler": scaler(), "scaler, clipped": scaler(unscale_and_clip),
           "scaler, read in inference mode": scaler(finite), "scaler, too large": scaler(scale=2.**120),
           "warm-up": scheduled(True, warmup), "warm-up before the step": scheduled(False, warmup),
           "one cycle": scheduled(True, one_cycle)}
USAGES |= {f"{f.__name__} between": between(f) for f in (
    read_in_inference, read_in_inference_and_halve, read_in_inference_and_add, read_in_inference_and_clip,
    read_in_inference_and_zero)}
USAGES |= {f"{f.__name__} between, never zeroed": between(f, zero=False)
           for f in (read_in_inference, read_in_inference_and_clip)}
USAGES |= {f.__name__: each_step(f) for f in (weight_as_input, weight_as_gradient)}
SEEN = {"itself": lambda p: p, "expanded": lambda p: p[:1].expand(7, -1, -1, -1),
        "viewed": lambda p: p.view(7, -1).view(7, 2, 6, 5), "in a function": Turned.apply, "bare": Bare.apply,
        "checkpointed": lambda p: checkpoint(lambda t: t.view_as(t), p, use_reentrant=True)}
USAGES |= {f"a parameter {name}": learned(seen) for name, seen in SEEN.items()}
USAGES |= {f"a parameter {name}, {move.__name__}": learned(seen, move) for name, seen in SEEN.items() if name != "bare"
           for move in (signs_off, plain_step_off)}
USAGES |= {f"bf16, {f.__name__}": stale(f) for f in (
    through_copy, through_clamp, through_mul, through_foreach, through_numpy, through_given, through_vector,
    through_shallow_copy, through_shared_memory, through_detached)}
USAGES |= {f"bf16, {f.__name__}, kept": stale(f, True) for f in (through_mul, through_foreach)}
USAGES["bf16, through what it holds"] = stale(through_what_it_holds())


def numbers(seen):
    "All tensors and numbers in what a usage returns."
    if isinstance(seen, (list, tuple)): return [n for s in seen for n in numbers(s)]
    return [] if seen is None else [torch.as_tensor(seen).detach().double()]


def outcome(usage, start, optimizer, dtype, base):
    "Weights, gradients and what was seen."
    model = copy.deepcopy(start)
    seen = usage(model, lambda m, **kw: optimizer(m, **(base | kw)), Data(dtype))
    return (numbers([*model.parameters()]), numbers([p.grad for p in model.parameters()]),
            [p.grad is None for p in model.parameters()], numbers(seen))


def plain(model, **kw): return torch.optim.SGD(model.parameters(), **kw)


@functools.cache
def embedded(kind, dtype): return embed(cnn(3, dtype=dtype), (2, 6, 5), kind)


@pytest.mark.filterwarnings("ignore")
@kinds
@pytest.mark.parametrize("name", USAGES)
def test_used_like_sgd(kind, name):
    "Weights, gradients and all that a usage sees are those of PyTorch's SGD, to a thousand roundings."
    for dtype, base in (torch.float64, SETTINGS[3]), (torch.float32, SETTINGS[1]):
        start = embedded(kind, dtype)
        ours, theirs = (outcome(USAGES[name], start, optimizer, dtype, base) for optimizer in (FusedSGD, plain))
        assert ours[2] == theirs[2]
        for what, a, b in zip(["weights", "gradients", "seen"], [ours[0], ours[1], ours[3]],
                              [theirs[0], theirs[1], theirs[3]]):
            assert len(a) == len(b)
            for i, (s, t) in enumerate(zip(a, b)):
                assert torch.allclose(s, t, rtol=0, atol=1000*torch.finfo(dtype).eps*max(1, t.abs().max().item())), (
                    what, i, dtype, base)
