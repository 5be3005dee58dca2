"""Same function, released weights: `embed` and its way back against PyTorch's own convolutions, and what it refuses."""
import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from efcn_nb.embedding import (conv_geometries, embed, kernel_from_local, kernel_from_matrix, matrix_from_kernel, matrix_from_local,
                               nearest_cnn, reinitialize, released_weights)
from efcn_nb.geometry import ConvGeometry
from efcn_nb.layers import FullyConnected, LocallyConnected
from efcn_nb.models import MODELS
from efcn_nb.subspaces import project_cnn, project_lcn, shares, squares

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=150)
settings.load_profile("repeatable")

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BOTH = pytest.mark.parametrize("to", ["fcn", "lcn"])


def rand(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def conv_of(n, ci, co, *args, seed=0, **kw):
    "A float64 convolution over `n` axes with weights of `seed`; the global random state is left alone."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return KINDS[n](ci, co, *args, dtype=torch.float64, **kw)


@st.composite
def cases(draw, most=6):
    "A convolution and a batch of inputs that it takes, among them kernels that are larger than the input."
    n = draw(st.integers(1, 3))
    most = most if n < 3 else 3
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(n))
    groups, kernel, dilation = draw(st.sampled_from([1, 1, 2, 3])), each(1, 4 if n < 3 else 3), each(1, 2)
    ci, co = groups*draw(st.integers(1, 2)), groups*draw(st.integers(1, 2))
    padding = draw(st.sampled_from(["same", "valid", "own", "own", "own"]))
    stride = (1,)*n if padding == "same" else each(1, 3)
    if padding == "own": padding = each(0, 3)
    span = [d*(k-1) + 1 for d, k in zip(dilation, kernel)]
    around = [0]*n if padding == "valid" else [s-1 for s in span] if padding == "same" else [2*p for p in padding]
    size = tuple(draw(st.integers(max(1, s-a), max(most, s-a))) for s, a in zip(span, around))
    seed = draw(st.integers(0, 999))
    conv = conv_of(n, ci, co, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=draw(st.booleans()), seed=seed)
    return conv, rand(draw(st.integers(1, 3)), ci, *size, seed=seed)


CHOSEN = [  # corners that must be among the cases whatever is drawn
    (conv_of(2, 2, 3, (3, 4), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), rand(2, 2, 5, 6)),
    (conv_of(2, 1, 1, 1), rand(1, 1, 1, 1)),
    (conv_of(2, 4, 4, 3, padding=1, groups=4, bias=False), rand(2, 4, 4, 4)),
    (conv_of(1, 2, 2, 7, padding=3), rand(2, 2, 2)),
    (conv_of(3, 1, 2, (1, 2, 3), padding="same"), rand(1, 1, 2, 3, 3)),
    (conv_of(2, 2, 2, (2, 4), padding="same"), rand(1, 2, 3, 5)),
]


def over_cases(**kw):
    "Run a test on drawn and on chosen cases."
    def decorate(test):
        for case in CHOSEN: test = example(case)(test)
        return given(cases(**kw))(test)
    return decorate


def close(a, b, tolerance):
    "Whether `a` and `b` agree to `tolerance` relative to the largest value."
    return a.shape == b.shape and float((a - b).detach().abs().max()) <= tolerance*max(1., float(b.detach().abs().max()))


def geometry_of(conv, x): return ConvGeometry.from_conv(conv, x.shape[2:])


def shape_of(x): return tuple(x.shape[1:])


# Properties of one convolution: each is a function of a case, so that the negative controls below can call it

def same_function(conv, x, to):
    assert close(embed(conv, shape_of(x), to)(x), conv(x), 1e-12)
    single, x = copy.deepcopy(conv).float(), x.float()
    assert close(embed(single, shape_of(x), to)(x), single(x), 1e-5)


def same_gradient(conv, x):
    "The sum over a tap's copies of the released gradient is the convolution's; so are inputs' and biases'."
    g, gradients = geometry_of(conv, x), []
    copies = (g.source >= 0).sum(0).view(conv.kernel_size)
    into = rand(*conv(x).shape, seed=1)
    for layer in (conv, embed(conv, shape_of(x)), embed(conv, shape_of(x), "lcn")):
        wanted = [x.clone().requires_grad_(), *layer.parameters()]
        gradients.append(torch.autograd.grad((layer(wanted[0])*into).sum(), wanted))
    (dx, dk, *db), dense, local = gradients
    assert close(dense[0], dx, 1e-10) and close(local[0], dx, 1e-10)
    assert close(kernel_from_matrix(dense[1], g)*copies, dk, 1e-10)
    assert close(local[1].sum(0).view(g.kernel_shape), dk, 1e-10)
    for released in (dense, local):
        assert [True]*len(db) == [close(r.view(g.out_channels, -1).sum(1), b, 1e-10) for r, b in zip(released[2:], db)]


