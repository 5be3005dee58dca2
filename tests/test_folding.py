"BatchNorm is merged where it alone follows a convolution, and stays where it does not."
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from efcn_nb.ladder.folding import BATCHNORMS, merge_batchnorm
from efcn_nb.ladder.embedding import embed, nearest_cnn

from nets import BOTH, close, frozen, KINDS, made, Net, rand, residual, settled, SHAPE, shape_of, unchanged

pytestmark = pytest.mark.usefixtures("one_thread")  # threads only cost time on tensors as small as these


def norms(model): return [name for name, m in model.named_modules() if isinstance(m, BATCHNORMS)]


FOLDABLE = {
    "plain": lambda: [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)],
    "without bias": lambda: [nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)],
    "without affine": lambda: [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False)],
    "groups": lambda: [nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4)],
    "reflect": lambda: [nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)],
    "transposed": lambda: [nn.ConvTranspose2d(2, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4)],
    "transposed, groups": lambda: [nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2), nn.BatchNorm2d(4)]}


@BOTH
@pytest.mark.parametrize("build", FOLDABLE.values(), ids=FOLDABLE)
def test_batchnorm_is_folded(to, build):
    model, x = settled(lambda: nn.Sequential(*build(), nn.ReLU()), (2, 5, 6)), rand(3, 2, 5, 6)
    before = frozen(model)
    folded = embed(model, (2, 5, 6), to, fold_batchnorm=True)
    assert unchanged(model, before) and not norms(folded) and norms(model) and close(folded(x), model(x), 1e-12)
    conv = nearest_cnn(folded)[0]
    if not (conv.transposed and conv.groups > 1):  # of which PyTorch's own function knows nothing
        fused = fuse_conv_bn_eval(model[0], model[1], transpose=conv.transposed)
        assert close(conv.weight, fused.weight, 1e-12) and close(conv.bias, fused.bias, 1e-12)
    kept = embed(model, (2, 5, 6), to)
    assert norms(kept) == ["1"] and close(kept(x), model(x), 1e-12)


@BOTH
@pytest.mark.parametrize("axes", [1, 3])
def test_batchnorm_of_signals_and_volumes_is_folded(to, axes):
    norm = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[axes]
    model = settled(lambda: nn.Sequential(KINDS[False, axes](2, 3, 2), norm(3), KINDS[True, axes](3, 2, 2), norm(2)),
                    None)
    x = rand(2, 2, *(3,)*axes)
    folded = embed(model, shape_of(x), to, fold_batchnorm=True)
    assert not norms(folded) and close(folded(x), model(x), 1e-12)


class Wired(nn.Module):
    "A convolution, a BatchNorm, and a way between them that must not be folded."
    def __init__(self, way, **norm):
        super().__init__()
        self.conv, self.norm, self.way = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2, **norm), way
    def forward(self, x): return self.way(self, x)


def skipped(m, x):
    y = m.conv(x)
    return F.relu(m.norm(y)) + y


def returned(m, x):
    y = m.conv(x)
    return torch.stack([m.norm(y), y])


UNFOLDABLE = {
    "a residual": skipped, "another output": returned, "ReLU in place": lambda m, x: m.norm(F.relu_(m.conv(x))),
    "ReLU": lambda m, x: m.norm(F.relu(m.conv(x))),
    "BatchNorm first": lambda m, x: m.conv(m.norm(x)), "convolution used twice": lambda m, x: m.norm(m.conv(m.conv(x))),
    "both used twice": lambda m, x: m.norm(m.conv(m.norm(m.conv(x)))),
    "convolution elsewhere": lambda m, x: m.norm(m.conv(x)) + m.conv(x),
    "BatchNorm elsewhere": lambda m, x: m.norm(m.conv(x)) + m.norm(x),
    "sum in place": lambda m, x: m.norm(m.conv(x).add_(1)),
    "kernel read elsewhere": lambda m, x: m.norm(m.conv(x))}


@BOTH
@pytest.mark.parametrize("way", UNFOLDABLE)
def test_batchnorm_that_does_not_simply_follow_stays(to, way):
    model, x = settled(lambda: Wired(UNFOLDABLE[way]), (2, 4, 5)), rand(3, 2, 4, 5)
    if way == "kernel read elsewhere":
        model.other = nn.BatchNorm2d(2).double()
        model.other.bias = model.norm.bias
    folded = embed(model, (2, 4, 5), to, fold_batchnorm=True)
    assert "norm" in norms(folded) and close(folded(x), model(x), 1e-12)


def detached(m, x):
    y = m.conv(x)
    return m.norm(y)*y.detach().sigmoid()


def largest_channel(m, x):
    y = m.conv(x)
    return m.norm(y) + y.argmax(1, keepdim=True)


def as_a_number(m, x):
    y = m.conv(x)
    return m.norm(y)*float(y.max())


