"Same function, released weights: `embed` and its way back on whole networks."
import copy
import math
import os
import pickle
import re
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torchvision.ops import deform_conv2d

import keep
from efcn_nb.ladder.matrices import kernel_from_local, kernel_from_matrix, matrix_from_kernel, matrix_from_local
from efcn_nb.ladder.inspection import conv_geometries
from efcn_nb.ladder.embedding import convert, embed, nearest_cnn, reinitialize, released_weights
from efcn_nb.ladder.layers import FullyConnected, LocallyConnected
from efcn_nb.materials.models import MODELS
from efcn_nb.instruments.subspaces import project_cnn, project_lcn, residuals, shares

from nets import (
    as_buffers, BOTH, close, closure, frozen, function_with_default, kernel, made, Net, OwnConv,
    rand, RELEASED, residual, settled, SHAPE, TIED, unchanged)

pytestmark = pytest.mark.usefixtures("one_thread")  # threads only cost time on tensors as small as these


# Whole networks

def network(name, width, dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name]((3, 32, 32), 10, width=width).to(dtype).eval()


@pytest.mark.parametrize("name, width, dtype, tolerance", [
    ("skinny", 64, torch.float64, 1e-12), ("skinny", 64, torch.float32, 1e-5), ("alexnet", 8, torch.float64, 1e-12),
    ("alexnet", 64, torch.float32, 1e-5)])
def test_networks_of_the_papers(name, width, dtype, tolerance):
    cnn, x = network(name, width, dtype), rand(2, 3, 32, 32).to(dtype)
    with torch.inference_mode():
        for to in ("fcn", "lcn"):
            released = embed(cnn, (3, 32, 32), to)
            assert close(released(x), cnn(x), tolerance)
            got = sum(m.weight.numel() for m in released.modules() if isinstance(m, (FullyConnected, LocallyConnected)))
            assert got == released_weights(conv_geometries(cnn, (3, 32, 32)), to)
            back = nearest_cnn(released).state_dict()
            assert all(torch.equal(v, back[k]) for k, v in cnn.state_dict().items())
            del released


def test_number_of_weights_of_the_papers():
    released = dict(skinny=3072*64*17**2 + (64*8**2)**2 + (64*3**2)**2,
                    alexnet=3072*64*17**2 + (64*8**2)*(192*8**2) + (192*3**2)*(384*3**2) + (384*3**2)*(256*3**2)
                    + (256*3**2)**2)
    for name, weights in ("skinny", 143_178), ("alexnet", 2_848_906):
        cnn = MODELS[name]((3, 32, 32))
        assert sum(p.numel() for p in cnn.parameters()) == weights
        assert released_weights(conv_geometries(cnn, (3, 32, 32))) == released[name]


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_residual_network(residual, to, training):
    x = rand(6, 2, 5, 5)
    residual.train(training).head[0].eval()  # one flag that differs from the others
    before, state = frozen(residual), torch.get_rng_state()
    released = embed(residual, (2, 5, 5), to)
    assert unchanged(residual, before) and torch.equal(state, torch.get_rng_state())
    assert [m.training for m in released.modules()] == before[1]
    assert released.alias is released.twice and released.twice is not residual.twice
    wanted = FullyConnected if to == "fcn" else LocallyConnected
    assert {type(m) for m in released.modules() if hasattr(m, "geometry")} == {wanted}
    assert close(released(x), residual(x), 1e-12)
    for name, value in residual.named_buffers():
        assert close(dict(released.named_buffers())[name].double(), value.double(), 1e-12)
    with torch.no_grad():
        for p in released.parameters(): p.add_(1)
    moved = [k for k, p in residual.named_parameters() if not torch.equal(p, before[0][k])]
    assert not moved, "the embedded network shares memory with its CNN"


@BOTH
def test_dropout_draws_the_same(residual, to):
    x, outputs = rand(6, 2, 5, 5), []
    for model in (residual.train(), embed(residual, (2, 5, 5), to)):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            outputs.append(model(x))
    assert close(*outputs, 1e-12) and not close(outputs[0], residual.eval()(x), 1e-3)


@BOTH
def test_gradient_of_a_shared_layer_is_one_gradient(residual, to):
    x, released = rand(3, 2, 5, 5), embed(residual.eval(), (2, 5, 5), to)
    residual(x).square().sum().backward()
    released(x).square().sum().backward()
    g, grad = released.twice.geometry, released.twice.weight.grad
    copies = (g.source >= 0).sum(0).view(3, 3)
    assert close(TIED[to](grad, g), residual.twice.weight.grad, 1e-10)
    assert close(kernel_from_local(grad, g) if to == "lcn" else kernel_from_matrix(grad, g),
                 residual.twice.weight.grad/copies, 1e-10)


