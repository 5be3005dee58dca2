"""Curvature against dense second derivatives and against curvlinops, in float64.

What it refuses, what it leaves alone and how much memory it takes.
"""
import copy
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import keep
from efcn_nb.instruments import curvature
from efcn_nb.ladder import layers
from efcn_nb.instruments.curvature import (
    gradient, gradient_shares, hessian_product, loss_line, loss_slice, minimise, random_direction, sharpness,
    smooth_density, spectral_density, split_unit, top_eigenvalues, trace)
from efcn_nb.ladder.embedding import embed
from efcn_nb.instruments.subspaces import PARTS, dimensions, project

pytestmark = pytest.mark.usefixtures("one_thread")  # threads only cost time on tensors as small as these

SUBSETS = [None, PARTS, "convolutional", "unshared", "off_local", "other", ("convolutional", "other"),
           ("unshared", "off_local")]


def plain(): return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)), (1, 4, 4)


def deep():
    return nn.Sequential(nn.Conv2d(2, 2, 3, stride=2, padding=1), nn.GELU(), nn.Conv2d(2, 2, 2, groups=2, padding=1),
                         nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3)), (2, 4, 4)


def noisy():
    "Dropout and BatchNorm, which evaluation mode must settle."
    net = nn.Sequential(nn.Conv2d(1, 2, 2, padding=1, padding_mode="circular"), nn.BatchNorm2d(2), nn.Tanh(),
                        nn.Dropout(.5), nn.Flatten(), nn.Linear(32, 3))
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(.5, 2)
    return net, (1, 3, 3)


class Case:
    "An embedded network, batches of unequal size, the dense Hessian, and for some parts an orthonormal basis."
    def __init__(self, make, to):
        torch.manual_seed(0)
        net, shape = make()
        self.made = {}
        self.cnn = net.double()
        self.net = embed(self.cnn, shape, to=to)
        with torch.no_grad():
            for name, p in self.net.named_parameters():
                p.copy_(project(self.net, {name: p + .1*torch.randn_like(p)}, PARTS)[name])
        x, y = torch.randn(11, *shape, dtype=torch.float64), torch.randint(3, (11,))
        self.one, self.batches = [(x, y)], [(x[:7], y[:7]), (x[7:8], y[7:8]), (x[8:], y[8:])]
        self.like = dict(self.net.named_parameters())
        self.n = sum(p.numel() for p in self.like.values())
        self.net.eval()
        loss = lambda theta: F.cross_entropy(functional_call(self.net, self.vector(theta), (x,)), y)
        theta = self.flat(self.like)
        self.g, self.H = torch.func.grad(loss)(theta), torch.autograd.functional.hessian(loss, theta)
        self.net.train()

    def vector(self, flat):
        return {name: v.view_as(p)
                for (name, p), v in zip(self.like.items(), flat.split([p.numel() for p in self.like.values()]))}
    def flat(self, vector): return torch.cat([vector[name].detach().flatten() for name in self.like])

    def projection(self, parts):
        eye = torch.eye(self.n, dtype=torch.float64)
        if parts is None: return eye
        for p in PARTS:
            if p not in self.made:
                def one(name, t, i):
                    unit = torch.eye(1, t.numel(), dtype=t.dtype).roll(i).view_as(t)
                    return project(self.net, {name: unit}, p)[name].flatten()

                self.made[p] = torch.block_diag(*[torch.stack([one(name, t, i) for i in range(t.numel())])
                                                  for name, t in self.like.items()])
        return sum(self.made[p] for p in ([parts] if isinstance(parts, str) else parts))

    def spectrum(self, parts):
        value, basis = torch.linalg.eigh(self.projection(parts))
        basis = basis[:, value > .5]
        return torch.linalg.eigvalsh(basis.T @ self.H @ basis).numpy()


CASES = {f"{make.__name__}-{to}": (make, to)
         for make, to in [(plain, "fcn"), (plain, "lcn"), (deep, "fcn"), (deep, "lcn"), (noisy, "fcn")]}


@pytest.fixture(scope="module", params=CASES)
def case(request): return Case(*CASES[request.param])


@pytest.fixture(scope="module")
def small(): return Case(plain, "fcn")


