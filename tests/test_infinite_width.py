"Kernels of infinitely wide networks, against full covariances and finite networks."
import math, sys

import numpy as np
import pytest
import torch

import keep
from efcn_nb.service.memory import use_little_memory
from efcn_nb.instruments.infinite_width import (
    Architecture, estimate_kernel, finite_network, gp_accuracies, gp_classify, gp_posterior, kernel_bytes,
    nngp_kernel, nngp_variances, relu_covariance)


KINDS = ("fcn", "cnn", "lcn")
pytestmark = pytest.mark.usefixtures("one_thread")


def images(n, shape=(2, 6, 5), seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Through a ReLU


def test_relu_covariance_at_its_ends():
    s = torch.tensor([1., 3., 0., 0.], dtype=torch.float64)
    t = torch.tensor([2., 3., 0., 5.], dtype=torch.float64)
    np.testing.assert_allclose(relu_covariance(s*t, s, t), s*t/2, rtol=1e-14)           # one and the same
    np.testing.assert_allclose(relu_covariance(-s*t, s, t), torch.zeros(4), atol=1e-14) # opposites
    beyond = relu_covariance(s*t*(1 + 1e-15), s, t)                                     # rounded past the end
    assert beyond.isfinite().all() and torch.allclose(beyond, s*t/2)
    c = s*t/3
    kept = c.clone()
    relu_covariance(c, s, t)
    assert torch.equal(c, kept), "the argument is left alone"


def test_near_the_diagonal_no_digits_are_lost():
    "1/2 - (1 - rho)/2 + O((1 - rho)^1.5): an arc cosine would be wrong in the eighth digit."
    gap = torch.tensor(1e-10, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    assert relu_covariance(one - gap, one, one).item() == pytest.approx(.5 - .5*gap.item(), abs=1e-15)


# The kernels


def by_covariances(arch, x, z):
    """The kernel from full covariances between all positions of both images, with explicit patches.

    `arch` has a tuple for each axis.
    """
    def patches(size):
        out = [(n + 2*p - k)//s + 1 for n, k, s, p in zip(size, arch.kernel_size, arch.stride, arch.padding)]
        def source(o, tap):
            at = [o_*s - p + t for o_, s, p, t in zip(o, arch.stride, arch.padding, tap)]
            return int(np.ravel_multi_index(at, size)) if all(0 <= a < n for a, n in zip(at, size)) else -1
        return np.array([[source(o, tap) for tap in np.ndindex(*arch.kernel_size)]
                         for o in np.ndindex(*out)]), tuple(out)
    def relu(c, s, t):
        st = np.sqrt(np.outer(s, t))
        angle = np.arccos(np.clip(c/st, -1, 1))
        return st*(np.sin(angle) + (np.pi - angle)*np.cos(angle))/(2*np.pi)
    K, v, b = np.empty((len(x), len(z))), arch.weight_variance, arch.bias_variance
    for i, j in np.ndindex(*K.shape):
        f, g, size = x[i].flatten(1).numpy(), z[j].flatten(1).numpy(), tuple(x.shape[2:])
        covariances = [p.T @ q/len(p) for p, q in ((f, g), (f, f), (g, g))]
        for _ in range(arch.depth):
            taps, size = patches(size)
            padded = [np.pad(c, ((0, 1), (0, 1))) for c in covariances]                 # place -1 is the zero outside
            c, s, t = (b + v*np.mean([p[np.ix_(tap, tap)] for tap in taps.T], 0) for p in padded)
            covariances = [relu(c, s.diagonal(), t.diagonal()), relu(s, s.diagonal(), s.diagonal()),
                           relu(t, t.diagonal(), t.diagonal())]
        K[i,j] = b + v*covariances[0].diagonal().mean()
    return K


@pytest.mark.parametrize("shape, kernel_size, stride, padding",
                         [((2, 9), (4,), (2,), (3,)), ((3, 5, 4), (3, 2), (2, 1), (2, 2)),
                          ((1, 6, 3), (5, 1), (1, 1), (2, 0)), ((2, 4, 3, 5), (3, 1, 2), (1, 2, 2), (1, 0, 1)),
                          ((2, 1, 1), (3, 3), (1, 1), (1, 1))])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_deep_kernels_by_full_covariances(shape, kernel_size, stride, padding, depth):
    arch = Architecture("cnn", depth, kernel_size, stride, padding, 1.7, .2)
    x, z = images(3, shape), images(2, shape, seed=1)
    np.testing.assert_allclose(nngp_kernel(arch, x, z, batch_size=2), by_covariances(arch, x, z), rtol=1e-12)
    np.testing.assert_allclose(nngp_variances(arch, x), by_covariances(arch, x, x).diagonal(), rtol=1e-7)


def test_numbers_of_numpy_will_do():
    x = images(3)
    arch = Architecture(depth=np.int64(2), kernel_size=np.int64(3), stride=[np.int64(2), 1])
    assert torch.equal(nngp_kernel(arch, x), nngp_kernel(Architecture(kernel_size=3, stride=(2, 1)), x))


def test_dense_kernel_is_the_recursion_on_dot_products():
    x, z = images(3), images(4, seed=1)
    arch = Architecture("fcn", 3, weight_variance=1.3, bias_variance=.4)
    a, b = x.flatten(1).numpy(), z.flatten(1).numpy()
    pixels = a.shape[1]
    c, s, t = a @ b.T/pixels, (a**2).mean(1)[:,None], (b**2).mean(1)[None]
    for _ in range(3):
        c, s, t = (.4 + 1.3*k for k in (c, s, t))
        angle = np.arccos(c/np.sqrt(s*t))
        c, s, t = np.sqrt(s*t)*(np.sin(angle) + (np.pi - angle)*np.cos(angle))/(2*np.pi), s/2, t/2
    np.testing.assert_allclose(nngp_kernel(arch, x, z), .4 + 1.3*c, rtol=1e-12)


@pytest.mark.parametrize("shape", [(2, 7), (1, 4, 6), (3, 3, 4, 2)], ids=["1d", "2d", "3d"])
def test_any_number_of_axes(shape):
    x = images(4, shape)
    K = nngp_kernel(Architecture("cnn"), x)
    assert torch.linalg.eigvalsh(K).min() > 0
    flipped = nngp_kernel(Architecture("cnn"), x.flip(-1))
    torch.testing.assert_close(flipped, K, rtol=1e-12, atol=0)  # a mirror keeps every patch


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 16, 35, 1000])
@pytest.mark.parametrize("kind", ["fcn", "cnn"])
def test_batches_change_nothing(kind, batch_size):
    x, z, arch = images(7), images(5, seed=1), Architecture(kind, stride=2)
    K = nngp_kernel(arch, x, batch_size=batch_size)
    assert torch.equal(K, K.T)
    torch.testing.assert_close(K, nngp_kernel(arch, x, x.clone()), rtol=1e-13, atol=0)
    torch.testing.assert_close(nngp_kernel(arch, x, z, batch_size), nngp_kernel(arch, torch.cat([x, z]))[:7,7:],
                               rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [0., .1])
def test_symmetric_positive_and_its_diagonal(kind, bias):
    x = images(6)
    x[0] = 0                                                    # an image of zeros has no direction
    x[1] = x[2]*3
    K = nngp_kernel(Architecture(kind, 3, bias_variance=bias), x)
    assert K.isfinite().all() and torch.linalg.eigvalsh(K).min() > -1e-12
    torch.testing.assert_close(nngp_variances(Architecture(kind, 3, bias_variance=bias), x), K.diagonal(), rtol=1e-12,
                               atol=1e-15)
    if not bias:                                                # without biases the kernel is homogeneous
        torch.testing.assert_close(K[1], 3*K[2], rtol=1e-12, atol=1e-15)
        assert not K[0].any()


# Finite networks

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options",
                         [dict(), dict(kernel_size=(2, 3), stride=(1, 2), padding=(1, 0), weight_variance=1.5,
                                       bias_variance=.5)],
                         ids=["plain", "odd"])