@BOTH
@pytest.mark.parametrize("chosen, released",
                         [(["twice"], 1), (lambda name, m: m.kernel_size == (3, 3), 3), ([], 0), (None, 4),
                          ("blocks", 2), ("blocks.a", 1), (["stem", "blocks.skip"], 2), (("blocks", "blocks.a"), 2),
                          (lambda m: m.kernel_size == (3, 3), 3), (lambda *both: len(both) == 2, 4),
                          (lambda m, size=1: m.kernel_size == (size, size), 1)])
def test_only_the_chosen_layers(residual, to, chosen, released):
    x = rand(3, 2, 5, 5)
    got = embed(residual.eval(), (2, 5, 5), to, layers=chosen)
    assert close(got(x), residual(x), 1e-12) and sum(hasattr(m, "geometry") for m in got.modules()) == released


@BOTH
def test_round_trips(residual, to, tmp_path):
    x, released = rand(3, 2, 5, 5), embed(residual.eval(), (2, 5, 5), to)
    for copied in (copy.deepcopy(released), pickle.loads(pickle.dumps(released)), reinitialize(released, seed=1)):
        copied.load_state_dict(released.state_dict())
        assert torch.equal(copied(x), released(x))
    assert not torch.equal(reinitialize(released, seed=1)(x), released(x))
    assert all(torch.equal(a, b) for a, b in zip(reinitialize(released, seed=1).parameters(),
                                                 reinitialize(released, seed=1).parameters()))
    assert not torch.equal(reinitialize(released, seed=2).twice.weight, reinitialize(released, seed=1).twice.weight)
    assert set(released.state_dict()) == set(residual.state_dict()), "the names of weights stay"


def test_reinitialize_leaves_the_random_state_and_its_model_alone(residual):
    released = embed(residual, (2, 5, 5))
    before, state = frozen(released), torch.get_rng_state()
    reinitialize(released, seed=1)
    assert unchanged(released, before) and torch.equal(state, torch.get_rng_state())


class UNet(nn.Module):
    "Two scales; `output_size` is given in the forward pass, so that odd sizes come back."
    def __init__(self, keyword=True, full=False):
        super().__init__()
        self.keyword, self.full = keyword, full
        self.down, self.below = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.out = nn.Conv2d(6, 2, 3, padding=1, padding_mode="circular")

    def forward(self, x):
        skip = F.relu(self.down(x))
        below, size = F.relu(self.below(F.max_pool2d(skip, 2))), skip.shape if self.full else skip.shape[2:]
        up = self.up(below, output_size=size) if self.keyword else self.up(below, list(size))
        return self.out(torch.cat([skip, up], 1))


@BOTH
@pytest.mark.parametrize("size", [(5, 7), (6, 6), (4, 5)])
@pytest.mark.parametrize("options", [dict(), dict(keyword=False), dict(full=True)],
                         ids=["keyword", "positional", "with batch axis"])
def test_u_net(to, size, options):
    model, x = made(lambda: UNet(**options)), rand(3, 2, *size)
    released = embed(model, (2, *size), to)
    assert close(released(x), model(x), 1e-12) and type(released.up) is RELEASED[to]
    back = nearest_cnn(released)
    # reflected in two rows, two taps read the same pixels everywhere
    mixed = () if size == (6, 6) else ("below.weight",)
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in model.state_dict().items() if k not in mixed)
    assert close(back(x), model(x), 1e-12)
    with pytest.raises(ValueError, match="embed the network again"): released(rand(3, 2, size[0] + 2, size[1]))


def test_a_released_layer_makes_one_output_size():
    layer = embed(made(UNet), (2, 5, 7)).up
    with pytest.raises(ValueError, match=r"makes outputs of size \(5, 7\)"): layer(rand(1, 4, 2, 3), output_size=(4, 6))


class Tied(nn.Module):
    "Two convolutions with one kernel."
    def __init__(self, stride=1):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1, stride=stride, bias=False)
        self.b.weight = self.a.weight
    def forward(self, x): return self.b(F.relu(self.a(x)))


