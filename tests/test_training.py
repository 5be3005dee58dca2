"""The loop: each precision against float64, any optimiser, no waiting for the device, and what it refuses."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import keep
from efcn_nb.experiments.bench import noise
from efcn_nb.materials.data import Data, Dataset
from efcn_nb.ladder.embedding import embed
from efcn_nb.ladder.inspection import evaluated, modes_kept
from efcn_nb.training.fused import FusedSGD
from efcn_nb.materials.models import make_model
from efcn_nb.training.loop import (
    PRECISIONS, Diverged, evaluate, products, start_training, train, train_epoch, train_steps)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


PLACES = [("fp32", "cpu"), ("bf16", "cpu")] + [pytest.param(p, "cuda", marks=needs_gpu) for p in PRECISIONS]


def efcn(width=4, dtype=torch.float32):
    return embed(make_model("skinny", (3, 32, 32), 10, width=width), (3, 32, 32), trim=True).to(dtype)


def vector(model): return torch.cat([p.detach().double().cpu().flatten() for p in model.parameters()])


def batches_in_float64(data, size, seed):
    "The batches of `train_epoch`, written out."
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    for index in order.split(size):
        x, y = data.batch(index)
        yield x.double(), y


@pytest.mark.parametrize("precision, device", PLACES)
def test_each_precision_against_float64(precision, device):
    """Four steps: where they end differs from where PyTorch's SGD ends in float64 as little as PyTorch's own steps in
    that precision do."""
    start, data = efcn(), noise(80).train
    exact = copy.deepcopy(start).double()
    optimizer = torch.optim.SGD(exact.parameters(), .01)
    for x, y in batches_in_float64(data, 20, seed=5):
        optimizer.zero_grad()
        F.cross_entropy(exact(x), y).backward()
        optimizer.step()
    off = []
    for make in (FusedSGD, lambda m, lr: torch.optim.SGD(m.parameters(), lr)):
        model = copy.deepcopy(start).to(device)
        train_epoch(model, make(model, .01), data.to(device), 20, 5, precision=precision)
        off.append(((vector(model) - vector(exact)).norm()/(vector(exact) - vector(start)).norm()).item())
    unit = {"fp32": 2**-24, "tf32": 2**-11, "bf16": 2**-8}[precision]  # what rounding changes in a number, at most
    assert off[0] < 2*off[1] + 1e-3, off
    if precision == "fp32": assert off[0] < 1e4*unit, off
    else: assert off[0] > unit/100, f"products are more precise than {precision}: {off}"


@pytest.mark.parametrize("precision, device", PLACES)
def test_evaluation_in_each_precision(precision, device):
    model, data = efcn(dtype=torch.float64), noise(100).train
    x, y = data.batch(range(100))
    with torch.no_grad():
        exact = model(x.double())
        model.float().to(device)
        with products(precision, device): rounded = model(x.to(device)).double().cpu()
    most = 2*(rounded - exact).abs().max().item()  # log-sum-exp and the right logit move by no more than this together
    found = evaluate(model, data.to(device), 33, precision)["loss"]
    assert found == pytest.approx(F.cross_entropy(exact, y).item(), abs=2*most + 1e-5)


def test_weights_stay_in_float32_and_gradients_of_others_too():
    model = efcn()
    train_epoch(model, FusedSGD(model, .1), noise(20).train, 10, 0, precision="bf16")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_switches_are_put_back():
    before = torch.backends.cuda.matmul.fp32_precision, torch.is_autocast_enabled("cpu")
    with pytest.raises(ZeroDivisionError), products("bf16", "cpu"): 1/0
    assert (torch.backends.cuda.matmul.fp32_precision, torch.is_autocast_enabled("cpu")) == before


@pytest.mark.parametrize("make", [lambda p: torch.optim.Adam(p, 1e-3),
                                  lambda p: torch.optim.SGD(p, .01, momentum=.9, nesterov=True),
                                  lambda p: torch.optim.AdamW(p, 1e-3), lambda p: torch.optim.RMSprop(p, 1e-4)],
                         ids=["Adam", "Nesterov", "AdamW", "RMSprop"])
@pytest.mark.parametrize("to", ["fcn", "lcn"])
def test_other_optimizers_take_the_ordinary_path(make, to):
    start = embed(make_model("skinny", (3, 32, 32), 10, width=2), (3, 32, 32), to).double()
    ours, plain, data = copy.deepcopy(start), copy.deepcopy(start), noise(30)
    data = Data(*(Dataset(part.x/255, part.y, part.classes, part.mean, part.std, part.name) for part in data))
    optimizer = make(plain.parameters())
    for x, y in batches_in_float64(data.train, 10, seed=0*1_000_003 + 1):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    def double(part):
        def batches(s, *a): return ((x.double(), y) for x, y in part.batches(*a))
        return type("Double", (), dict(x=part.x, __len__=lambda s: len(part), batches=batches))()
    train(ours, Data(double(data.train), double(data.test)), 1, batch_size=10, optimizer=make(ours.parameters()))
    assert (vector(ours) - vector(plain)).abs().max() < 1e-6 and (vector(ours) - vector(start)).abs().max() > 1e-5


def test_nothing_is_read_from_the_device_during_an_epoch(monkeypatch):
    "A number that Python reads makes it wait for the device: there is none until the last step is over."
    reads, steps, data = [], [], noise(40).train
    for name in ("item", "__float__", "__bool__", "__int__", "tolist", "cpu", "numpy"):
        real = getattr(torch.Tensor, name)
        def read(self, *a, real=real, name=name, **kw):
            reads.append((len(steps), name))
            return real(self, *a, **kw)
        monkeypatch.setattr(torch.Tensor, name, read)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    train_epoch(model, torch.optim.SGD(model.parameters(), .1), data, 10, 0, shuffle=False,
                after_step=lambda: steps.append(1))
    assert steps == [1]*4 and {at for at, _ in reads} == {4}, reads


def test_what_an_epoch_measures_is_the_mean_over_images():
    "Also of a last, smaller batch: nothing moves, so that it is what evaluation finds."
    model, data = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), noise(25).train
    found = train_epoch(model, torch.optim.SGD(model.parameters(), 0.), data, 10, 0)
    assert found == pytest.approx(evaluate(model, data), rel=1e-5)


@pytest.mark.parametrize("empty", [0, 1])
def test_empty_splits(empty):
    data, none = noise(10), noise(10).train
    none = Dataset(none.x[:0], none.y[:0], none.classes, none.mean, none.std, none.name)
    with pytest.raises(ValueError, match="there must be images to train on and to test on"):
        train(nn.Flatten(), Data(*((none, data.test) if empty == 0 else (data.train, none))), 1)


MEMORY = """
import sys
import torch
from efcn_nb.experiments.bench import noise
from efcn_nb.service.timing import peak_memory
from efcn_nb.experiments.relaxation import Study
precision, momentum, out = sys.argv[1], float(sys.argv[2]), sys.argv[3]
study = Study(noise(100), "alexnet", relax_times=[0], elcn_times=[], epochs=1, lr=1e-3, seeds=1, device="cpu",
              precision=precision, out=out, keep_weights=True, momentum=momentum, width=32, batch_size=50)