def test_finite_networks_of_one_layer_have_the_kernel_at_any_width(kind, options):
    "The mean over networks is exact at one hidden layer: 15 entries, each in standard errors."
    x, arch = images(5, (2, 4, 5)), Architecture(kind, 1, **options)
    for width in (3, 40):
        found, error = estimate_kernel(arch, x, width, networks=300, outputs=20)
        z = ((found - nngp_kernel(arch, x))/error)[torch.ones(5, 5).triu() > 0]
        assert z.abs().max() < 4.5 and error.max() < .1*found.max()


def test_finite_networks_are_what_they_say():
    cnn, lcn = (finite_network(Architecture(kind, 2, 3, 2, 1, bias_variance=.7), (1, 9, 9), width=50, outputs=3)
                for kind in ("cnn", "lcn"))
    assert [tuple(m.weight.shape) for m in cnn if hasattr(m, "weight")] == [(50, 1, 3, 3), (50, 50, 3, 3), (3, 50*9)]
    assert cnn[2].weight.square().mean().item() == pytest.approx(2/450, rel=.1)
    assert lcn[2].weight[4].square().mean().item() == pytest.approx(2/450, rel=.1)
    assert torch.cat([m.bias for m in lcn if hasattr(m, "bias")]).square().mean().item() == pytest.approx(.7, rel=.2)
    nothing = (lcn[0].geometry.reads < 0)[:,None,:,None].expand_as(lcn[0].weight)
    assert nothing.any() and not lcn[0].weight[nothing].any() and lcn[0].weight[~nothing].all()
    x = torch.randn(2, 1, 9, 9, dtype=torch.float64)
    assert cnn(x).shape == lcn(x).shape == (2, 3)
    before = torch.get_rng_state()
    again = finite_network(Architecture("cnn", 2, 3, 2, 1, bias_variance=.7), (1, 9, 9), width=50, outputs=3)
    assert torch.equal(again(x), cnn(x)) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(finite_network(Architecture(), (1, 9, 9), seed=1)(x),
                           finite_network(Architecture(), (1, 9, 9))(x))


