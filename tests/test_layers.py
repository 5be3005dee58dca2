"""Both released layers as PyTorch modules: saved, copied, compiled, distributed, differentiated, and in chunks."""
import copy
import io
import math
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from efcn_nb.ladder import layers
from efcn_nb.ladder.embedding import embed
from efcn_nb.ladder.geometry import ConvGeometry
from efcn_nb.ladder.layers import FullyConnected, LocallyConnected

pytestmark = pytest.mark.usefixtures("one_thread")  # threads only cost time on tensors as small as these

KINDS = {"fcn": FullyConnected, "lcn": LocallyConnected}
BOTH = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain(ci=2, co=4, size=(4, 5), kernel=(3, 2), stride=(1, 2), padding=((1, 1), (0, 1)), dilation=(1, 1), **kw):
    return ConvGeometry(ci, co, size, kernel, stride, padding, dilation, **kw)


GEOMETRIES = {
    "plain": plain(), "groups": plain(groups=2), "depthwise": plain(ci=4, groups=4),
    "reflect": plain(padding_mode="reflect"),
    "circular": plain(padding=((2, 2), (1, 0)), padding_mode="circular"),
    "replicate": plain(padding=((2, 2), (3, 3)), padding_mode="replicate", groups=2),
    "transposed": plain(transposed=True, stride=(2, 3), padding=((1, 1), (0, 0)), output_padding=(1, 0), groups=2),
    "line": plain(size=(7,), kernel=(3,), stride=(2,), padding=((1, 1),), dilation=(2,)),
    "volume": plain(size=(2, 3, 2), kernel=(2, 2, 1), stride=(1,)*3, padding=((1, 0), (1, 1), (0, 0)), dilation=(1,)*3),
    "outputs that read nothing": plain(transposed=True, kernel=(1, 1), stride=(3, 2), padding=((0, 0),)*2,
                                       output_padding=(2, 1))}
EVERY = pytest.mark.parametrize("g", GEOMETRIES.values(), ids=GEOMETRIES)


def drawn(kind, g=GEOMETRIES["groups"], dtype=torch.float64, seed=0, **kw):
    "A layer with weights of `seed`; the global random state is left alone."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(g, dtype=dtype, **kw)


def batch(layer, n=3, seed=1): return rand(n, *layer.in_shape, seed=seed).to(layer.weight.dtype)


def gradients(call, layer, x):
    "Output, and gradients of input and parameters, of one random functional of the output."
    x = x.clone().requires_grad_()
    out = call(x)
    return out.detach(), *torch.autograd.grad((out*rand(*out.shape, seed=2).to(out.dtype)).sum(),
                                              [x, *layer.parameters()])


def same(a, b, tolerance=1e-12):
    "Whether two tuples of tensors agree."
    return len(a) == len(b) and all(p.shape == q.shape and torch.allclose(p, q, rtol=tolerance, atol=tolerance)
                                    for p, q in zip(a, b))


# What they compute


def test_dense_layer_is_linear():
    layer = drawn(FullyConnected)
    x = batch(layer)
    assert torch.equal(layer(x).flatten(1), F.linear(x.flatten(1), layer.weight, layer.bias))
    assert layer(x).shape == (3, *layer.out_shape)


def test_padding_is_told_as_pytorch_tells_it():
    "One number an axis, or the word for what differs on the two sides of one of them."
    for name, padding in dict(plain="same", replicate=(2, 3)).items():
        for kind in KINDS.values(): assert kind(GEOMETRIES[name]).padding == padding


@BOTH
@EVERY
def test_unbatched_and_empty_batches(kind, g):
    layer = drawn(kind, g)
    x = batch(layer)
    assert torch.allclose(layer(x[1]), layer(x)[1], rtol=1e-12, atol=1e-12) and layer(x[1]).shape == layer.out_shape
    empty = x[:0].clone().requires_grad_()
    out = layer(empty)
    assert out.shape == (0, *layer.out_shape)
    out.sum().backward()
    assert empty.grad.shape == empty.shape and not layer.weight.grad.any() and not layer.bias.grad.any()


@BOTH
def test_inputs_in_any_memory_format(kind):
    layer = drawn(kind)
    x = batch(layer)
    for strided in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3),
                    x[:1].expand(3, -1, -1, -1)):
        assert same(gradients(layer, layer, strided), gradients(layer, layer, strided.contiguous()))


@BOTH
@pytest.mark.parametrize("bad", [(2, 4), (3, 2, 5, 5), (3, 1, 2, 4, 5), (3, 40)])
def test_other_inputs_are_refused(kind, bad):
    with pytest.raises(ValueError, match="embed the network again"): drawn(kind)(torch.zeros(bad, dtype=torch.float64))