@BOTH
def test_tied_kernels_stay_tied(to):
    model, x = made(Tied), rand(2, 2, 4, 5)
    released = embed(model, (2, 4, 5), to)
    assert released.a is not released.b and released.a.weight is released.b.weight
    assert len(list(released.parameters())) == 2
    model(x).square().sum().backward(), released(x).square().sum().backward()
    assert close(released(x), model(x), 1e-12)
    assert close(TIED[to](released.a.weight.grad, released.a.geometry), model.a.weight.grad, 1e-10)


@BOTH
@pytest.mark.parametrize("stride, layers", [(2, None), (1, ["a"]), (1, ["b"])])
def test_tied_kernels_that_cannot_stay_tied_are_refused(to, stride, layers):
    with pytest.raises(ValueError, match="share a parameter but not a geometry"):
        embed(made(lambda: Tied(stride)), (2, 4, 5), to, layers)


@BOTH
def test_stage_by_stage(residual, to):
    for first in ["twice"], ["stem.0", "blocks.skip"], lambda name, m: m.groups == 2:
        half = embed(residual, (2, 5, 5), to, layers=first)
        staged, at_once = embed(half, (2, 5, 5), to), embed(residual, (2, 5, 5), to)
        assert staged.state_dict().keys() == at_once.state_dict().keys()
        assert 1 <= sum(hasattr(m, "geometry") for m in half.modules()) < 4
        assert all(torch.equal(v, at_once.state_dict()[k]) for k, v in staged.state_dict().items())
    by_name = embed(residual, (2, 5, 5), to, layers="twice")
    assert [name for name, m in by_name.named_modules() if hasattr(m, "geometry")] == ["twice"]


@BOTH
def test_one_network_in_both_kinds(residual, to):
    other, x = "lcn" if to == "fcn" else "fcn", rand(3, 2, 5, 5)
    mixed = embed(embed(residual.eval(), (2, 5, 5), to, layers="twice"), (2, 5, 5), other)
    assert close(mixed(x), residual(x), 1e-12)
    assert {type(m) for m in mixed.modules() if hasattr(m, "geometry")} == set(RELEASED.values())
    assert all(torch.equal(v, nearest_cnn(mixed).state_dict()[k]) for k, v in residual.state_dict().items())


@BOTH
def test_frozen_convolutions_stay_frozen(to):
    model = made(lambda: nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 2)))
    model[0].weight.requires_grad_(False)
    for released in (embed(model, (2, 5, 5), to), convert(embed(model, (2, 5, 5), to), "fcn"),
                     nearest_cnn(embed(model, (2, 5, 5), to))):
        assert [p.requires_grad for p in released.parameters()] == [False, True, True, True]


# The ladder: CNN, LCN, FCN

def ladder():
    "A network with plain, grouped, reflecting and transposed convolutions, and an input."
    return made(lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(),
                                      nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect", stride=2),
                                      nn.ReLU(), nn.ConvTranspose2d(3, 2, 3, stride=2, bias=False))), rand(3, 2, 5, 4)


def test_a_step_up_is_exact():
    cnn, x = ladder()
    local = reinitialize(embed(cnn, (2, 5, 4), "lcn"), seed=1)
    before, dense = frozen(local), convert(local, "fcn")
    assert close(dense(x), local(x), 1e-12) and unchanged(local, before) and (residuals(dense)["lcn"] == 0).all()
    assert {type(m) for m in dense.modules() if hasattr(m, "geometry")} == {FullyConnected}
    again = convert(dense, "lcn")
    assert torch.equal(again(x), local(x))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in local.state_dict().items())
    for name in "0", "2", "4":
        assert math.isclose(residuals(dense).loc[name, "cnn"], residuals(local).loc[name, "cnn"], rel_tol=1e-10)


def test_a_step_down_is_the_nearest():
    cnn, _ = ladder()
    dense = reinitialize(embed(cnn, (2, 5, 4)), seed=1)
    local, near = convert(dense, "lcn"), nearest_cnn(dense)
    for i in 0, 2, 4:
        g, W = dense[i].geometry, dense[i].weight
        assert torch.equal(matrix_from_local(local[i].weight, g), project_lcn(W, g))
        assert close(matrix_from_kernel(near[i].weight, g), project_cnn(W, g), 1e-12)
        if dense[i].bias is not None:
            assert torch.equal(local[i].bias, dense[i].bias)
            assert close(near[i].bias, dense[i].bias.view(g.out_channels, -1).mean(1), 1e-12)
        assert math.isclose(residuals(dense).loc[str(i), "lcn"],
                            (matrix_from_local(local[i].weight, g) - W).detach().norm(), rel_tol=1e-10)
    through = nearest_cnn(local).state_dict()
    assert all(close(v, through[k], 1e-12) for k, v in near.state_dict().items())