def test_the_standard_error_is_that_of_independent_networks():
    "Half of the networks twice as many times: estimates scatter as the error says."
    x, arch = images(2, (1, 3, 3)), Architecture("fcn", 1)
    runs = [estimate_kernel(arch, x, 10, networks=40, outputs=5, seed=seed) for seed in range(40)]
    means, errors = (torch.stack(part)[:,0,1] for part in zip(*runs))
    assert means.std().item() == pytest.approx(errors.mean().item(), rel=.4)


# Memory

def peaks(batch_sizes):
    "Bytes that a kernel takes at the peak, and what the formula says, for each batch size in rising order."
    torch.set_num_threads(1)
    use_little_memory(2**16)
    kib = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
    arch, x = Architecture("cnn", 3), torch.rand(400, 1, 12, 12, dtype=torch.float64)
    nngp_kernel(arch, x[:20])
    found = []
    for batch_size in batch_sizes:
        before = kib("VmRSS")
        nngp_kernel(arch, x, batch_size=batch_size)
        found.append(((kib("VmHWM") - before)*1024, kernel_bytes(arch, (1, 12, 12), 400, batch_size=batch_size)))
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_memory_is_bounded_by_its_formula():
    "In a process of its own, by its own peak: a child's ru_maxrss would begin at its parent's."
    (small, said_small), (large, said_large) = keep.in_child(peaks, (512, 20_000))
    assert small < said_small + 4e6 and .7*said_large < large < 1.1*said_large + 4e6
    assert said_large - said_small == 8*3*144*(20_000 - 512), "three maps of a batch"


