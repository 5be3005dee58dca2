"""What a GPU must compute as a CPU does. It needs neither nbdev nor the other tests, so that it runs on a bare machine:

    python -m pytest --noconftest -q tests/test_cuda.py

Each test runs on the CPU, and on a GPU where there is one."""
import copy
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from efcn_nb.instruments.subspaces import shares
from efcn_nb.ladder.embedding import embed, nearest_cnn
from efcn_nb.materials.data import Data, Dataset
from efcn_nb.training.fused import FusedSGD, adds_in_fp32
from efcn_nb.training.graphs import BatchMajor, Group, Trainer
from efcn_nb.training.loop import PRECISIONS, evaluate, products, train

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PLACES = [(d, p) for d in DEVICES for p in PRECISIONS if d == "cuda" or p != "tf32"]
ERRORS = dict(fp32=1e-5, tf32=2e-3, bf16=2e-2)  # relative, of products

on_each_device = pytest.mark.parametrize("device", DEVICES)
in_each_precision = pytest.mark.parametrize("device, precision", PLACES)


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


def images(n=90, device="cpu"):
    x = torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8)
    mean, std = torch.full((3,), .5), torch.full((3,), .25)
    return Dataset(x, torch.randint(10, (n,)), [*"0123456789"], mean, std, "noise").to(device)


def cnn(device, dtype=torch.float32):
    "Two convolutions; the second pooling leaves rows out that trimming takes away."
    net = nn.Sequential(nn.Conv2d(3, 4, 4, 2, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(4, 6, 3, padding=1),
                        nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(6, 10))
    return net.to(device, dtype)


def efcn(device, dtype=torch.float32, **options): return embed(cnn(device, dtype), (3, 16, 16), **options)


def error(found, true):
    "Relative error of `found`, a tensor or a list of them."
    pairs = zip(found, true, strict=True) if isinstance(found, list) else [(found, true)]
    pairs = [(a.detach().double(), b.detach().double()) for a, b in pairs]
    apart, whole = zip(*(((a - b).square().sum(), b.square().sum()) for a, b in pairs))
    return float((sum(apart)/sum(whole))**.5)


# Embedding

@on_each_device
@pytest.mark.parametrize("to, trim", [("fcn", False), ("fcn", True), ("lcn", False)])
def test_an_embedding_computes_the_same(device, to, trim):
    net, x = cnn(device, torch.float64), torch.randn(5, 3, 16, 16, dtype=torch.float64, device=device)
    whole = embed(net, (3, 16, 16), to, trim=trim)
    assert error(whole(x), net(x)) < 1e-12
    assert error([*nearest_cnn(whole).parameters()], [*net.parameters()]) < 1e-12


@on_each_device
def test_trimming_changes_nothing_but_size(device):
    net = cnn(device, torch.float64)
    whole, less = (embed(net, (3, 16, 16), trim=trim) for trim in (False, True))
    x = torch.randn(5, 3, 16, 16, dtype=torch.float64, device=device)
    assert error(less(x), whole(x)) < 1e-12
    assert sum(p.numel() for p in less.parameters()) < sum(p.numel() for p in whole.parameters())


@on_each_device
def test_shares_are_those_of_the_cpu(device):
    net = efcn(device)
    assert shares(net)[["unshared", "off_local"]].to_numpy().max() == 0
    with torch.no_grad():
        for p in net.parameters(): p.add_(.01*torch.randn(p.shape).to(p.device))
    found, known = shares(net), shares(copy.deepcopy(net).cpu())
    assert abs(found/known - 1).to_numpy().max() < 1e-6


# Steps

def stepped(net, optimizer, precision="fp32", steps=2):
    "The parameters after some steps on noise."
    device, dtype = next(net.parameters()).device, next(net.parameters()).dtype
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(20, 3, 16, 16, generator=draw).to(device, dtype)
        y = torch.randint(10, (20,), generator=draw).to(device)
        optimizer.zero_grad()
        with products(precision, device):
            out = net(x)
            loss = F.cross_entropy(out.to(torch.promote_types(dtype, torch.float32)), y)
        loss.backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()]


@on_each_device
@pytest.mark.parametrize("options", [{}, dict(momentum=.9), dict(weight_decay=.1)])
def test_fused_is_plain_sgd_in_float64(device, options):
    net = efcn(device, torch.float64)
    other = copy.deepcopy(net)
    found = stepped(net, FusedSGD(net, .1, **options))
    assert error(found, stepped(other, torch.optim.SGD(other.parameters(), .1, **options))) < 1e-12


@in_each_precision
def test_fused_errs_as_plain_sgd_does(device, precision):
    "Of what a step moves, against float64."
    net = efcn(device)
    before = [p.detach().clone() for p in net.parameters()]
    moved = lambda after: [a - b for a, b in zip(after, before)]
    kinds = dict(fused=lambda m: FusedSGD(m, .1), plain=lambda m: torch.optim.SGD(m.parameters(), .1))
    true = copy.deepcopy(net).double()
    true = moved(stepped(true, torch.optim.SGD(true.parameters(), .1), steps=1))
    found = {}
    for kind, make in kinds.items():
        copied = copy.deepcopy(net)
        found[kind] = error(moved(stepped(copied, make(copied), precision, 1)), true)
    assert found["fused"] < 1.5*found["plain"] + 1e-5, found