def same_way_back(conv, x, to):
    "Every tap that reads a pixel anywhere comes back bit for bit; the others, of which the released layer knows nothing, as zero."
    back = nearest_cnn(embed(conv, shape_of(x), to))
    used = (geometry_of(conv, x).source >= 0).any(0).view(conv.kernel_size)
    assert type(back) is type(conv) and torch.equal(back.weight, conv.weight*used)
    assert (back.bias is None) == (conv.bias is None) and (conv.bias is None or torch.equal(back.bias, conv.bias))
    assert close(back(x), conv(x), 1e-12)


def matrix_by_autograd(conv, g):
    "The matrix of `conv`, without its bias, from the images of all unit inputs."
    units = torch.eye(math.prod(g.in_shape), dtype=torch.float64).view(-1, *g.in_shape)
    with torch.no_grad(): return (conv(units) - conv(torch.zeros_like(units))).flatten(1).T


def matrices_of_taps(conv, g):
    "The matrices of all unit kernels: a basis of the CNN subspace."
    unit, found = copy.deepcopy(conv), []
    for k in range(conv.weight.numel()):
        with torch.no_grad(): unit.weight.zero_().view(-1)[k] = 1
        found.append(matrix_by_autograd(unit, g).flatten())
    return torch.stack(found, 1)


def projections_are_the_dense_ones(conv, x):
    "Both projections against least squares in the span of the unit kernels' matrices, which PyTorch computes."
    g = geometry_of(conv, x)
    W, basis = rand(*g.matrix_shape), matrices_of_taps(conv, g)
    local = (basis != 0).any(1).view(g.matrix_shape)
    assert torch.equal(g.mask, local) and torch.equal(project_lcn(W, g), W*local)
    basis = basis[:, basis.any(0)]
    nearest = basis @ torch.linalg.lstsq(basis, W.flatten()).solution if basis.shape[1] else torch.zeros(W.numel(), dtype=W.dtype)
    assert close(project_cnn(W, g), nearest.view(g.matrix_shape), 1e-10)


@BOTH
@over_cases()
def test_one_convolution_same_function(to, case): same_function(*case, to)


@over_cases()
def test_one_convolution_same_gradient(case): same_gradient(*case)


@BOTH
@over_cases()
def test_one_convolution_same_way_back(to, case): same_way_back(*case, to)


@over_cases(most=4)
def test_projections_are_the_dense_ones(case): projections_are_the_dense_ones(*case)


@over_cases()
def test_projections_are_orthogonal_and_nested(case):
    conv, x = case
    g = geometry_of(conv, x)
    V, W = rand(*g.matrix_shape, seed=1), rand(*g.matrix_shape, seed=2)
    for project in (project_lcn, project_cnn):
        assert close(project(project(W, g), g), project(W, g), 1e-12)
        assert math.isclose((V*project(W, g)).sum(), (project(V, g)*W).sum(), rel_tol=1e-10, abs_tol=1e-10)
        assert abs(float((project(W, g)*(W - project(W, g))).sum())) <= 1e-10*float(W.square().sum())
    assert close(project_lcn(project_cnn(W, g), g), project_cnn(W, g), 1e-12)
    assert close(project_cnn(project_lcn(W, g), g), project_cnn(W, g), 1e-12)
    K = matrix_from_kernel(conv.weight, g)
    assert torch.equal(project_lcn(K, g), K) and torch.equal(project_cnn(K, g), K)