def subsets(case):
    def size(parts): return dimensions(case.net).loc["all", [parts] if isinstance(parts, str) else list(parts)].sum()
    return [parts for parts in SUBSETS if parts is None or size(parts) > 3]


def close(a, b, eps): assert np.allclose(a, b, rtol=0, atol=eps), np.abs(np.asarray(a) - np.asarray(b)).max()


# Products

def test_gradient(case):
    for batches in (case.one, case.batches): close(case.flat(gradient(case.net, batches)), case.g, 1e-12)
    table = gradient_shares(case.net, case.batches)
    for part in PARTS:
        close(table.loc["all", part] * table.norm["all"]**2, (case.projection(part) @ case.g).square().sum(), 1e-12)


def test_product(case):
    v = torch.randn(case.n, dtype=torch.float64)
    for parts in SUBSETS:
        P = case.projection(parts)
        for batches in (case.one, case.batches):
            close(case.flat(hessian_product(case.net, batches, case.vector(v), parts)), P @ case.H @ P @ v, 1e-11)


def test_restrict_is_project_in_place(case):
    for parts in SUBSETS[1:]:
        v = case.vector(torch.randn(case.n, dtype=torch.float64))
        expected = case.flat(project(case.net, v, parts))
        for most in (1, 50, 2**20):
            own = {name: t.clone() for name, t in v.items()}
            assert curvature._restrict(case.net, own, parts, most) is own
            close(case.flat(own), expected, 1e-14)


def test_product_of_local_weights_in_chunks(monkeypatch):
    case = Case(deep, "lcn")
    v = case.vector(torch.randn(case.n, dtype=torch.float64))
    monkeypatch.setattr(layers, "CHUNK", 64)
    close(case.flat(hessian_product(case.net, case.batches, v)), case.H @ case.flat(v), 1e-11)


def test_product_agrees_with_curvlinops(case):
    curvlinops = pytest.importorskip("curvlinops")
    case.net.eval()
    operator = curvlinops.HessianLinearOperator(case.net, nn.CrossEntropyLoss(), list(case.net.parameters()),
                                                case.batches, num_data=11, check_deterministic=False)
    v = torch.randn(case.n, dtype=torch.float64)
    close(operator @ v, case.flat(hessian_product(case.net, case.batches, case.vector(v))), 1e-11)
    top = np.linalg.eigvalsh(np.asarray(operator @ torch.eye(case.n, dtype=torch.float64)))[-1]
    close(top_eigenvalues(case.net, case.batches, tol=1e-9)[0], top, 1e-9)
    case.net.train()


def test_frozen_parameters_count():
    case = Case(plain, "fcn")
    for p in case.net.parameters(): p.requires_grad_(False)
    close(case.flat(gradient(case.net, case.batches)), case.g, 1e-12)
    assert not any(p.requires_grad for p in case.net.parameters())


# Second derivatives that PyTorch has not, or has wrong

class Attention(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True) if kind == "module" else nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        if self.kind == "module": return self.head(self.inner(x, x, x, need_weights=False)[0].mean(1))
        q, k, v = self.inner(x).unflatten(-1, (6, 2)).transpose(1, 2).chunk(3, 1)
        if self.kind == "function": out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else: out = (q @ k.mT/2**.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1) @ v
        return self.head(out.transpose(1, 2).flatten(2).mean(1))


def transformer():
    return nn.Sequential(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), nn.Flatten(), nn.Linear(20, 3))


def dense_hessian(net, batches):
    "From gradients of gradients by attention's plain kernel, a column at a time."
    leaves = [p for p in net.parameters()]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = F.cross_entropy(net.eval()(batches[0][0]), batches[0][1])
        grads = torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves, create_graph=True)])
        rows = [torch.autograd.grad(e, leaves, retain_graph=True, materialize_grads=True) for e in grads]
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.mark.parametrize("make",
                         [lambda: Attention("module"), lambda: Attention("function"), lambda: Attention("plain"),
                          transformer],
                         ids=["module", "function", "plain", "transformer"])