@in_each_precision
def test_products_have_their_precision(device, precision):
    a, b = torch.randn(2, 300, 300, device=device)
    with products(precision, device): found = [a @ b, F.conv2d(a.view(4, 3, 75, 100), b[:5, :27].reshape(5, 3, 3, 3))]
    a, b = a.double(), b.double()
    true = [a @ b, F.conv2d(a.view(4, 3, 75, 100), b[:5, :27].reshape(5, 3, 3, 3))]
    for one, other in zip(found, true): assert error(one, other) < ERRORS[precision]


@on_each_device
@pytest.mark.parametrize("batch", [50, 250])
def test_the_update_of_fp32_weights_by_factors_in_bf16(device, batch):
    "Shapes of which no number is a multiple of 16, on memory that held something else."
    layer = efcn(device)[0]
    direct, before = BatchMajor(copy.deepcopy(layer), .1), layer.weight.detach().double()
    rows, columns = layer.weight.shape
    grad, x = (torch.randn(batch, n, device=device).bfloat16() for n in (rows, columns))
    direct.descend(grad, x)
    true = -.1*grad.double().t() @ x.double()
    assert error(direct.weight.detach() - before, true) < (1e-4 if adds_in_fp32(x.device) else 5e-3)
    assert torch.equal(direct.low, direct.weight.bfloat16())


# Graphs

def group(device, precision, dtype=torch.float32, graph=None):
    "An eFCN, a CNN and an eFCN; 90 images are three batches of 25 and a smaller one."
    torch.manual_seed(0)
    nets, data = [efcn(device, dtype), cnn(device, dtype), efcn(device, dtype)], images(device=device)
    held_out = dict(test=images(30, device))
    return Group([Trainer(net, data, .05, 25, s, precision, held_out=held_out) for s, net in enumerate(nets)], graph)


def parameters(g): return [p.detach() for t in g.trainers for p in t.model.parameters()]


@on_each_device
def test_a_graph_computes_what_single_steps_do(device):
    "In float64; a rate that changes between two replays, too."
    found, known = (group(device, "fp32", torch.float64, graph) for graph in (None, False))
    assert (found.replay is not None) == (device == "cuda"), found.how
    for epoch in (1, 2):
        for g in (found, known):
            g.epoch(epoch)
            for t in g.trainers: t.set_rate(.02)
    assert error(parameters(found), parameters(known)) < 1e-12
    for one, other in zip(found.measured(), known.measured()):
        assert one["test"] == other["test"] and abs(one["train_loss"] - other["train_loss"]) < 1e-10


@in_each_precision
def test_a_graph_is_as_precise_as_single_steps(device, precision):
    found, known = (group(device, precision, graph=graph) for graph in (None, False))
    for g in (found, known): g.epoch(1)
    assert error(parameters(found), parameters(known)) < ERRORS[precision]


@contextmanager
def refused_waits(device):
    "Whatever makes the host wait for a GPU raises."
    if device != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try: yield
    finally: torch.cuda.set_sync_debug_mode(before)


@on_each_device
def test_a_step_does_not_wait(device):
    g = group(device, "bf16", graph=False)
    g.epoch(1)
    for t in g.trainers: t.begin(2)
    with refused_waits(device):
        for t in g.trainers: t.step()
    assert all(int(t.at) == 1 for t in g.trainers)


@on_each_device
def test_a_trainer_gives_the_layers_back(device):
    net = efcn(device)
    layer, before = net[0], net[0].weight.detach().clone()
    trainer = Trainer(net, images(device=device), .05, 25)
    Group([trainer]).epoch(1)
    trainer.close()
    assert net[0] is layer and not torch.equal(layer.weight, before)
    assert error(layer.weight.detach(), trainer.dense[0].weight.detach()) == 0


# The loop

@in_each_precision
def test_training_and_evaluation_agree_with_the_cpu(device, precision):
    "One epoch, and what it comes to, against float32 on the CPU."
    torch.manual_seed(0)
    data, net = Data(images(), images(30)), efcn("cpu")
    other = copy.deepcopy(net).to(device)
    known = train(net, data, 1, .02, 25)
    found = train(other, data.to(device), 1, .02, 25, precision=precision)
    for what in (("train", "loss"), ("test", "loss")): assert abs(found[what] - known[what]) < 5*ERRORS[precision]
    again = evaluate(other, data.test.to(device), 7, precision)
    assert abs(again["loss"] - found["test", "loss"]) < 5*ERRORS[precision]


@on_each_device
def test_a_released_layer_without_bias_is_trained_as_well(device):
    net = embed(nn.Sequential(nn.Conv2d(3, 2, 3, bias=False), nn.Flatten(), nn.Linear(392, 10)).to(device), (3, 16, 16))
    before = net[0].weight.detach().clone()
    Group([Trainer(net, images(device=device), .05, 25)], graph=False).epoch(1)
    assert not torch.equal(net[0].weight, before)