@BOTH
def test_other_output_sizes_are_refused(kind):
    layer = drawn(kind)
    x, own = batch(layer), layer.out_shape[1:]
    for size in (None, own, list(own), torch.Size((3, *layer.out_shape))):
        assert torch.equal(layer(x, output_size=size), layer(x))
    with pytest.raises(ValueError, match="embed the network again"): layer(x, output_size=(9, 9))


# Chunks

def chunked(monkeypatch, layer, size=1):
    "Make the layer, and all others, take its patches in chunks; returns the list of the calls that did."
    monkeypatch.setattr(layers, "CHUNK", size)
    calls, right = [], layers._InChunks.apply
    monkeypatch.setattr(layers._InChunks, "apply", lambda *args: calls.append(args) or right(*args))
    return calls


@EVERY
@pytest.mark.parametrize("size", [1, 300, 2000])
@pytest.mark.parametrize("bias", [True, False])
def test_chunks_compute_the_same(monkeypatch, g, size, bias):
    layer = drawn(LocallyConnected, g, bias=bias)
    x = batch(layer, n=5)
    wanted = gradients(layer, layer, x)
    calls = chunked(monkeypatch, layer, size)
    assert same(gradients(layer, layer, x), wanted) and len(calls) == (5*layer.pixels.numel()*g.in_channels*8 > 2*size)
    empty = (g.reads < 0)[:, None, :, None].expand_as(layer.weight)
    assert not gradients(layer, layer, x)[2][empty].any()


def test_chunks_are_as_large_as_they_may_be(monkeypatch):
    layer = drawn(LocallyConnected, plain(size=(8, 8)))
    for size in 1, 500, 10_000, 10**9:
        monkeypatch.setattr(layers, "CHUNK", size)
        chunks = layers.chunks_of(layer.counts, 24)
        assert [(i, n) for a, b, n in chunks for i in range(a, b)] == list(enumerate(layer.counts))
        assert all(b - a == 1 or (b - a)*n*24 < size + n*24 for a, b, n in chunks)


def test_chunks_differentiate_only_what_is_asked(monkeypatch):
    layer = drawn(LocallyConnected)
    x, wanted = batch(layer), gradients(layer, layer, batch(layer))
    calls, upstream = chunked(monkeypatch, layer), rand(*wanted[0].shape, seed=2)
    (layer(x)*upstream).sum().backward()
    assert torch.allclose(layer.weight.grad, wanted[2], rtol=1e-12)
    layer.weight.requires_grad_(False)
    x.requires_grad_()
    (layer(x)*upstream).sum().backward()
    assert torch.allclose(x.grad, wanted[1], rtol=1e-12) and len(calls) == 2
    with torch.inference_mode(): assert torch.allclose(layer(x), wanted[0], rtol=1e-12)


def test_chunks_of_one_input(monkeypatch):
    layer = drawn(LocallyConnected)
    x = batch(layer)
    wanted = layer(x[0]), layer(x[:0])
    calls = chunked(monkeypatch, layer)
    assert same((layer(x[0]),), wanted[:1]) and layer(x[:0]).shape == wanted[1].shape and len(calls) == 1


@pytest.mark.parametrize("small", [False, True], ids=["plain", "in chunks"])
@pytest.mark.parametrize("name", ["plain", "groups", "replicate", "transposed"])
def test_gradcheck(monkeypatch, small, name):
    layer = drawn(LocallyConnected, GEOMETRIES[name])
    calls = chunked(monkeypatch, layer) if small else []
    call = lambda x, *values: torch.func.functional_call(layer, dict(zip(("weight", "bias"), values)), (x,))
    inputs = batch(layer, n=2).requires_grad_(), *layer.parameters()
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True) and bool(calls) == small
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("wrt", ["input", "weight", "both"])
def test_second_derivatives_of_chunks(monkeypatch, wrt):
    "The gradient of a gradient's norm, as in a gradient penalty, is the same with chunks."
    def penalty():
        x = batch(layer).requires_grad_()
        wanted = {"input": [x], "weight": [layer.weight], "both": [x, layer.weight]}[wrt]
        first = torch.autograd.grad(layer(x).pow(3).sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(f.square().sum() for f in first), [x, layer.weight])
    layer = drawn(LocallyConnected)
    wanted = penalty()
    calls = chunked(monkeypatch, layer)
    assert same(penalty(), wanted) and calls


def test_chunks_of_real_size():
    layer = drawn(LocallyConnected, plain(ci=32, co=4, size=(16, 16), stride=(1, 1), groups=2))
    x = batch(layer, n=24)
    assert 24*layer.pixels.numel()*32*8 > 2*layers.CHUNK and len(layers.chunks_of(layer.counts, 24*32*8)) > 8
    plainly = lambda x: (layers.position_product(x, layer.weight, layer.pixels, layer.geometry).flatten(1)
                         + layer.bias).unflatten(1, layer.out_shape)
    assert same(gradients(layer, layer, x), gradients(plainly, layer, x))
    assert "_InChunks" in graph_of(layer(x))