cnn, fcn, relaxed = study.plan()
study.carry_out(cnn)
for run in fcn, relaxed: print(peak_memory(lambda: study.carry_out(run))/(4*study.weights))
print(len(list(study.out.glob("relaxed*/epoch-0001-*"))))
"""


@pytest.mark.parametrize("precision, momentum, most", [("bf16", 0, 1.9), ("fp32", .9, 2.4)])
def test_memory_of_a_whole_run(tmp_path, precision, momentum, most):
    """The eFCN of half an AlexNet (43 million weights) and its baseline, made, evaluated, trained, measured and
    stored: at most so many times its weights.

    That is once, half for a copy in bf16, once for momentum, and what a batch needs; a stored gradient would add 1."""
    said = keep.in_child(keep.printed, MEMORY, precision, str(momentum), str(tmp_path/"s"), timeout=keep.HANGS)
    *peaks, stored = map(float, said.split())
    if any(p != p for p in peaks): pytest.skip("this system does not tell the peak of memory")
    assert stored == 1 and max(peaks) < most, peaks


# Steps on any loss

def test_steps_are_those_of_a_plain_loop():
    draw = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 3, generator=draw), torch.randn(4, 2, generator=draw)) for _ in range(6)]
    net, other, calls = nn.Linear(3, 2), nn.Linear(3, 2), []
    other.load_state_dict(net.state_dict())
    losses = train_steps(net, torch.optim.SGD(net.parameters(), .1), iter(batches), F.l1_loss,
                         after_step=lambda: calls.append(1))
    expected = []
    for x, y in batches:
        loss = (other(x) - y).abs().mean()
        grads = torch.autograd.grad(loss, [*other.parameters()])
        with torch.no_grad():
            for p, g in zip(other.parameters(), grads): p -= .1*g
        expected.append(loss.item())
    torch.testing.assert_close(losses, torch.tensor(expected))
    torch.testing.assert_close(net.weight, other.weight)
    assert len(calls) == 6 and not losses.requires_grad and not len(train_steps(net, None, []))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_keep_double_precision(dtype):
    net = nn.Linear(3, 2).to(dtype)
    assert train_steps(net, torch.optim.SGD(net.parameters(), .1),
                       [(torch.ones(4, 3, dtype=dtype), torch.ones(4, 2, dtype=dtype))], F.mse_loss).dtype == dtype


def test_the_step_that_diverged():
    net, x = nn.Linear(3, 2), torch.ones(1, 3)
    batches = [(x, torch.zeros(1, 2)), (x*float("inf"), torch.zeros(1, 2)), (x, torch.zeros(1, 2))]
    with pytest.raises(Diverged, match="^the loss was not finite at step 2; try a smaller learning rate$") as error:
        train_steps(net, torch.optim.SGD(net.parameters(), .1), batches, F.mse_loss)
    assert error.value.args == (2,) and str(Diverged("a sentence")) == "a sentence"


# Modes

class Merging(nn.Module):
    "An adapter: it merges a weight in evaluation mode and takes it out again in training mode, through `train` alone."
    def __init__(self):
        super().__init__()
        self.weight, self.extra, self.merged = nn.Parameter(torch.ones(2)), 1., False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            with torch.no_grad(): self.weight += -self.extra if mode else self.extra
            self.merged = not mode
        return self

    def forward(self, x): return x*(self.weight if self.merged else self.weight + self.extra)


class Stubborn(nn.BatchNorm1d):
    "Frozen for good."
    def train(self, mode=True): return super().train(False)


def frozen_norm(): return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval(), nn.Dropout())


def nested():
    shared = nn.BatchNorm1d(2).eval()
    return nn.Sequential(nn.Sequential(nn.Linear(2, 2), shared), nn.Sequential(nn.Dropout(), shared).eval(),
                         nn.Sequential(nn.BatchNorm1d(2)))


def root_alone():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    net[1].train()
    return net


MODES = {"frozen BatchNorm": frozen_norm, "nested and shared": nested, "the child trains": root_alone,
         "all train": lambda: frozen_norm().train(), "none trains": lambda: frozen_norm().eval(),
         "merging": lambda: nn.Sequential(Merging(), nn.Linear(2, 2)),
         "merged": lambda: nn.Sequential(nn.Linear(2, 2), Merging().eval()),
         "stubborn": lambda: nn.Sequential(Stubborn(2), nn.Linear(2, 2))}


def flags(net): return [m.training for m in net.modules()]


@pytest.mark.parametrize("what", MODES)
@pytest.mark.parametrize("breaks", [False, True])
def test_every_module_gets_its_own_mode_back(what, breaks):
    "After an evaluation that succeeds or fails, and each context; modules that act in `train` too."
    data = Dataset(torch.randn(6, 2), torch.arange(6) % 2, ["a", "b"], torch.zeros(2), torch.ones(2), "noise")
    net = MODES[what]()
    before, kept = flags(net), copy.deepcopy(net.state_dict())
    def check():
        assert flags(net) == before
        for name, value in net.state_dict().items(): torch.testing.assert_close(value, kept[name])
    for call in (lambda model: evaluate(model, data, 3), lambda model: refresh(model, evaluated),
                 lambda model: refresh(model, modes_kept)):
        hook = net.register_forward_hook(lambda *_: 1/0) if breaks else None
        if breaks:
            with pytest.raises(ZeroDivisionError): call(net)
            hook.remove()
        else: call(net)
        check()


def refresh(model, context):
    "A forward pass in other modes than before."
    with context(model), torch.no_grad():
        for m in model.modules(): m.training = False
        model(torch.randn(4, 2))


@pytest.mark.parametrize("make", [frozen_norm, nested])
@pytest.mark.parametrize("own", [False, True])
def test_frozen_statistics_survive_training(make, own):
    """Frozen BatchNorm keeps its running statistics over epochs and the evaluations between them;
    the network that is all in evaluation mode trains as a whole."""
    part = Dataset(torch.randn(12, 2), torch.arange(12) % 2, ["a", "b"], torch.zeros(2), torch.ones(2), "noise")
    net = make()
    before, optimizer = flags(net), torch.optim.SGD(net.parameters(), .1) if own else None
    norms = {name: copy.deepcopy(m.state_dict())
             for name, m in net.named_modules() if isinstance(m, nn.BatchNorm1d) and not m.training}
    seen = []
    train(net, Data(part, part), 2, batch_size=6, optimizer=optimizer, after_epoch=lambda *_: seen.append(flags(net)))
    assert seen == [before]*2 and flags(net) == before
    for name, kept in norms.items():
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(net.get_submodule(name).state_dict()[key], kept[key])
    train(net.eval(), Data(part, part), 1, batch_size=6)
    assert all(flags(net)) and start_training(net) is net