def test_attention(make):
    "The kernel that can be differentiated twice is chosen for the product alone."
    net, batches = make().double(), [(torch.randn(5, 5, 4, dtype=torch.float64), torch.arange(5) % 3)]
    H, v = dense_hessian(net, batches), random_direction(net, seed=1)
    flat = torch.cat([x.flatten() for x in v.values()])
    close(torch.cat([x.flatten() for x in hessian_product(net, batches, v).values()]), H @ flat, 1e-9)
    close(top_eigenvalues(net, batches, tol=1e-9)[0], torch.linalg.eigvalsh(H)[-1], 1e-7)
    assert torch.backends.cuda.flash_sdp_enabled()


class Cut(torch.autograd.Function):
    "A cube whose backward pass is cut off from the graph, in one of several ways."
    @staticmethod
    def forward(ctx, x, way):
        ctx.way = way
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        if ctx.way == "detach": x = x.detach()
        # the value is right, its derivative 10 % off
        if ctx.way == "factor" and torch.is_grad_enabled(): x = x + .1*(x - x.detach())
        return 3*x**2*grad, None


class Once(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: ctx.save_for_backward(x) or x**3)
    backward = staticmethod(torch.autograd.function.once_differentiable(lambda ctx, g: 3*ctx.saved_tensors[0]**2*g))


class Of(nn.Module):
    "A function as a module."
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x): return self.f(x)


class Shifted(torch.autograd.Function):
    "Adds one number to all logits, of which the loss knows nothing; its second derivative is made up."
    forward = staticmethod(lambda ctx, x, c: ctx.save_for_backward(c) or x + c)

    @staticmethod
    def backward(ctx, grad):
        c, = ctx.saved_tensors
        return grad, c - c.detach()


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.ones(1))

    def forward(self, x): return Shifted.apply(x, self.by)


def cubed(way):
    return nn.Sequential(nn.Linear(4, 4), Of(Once.apply if way == "once" else lambda x: Cut.apply(x, way)),
                         nn.Linear(4, 3))


def normed(layer, after, old=False, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = (nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm)(layer, **kw)
    return nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(after, 3))


def with_empty_windows(*layers):
    "A network drawn such that for the images that are drawn next, some windows of its pooling hold zeros alone."
    torch.manual_seed(0)
    for layer in layers: getattr(layer, "reset_parameters", lambda: None)()
    return nn.Sequential(*layers)


WRONG = {
    "weight norm": (lambda: normed(nn.Linear(4, 6), 6), (4,),
                    "wrong in 0.parametrizations.weight.original1, "
                    "by .*fused kernel of weight_norm .*remove_parametrizations"),
    "weight norm by a hook": (lambda: normed(nn.Linear(4, 6), 6, old=True), (4,),
                              "0.weight_v, by .* remove_weight_norm"),
    "weight norm deep inside": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), normed(nn.Linear(4, 6), 6)), (4,),
                                "2.0.parametrizations.weight.original1"),
    "detached": (lambda: cubed("detach"), (4,), "wrong in 0.*, by .* cut off from the graph"),
    "a tenth off": (lambda: cubed("factor"), (4,), "wrong in 0.*, by"),
    "once differentiable": (lambda: cubed("once"), (4,), "cut off from the graph"),
    "a root at zero": (lambda: with_empty_windows(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.LPPool2d(2, 2), nn.Flatten(),
                                                  nn.Linear(12, 3)), (1, 5, 5),
                       "are not finite in 0.weight: a root or a power at zero has none"),
    "where there are none": (lambda: nn.Sequential(nn.Linear(4, 3), Shift()), (4,),
                             "wrong in 1.by, where differences of its gradients converge to zero; "
                             ".* cut off from the graph"),
    "none at all": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Hardsigmoid(), nn.Linear(4, 3)), (4,),
                    r"has none in PyTorch \(derivative for aten::hardsigmoid_backward is not implemented\); "
                    r"compute the same"),
    "compiled": (lambda: torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), backend="aot_eager"),
                 (4,), "has none in PyTorch .*; measure the network as it was before torch.compile"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrong_second_derivatives_are_refused(what, dtype):
    make, shape, sentence = WRONG[what]
    net, batches = make().to(dtype), [(torch.randn(6, *shape, dtype=dtype), torch.arange(6) % 3)]
    for call in (lambda: hessian_product(net, batches, random_direction(net)), lambda: top_eigenvalues(net, batches),
                 lambda: trace(net, batches, probes=1), lambda: spectral_density(net, batches, steps=2)):
        with pytest.raises(ValueError, match=sentence): call()
    gradient(net, batches)                                                        # first derivatives are right


