"""Rows that nothing reads: what is left out changes nothing, and what is read stays."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efcn_nb.ladder.inspection import conv_geometries
from efcn_nb.ladder.folding import merge_batchnorm
from efcn_nb.ladder.embedding import embed, nearest_cnn
from efcn_nb.materials.models import make_model

BOTH = pytest.mark.parametrize("to", ["fcn", "lcn"])


def conv(ci, co, k=3, **kw): return nn.Conv2d(ci, co, k, padding=k//2, **kw)


class Net(nn.Module):
    "Convolutions called `a` and `b`, and whatever `forward` does with them."
    def __init__(self, forward, a=None, b=None):
        super().__init__()
        self.a, self.b, self._forward = a or conv(2, 3), b, forward
    def forward(self, x): return self._forward(self, x)


def trimmed(model, shape=(2, 8, 8)):
    return {name: g.unread for name, g in conv_geometries(model, shape, trim=True).items()}


def untrimmed(model, shape=(2, 8, 8)): return {name: (0,)*len(u) for name, u in trimmed(model, shape).items()}


# What is left out

@BOTH
@pytest.mark.parametrize("name, left_out", [("skinny", 15*8), ("alexnet", 15*24)])
def test_networks_of_the_papers(name, left_out, to):
    """The second convolution makes 8 x 8 outputs, of which the pooling reads 7 x 7;
    function and gradients are those of the whole."""
    torch.manual_seed(0)
    cnn = make_model(name, (3, 32, 32), 10, width=8).double().eval()
    whole, cut = embed(cnn, (3, 32, 32), to), embed(cnn, (3, 32, 32), to, trim=True)
    x, y = torch.randn(4, 3, 32, 32).double(), torch.arange(4)
    for model in cnn, whole, cut: F.cross_entropy(model(x), y).backward()
    assert torch.allclose(cut(x), cnn(x), atol=1e-12)
    assert (sum(m.bias.numel() for m in whole.modules() if hasattr(m, "geometry"))
            - sum(m.bias.numel() for m in cut.modules() if hasattr(m, "geometry")) == left_out)
    for (path, a), b in zip(whole.named_parameters(), cut.parameters()):
        if a.shape == b.shape: assert torch.allclose(a.grad, b.grad, atol=1e-13), path
    g = cut[3].geometry
    read = (torch.arange(8)[:, None] < 7) & (torch.arange(8) < 7)
    rows = read.flatten().repeat(g.out_channels)
    if to == "fcn":
        assert torch.allclose(whole[3].weight.grad[rows], cut[3].weight.grad, atol=1e-13)
        assert whole[3].weight.grad[~rows].abs().max() == 0
    assert all(torch.equal(p, q) for p, q in zip(nearest_cnn(cut).parameters(), cnn.parameters()))


@pytest.mark.parametrize("pool, unread", [(nn.MaxPool2d(3, 2), (1, 1)), (nn.AvgPool2d(3, 2), (1, 1)),
                                          (nn.MaxPool2d(2), (0, 0)), (nn.MaxPool2d((5, 2)), (3, 0)),
                                          (nn.MaxPool2d(3, 2, ceil_mode=True), (0, 0)), (nn.LPPool2d(2, 3), (2, 2))],
                         ids=str)
def test_pooling(pool, unread):
    assert trimmed(nn.Sequential(conv(2, 3), nn.ReLU(), pool, nn.Flatten()))["0"][-2:] == unread


def test_one_and_three_axes():
    for conv_, pool, shape in [(nn.Conv1d, nn.MaxPool1d, (2, 8)), (nn.Conv3d, nn.MaxPool3d, (2, 4, 8, 6))]:
        model = nn.Sequential(conv_(2, 3, 3, padding=1), pool(3, 2)).double()
        cut = embed(model, shape, trim=True)
        x = torch.randn(2, *shape).double()
        assert any(cut[0].geometry.unread) and torch.allclose(cut(x), model(x), atol=1e-13)


def test_a_convolution_at_the_end_that_reads_less():
    "Global pooling of a part that somebody cuts out."
    model = Net(lambda s, x: s.a(x)[:, :, :5, :6].mean((2, 3)))
    assert trimmed(model)["a"][-2:] == (3, 2)
    x = torch.randn(3, 2, 8, 8)
    assert torch.allclose(embed(model, (2, 8, 8), trim=True)(x), model(x), atol=1e-6)


# What stays

READ = dict(
    strided=Net(lambda s, x: s.b(s.a(x).relu()), b=nn.Conv2d(3, 2, 3, stride=2)),
    global_mean=Net(lambda s, x: s.a(x).mean((2, 3))), global_max=Net(lambda s, x: F.adaptive_max_pool2d(s.a(x), 1)),
    adaptive=Net(lambda s, x: F.adaptive_avg_pool2d(s.a(x), 4)),
    softmax=Net(lambda s, x: F.max_pool2d(s.a(x).flatten(2).softmax(2).unflatten(2, (8, 8)), 3, 2)),
    batchnorm=nn.Sequential(conv(2, 3), nn.BatchNorm2d(3), nn.MaxPool2d(3, 2)),
    layernorm=nn.Sequential(conv(2, 3), nn.LayerNorm((8, 8)), nn.MaxPool2d(3, 2)),
    skip=Net(lambda s, x: F.max_pool2d(s.a(x), 3, 2).flatten(1) @ torch.ones(27, 1) + s.a(x).sum((1, 2, 3))[:, None]),
    hides_nan=Net(lambda s, x: torch.where(s.a(x) > 0, s.a(x), 0).amax((2, 3)), a=conv(2, 1)),
    hides_nan_below=Net(lambda s, x: torch.where(s.a(x) < 0, s.a(x), 0).amin((2, 3)), a=conv(2, 1)),
    nan_to_num=Net(lambda s, x: s.a(x).nan_to_num().sum((2, 3))),
    answers_in_classes=Net(lambda s, x: F.max_pool2d(s.a(x), 3, 2).flatten(1).argmax(1)),
    asked_size=Net(lambda s, x: F.max_pool2d(s.a(x, output_size=[8, 8]), 3, 2),
                   a=nn.ConvTranspose2d(2, 3, 3, padding=1)))


@pytest.mark.parametrize("name", READ)
def test_what_is_read_stays(name):
    model = READ[name].eval()
    assert trimmed(model) == untrimmed(model)
    x = torch.randn(3, 2, 8, 8)
    assert torch.allclose(embed(model, (2, 8, 8), trim=True)(x).float(), model(x).float(), atol=1e-5)


def test_shared_parameters_stay_whole():
    one = conv(2, 2)
    model = nn.Sequential(one, nn.ReLU(), one, nn.MaxPool2d(3, 2))
    assert not any(trimmed(model)["0"])


def test_dead_units_are_no_reason():
    "A ReLU that is dead for every image hides all but NaN; a head of zeros hides nothing from NaN either."
    model = nn.Sequential(conv(2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 2))
    with torch.no_grad(): model[0].bias.fill_(-100)
    assert not any(trimmed(model)["0"])
    nn.init.zeros_(model[3].weight)
    assert not any(trimmed(model)["0"])


def test_merged_batchnorm_trims():
    model = nn.Sequential(conv(2, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(3, 2)).double().eval()
    cut = embed(model, (2, 8, 8), fold_batchnorm=True, trim=True)
    x = torch.randn(2, 2, 8, 8).double()
    assert torch.allclose(cut(x), model(x), atol=1e-13)
    assert trimmed(merge_batchnorm(model, (2, 8, 8)))["0"][-2:] == (1, 1)
    assert math.prod(cut[0].geometry.output_size) in (49, 64)


def test_random_state_and_model_are_left_alone():
    model = nn.Sequential(conv(2, 3), nn.BatchNorm2d(3), nn.Dropout(), nn.MaxPool2d(3, 2)).train()
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    conv_geometries(model, (2, 8, 8), trim=True)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


# Outputs that are read for some images only

def gate(when): return lambda s, x: (lambda y: y[..., :6] + (y[..., 6:].sum() if when(x) else 0))(s.a(x))


GATES = {
    "mean above 2": lambda x: x.mean() > 2, "mean below -3": lambda x: x.mean() < -3,
    "mean above 50": lambda x: x.mean() > 50, "mean below -50": lambda x: x.mean() < -50,
    "loud": lambda x: x.std() > 5, "very loud": lambda x: x.abs().max() > 500, "quiet": lambda x: x.std() < .1,
    "black": lambda x: (x == 0).all(), "white": lambda x: (x == 1).all(),
    "constant": lambda x: (x == x[0, 0, 0, 0]).all(), "positive": lambda x: (x >= 0).all(),
    "grey values": lambda x: (x >= 0).all() and x.max() > 200, "inverted": lambda x: (x == -1).all()}


@pytest.mark.parametrize("name", GATES)
def test_outputs_that_are_read_for_some_images_stay(name):
    model = Net(gate(GATES[name])).double()
    assert not any(trimmed(model)["a"])


def test_real_images_show_what_noise_does_not():
    "Read for images with a mark in the corner alone, of which no noise has one."
    model = Net(gate(lambda x: (x[:, 0, 0, 0] == 7).any())).double()
    images = torch.rand(6, 2, 8, 8).double()
    assert trimmed(model)["a"][-1] == 2
    assert conv_geometries(model, (2, 8, 8), trim=True, images=images)["a"].unread[-1] == 2
    images[-1, 0, 0, 0] = 7
    assert not any(conv_geometries(model, (2, 8, 8), trim=True, images=images)["a"].unread)
    whole = embed(model, (2, 8, 8), trim=True, images=images)
    assert torch.allclose(whole(images), model(images), atol=1e-12)


def test_images_that_a_network_cannot_take_say_nothing():
    "Normalised constants are NaN, and logarithms of noise too: outputs that nothing reads go all the same."
    for prepare in (lambda x: (x - x.mean())/x.std(), lambda x: x if x.abs().max() < 500 else 1/0):
        assert trimmed(Net(lambda s, x: F.max_pool2d(s.a(prepare(x)), 3, 2)))["a"][-2:] == (1, 1)