def test_formula():
    assert kernel_bytes(Architecture("fcn", 2), (1, 4, 4), 10, batch_size=5) == 8*(100 + 10*(32 + 3) + 3*5)
    found = kernel_bytes(Architecture("cnn", 2, stride=2), (1, 4, 4), 10, 20, batch_size=5)
    assert found == 8*(200 + 30*(32 + 16 + 4 + 1) + 3*16*5)
    found = kernel_bytes(Architecture("cnn"), (1, 4, 4), 2, batch_size=10**9)
    assert found == 8*(4 + 2*(32 + 3*16) + 3*16*4), "no more pairs than there are"


# Gaussian processes


def test_jitter_grows_until_the_factor_is_real():
    x = images(6)
    twice = torch.cat([x, x])                                     # singular
    K = nngp_kernel(Architecture(), twice)
    found = gp_posterior(K, K, torch.randn(12, 1), jitter=0.)
    assert 0 <= found.jitter < 1e-6 and found.mean.isfinite().all() and found.variance is None
    bent = K - .01*K.diagonal().mean()*torch.eye(12, dtype=torch.float64)
    assert .01 <= gp_posterior(bent, K, torch.randn(12, 1), jitter=1e-9).jitter < .2
    with pytest.raises(ValueError, match="not positive definite, even with a tenth"):
        gp_posterior(-K, K, torch.randn(12, 1))
    with pytest.raises(ValueError, match="not positive definite"): gp_posterior(K*math.nan, K, torch.randn(12, 1))


def test_classes():
    x = torch.cat([images(20) + 1, images(20, seed=1) - 1])
    y = torch.arange(40) // 20
    K, order = nngp_kernel(Architecture("fcn"), x), torch.randperm(40, generator=torch.Generator().manual_seed(0))
    a, b = order[:30], order[30:]
    assert torch.equal(gp_classify(K[a][:,a], K[b][:,a], y[a], 2), y[b])
    with pytest.raises(ValueError, match="classes run from 0 to 1: they must lie between 0 and 0"):
        gp_classify(K, K, y, 1)
    with pytest.raises(ValueError, match=r"do not fit: \(40, 40\), \(40, 39\), \(40, 2\)"):
        gp_classify(K, K[:,1:], y, 2)


def test_accuracies_of_splits_and_permutations():
    x, y = torch.cat([images(30) + .4, images(30, seed=1) - .4]), torch.arange(60) // 30
    table = gp_accuracies(x, y, dict(CNN=Architecture("cnn"), FCN=Architecture("fcn")), seeds=(0, 1, 2),
                          train=30, test=25)
    assert len(table) == 12 and table.accuracy.between(.5, 1).all() and table.train.eq(30).all()
    wide = table.pivot(index="seed", columns=["kernel", "pixels"], values="accuracy")
    assert wide["FCN"]["natural"].equals(wide["FCN"]["permuted"])
    assert table.equals(gp_accuracies(x, y, dict(CNN=Architecture("cnn"), FCN=Architecture("fcn")), seeds=(0, 1, 2),
                                      train=30, test=25, batch_size=9).assign(accuracy=table.accuracy))
    for train, test in [(0, 5), (5, 0), (40, 30)]:
        with pytest.raises(ValueError, match="one or more of each, and together no more than 60"):
            gp_accuracies(x, y, {}, train=train, test=test)


# What cannot be

@pytest.mark.parametrize("options, message", [
    (dict(kind="rnn"), "unknown architecture 'rnn'; known are fcn, cnn, lcn"),
    (dict(depth=0), "depth must be a whole number, 1 or more, not 0"),
    (dict(weight_variance=-1.), "weight_variance must be a number, 0 or more, not -1.0"),
    (dict(bias_variance=-.1), "bias_variance must be a number, 0 or more, not -0.1")])
def test_impossible_architectures(options, message):
    with pytest.raises(ValueError, match=message): Architecture(**options)


