"The host reads what the device holds seldom: on a GPU each read waits until all work is done."
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from efcn_nb.instruments.subspaces import residuals, shares
from efcn_nb.ladder.embedding import embed
from efcn_nb.materials.models import skinny, small
from efcn_nb.training.loop import evaluate, train

MOST = 10  # reads
OPERATORS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}  # their results need the host
METHODS = {"tolist", "numpy", "cpu"}


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.found += [name]*(name in OPERATORS or by_mask)
        return operator(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        self.found += [name]*(name in METHODS)
        return function(*args, **(kwargs or {}))


def reads(function):
    "What the host asks for while `function` runs, by name."
    found, operators, methods = [], _Operators(), _Methods()
    operators.found = methods.found = found
    with operators, methods: function()
    return found


def network(to="fcn"):
    torch.manual_seed(0)
    return embed(small((1, 16, 16), 10, 2), (1, 16, 16), to)


def large():
    "A network whose first layer has 3 million weights, some of them off-local."
    torch.manual_seed(0)
    net = embed(skinny((3, 32, 32), 10, 4), (3, 32, 32))
    with torch.no_grad(): net[0].weight.add_(1e-3*torch.randn_like(net[0].weight))
    return net


@pytest.mark.parametrize("what, count", [
    (lambda x: x.sum().item(), 1), (lambda x: float(x.sum()), 1), (lambda x: bool(x.sum() > 0), 1),
    (lambda x: x.tolist(), 1), (lambda x: x.numpy(), 1), (lambda x: x[x > 0], 1), (lambda x: x.sum() + x, 0)])
def test_reads_are_counted(what, count):
    assert len(reads(lambda: what(torch.ones(3)))) >= count and (count or not reads(lambda: what(torch.ones(3))))


JOBS = {
    "an epoch": lambda net: train(net, tiny.DATA, 1, batch_size=10),
    "an epoch in bf16": lambda net: train(net, tiny.DATA, 1, batch_size=10, precision="bf16"),
    "an evaluation": lambda net: evaluate(net, tiny.DATA.test, 10), "shares": shares, "residuals": residuals}


@pytest.mark.parametrize("to", ["fcn", "lcn"])
@pytest.mark.parametrize("job", JOBS)
def test_the_device_is_read_seldom(job, to):
    net = network(to)
    shares(net)  # what is known of a geometry is found out once
    found = reads(lambda: JOBS[job](net))
    assert len(found) < MOST, found


@pytest.mark.parametrize("instrument", [shares, residuals])
def test_a_large_matrix_costs_no_more_reads_than_a_small_one(instrument):
    net = large()
    instrument(net)
    found = reads(lambda: instrument(net))
    assert len(found) < MOST, found