def graph_of(out):
    "Names of the first nodes of the graph behind `out`."
    names, node = "", out.grad_fn
    while node: names, node = names + node.name(), node.next_functions[0][0] if node.next_functions else None
    return names


def jvp_by_dual_numbers(layer, x):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(
            layer(torch.autograd.forward_ad.make_dual(x, rand(*x.shape, seed=4)))).tangent


def several_gradients_at_once(layer, x):
    x = x.clone().requires_grad_()
    out = layer(x)
    return torch.autograd.grad(out, [x, layer.weight, layer.bias], rand(4, *out.shape, seed=4),
                               is_grads_batched=True)[1]


OTHER_WAYS = {
    "dual numbers": jvp_by_dual_numbers, "batched gradients": several_gradients_at_once,
    "jacobian, vectorized": lambda layer, x: torch.autograd.functional.jacobian(layer, x, vectorize=True),
    "hessian": lambda layer, x: torch.autograd.functional.hessian(lambda x: layer(x).pow(3).sum(), x),
    "checkpoint": lambda layer, x: gradients(lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False),
                                             layer, x)[2],
    "trace": lambda layer, x: torch.jit.trace(layer, x)(x),
    "export": lambda layer, x: torch.export.export(layer, (x,)).module()(x)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", OTHER_WAYS.values(), ids=OTHER_WAYS)
def test_chunks_in_other_ways_to_differentiate(monkeypatch, way):
    layer = drawn(LocallyConnected)
    wanted = way(layer, batch(layer))
    monkeypatch.setattr(layers, "CHUNK", 1)
    assert torch.allclose(way(layer, batch(layer)), wanted, rtol=1e-10, atol=1e-10)


# As modules


def saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@BOTH
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved],
                         ids=["deepcopy", "pickle", "torch.save"])
def test_copies(monkeypatch, kind, copied):
    layer = drawn(kind)
    layer.bias.requires_grad_(False)
    other, x = copied(layer), batch(layer)
    assert torch.equal(other(x), layer(x)) and other.geometry == layer.geometry and repr(other) == repr(layer)
    assert [p.requires_grad for p in other.parameters()] == [True, False]
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in layer.parameters()}
    chunked(monkeypatch, layer)
    assert torch.allclose(other(x), layer(x))


@BOTH
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("small", [False, True], ids=["plain", "in chunks"])
def test_to_another_dtype(monkeypatch, kind, dtype, tolerance, small):
    layer = drawn(kind)
    x, other = batch(layer), copy.deepcopy(layer).to(dtype)
    if small: chunked(monkeypatch, layer)
    wanted, got = gradients(layer, layer, x), gradients(other, other, x.to(dtype))
    assert {t.dtype for t in got} == {dtype} and same([t.double() for t in got], wanted, tolerance)
    assert torch.equal(other.to(torch.float64).weight, layer.weight.to(dtype).double())
    if kind is LocallyConnected: assert other.pixels.dtype == torch.long


@BOTH
def test_on_the_meta_device(kind):
    layer = kind(GEOMETRIES["groups"], device="meta", dtype=torch.float64)
    x = torch.zeros(2, *layer.in_shape, device="meta", dtype=torch.float64)
    assert all(p.is_meta for p in layer.parameters()) and layer(x).shape == (2, *layer.out_shape)


@BOTH
def test_parameters_are_contiguous_leaves(kind):
    conv = nn.ConvTranspose2d(2, 4, 3, groups=2)
    for layer in drawn(kind), embed(conv, (2, 4, 5), next(name for name, k in KINDS.items() if k is kind)):
        assert all(isinstance(p, nn.Parameter) and p.is_leaf and p.is_contiguous() and p.grad is None
                   for p in layer.parameters())
        assert layer.weight.untyped_storage().nbytes() == layer.weight.numel()*layer.weight.element_size()


@BOTH
def test_repr(kind):
    layer = drawn(kind, GEOMETRIES["plain"])
    shape, times = tuple(layer.weight.shape), layer.weight.numel()/(4*2*3*2)
    assert repr(layer) == f"{kind.__name__}((2, 4, 5) -> (4, 4, 3), weight={shape}, bias=True, {times:.0f}x the kernel)"


@BOTH
def test_embedded_layers_can_be_shared_between_processes(kind):
    "Also large ones, whose memory the embedding asks for itself."
    with torch.random.fork_rng():
        layer = embed(nn.Conv2d(3, 16, 3, padding=1), (3, 32, 32), next(name for name, k in KINDS.items() if k is kind))
    x = rand(1, 3, 32, 32).float()
    before = layer(x).detach()
    layer.weight.share_memory_()
    layer.share_memory()
    assert all(p.is_shared() for p in layer.parameters()) and torch.equal(layer(x), before)
    assert torch.equal(saved(layer)(x), before)