@pytest.mark.parametrize("options, message", [
    (dict(kernel_size=(3, 3, 3)), r"kernel_size is \(3, 3, 3\): it must be a whole number, 1 or more, or a tuple of 2"),
    (dict(kernel_size=0), "kernel_size is 0"),
    (dict(stride=0), "stride is 0"), (dict(stride=(1, 2, 1)), r"stride is \(1, 2, 1\)"),
    (dict(padding=-1), "padding is -1: it must be a whole number, 0 or more"),
    (dict(padding=(1,)), r"padding is \(1,\)"),
    (dict(padding="valid"), "padding is 'valid'"),
    (dict(kernel_size=(3, 4)), r"padding 'same' needs odd kernel sizes, not \(3, 4\); give the padding as numbers"),
    (dict(kernel_size=7, padding=0), "does not fit")])
def test_impossible_patches(options, message):
    for function in (nngp_kernel, nngp_variances):
        with pytest.raises(ValueError, match=message): function(Architecture(**options), images(2))
    with pytest.raises(ValueError, match=message): finite_network(Architecture(**options), (2, 6, 5))


def test_impossible_arguments():
    x = images(3)
    said = r"no kernel between images of shapes \(2, 6, 5\) and \(2, 5, 6\); bring them to one shape"
    with pytest.raises(ValueError, match=said):
        nngp_kernel(Architecture(), x, x.transpose(2, 3))
    with pytest.raises(ValueError, match="no kernel between images of shapes"):
        nngp_kernel(Architecture("fcn"), x, x.transpose(2, 3))
    for batch_size in (0, -3):
        with pytest.raises(ValueError, match=f"batch_size must be a whole number, 1 or more, not {batch_size}"):
            nngp_kernel(Architecture(), x, batch_size=batch_size)
    with pytest.raises(ValueError, match="one image or more, not"): nngp_kernel(Architecture(), x[:0])
    with pytest.raises(ValueError, match="one image or more, not"): nngp_kernel(Architecture(), x, x[:0])
    with pytest.raises(ValueError, match="one image or more, not"): nngp_variances(Architecture(), x.flatten(1))
    for width, outputs in [(0, 10), (5, 0)]:
        with pytest.raises(ValueError, match="(width|outputs) must be a whole number, 1 or more, not"):
            finite_network(Architecture(), (2, 6, 5), width, outputs)
    with pytest.raises(ValueError, match="networks must be a whole number, 2 or more, not 1"):
        estimate_kernel(Architecture(), x, networks=1)
    with pytest.raises(ValueError, match="jitter is -1: it must be from zero to a tenth"):
        gp_posterior(torch.eye(2), torch.eye(2), torch.ones(2, 1), jitter=-1)
    for jitter in (10., math.inf, math.nan):
        with pytest.raises(ValueError, match=f"jitter is {jitter}: it must be from zero to a tenth"):
            gp_posterior(torch.eye(2), torch.eye(2), torch.ones(2, 1), jitter=jitter)
    for variances in (torch.ones(2, 1), torch.ones(3)):
        with pytest.raises(ValueError, match="there must be 2 variances, one for each new image"):
            gp_posterior(torch.eye(2), torch.eye(2), torch.ones(2, 1), variances)
    with pytest.raises(ValueError, match="classes must be whole numbers, not torch.float32"):
        gp_classify(torch.eye(2), torch.eye(2), torch.tensor([0., 1.]), 2)
    assert gp_classify(torch.eye(2), torch.eye(2), torch.tensor([0, 1], dtype=torch.int32), 2).tolist() == [0, 1]
    with pytest.raises(ValueError, match="images must be finite numbers"): nngp_kernel(Architecture(), x, x*math.nan)
    with pytest.raises(ValueError, match="1, 2 or 3 axes beside their channels, not 4"):
        nngp_kernel(Architecture(), images(2, (1, 3, 3, 3, 3)))
    for shape in ((36,), (1, 3, 3, 3, 3)):
        with pytest.raises(ValueError, match=f"1, 2 or 3 axes beside their channels, not {len(shape) - 1}"):
            finite_network(Architecture(), shape)
    with pytest.raises(ValueError, match="3 images, but 2 classes"):
        gp_accuracies(x, torch.zeros(2).long(), {}, train=1, test=1)