def test_a_verdict_holds_for_what_the_network_consists_of():
    net, batches = normed(nn.Linear(4, 6), 6).double(), [(torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3)]
    nn.utils.parametrize.remove_parametrizations(net[0], "weight")
    trace(net, batches)
    nn.utils.parametrizations.weight_norm(net[0])
    with pytest.raises(ValueError, match="weight_norm"): trace(net, batches)


def kinked(act):
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), act, nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), act,
                         nn.Flatten(), nn.Linear(128, 3))


RIGHT = {act.__name__: (lambda act=act: kinked(act()))
         for act in (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.Hardswish, nn.PReLU, nn.Hardshrink)} | {
    "all zero": lambda: kinked(nn.ReLU()),
    "wide": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 800), nn.ReLU(), nn.Linear(800, 400), nn.ReLU(),
                                  nn.Linear(400, 3)),
    "steep": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), Of(lambda x: 1e3*x), nn.Linear(20, 3)),
    "dead": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.Threshold(1e6, 0.), nn.Linear(9, 3)),
    "released": lambda: embed(kinked(nn.ReLU()), (1, 8, 8)),
    "normalised": lambda: nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.GroupNorm(2, 6),
                                        nn.Flatten(), nn.LayerNorm(216), nn.Linear(216, 3)),
    "spectral norm": lambda: nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(64, 5)),
                                           nn.ReLU(), nn.Linear(5, 3)),
    "noise": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 9), Of(lambda x: x + .1*torch.randn_like(x)),
                                   nn.Linear(9, 3)),
    "rounded": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 9), Of(lambda x: x.bfloat16().to(x)), nn.ReLU(),
                                     nn.Linear(9, 3)),
    "straight through": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 9),
                                              Of(lambda x: x + ((4*x).round()/4 - x).detach()), nn.Linear(9, 3)),
    "in float32 alone": lambda: nn.Sequential(nn.Flatten(), Of(lambda x: x.float()), nn.Linear(64, 9), nn.ReLU(),
                                              nn.Linear(9, 3)).float(),
    "for six images alone": lambda: nn.Sequential(Of(lambda x: x.view(6, 64)), nn.Linear(64, 9), nn.Tanh(),
                                                  nn.Linear(9, 3)),
}


@pytest.mark.parametrize("what", RIGHT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_said_of_right_ones(what, dtype):
    "Kinks, zeros on kinks, saturated and dead units, noise, rounding, and networks that cannot be compared."
    for seed in range(2):
        torch.manual_seed(seed)
        net = RIGHT[what]().to(torch.float32 if what == "in float32 alone" else dtype)
        x, y = torch.randn(6, 1, 8, 8, dtype=dtype)*(what != "all zero"), torch.arange(6) % 3
        if what == "all zero": [nn.init.zeros_(p) for name, p in net.named_parameters() if name.endswith("bias")]
        state, before = torch.get_rng_state(), {k: v.clone() for k, v in net.state_dict().items()}
        curvature._check_second(net, [(x, y)])
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        trace(net, [(x, y)], probes=1)


def shared_module():
    act = nn.PReLU()
    return nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 3))


def shared_weight():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    net[2].weight = net[0].weight
    return net


def shared_buffer():
    norm = nn.BatchNorm1d(4)
    norm.running_mean.fill_(.3)
    return nn.Sequential(nn.Linear(4, 4), norm, nn.Tanh(), nn.Linear(4, 4), norm, nn.Linear(4, 3))


def shared_twice():
    block = nn.Sequential(nn.Linear(4, 4), nn.PReLU())
    return nn.ModuleDict(dict(a=block, b=nn.Sequential(block, block, nn.Linear(4, 3))))["b"]