@over_cases()
def test_shares_add_up(case):
    conv, x = case
    layer = embed(conv, shape_of(x))
    assert squares(layer)["unshared"] == squares(layer)["off_local"] == 0
    g, drawn = layer.geometry, reinitialize(layer, seed=0)
    got, W = squares(drawn), drawn.weight.detach()
    wanted = dict(convolutional=project_cnn(W, g), unshared=project_lcn(W, g) - project_cnn(W, g), off_local=W - project_lcn(W, g))
    for part, matrix in wanted.items(): assert math.isclose(got[part], matrix.square().sum(), rel_tol=1e-10, abs_tol=1e-12)
    table = shares(drawn)
    assert math.isclose(table.loc["all", list(wanted)].sum(), 1, rel_tol=1e-12) and math.isclose(table.loc["all", "norm"], W.norm(), rel_tol=1e-12)


@over_cases()
def test_local_weights_and_their_matrix_compute_the_same(case):
    conv, x = case
    layer = reinitialize(embed(conv, shape_of(x), "lcn"), seed=3)
    assert close(F.linear(x.flatten(1), matrix_from_local(layer.weight, layer.geometry), layer.bias), layer(x).flatten(1), 1e-12)
    assert torch.equal(embed(nearest_cnn(layer), shape_of(x), "lcn").weight[:, :, 0, 0] != 0, (layer.weight != 0)[:, :, 0, 0])


@pytest.mark.parametrize("to", ["fcn", "lcn"])
@pytest.mark.parametrize("n, kw, size", [(1, dict(kernel_size=3, stride=2, padding=1), (5,)), (2, dict(kernel_size=(2, 3), groups=2, padding=1), (3, 3)),
                                         (3, dict(kernel_size=2, dilation=2, padding=1, bias=False), (2, 3, 2))])
def test_gradcheck(to, n, kw, size):
    layer, x = embed(conv_of(n, 2, 2, **kw), (2, *size), to), rand(2, 2, *size).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]
    call = lambda x, *values: torch.func.functional_call(layer, dict(zip(names, values)), (x,))
    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))


# Negative controls: a wrong map must make the properties fail

ASYMMETRIC = conv_of(2, 2, 3, (3, 2), stride=(1, 2), padding=(1, 0), seed=4), rand(2, 2, 4, 5, seed=4)


def break_map(monkeypatch, how):
    right = ConvGeometry.source.fget if isinstance(ConvGeometry.source, property) else ConvGeometry.source.func
    monkeypatch.setattr(ConvGeometry, "source", property(lambda self: how(right(self))))


PERMUTED = {"rolled": lambda s: s.roll(1, 0), "shuffled": lambda s: s[torch.randperm(len(s), generator=torch.Generator().manual_seed(0))],
            "taps flipped": lambda s: s.flip(1)}
PROPERTIES = {"function fcn": lambda *c: same_function(*c, "fcn"), "function lcn": lambda *c: same_function(*c, "lcn"),
              "gradient": same_gradient, "projections": projections_are_the_dense_ones}


@pytest.mark.parametrize("how", PERMUTED.values(), ids=PERMUTED)
@pytest.mark.parametrize("holds", PROPERTIES.values(), ids=PROPERTIES)
def test_a_permuted_map_is_noticed(monkeypatch, how, holds):
    holds(*ASYMMETRIC)
    if holds is projections_are_the_dense_ones and how is PERMUTED["taps flipped"]: return  # another name for each tap, the same subspaces
    break_map(monkeypatch, how)
    with pytest.raises(AssertionError): holds(*ASYMMETRIC)


@BOTH
def test_a_map_that_loses_a_tap_is_noticed(monkeypatch, to):
    same_way_back(*ASYMMETRIC, to)
    back = nearest_cnn(embed(ASYMMETRIC[0], (2, 4, 5), to))
    break_map(monkeypatch, lambda s: s.index_fill(1, torch.tensor([2]), -1))
    assert not torch.equal(nearest_cnn(embed(ASYMMETRIC[0], (2, 4, 5), to)).weight, back.weight)


@BOTH
@pytest.mark.parametrize("rows", [True, False], ids=["outputs", "inputs"])
def test_a_shuffled_embedding_is_another_function(to, rows):
    conv, x = ASYMMETRIC
    layer = embed(conv, shape_of(x), to)
    axis = (0 if rows else 1) if to == "fcn" else (0 if rows else 3)
    with torch.no_grad(): layer.weight.copy_(layer.weight.index_select(axis, torch.randperm(layer.weight.shape[axis], generator=torch.Generator().manual_seed(1))))
    assert not close(layer(x), conv(x), 1e-3)


# Whole networks

def network(name, width, dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name]((3, 32, 32), 10, width=width).to(dtype).eval()