@BOTH
def test_what_comes_from_a_cnn_has_no_residual(to):
    cnn, x = ladder()
    released = embed(cnn, (2, 5, 4), to)
    for kind in RELEASED:
        assert (residuals(convert(released, kind)) == 0).all(axis=None)
        assert close(convert(released, kind)(x), cnn(x), 1e-12)
    same = convert(released, to)
    assert all(a is not b and torch.equal(a, b) for a, b in zip(same.parameters(), released.parameters()))
    assert all(torch.equal(v, convert(released).state_dict()[k]) for k, v in cnn.state_dict().items())


def test_layers_used_twice_stay_one_in_every_step(residual):
    dense = embed(residual, (2, 5, 5))
    for to in ("lcn", "cnn"): assert (lambda m: m.alias is m.twice)(convert(dense, to))


@pytest.mark.parametrize("to", ["cnn", "lcn", "fcn"])
def test_convert_tied_kernels_stay_tied(to):
    tied = convert(embed(made(Tied), (2, 4, 5), "lcn"), to)
    assert tied.a.weight is tied.b.weight


def test_convert_refuses_a_cnn_and_an_unknown_kind():
    for to in "cnn", "lcn", "fcn":
        with pytest.raises(ValueError, match="embed a CNN first"): convert(ladder()[0], to)
    with pytest.raises(ValueError, match="embed a CNN first"): residuals(ladder()[0])
    with pytest.raises(ValueError, match="'cnn', 'lcn' or 'fcn'"): convert(embed(ladder()[0], (2, 5, 4)), "mlp")


# Memory

PEAK = """
import torch
from efcn_nb.ladder.embedding import embed
from efcn_nb.materials.models import MODELS
def peak(): return 1024*int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])
embed(MODELS['alexnet']((3, 32, 32), width=1), (3, 32, 32), TO)
model = MODELS['alexnet']((3, 32, 32))
open('/proc/self/clear_refs', 'w').write('5')
before = peak()
released = embed(model, (3, 32, 32), TO)
print((peak() - before) / sum(p.numel()*p.element_size() for p in released.parameters()))
"""


@BOTH
def test_peak_memory_is_the_network(to):
    if not os.access("/proc/self/clear_refs", os.W_OK): pytest.skip("this system does not tell the peak of memory")
    assert .9 <= float(keep.in_child(keep.printed, PEAK.replace("TO", repr(to)), timeout=keep.HANGS)) <= 1.1


def test_what_is_not_embedded_has_no_way_back():
    for call in nearest_cnn, shares:
        with pytest.raises(ValueError, match="embed a CNN first"): call(nn.Linear(2, 2))


def test_a_cnn_with_a_closure_is_not_reinitialized():
    for more in closure, function_with_default:
        with pytest.raises(ValueError, match="goes on using f of the original"):
            reinitialize(Net(lambda m, x: m.f(m.conv(x)), more), 0)
        assert reinitialize(Net(lambda m, x: m.f(m.conv(x)), more), 0, inplace=True)


GIVEN = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
         "transposed", "output_padding")


@BOTH
@pytest.mark.parametrize("conv, size", [
    (nn.Conv2d(4, 6, (3, 5), (1, 2), (1, 2), (2, 1), 2), (9, 9)), (nn.Conv2d(2, 3, 3, padding="same"), (4, 5)),
    (nn.Conv2d(2, 3, (2, 4), padding="same"), (4, 5)),
    (nn.Conv2d(2, 3, 3, padding="valid"), (4, 5)), (nn.Conv1d(2, 3, 3, padding="same", padding_mode="circular"), (5,)),
    (nn.Conv3d(1, 2, 2, padding=1, padding_mode="replicate"), (3, 2, 3)),
    (nn.ConvTranspose1d(2, 4, 3, 2, 1, 1, 2), (4,)),
    (nn.ConvTranspose2d(2, 3, 3, (2, 3), output_padding=(1, 0)), (3, 3)), (nn.ConvTranspose3d(1, 2, 2, 2), (2, 2, 2))],
    ids=str)