@pytest.mark.parametrize("make", [shared_module, shared_weight, shared_buffer, shared_twice])
def test_what_is_shared_counts_once_and_stays(make):
    net, batches = make().double(), [(torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3)]
    before, own = copy.deepcopy(net.state_dict()), [*net.parameters()]
    H, v = dense_hessian(net, batches), random_direction(net)
    close(torch.cat([x.flatten() for x in hessian_product(net, batches, v).values()]),
          H @ torch.cat([x.flatten() for x in v.values()]), 1e-9)
    close(top_eigenvalues(net, batches, tol=1e-9)[0], torch.linalg.eigvalsh(H)[-1], 1e-7)
    curvature._losses_along(net, batches, [[(1., v)]])
    assert all(torch.equal(x, before[k]) for k, x in net.state_dict().items())
    assert all(p is q for p, q in zip(net.parameters(), own, strict=True))


def test_large_vectors_are_compared_by_sums():
    """Groups with signs: as long as the vector on average, the same in every call, whatever the layout.

    A gradient whose rows add up to zero does not vanish.
    """
    v = torch.randn(7, 9000, dtype=torch.float64)
    v -= v.mean(0)
    one, two = (curvature._sketch({"a": x}, most=5000)["a"] for x in (v, v.T.contiguous().T))
    assert torch.equal(one, two) and one.shape == (256,) and .8 < one.norm()/v.norm() < 1.2
    assert torch.equal(curvature._sketch({"a": v})["a"], v)
    name, off = curvature._furthest({"a": one, "b": 1.1*v}, {"a": one, "b": v}, .02, 1e-5)
    assert name == "b" and off == pytest.approx(.1, rel=1e-3)
    assert curvature._furthest({"a": one}, {"a": one}, .02, 0)[0] is None
    assert curvature._furthest({"a": torch.full_like(v, torch.nan)}, {"a": v}, .02, 0)[0] == "a"


# Spectra

@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_eigenvalues(case, which):
    for parts in subsets(case)[::2]:
        expected = case.spectrum(parts)
        # zero may be there many times, and Lanczos sees only one of equal eigenvalues
        k = 2 if which == "largest" else 1
        values, vectors = top_eigenvalues(case.net, case.one, k, parts, which, vectors=True, tol=1e-8)
        close(values, expected[::-1][:k] if which == "largest" else expected[:k], 1e-7)
        for value, vector in zip(values, vectors):
            d = case.flat(vector)
            close(d.norm(), 1, 1e-10)
            close(case.projection(parts) @ d, d, 1e-7)
            close(d @ case.H @ d, value, 1e-7)


def linear(): return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(18, 3)), (1, 4, 4)


def test_smallest_of_a_positive_restriction_is_not_the_zero_of_other_parts():
    "Without units in between the loss is convex in the kernels."
    case = Case(linear, "fcn")
    expected = case.spectrum("convolutional")
    assert expected[0] > 1e-5
    for tol in (1e-4, 1e-10):
        close(top_eigenvalues(case.net, case.batches, 1, "convolutional", "smallest", tol=tol)[0], expected[0], 1e-7)
    close(top_eigenvalues(case.net, case.batches, 9, "convolutional", "smallest", tol=1e-10)[0], expected[:9], 1e-7)
    close(top_eigenvalues(case.net, case.batches, 2, "convolutional", tol=1e-10, basis=5)[0], expected[:-3:-1], 1e-7)


def test_largest_of_a_negative_restriction(monkeypatch):
    "The same with the sign of the loss turned."
    case = Case(linear, "fcn")
    real = curvature._hessian_vector
    monkeypatch.setattr(curvature, "_hessian_vector", lambda *args: {name: -v for name, v in real(*args).items()})
    found = top_eigenvalues(case.net, case.batches, 1, "convolutional", tol=1e-10)[0]
    close(found, -case.spectrum("convolutional")[0], 1e-7)


def test_float32_and_images_of_another_type(small):
    net = embed(small.cnn, (1, 4, 4)).float()
    values, vectors = top_eigenvalues(net, small.batches, 1, "off_local", vectors=True)
    assert vectors[0]["0.weight"].dtype == torch.float32
    close(values, top_eigenvalues(embed(small.cnn, (1, 4, 4)), small.batches, 1, "off_local")[0], 1e-4)


def test_density_of_one_start_has_its_moments_beyond_orthogonality(small):
    "Many more steps than eigenvalues that differ: ghosts, and still the right measure."
    table = spectral_density(small.net, small.one, steps=1000, probes=1, seed=3)
    v = small.flat(random_direction(small.net, seed=3))
    for power in (1, 2, 5):
        close((table.node**power * table.weight).sum(), v @ torch.linalg.matrix_power(small.H, power) @ v, 1e-9)