@pytest.mark.parametrize("name, width, dtype, tolerance", [
    ("skinny", 64, torch.float64, 1e-12), ("skinny", 64, torch.float32, 1e-5), ("alexnet", 8, torch.float64, 1e-12), ("alexnet", 64, torch.float32, 1e-5)])
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
                    alexnet=3072*64*17**2 + (64*8**2)*(192*8**2) + (192*3**2)*(384*3**2) + (384*3**2)*(256*3**2) + (256*3**2)**2)
    for name, weights in ("skinny", 143_178), ("alexnet", 2_848_906):
        cnn = MODELS[name]((3, 32, 32))
        assert sum(p.numel() for p in cnn.parameters()) == weights and released_weights(conv_geometries(cnn, (3, 32, 32))) == released[name]


class Residual(nn.Module):
    "Nested, with BatchNorm, dropout, a skip connection, and one convolution that is used twice, the second time under another name."
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.ModuleDict(dict(a=nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)), skip=nn.Conv2d(4, 4, 1)))
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.alias = self.twice
        self.head = nn.Sequential(nn.Dropout(), nn.Flatten(), nn.Linear(4*25, 3))

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.blocks["a"](x) + self.blocks["skip"](x))
        return self.head(self.alias(F.relu(self.twice(x))))


@pytest.fixture
def residual():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Residual().double()
        with torch.no_grad(): model(rand(8, 2, 5, 5, seed=9) + 1)  # running statistics that are not the default
    return model