def frozen_backbone(m, x):
    "A feature extractor without a graph; the affine map after it makes one."
    with torch.no_grad(): features = m.norm(F.relu(m.conv(x)))
    return m.head(features)


def frozen_residual(m, x):
    with torch.no_grad():
        y = m.conv(x)
        features = m.norm(y) + y
    return m.head(features)


HIDDEN = [detached, largest_channel, as_a_number, frozen_backbone, frozen_residual]


@BOTH
@pytest.mark.parametrize("way", HIDDEN, ids=lambda way: way.__name__)
def test_batchnorm_stays_where_the_graph_does_not_show_what_is_between(to, way):
    """Autograd knows nothing of what happens to detached values or without gradients:
    then the function must stay all the same."""
    model, x = settled(lambda: Wired(way), (2, 4, 5)), rand(3, 2, 4, 5)
    model.head = made(lambda: nn.Linear(5, 3))
    assert close(embed(model, (2, 4, 5), to, fold_batchnorm=True)(x), model(x), 1e-12)


def with_a_hook(norm): norm.register_forward_hook(lambda m, args, out: 2*out)


def with_a_pre_hook(norm): norm.register_forward_pre_hook(lambda m, args: 2*args[0])


def with_another_forward(norm):
    norm.forward = types.MethodType(lambda norm, x: 2*F.batch_norm(x, norm.running_mean, norm.running_var), norm)


@BOTH
@pytest.mark.parametrize("change", [with_a_hook, with_a_pre_hook, with_another_forward],
                         ids=lambda change: change.__name__)
def test_batchnorm_that_computes_something_else_stays(to, change):
    model, x = settled(lambda: Wired(lambda m, x: m.norm(m.conv(x))), (2, 4, 5)), rand(3, 2, 4, 5)
    change(model.norm)
    assert close(embed(model, (2, 4, 5), to, fold_batchnorm=True)(x), model(x), 1e-12)


@BOTH
@pytest.mark.parametrize("fold", [False, True])
def test_inputs_by_keyword(to, fold):
    "PyTorch calls the input of a convolution, and of BatchNorm, `input`."
    model, x = settled(lambda: Wired(lambda m, x: m.norm(input=m.conv(input=x))), (2, 4, 5)), rand(3, 2, 4, 5)
    released = embed(model, (2, 4, 5), to, fold_batchnorm=fold)
    assert close(released(x), model(x), 1e-12) and close(nearest_cnn(released)(x), model(x), 1e-12)


def test_batchnorm_without_statistics_stays():
    model = settled(lambda: nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)), (2, 4, 5))
    x = rand(3, 2, 4, 5)
    folded = embed(model, (2, 4, 5), fold_batchnorm=True)
    assert norms(folded) == ["1"] and close(folded(x), model(x), 1e-12)


def test_batchnorm_in_training_mode_is_refused(residual):
    with pytest.raises(ValueError, match="training mode.*call model.eval"):
        embed(residual.train(), (2, 5, 5), fold_batchnorm=True)
    model = settled(lambda: Wired(skipped), (2, 4, 5)).train()  # its BatchNorm stays, whatever its mode is
    assert embed(model, (2, 4, 5), fold_batchnorm=True).norm.training


@BOTH
def test_batchnorm_of_a_network(residual, to):
    before, x = frozen(residual.eval()), rand(3, 2, 5, 5)
    folded = embed(residual, (2, 5, 5), to, fold_batchnorm=True)
    assert unchanged(residual, before) and not norms(folded) and close(folded(x), residual(x), 1e-12)
    some = embed(residual, (2, 5, 5), to, layers=["stem.0"], fold_batchnorm=True)
    assert norms(some) == ["blocks.a.1"] and sum(hasattr(m, "geometry") for m in some.modules()) == 1
    assert close(some(x), residual(x), 1e-12)


class Recycled(nn.Module):
    "BatchNorms that read short-lived tensors, and after each a convolution whose output can take over their memory."
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(4)])
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)])
    def forward(self, x):
        for norm, conv in zip(self.norms, self.convs): x = conv(norm(x*2)).relu()
        return x


def test_memory_used_again_is_not_taken_for_the_same_tensor():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Recycled().double().eval()
    for size in (4, 8, 16, 64):
        merged = merge_batchnorm(model, (4, size, size))
        assert sum(isinstance(m, nn.BatchNorm2d) for m in merged.modules()) == 4


def test_merging_proves_itself():
    model = Net(lambda m, x: m.head(m.norm(m.conv(x)))*m.conv.weight.norm()).eval()
    model.norm.running_mean.normal_(), model.norm.running_var.uniform_(2, 3)
    with pytest.raises(ValueError,
                       match="cannot be merged with its BatchNorm.*first part at the forward pass of Net itself"):
        merge_batchnorm(model, SHAPE)
    assert merge_batchnorm(model, SHAPE, check=False)
