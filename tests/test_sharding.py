"Layers over two processes (gloo): outputs, gradients and steps of SGD are those of one process."
import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

import keep
from efcn_nb.training import sharding
from efcn_nb.ladder.embedding import embed
from efcn_nb.training.fused import FusedSGD
from efcn_nb.training.sharding import gather, shard


def cnn(groups=1):
    "3 x 25 and 5 x 9 output units: two processes get unequal parts."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                             nn.Conv2d(4, 3*groups, 2, padding=1, groups=groups), nn.Tanh(),
                             nn.Conv2d(3*groups, 5, 2), nn.Flatten(), nn.Linear(20, 3)).double()


def fcn(): return embed(cnn(), (2, 5, 5))
def lcn(): return embed(cnn(groups=2), (2, 5, 5), "lcn")


def tied():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1), nn.Flatten(),
                          nn.Linear(50, 3)).double()
    model[2].weight = model[0].weight
    return embed(model, (2, 5, 5))


def frozen():
    model = fcn()
    model[3].weight.requires_grad_(False)
    return model


CASES = {"rows": (fcn, dict()), "columns": (fcn, dict(by="columns")), "locally connected": (lcn, dict()),
         "tied": (tied, dict()), "tied columns": (tied, dict(by="columns")),
         "frozen": (frozen, dict()), "one of three": (fcn, dict(layers=["3"])),
         "first by columns": (fcn, dict(by="columns", layers=["0"]))}


def whole(t): return t.full_tensor() if isinstance(t, DTensor) else t


def steps(model, optimizer, count=3):
    """Outputs, gradients with respect to the input and the parameters of the first step;
    then parameters after some steps."""
    g, seen = torch.Generator().manual_seed(1), []
    for _ in range(count):
        x, y = torch.randn(6, 2, 5, 5, generator=g).double().requires_grad_(), torch.randint(3, (6,), generator=g)
        out = model(x)
        optimizer.zero_grad()
        F.cross_entropy(out, y).backward()
        seen += [out.detach(), x.grad, *(whole(p.grad) for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    return seen + [whole(p.detach()) for p in model.parameters()]


def apart(a, b): return max((p - q).abs().max().item() for p, q in zip(a, b, strict=True))


def case(name, mesh):
    "What it finds of one case."
    make, how = CASES[name]
    torch.manual_seed(0)
    single = make()
    spread = copy.deepcopy(single)
    shard(spread, mesh, **how)
    sharded = [m for m in spread.modules() if getattr(m, "through", None) is not None]
    weights = {id(m.weight): m.weight for m in sharded}.values()
    share = sum(p.to_local().numel() for p in weights) / sum(p.numel() for p in weights)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=.1, momentum=.9, weight_decay=.01)
                  for m in (single, spread)]
    difference = apart(steps(single, optimizers[0]), steps(spread, optimizers[1]))
    gather(spread)
    x = torch.ones(2, 2, 5, 5).double()
    return dict(layers=len(sharded), share=share, difference=difference,
                gathered=apart(single.parameters(), spread.parameters()), after=apart([single(x)], [spread(x)]),
                plain=not any(isinstance(p, DTensor) for p in spread.parameters()),
                same=[p.requires_grad for p in single.parameters()] == [p.requires_grad for p in spread.parameters()])


def without_the_sum(mesh):
    "Negative control: the input's gradient is taken for whole."
    real, single, spread = sharding.Partial, fcn(), fcn()
    shard(spread, mesh)
    sharding.Partial = Replicate
    try: return apart(*(steps(m, torch.optim.SGD(m.parameters(), .1)) for m in (single, spread)))
    finally: sharding.Partial = real


def unfused(mesh):
    "FusedSGD beside sharded layers."
    models = fcn(), fcn()
    shard(models[1], mesh, layers=["3"])
    optimizers = [FusedSGD(m, .1) for m in models]
    def parameters(m, o): return steps(m, o)[-len(list(m.parameters())):]
    return dict(ordinary=optimizers[1].ordinary,
                difference=apart(*(parameters(m, o) for m, o in zip(models, optimizers))))


def replicated(mesh):
    """FusedSGD of a network that is wrapped into replicas afterwards,
    each with images of its own: gradients are averaged."""
    start = fcn()
    models, found = [copy.deepcopy(start) for _ in range(2)], []
    for m, o in zip(models, (FusedSGD(models[0], .1, momentum=.9),
                             torch.optim.SGD(models[1].parameters(), .1, momentum=.9))):
        replica, g = nn.parallel.DistributedDataParallel(m), torch.Generator().manual_seed(dist.get_rank())
        for _ in range(3):
            o.zero_grad()
            F.cross_entropy(replica(torch.randn(6, 2, 5, 5, generator=g).double()), torch.arange(6) % 3).backward()
            o.step()
    return dict(difference=apart(*(m.parameters() for m in models)),
                moved=apart(start.parameters(), models[0].parameters()))


def one_of_two(rank, folder):
    "What one of the two processes finds."
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    found = {name: case(name, mesh) for name in CASES} | {"negative": without_the_sum(mesh), "fused": unfused(mesh),
                                                          "replicated": replicated(mesh)}
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    "What the two processes found."
    folder = tmp_path_factory.mktemp("two")
    both = [keep.started(one_of_two, rank, folder) for rank in range(2)]
    try: return [keep.result(*one, timeout=keep.HANGS) for one in both]
    finally:
        for process, _ in both: process.kill()


@pytest.mark.parametrize("name", CASES)
def test_the_same_as_one_process(found, name):
    for rank in range(2):
        r = found[rank][name]
        assert r["difference"] < 1e-10 and r["gathered"] < 1e-10 and r["after"] < 1e-10 and r["plain"] and r["same"], r
        assert r["layers"] == {"locally connected": 3, "one of three": 1, "first by columns": 1}.get(
            name, 2 if "tied" in name else 3)
        assert .3 < r["share"] < .7
    assert abs(found[0][name]["share"] + found[1][name]["share"] - 1) < 1e-12


def test_a_gradient_that_is_not_added_up_would_be_seen(found): assert min(f["negative"] for f in found) > 1e-4


def test_fused_training_leaves_sharded_layers_alone(found):
    for f in found:
        assert list(f["fused"]["ordinary"]) == ["3"] and "plain parameter" in f["fused"]["ordinary"]["3"]
        assert f["fused"]["difference"] < 1e-10


def test_fused_training_of_replicas_averages_gradients(found):
    for f in found: assert f["replicated"]["difference"] < 1e-12 and f["replicated"]["moved"] > 1e-3


def test_a_mesh_is_needed():
    with pytest.raises(ValueError, match="must be a DeviceMesh of one dimension"): shard(fcn(), None)


@pytest.mark.parametrize("make, options, says", [
    (fcn, dict(by="diagonals"), "by must be 'rows' or 'columns'"),
    (fcn, dict(layers=["nowhere"]), "no released layer is called 'nowhere'"),
    (fcn, dict(layers=3), "layers must be names"),
    (lambda: nn.Linear(2, 2), {}, "embed a CNN first")])
def test_what_cannot_be_spread_is_refused(make, options, says):
    with pytest.raises(ValueError, match=says): shard(make(), SimpleNamespace(ndim=1), **options)