def frozen(model):
    "All that embedding must leave alone."
    return {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def unchanged(model, before):
    return all(torch.equal(v, model.state_dict()[k]) for k, v in before[0].items()) and frozen(model)[1:] == before[1:]


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
    assert {type(m) for m in released.modules() if hasattr(m, "geometry")} == {FullyConnected if to == "fcn" else LocallyConnected}
    assert close(released(x), residual(x), 1e-12)
    for name, value in residual.named_buffers(): assert close(dict(released.named_buffers())[name].double(), value.double(), 1e-12)
    with torch.no_grad():
        for p in released.parameters(): p.add_(1)
    assert not [k for k, p in residual.named_parameters() if not torch.equal(p, before[0][k])], "the embedded network shares memory with its CNN"


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
    kernel = kernel_from_matrix(grad, g)*copies if to == "fcn" else grad.sum(0).view(g.kernel_shape)
    assert close(kernel, residual.twice.weight.grad, 1e-10)
    assert close(kernel_from_local(grad, g) if to == "lcn" else kernel_from_matrix(grad, g), residual.twice.weight.grad/copies, 1e-10)


@BOTH
@pytest.mark.parametrize("chosen, released", [(["twice"], 1), (lambda name, m: m.kernel_size == (3, 3), 3), ([], 0), (None, 4)])
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
    assert all(torch.equal(a, b) for a, b in zip(reinitialize(released, seed=1).parameters(), reinitialize(released, seed=1).parameters()))
    assert not torch.equal(reinitialize(released, seed=2).twice.weight, reinitialize(released, seed=1).twice.weight)
    assert set(released.state_dict()) == set(residual.state_dict()), "the names of weights stay"


def test_reinitialize_leaves_the_random_state_and_its_model_alone(residual):
    released = embed(residual, (2, 5, 5))
    before, state = frozen(released), torch.get_rng_state()
    reinitialize(released, seed=1)
    assert unchanged(released, before) and torch.equal(state, torch.get_rng_state())


def test_a_model_that_draws_numbers_leaves_the_random_state_alone():
    class Noisy(nn.Module):
        def __init__(self): super().__init__(); self.conv = nn.Conv2d(1, 2, 3)
        def forward(self, x): return self.conv(F.dropout(x))
    model, state = Noisy(), torch.get_rng_state()
    embed(model, (1, 5, 5))
    assert torch.equal(state, torch.get_rng_state())


def test_geometries_by_name(residual):
    assert {name: g.out_shape for name, g in conv_geometries(residual, (2, 5, 5)).items()} == {
        "stem.0": (4, 5, 5), "blocks.a.0": (4, 5, 5), "blocks.skip": (4, 5, 5), "twice": (4, 5, 5)}


# Bad input: one clear sentence, before any work

def plain(**kw): return nn.Conv2d(3, 4, 3, padding=1, **kw)


class Halves(nn.Module):
    "One convolution called with two shapes, and one that is never called."
    def __init__(self, unused): super().__init__(); self.conv = nn.Conv2d(3, 3, 3, padding=1); self.other = plain() if unused else None
    def forward(self, x): return self.conv(x) if self.other else self.conv(F.max_pool2d(self.conv(x), 2))


class OwnConv(nn.Conv2d):
    def forward(self, x): return super().forward(x)**2


def after_a_step(model):
    model(torch.ones(1, 3, 8, 8))
    return model


def hooked():
    model = plain()
    model.register_forward_hook(lambda module, args, output: 2*output)
    return model


class Asserts(nn.Module):
    def __init__(self): super().__init__(); self.conv = plain()
    def forward(self, x):
        assert x.shape[-1] == 4, "only four pixels"
        return self.conv(x)


def pruned():
    model = nn.Sequential(plain())
    prune.l1_unstructured(model[0], "weight", .5)
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make, shape, kw, says", [
    (lambda: nn.Linear(3, 3), (3, 8, 8), {}, "no convolution"),
    (lambda: nn.Sequential(nn.ReLU()), (3, 8, 8), {}, "no convolution"),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(5, 2)), (3, 8, 8), {}, "does not fit"),
    (plain, (1, 8, 8), {}, "does not fit"),
    (plain, (2, 3, 8, 8), {}, "batch axis"),
    (plain, (3, 0, 8), {}, "does not fit"),
    (plain, 8, {}, "input_shape"),
    (lambda: nn.Conv2d(3, 4, 9), (3, 8, 8), {}, "does not fit"),
    (Asserts, (3, 8, 8), {}, "does not fit"),
    (lambda: Halves(False), (3, 8, 8), {}, r"conv is called with shapes \(3, 4, 4\) and \(3, 8, 8\)"),
    (lambda: Halves(True), (3, 8, 8), {}, "other is never called"),
    (lambda: OwnConv(3, 4, 3), (3, 8, 8), {}, "OwnConv"),
    (lambda: nn.LazyConv2d(4, 3), (3, 8, 8), {}, "Lazy"),
    (lambda: parametrizations.weight_norm(plain()), (3, 8, 8), {}, "parametriz"),
    (lambda: parametrizations.spectral_norm(plain()), (3, 8, 8), {}, "parametriz"),
    (lambda: nn.Sequential(weight_norm(plain())), (3, 8, 8), {}, "plain convolution"),
    (lambda: after_a_step(nn.Sequential(spectral_norm(plain()))), (3, 8, 8), {}, "plain convolution"),
    (pruned, (3, 8, 8), {}, "plain convolution"),
    (hooked, (3, 8, 8), {}, "plain convolution"),
    (lambda: plain(padding_mode="reflect"), (3, 8, 8), {}, "padding_mode='zeros'"),
    (plain, (3, 8, 8), dict(to="mlp"), "'fcn' or 'lcn'"),
    (lambda: nn.Sequential(plain()), (3, 8, 8), dict(layers=["first"]), "'first'.*'0'"),
])
def test_refusals(make, shape, kw, says):
    with pytest.raises(ValueError, match=says) as error: embed(make(), shape, **kw)
    assert len(str(error.value).splitlines()) == 1


def test_refuses_what_does_not_fit_in_memory():
    model = nn.Conv2d(3, 512, 3, padding=1)
    with pytest.raises(MemoryError, match=r"15,468.3 GB .*GB are free; use smaller images"): embed(model, (3, 224, 224))
    with pytest.raises(MemoryError, match="GB"): embed(model.double(), (3, 224, 224))


@BOTH
def test_released_layers_take_one_size_only(to):
    layer = embed(plain(), (3, 8, 8), to)
    for shape in (2, 3, 9, 8), (3, 8, 7), (1, 1, 3, 8, 8), (8, 8):
        with pytest.raises(ValueError, match="embed the network again"): layer(torch.zeros(shape))
    assert layer(torch.zeros(3, 8, 8)).shape == (4, 8, 8) and layer(torch.zeros(0, 3, 8, 8)).shape == (0, 4, 8, 8)


def test_what_is_not_embedded_has_no_way_back():
    for call in nearest_cnn, shares:
        with pytest.raises(ValueError, match="embed a CNN first"): call(nn.Linear(2, 2))