# Why it leaves


def test_no_minimum_is_told(small):
    with pytest.raises(RuntimeError, match="after 1 steps the norm of the gradient"):
        minimise(copy.deepcopy(small.net), small.batches, steps=1)


def test_split_unit_without_bias():
    first, second = nn.Linear(3, 2, bias=False), nn.Linear(2, 4)
    a, b = split_unit(first, second, 1, .3)
    x = torch.randn(5, 3)
    close(b(a(x).relu()).detach(), second(first(x).relu()).detach(), 1e-6)
    assert a.bias is None and a.weight.shape == (3, 3) and b.weight.shape == (4, 3)


# Lines and planes

def test_sharpness_has_all_rows_and_dense_curvatures(small):
    table = sharpness(small.net, small.batches, tol=1e-8).set_index(["direction", "part"])
    assert len(table) == 15
    for part in ("whole", *PARTS):
        P = small.projection(None if part == "whole" else part)
        g = P @ small.g
        close(table.curvature["gradient", part], g @ small.H @ g / (g @ g), 1e-10)
        close(table.slope["gradient", part], g.norm(), 1e-10)
        close(table.curvature["eigenvector", part], small.spectrum(None if part == "whole" else part)[-1], 1e-7)
    assert "off_local" not in sharpness(Case(plain, "lcn").net, small.batches, tol=1e-2).part.values


def test_nothing_is_changed():
    case = Case(noisy, "fcn")
    net, batches = case.net, case.batches
    net[3].eval()                                                                 # flags of their own
    before, flags = {k: v.clone() for k, v in net.state_dict().items()}, [m.training for m in net.modules()]
    d = gradient(net, batches)
    kept = {k: v.clone() for k, v in d.items()}
    other = random_direction(net)
    hessian_product(net, batches, d, "unshared")
    top_eigenvalues(net, batches, vectors=True)
    trace(net, batches, probes=1)
    spectral_density(net, batches, steps=3, probes=1)
    loss_line(net, batches, d, [.1, -.1])
    loss_slice(net, batches, d, other, .1, 2)
    sharpness(net, batches, tol=.1)
    gradient_shares(net, batches)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(v, kept[k]) for k, v in d.items())
    assert flags == [m.training for m in net.modules()]
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    with pytest.raises(Exception): gradient(net, [(torch.randn(2, 5, 5), torch.zeros(2, dtype=torch.long))])
    assert flags == [m.training for m in net.modules()]


# What it refuses

def zeros(case): return {name: torch.zeros_like(p) for name, p in case.like.items()}


