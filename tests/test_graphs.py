"The captured step without a GPU: against plain SGD, against itself step by step, and its arithmetic emulated."
import copy
import gc
import types
import weakref
from contextlib import nullcontext

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import tiny
from test_reads import reads
from efcn_nb import cli
from efcn_nb.experiments import bench
from efcn_nb.ladder.embedding import embed
from efcn_nb.materials.models import small
from efcn_nb.training import fused, graphs
from efcn_nb.training.fused import FusedSGD, adds_in_fp32
from efcn_nb.training.graphs import BatchMajor, Group, Trainer, gathered
from efcn_nb.training.loop import products, train_epoch

DATA, TEST = tiny.DATA
CPU = torch.device("cpu")


def cnn(seed=0):
    torch.manual_seed(seed)
    return small((1, 16, 16), 10, 2)


def efcn(seed=0): return embed(cnn(seed), (1, 16, 16))


def tied(seed=0):
    torch.manual_seed(seed)
    a, b = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
    b.weight, b.bias = a.weight, a.bias
    return embed(nn.Sequential(a, nn.Tanh(), b, nn.Flatten(), nn.Linear(256, 10)), (1, 16, 16))


def frozen(seed=0):
    net = efcn(seed)
    for p in net[0].parameters(): p.requires_grad_(False)
    return net


def without_bias(seed=0):
    torch.manual_seed(seed)
    return embed(nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Flatten(), nn.Linear(392, 10)), (1, 16, 16))


class Doubled(nn.Module):
    def forward(self, x): return 2*x


def parametrised(seed=0):
    net = efcn(seed)
    parametrize.register_parametrization(net[0], "weight", Doubled())
    return net


def normed(seed=0):
    torch.manual_seed(seed)
    return embed(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10)),
                 (1, 16, 16))


NETS = dict(efcn=(efcn, 2), cnn=(cnn, 0), lcn=(lambda: embed(cnn(), (1, 16, 16), "lcn"), 0), tied=(tied, 0),
            frozen=(frozen, 1), bias=(without_bias, 0), parametrised=(parametrised, 1), batchnorm=(normed, 1))


def by_sgd(net, epochs, lr, batch, seed, slow=None):
    "`torch.optim.SGD` on the batches that a `Trainer` takes."
    slow = slow or {}
    groups = [dict(params=[p], lr=lr/slow.get(name, 1)) for name, p in net.named_parameters() if p.requires_grad]
    optimizer, dtype = torch.optim.SGD(groups), next(net.parameters()).dtype
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(DATA), generator=torch.Generator().manual_seed(seed*1_000_003 + epoch))
        for rows in order.split(batch):
            x, y = gathered(DATA, rows, dtype)
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net


def close(one, other, eps):
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=eps), (name, (p - q).abs().max())


@pytest.mark.parametrize("batch", [25, 30, 100])
@pytest.mark.parametrize("name", NETS)
def test_an_epoch_is_one_of_plain_gradient_descent(name, batch):
    "In float64, with a smaller batch at the end or without."
    make, moves = NETS[name]
    net, other = make().double(), make().double()
    trainer = Trainer(net, DATA, .1, batch, seed=5, precision="fp32")
    assert len(trainer.dense) == moves
    group = Group([trainer])
    for epoch in (1, 2): group.epoch(epoch)
    trainer.close()
    assert [type(m).__name__ for m in net.modules()] == [type(m).__name__ for m in other.modules()]
    close(net, by_sgd(other, 2, .1, batch, 5), 1e-12)


def test_the_order_is_that_of_the_loop():
    net, other = efcn(), efcn()
    group = Group([Trainer(net, DATA, .1, 40, seed=0, precision="fp32")])
    group.epoch(7)
    found, known = group.measured()[0], train_epoch(other, torch.optim.SGD(other.parameters(), .1), DATA, 40, 7)
    assert abs(found["train_loss"] - known["loss"]) < 1e-5 and found["train"] == known["accuracy"]


def test_slow_parameters_take_smaller_steps():
    net, other, slow = cnn().double(), cnn().double(), {"0.weight": 4., "0.bias": 9.}
    Group([Trainer(net, DATA, .1, 50, 1, "fp32", slow)]).epoch(1)
    close(net, by_sgd(other, 1, .1, 50, 1, slow), 1e-12)


def test_the_rate_changes_without_a_new_trainer():
    net, other = efcn().double(), efcn().double()
    trainer = Trainer(net, DATA, .1, 50, 2, "fp32")
    trainer.set_rate(.025)
    Group([trainer]).epoch(1)
    trainer.close()
    close(net, by_sgd(other, 1, .025, 50, 2), 1e-12)


# Graph logic with a stand-in