@BOTH
@pytest.mark.parametrize("small", [False, True], ids=["plain", "in chunks"])
@pytest.mark.filterwarnings("ignore")
def test_compiled(monkeypatch, kind, small):
    torch._dynamo.reset()
    layer = drawn(kind)
    x, wanted = batch(layer), gradients(layer, layer, batch(layer))
    if small: monkeypatch.setattr(layers, "CHUNK", 1)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert same(gradients(compiled, layer, x), wanted) and torch.allclose(compiled(x[0]), wanted[0][0])
    with torch.no_grad(): assert torch.allclose(compiled(x), wanted[0])


@pytest.fixture
def one_process():
    "A process group of this process alone."
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@BOTH
@pytest.mark.parametrize("small", [False, True], ids=["plain", "in chunks"])
def test_distributed(monkeypatch, one_process, kind, small):
    model = nn.Sequential(drawn(kind), nn.ReLU(), nn.Flatten())
    x, into = batch(model[0]), rand(3, math.prod(model[0].out_shape))
    (model(x)*into).sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    if small: chunked(monkeypatch, model[0])
    parallel = nn.parallel.DistributedDataParallel(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (parallel(x)*into).sum().backward()
    assert same([p.grad for p in model.parameters()], wanted)


@BOTH
@pytest.mark.parametrize("small", [False, True], ids=["plain", "in chunks"])
def test_gradient_of_each_example(monkeypatch, kind, small):
    "torch.func.vmap(torch.func.grad) against one backward pass per example."
    layer = drawn(kind)
    x, values = batch(layer), {k: v.detach() for k, v in layer.named_parameters()}
    if small: chunked(monkeypatch, layer)
    loss = lambda values, x: torch.func.functional_call(layer, values, (x,)).square().sum()
    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    for i, one in enumerate(x):
        wanted = torch.autograd.grad(layer(one).square().sum(), list(layer.parameters()))
        assert same([got[k][i] for k in values], wanted)


@BOTH
@pytest.mark.parametrize("small", [False, True], ids=["plain", "in chunks"])
def test_derivatives_forward(monkeypatch, kind, small):
    "Forward mode gives what reverse mode gives."
    layer = drawn(kind)
    x, along = batch(layer), batch(layer, seed=5)
    wanted = layer(along) - layer(torch.zeros_like(x))
    if small: chunked(monkeypatch, layer)
    assert torch.allclose(torch.func.jvp(layer, (x,), (along,))[1], wanted, atol=1e-12)
    assert torch.func.jacrev(layer)(x[0]).shape == (*layer.out_shape, *layer.in_shape)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("small", [False, True], ids=["plain", "in chunks"])
def test_autocast(monkeypatch, kind, dtype, small):
    layer = drawn(kind, dtype=torch.float32)
    x, wanted = batch(layer), gradients(layer, layer, batch(layer))
    if small: chunked(monkeypatch, layer)
    def call(x):
        with torch.autocast("cpu", dtype=dtype): return layer(x)
    assert call(x).dtype == call(x[0]).dtype == dtype
    got = gradients(call, layer, x)
    assert {t.dtype for t in got[1:]} == {torch.float32}
    assert same([t.float() for t in got], wanted, 8e-2 if dtype == torch.bfloat16 else 1e-2)
    with torch.autocast("cpu", enabled=False): assert layer(x).dtype == torch.float32


@BOTH
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_what_is_frozen_gets_no_gradient(monkeypatch, kind, frozen):
    layer = drawn(kind)
    getattr(layer, frozen).requires_grad_(False)
    for small in (False, True):
        if small: chunked(monkeypatch, layer)
        layer.zero_grad()
        layer(batch(layer)).square().sum().backward()
        assert [name for name, p in layer.named_parameters() if p.grad is None] == [frozen]


@BOTH
def test_default_initialisation(kind):
    g = plain(ci=6, co=8, size=(9, 9), groups=2)
    layer = drawn(kind, g)
    fan_in = 6*81 if kind is FullyConnected else 3*6
    used = torch.cat([layer.weight[layer.weight != 0], layer.bias]).detach()
    assert float(used.abs().max()) <= fan_in**-.5 and math.isclose(float(used.std()), fan_in**-.5/3**.5, rel_tol=.05)
    if kind is FullyConnected:
        layer.reset_parameters("padded")
        assert float(layer.weight.detach().abs().max()) <= (6*11*10)**-.5
        with pytest.raises(ValueError, match="'folded' or 'padded'"): layer.reset_parameters("other")