def test_released_layers_tell_what_their_convolution_tells(to, conv, size):
    layer = embed(conv, (conv.in_channels, *size), to)
    for m in (layer, convert(layer, "fcn"), convert(layer, "lcn"), nearest_cnn(layer), copy.deepcopy(layer),
              pickle.loads(pickle.dumps(layer)), reinitialize(layer, 0)):
        for name in GIVEN:
            assert getattr(m, name) == getattr(conv, name) and type(getattr(m, name)) is type(getattr(conv, name)), name
    assert str(nearest_cnn(layer)) == str(conv) and "same" not in repr(layer)


def test_an_output_padding_that_is_overruled_in_the_call():
    model = Net(lambda m, x: m.conv(x, output_size=[x.shape[2]*2 + m.conv.output_padding[0]]*2),
                conv=nn.ConvTranspose2d(2, 3, 2, 2, output_padding=1))
    for m in (lambda: embed(model, SHAPE)), (lambda: embed(model, SHAPE, "lcn")):
        assert m().conv.output_padding == (1, 1) and close(m()(rand(2, *SHAPE)), model(rand(2, *SHAPE)), 1e-12)


@BOTH
@pytest.mark.parametrize("names", [["weight"], ["bias"], ["weight", "bias"]])
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("fold", [False, True])
def test_a_kernel_that_is_a_buffer_stays_one(to, names, persistent, fold):
    model = settled(
        lambda: nn.Sequential(as_buffers(nn.Conv2d(2, 3, 3), *names, persistent=persistent), nn.BatchNorm2d(3)), None)
    x = rand(2, *SHAPE)
    released = embed(model, SHAPE, to, fold_batchnorm=fold)
    for m in (released, nearest_cnn(released), convert(released, "fcn"), convert(released, "lcn"),
              copy.deepcopy(released)):
        in_order = [*m[0]._buffers.keys() - {"pixels"}] == [n for n in ("weight", "bias") if n in names]
        assert close(m(x), model(x), 1e-12) and in_order or set(m[0]._buffers) - {"pixels"} == set(names)
        assert ("0.weight" in m.state_dict()) == ("weight" not in names or persistent)


class Own(nn.modules.conv._ConvNd):
    "A convolution that is none of torch.nn's."
    def __init__(self): super().__init__(3, 3, (3, 3), (1, 1), (1, 1), (1, 1), False, (0, 0), 1, True, "zeros")
    def forward(self, x): return F.conv2d(x, self.weight, self.bias, padding=1)