class Rerun:
    "A stand-in for a capture: keeps the branches and runs them again."
    def __init__(self): self.replays = 0

    def __call__(self, warm_ups, branches):
        for warm_up in warm_ups: warm_up()
        def replay():
            self.replays += 1
            for branch in branches: branch()
        return replay


def group(precision="bf16", batch=30, nets=(efcn, cnn, efcn, normed), **options):
    trainers = [Trainer(net(seed), DATA, .1, batch, seed, precision, held_out=dict(test=TEST))
                for seed, net in enumerate(nets)]
    return Group(trainers, **options)


def state(g): return [t.clone() for trainer in g.trainers for t in trainer.model.state_dict().values()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_replay_is_the_same_as_step_by_step(precision):
    rerun, known = Rerun(), group(precision)
    found = group(precision, graph=True, capture=rerun)
    assert all(torch.equal(a, b) for a, b in zip(state(found), state(known))), "warming up moves nothing"
    for epoch in (1, 2):
        for g in (found, known): g.epoch(epoch)
        assert found.measured() == known.measured()
    assert all(torch.equal(a, b) for a, b in zip(state(found), state(known)))
    assert found.at_once == 3 and rerun.replays == 2 and "3 steps of 4 networks" in found.how


def buffers(g):
    "Addresses of all that a step reads and writes."
    own = [t.order for t in g.trainers], [t.window for t in g.trainers], [t.at for t in g.trainers]
    own += [t.hits for t in g.trainers], [t.loss for t in g.trainers], [t.scale for t in g.trainers]
    held = [[*t.model.parameters(), *t.model.buffers(), t.data.x, t.data.y] for t in g.trainers]
    return [t.data_ptr() for part in (*own, *held) for t in part]


def test_addresses_are_constant_and_no_autograd_graph_survives():
    g = group(graph=True, capture=Rerun())
    before, outputs = buffers(g), []
    for t in g.trainers: t.model.register_forward_hook(lambda module, x, out: outputs.append(weakref.ref(out)))
    g.epoch(1)
    g.trainers[0].set_rate(.01)
    g.trainers[0].model.load_state_dict(g.trainers[2].model.state_dict())
    g.epoch(2)
    gc.collect()
    assert buffers(g) == before and outputs and all(out() is None for out in outputs)


def test_nothing_is_read_in_an_epoch_and_once_for_all_measures():
    g = group(batch=25)
    g.epoch(1)
    assert reads(lambda: g.epoch(2)) == [] and reads(g.measured) == ["tolist"]


def test_a_capture_that_fails_is_said_and_trains_all_the_same():
    def capture(warm_ups, branches): raise RuntimeError("operation not permitted\nwhen stream is capturing")
    with pytest.warns(UserWarning, match="because the capture failed: operation not permitted$"):
        found = group(capture=capture)
    known = group()
    for g in (found, known): g.epoch(1)
    assert found.measured() == known.measured() and "step by step, on cpu" == known.how
    with pytest.raises(RuntimeError, match="not permitted"): group(graph=True, capture=capture)


@pytest.mark.parametrize("wrong, words", [
    (lambda: Group([Trainer(efcn(), DATA, .1, n) for n in (20, 50)]), "a group needs trainers with the same steps"),
    (lambda: Group([]), "a group needs trainers"),
    (lambda: group(graph=True), "a graph needs a GPU, and the networks are on cpu"),
    (lambda: Trainer(efcn(), DATA, .1, 101), "batch_size must be a whole number from 1 to 100, not 101"),
    (lambda: Trainer(efcn(), DATA, 0, 20), "lr must be a positive number, not 0"),
    (lambda: Trainer(efcn(), DATA, .1, 20, precision="tf32"), "tf32 products need a GPU"),
    (lambda: Trainer(efcn(), DATA, .1, 20, slow={"0.weight": 2.}), "slow names 0.weight; the ordinary parameters are")])
def test_bad_input_gets_a_sentence(wrong, words):
    with pytest.raises(ValueError, match=words): wrong()


# What only a GPU computes

ADDMM = torch.addmm


def added_in_fp32(W, a, b, *, out_dtype=None, **options):
    "`torch.addmm` as CUDA has it: products of bf16 numbers, summed and added in fp32."
    if out_dtype is None: return ADDMM(W, a, b, **options)
    assert a.dtype == b.dtype == torch.bfloat16 and W.dtype == out_dtype == torch.float32 and options["out"] is W
    return W.copy_(options["beta"]*W + options["alpha"]*(a.float() @ b.float()))


@pytest.fixture
def like_a_gpu(monkeypatch):
    "The paths that only a GPU takes, on the CPU."
    for module in (fused, graphs): monkeypatch.setattr(module, "adds_in_fp32", lambda device: True)
    monkeypatch.setattr(fused, "batch_major", lambda device: True)
    monkeypatch.setattr(torch, "addmm", added_in_fp32)


def update():
    "Relative error of the update by factors in bf16, against float64."
    layer = efcn()[0]
    direct, before = BatchMajor(copy.deepcopy(layer), .1), layer.weight.detach().double()
    grad, x = torch.randn(250, len(layer.weight)).bfloat16(), torch.randn(250, layer.weight.shape[1]).bfloat16()
    direct.descend(grad, x)
    true = -.1*grad.double().t() @ x.double()
    assert torch.equal(direct.low, direct.weight.bfloat16())
    return (direct.weight.double() - before - true).norm()/true.norm()


def test_an_update_on_the_cpu_errs_as_bf16_does(): assert update() < 3e-3


def test_an_update_summed_in_fp32_errs_less(like_a_gpu): assert update() < 1e-6


def moved(kind, options, precision="bf16", dtype=torch.float32, steps=3):
    "How far some steps on the images take a network."
    net = efcn().to(dtype)
    before, optimizer = [p.detach().clone() for p in net.parameters()], kind(net, **options)
    for i in range(steps):
        x, y = DATA.batch(range(30*i, 30*i + 30))
        optimizer.zero_grad()
        with products(precision, "cpu"): out = net(x.to(dtype))
        F.cross_entropy(out.to(torch.promote_types(dtype, torch.float32)), y).backward()
        optimizer.step()
    return torch.cat([(p.detach() - b).double().flatten() for p, b in zip(net.parameters(), before)])


def plain(net, **options): return torch.optim.SGD(net.parameters(), **options)


OPTIONS = pytest.mark.parametrize("options", [dict(lr=.1), dict(lr=.1, momentum=.9), dict(lr=.1, weight_decay=.1),
                                              dict(lr=.1, momentum=.9, weight_decay=.1)])


@OPTIONS
def test_the_gpus_path_of_fused_is_plain_sgd_in_float64(options, like_a_gpu):
    found, true = (moved(kind, options, "fp32", torch.float64) for kind in (FusedSGD, plain))
    assert (found - true).norm() < 1e-12*true.norm()


@OPTIONS
def test_the_gpus_path_of_fused_is_no_coarser_than_autocast(options, like_a_gpu):
    true = moved(plain, options, "fp32", torch.float64)
    found, known = ((moved(kind, options) - true).norm()/true.norm() for kind in (FusedSGD, plain))
    assert found < 1.2*known, (found, known)


def test_only_a_gpu_adds_products_of_bf16_to_fp32(): assert not adds_in_fp32(CPU)


class Shapes(types.SimpleNamespace):
    "A data set without numbers."
    def __len__(self): return len(self.x)


def test_a_step_asks_no_number_of_the_device(monkeypatch):
    "On the meta device, which has none: whatever decides by a number raises."
    like = {k: getattr(DATA, k).to("meta") for k in ("x", "y", "mean", "std")}
    net = efcn().to("meta")
    monkeypatch.setattr(graphs, "products", lambda *_: nullcontext())  # there is no autocast for it
    trainer = Trainer(net, Shapes(**like), .1, 25, precision="fp32")
    trainer.warm_up()
    trainer.step()
    with pytest.raises((RuntimeError, NotImplementedError)): trainer.numbers().tolist()


# The ladder

def test_a_rung_that_a_device_does_not_know_says_why():
    def make(): raise RuntimeError("no such kernel\nat line 5")
    seconds, said = bench.rung(make, 1)
    assert seconds != seconds and said == "RuntimeError: no such kernel"


def test_the_ladder_climbs_to_eight_networks_of_one_graph():
    rungs = bench.ladder_jobs(efcn(), cnn(), DATA, 25, graph=True)
    assert [steps for _, steps in rungs.values()] == [1, 1, 4, 4, 32, 4, 4, 32]
    assert [*rungs][4] == "eFCN, batch-major, addmm, captured, a network of 8"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_console_prints_the_ladder_on_a_gpu_alone(monkeypatch, capsys, device):
    table = pd.DataFrame([{"model": "small", "step (ms)": 1.}])
    for name in ("bench_train", "bench_epoch", "bench_ladder"): monkeypatch.setattr(bench, name, lambda *_: table)
    args = types.SimpleNamespace(batch=1, images=1, precision="bf16", out=None, repeat=1, width=None)
    cli._bench_train(args, ["small"], torch.device(device), "efcn_bench train", "a machine")
    said = capsys.readouterr().out
    assert "step of small" in said and ("ladder of small" in said) == (device == "cuda")