REFUSED = {
    "no batches": (lambda c: gradient(c.net, []), "at least one sample"),
    "empty batch": (lambda c: gradient(c.net, [(torch.zeros(0, 1, 4, 4), torch.zeros(0).long())]),
                    "at least one sample"),
    "a generator": (lambda c: trace(c.net, iter(c.batches)), "must be a list of"),
    "a CNN": (lambda c: gradient_shares(c.cnn, c.batches), "embed a CNN first"),
    "parts of a CNN": (lambda c: trace(c.cnn, c.batches, "other"), "embed a CNN first"),
    "half precision": (lambda c: gradient(embed(c.cnn, (1, 4, 4)).bfloat16(), c.batches), "float32 or all in float64"),
    "no parameters": (lambda c: gradient(nn.Flatten(), c.batches), "parameters are none"),
    "unknown part": (lambda c: top_eigenvalues(c.net, c.batches, parts="local"), "parts must be some of"),
    "no part": (lambda c: spectral_density(c.net, c.batches, parts=()), "parts must be some of"),
    "empty part": (lambda c: trace(embed(c.cnn, (1, 4, 4), to="lcn"), c.batches, "off_local"),
                   "no directions in the part off_local"),
    "names": (lambda c: hessian_product(c.net, c.batches, {}), "see '0.bias'"),
    "shapes": (lambda c: hessian_product(c.net, c.batches, zeros(c) | {"0.bias": torch.zeros(1)}), "see '0.bias'"),
    "k": (lambda c: top_eigenvalues(c.net, c.batches, c.n), "k must lie between 1 and"),
    "k of a part": (lambda c: top_eigenvalues(c.net, c.batches, 10, "convolutional"), "between 1 and 9"),
    "k 0": (lambda c: top_eigenvalues(c.net, c.batches, 0), "k must lie between"),
    "which": (lambda c: top_eigenvalues(c.net, c.batches, which="LM"), "'largest' or 'smallest'"),
    "basis": (lambda c: top_eigenvalues(c.net, c.batches, 3, basis=3), "more than 3"),
    "probes": (lambda c: trace(c.net, c.batches, probes=0), "must be a whole number, 1 or more"),
    "steps": (lambda c: spectral_density(c.net, c.batches, steps=0), "must be a whole number, 1 or more"),
    "width": (lambda c: smooth_density(spectral_density(c.net, c.batches, steps=2), [0.], -1),
              "width must be a positive number"),
    "no length": (lambda c: loss_line(c.net, c.batches, zeros(c), [0.]), "finite norm above zero"),
    "parallel": (lambda c: loss_slice(c.net, c.batches, gradient(c.net, c.one), gradient(c.net, c.one), .1),
                 "parallel"),
    "points": (lambda c: loss_slice(c.net, c.batches, gradient(c.net, c.one), random_direction(c.net), .1, 1),
               "points must be a whole number, 2 or more, not 1"),
    "slice radius": (lambda c: loss_slice(c.net, c.batches, gradient(c.net, c.one), random_direction(c.net), 0),
                     "radius must be a positive number, not 0"),
    "radius": (lambda c: sharpness(c.net, c.batches, radius=-1), "radius must be a positive number"),
    "float32": (lambda c: minimise(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), c.batches), r"call \.double\(\)"),
    "unit": (lambda c: split_unit(nn.Linear(3, 2), nn.Linear(2, 1), 2), "units 0 to 1"),
    "negative unit": (lambda c: split_unit(nn.Linear(3, 2), nn.Linear(2, 1), -1), "units 0 to 1"),
    "layers": (lambda c: split_unit(nn.Linear(3, 2), nn.Linear(3, 1), 0), "give two that follow"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(small, what):
    call, sentence = REFUSED[what]
    with pytest.raises(ValueError, match=sentence): call(small)


def test_one_probe_has_no_error(small): assert np.isnan(trace(small.net, small.batches, probes=1)[1])


def test_no_convergence_is_told(small):
    with pytest.raises(RuntimeError, match="ARPACK did not find 5 largest eigenvalues"):
        top_eigenvalues(small.net, small.batches, 5, tol=1e-15, restarts=1)


# Memory

MEASURE = """
import re, sys, torch
from torch import nn
from efcn_nb.instruments import curvature
from efcn_nb.ladder.embedding import embed
torch.set_num_threads(1)

def case(channels, size):
    "A network of one big matrix, with two small batches."
    cnn = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.Tanh(), nn.AvgPool2d(size//2), nn.Flatten(),
                        nn.Linear(4*channels, 3))
    net = embed(cnn, (1, size, size))
    return net, [(torch.randn(4, 1, size, size), torch.randint(3, (4,))) for _ in range(2)]

parts = ("unshared", "off_local") if sys.argv[2] == "parts" else None
call = dict(density=lambda net, batches: curvature.spectral_density(net, batches, parts, steps=5, probes=1),
            top=lambda net, batches: curvature.top_eigenvalues(net, batches, 1, parts, tol=.5))[sys.argv[1]]
call(*case(1, 4))                                                 # libraries take their memory now
net, batches = case(8, 32)
def kib(name):                                                    # not ru_maxrss: a child inherits its parent's
    with open("/proc/self/status") as f: return int(re.search(name + r":\\s+(\\d+)", f.read())[1])
before = kib("VmRSS")
call(net, batches)
print((kib("VmHWM") - before)*1024 / sum(p.numel()*4 for p in net.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("what, most, where", [("density", 8, "parts"), ("top", 17, "whole")])
def test_memory(what, most, where):
    "Peak beyond the network itself, in vectors of its size (8.4 million weights)."
    said = keep.in_child(keep.printed, MEASURE, what, where)
    print(what, where, said)
    assert float(said) < most