STAYS = {  # forward pass, more, layers, and what the warning says; None for none
    "F.conv2d": (lambda m, x: F.conv2d(m.conv(x), m.kernel), kernel, None,
                 "in the forward pass of Net itself, by aten.convolution"),
    "torch.conv_transpose2d": (lambda m, x: torch.conv_transpose2d(m.conv(x), m.kernel), kernel, None,
                               "in the forward pass of Net itself"),
    "torch.convolution": (
        lambda m, x: torch.convolution(m.conv(x), m.kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        kernel, None, "in the forward pass of Net itself"),
    "deformable": (lambda m, x: deform_conv2d(m.conv(x), torch.zeros(len(x), 18, 3, 3).to(x), m.kernel), kernel, None,
                   "by torchvision.deform_conv2d"),
    "a module": (lambda m, x: m.own(m.conv(x)), lambda m: setattr(m, "own", Own()), None, r"in own \(Own\)"),
    "inside a block": (lambda m, x: m.block(m.conv(x)),
                       lambda m: setattr(m, "block", nn.Sequential(nn.ReLU(), Own(), nn.Sequential(Own()))), None,
                       r"in block.1 \(Own\), by .*; in block.2.0 \(Own\)"),
    "in inference mode": (torch.inference_mode()(lambda m, x: F.conv2d(m.conv(x), m.kernel)), kernel, None,
                          "in the forward pass of Net itself"),
    "left out": (lambda m, x: m.other(m.conv(x)), lambda m: setattr(m, "other", nn.Conv2d(3, 2, 1)), ["conv"], None),
    "a refused one left out": (lambda m, x: m.other(m.conv(x)), lambda m: setattr(m, "other", OwnConv(3, 2, 1)),
                               lambda name, m: name == "conv", None),
    "none": (lambda m, x: m.conv(x).to(torch.float32).relu(), lambda m: None, None, None),
    "padding by another mode": (lambda m, x: m.other(m.conv(x)),
                                lambda m: setattr(m, "other", nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular")),
                                None, None)}


@pytest.mark.parametrize("name", STAYS)
def test_convolutions_that_stay_are_named(name):
    forward, more, layers, says = STAYS[name]
    model, x = Net(forward, more), rand(2, *SHAPE)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        released = embed(model, SHAPE, layers=layers)
    said = [w for w in said if "not released" in str(w.message)]
    assert close(released(x), model(x), 1e-6) and len(said) == (says is not None)
    if says: assert re.search(says, str(said[0].message)) and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed(model, SHAPE, layers=layers, check=False)


class Experts(nn.Module):
    "A mixture of experts, each of which takes the images that a gate sends it."
    def __init__(self):
        super().__init__()
        self.experts, self.gate = nn.ModuleList([nn.Conv2d(2, 2, 3) for _ in range(4)]), nn.Linear(50, 4)
        self.fc = nn.Linear(18, 2)
    def forward(self, x):
        expert, h = self.gate(x.flatten(1)).argmax(1), x.new_zeros(len(x), 2, 3, 3)
        for i, conv in enumerate(self.experts): h[expert == i] = conv(x[expert == i])
        return self.fc(h.flatten(1))


@BOTH
def test_a_mixture_of_experts_is_reinitialized(to):
    released = embed(made(Experts), SHAPE, to)
    for seed in range(10): assert reinitialize(released, seed) is not released
    released.held = lambda x: released.fc(x)
    released.forward = types.MethodType(lambda self, x: self.held(x.flatten(1)[:, :18]), released)
    with pytest.raises(ValueError, match="goes on using fc.weight of the original"): reinitialize(released, 0)


class Raw(nn.Module):
    "Parameters of its own that it cannot draw."
    def __init__(self):
        super().__init__()
        self.scale, self.conv = nn.Parameter(torch.ones(3, 1, 1)), nn.Conv2d(2, 3, 3)
    def forward(self, x): return self.conv(x)*self.scale


class OwnDraw(nn.Linear):
    "Draws in a way that leaves no trace in the version of its parameters."
    def reset_parameters(self):
        for p in self.parameters(): p.data.uniform_(-1, 1)


def attention():
    m = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
    with torch.no_grad(): m[1].in_proj_bias.fill_(1), m[1].out_proj.bias.fill_(1)
    return m


def pruned_linear():
    m = nn.Linear(3, 3)
    prune.l1_unstructured(m, "weight", .5)
    return m


UNDRAWN = {  # network, and the parameters that stay
    "plain": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.PReLU(), nn.GroupNorm(1, 3),
                                    nn.Linear(3, 3, bias=False), nn.Embedding(3, 2), nn.LSTM(2, 2)), []),
    "raw": (Raw, ["scale"]), "attention": (attention, []), "without a trace": (lambda: OwnDraw(3, 3), []),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
                    ["parametrizations.weight.original0", "parametrizations.weight.original1"]),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(3, 3)), ["parametrizations.weight.original"]),
    "old spectral norm": (lambda: spectral_norm(nn.Linear(3, 3)), ["weight_orig"]),
    "old weight norm": (lambda: weight_norm(nn.Linear(3, 3)), ["weight_g", "weight_v"]),
    "pruned": (pruned_linear, ["weight_orig"])}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", UNDRAWN)
def test_parameters_that_are_not_drawn_are_named(name, inplace):
    make, kept = UNDRAWN[name]
    model = made(make).float()
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        drawn = reinitialize(model, 1, inplace=inplace)
    said = [w for w in said if "not drawn anew" in str(w.message)]
    assert len(said) == bool(kept)
    assert all(f": {', '.join(sorted(kept))};" in str(w.message) and w.filename == __file__ for w in said)
    assert all(torch.equal(p, before[k]) == (k in kept)
               for k, p in drawn.named_parameters() if p.dim() > 1 or k in kept)
    if name == "attention": assert not drawn[1].in_proj_bias.any() and not drawn[1].out_proj.bias.any()


def test_attention_changes_no_other_draw():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, out, last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    drawn = reinitialize(made(attention).float(), 1)
    assert all(torch.equal(a.weight, b.weight)
               for a, b in [(drawn[0], first), (drawn[1].out_proj, out), (drawn[2], last)])


def test_weights_of_an_unknown_kind_are_not_counted():
    with pytest.raises(ValueError, match="to must be 'fcn' or 'lcn', not 'mlp'"): released_weights({}, to="mlp")
