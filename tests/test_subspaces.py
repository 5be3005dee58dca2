"The instruments of subspaces and measures against plain loops and dense algebra."
import copy
import math

import pytest
import torch
from torch import nn

from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import tiny
from nets import rand
from efcn_nb.materials.data import Data, load_data
from efcn_nb.ladder.matrices import release
from efcn_nb.ladder.embedding import embed, reinitialize
from efcn_nb.ladder.geometry import ConvGeometry
from efcn_nb.instruments.curvature import gradient, loss_line, random_direction
from efcn_nb.instruments.subspaces import (
    PARTS, ablate, ablation, bias_spread, dimensions, off_local_nulls, off_local_rows, project, radial_profile,
    read_out_afresh, residuals, shares, split, squares, template_similarity)

pytestmark = pytest.mark.filterwarnings("ignore:Complex modules are a new feature")


CONVS = {
    "plain": nn.Conv2d(2, 3, 3, padding=1),
    "strided": nn.Conv2d(2, 2, (3, 2), stride=2, padding=(0, 2), dilation=(1, 2)),
    "grouped": nn.Conv2d(4, 4, 3, groups=2),
    "reflect": nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"),
    "circular": nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
    "transposed": nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1), "1-d": nn.Conv1d(2, 3, 4, padding=3),
    "3-d": nn.Conv3d(1, 2, 2),
}
CASES = pytest.mark.parametrize("name", CONVS)


def layer(name, seed=0, to="fcn"):
    "A released layer in float64 with random weights."
    torch.manual_seed(seed)
    conv = copy.deepcopy(CONVS[name]).double()
    found = release(conv, ConvGeometry.from_conv(conv, (5, 6, 4)[:len(conv.kernel_size)]), to)
    found.reset_parameters()
    return found


def net(seed=0):
    torch.manual_seed(seed)
    cnn = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 2, 3, stride=2), nn.Flatten(),
                        nn.Linear(2*7*7, 10)).double()
    return reinitialize(embed(cnn, (1, 16, 16)), seed)


@CASES
def test_a_profile_against_a_loop(name):
    m, found = layer(name), {}
    g = m.geometry
    mask, sizes = g.mask, g.input_size
    read = [[{p for p in row if p >= 0} for row in table.tolist()] for table in g.axes]
    for unit in range(g.matrix_shape[0]):
        i = unit % math.prod(g.output_size)
        at = torch.unravel_index(torch.tensor(i), g.output_size)
        for pixel in range(g.matrix_shape[1]):
            p = torch.unravel_index(torch.tensor(pixel % math.prod(sizes)), sizes)
            distance = max(min((abs(int(x) - q) for q in read[axis][int(at[axis])]), default=2**31)
                           for axis, x in enumerate(p))
            found.setdefault((bool(mask[unit, pixel]), distance), []).append(m.weight[unit, pixel].item()**2)
    profile = radial_profile(m).set_index(["local", "distance"])
    assert set(profile.index) == set(found)
    for key, values in found.items():
        assert profile.entries[key] == len(values)
        assert math.isclose(profile.mean_square[key], sum(values)/len(values), rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(profile.share.sum(), 1)


@pytest.mark.parametrize("parts", [[], "local", ["convolutional", "conv"]])
def test_parts_that_there_are_not(parts):
    with pytest.raises(ValueError, match="parts must be some of convolutional, unshared, off_local, other"):
        project(net(), {}, parts)
    with pytest.raises(ValueError, match="parts must be some of"): ablate(net(), parts)


def test_ablation_leaves_the_network_alone_and_evaluates_what_is_left():
    model, data = net(), tiny.DATA.test
    before = copy.deepcopy(model.state_dict())
    table = ablation(model.float(), data).set_index("kept")
    assert all(torch.equal(p, q.float()) for p, q in zip(model.state_dict().values(), before.values()))
    x, y = data.batch(range(len(data)))
    for kept, row in table.iterrows():
        with torch.no_grad(): right = (ablate(model, kept.split(" + "))(x).argmax(1) == y).float().mean()
        assert math.isclose(row.accuracy, right, abs_tol=1e-6)
    without = ablate(model, "convolutional")
    assert shares(without).loc["all", "convolutional"] > 1 - 1e-6 and (bias_spread(without).spread < 1e-7).all()


class Twice(nn.Module):
    "Two convolutions with one kernel, and a linear layer."
    def __init__(self):
        super().__init__()
        self.first, self.again = (nn.Conv2d(1, 1, 3, padding=1) for _ in range(2))
        self.again.weight, self.head = self.first.weight, nn.Linear(256, 10)

    def forward(self, x): return self.head(torch.relu(self.again(torch.relu(self.first(x)))).flatten(1))


def test_noise_is_put_into_a_shared_weight_once():
    efcn = embed(Twice(), (1, 16, 16))
    with torch.no_grad(): efcn.first.weight.add_(.1*rand(*efcn.first.weight.shape).float())
    before, nulls = efcn.first.weight.clone(), off_local_nulls(efcn, seed=1)
    alone, less = (nulls[name].first.weight for name in ("off_local noise", "all less noise"))
    assert nulls["all less noise"].again.weight is less and torch.equal(efcn.first.weight, before)
    torch.testing.assert_close(before - less, alone, atol=1e-6, rtol=0)
    own = split(before, efcn.first.geometry)["off_local"].norm()
    torch.testing.assert_close(alone.norm(), own, atol=0, rtol=1e-5)
    assert not alone[efcn.first.geometry.mask].any()


def test_a_fresh_read_out_reads_what_reaches_the_last_linear_layer():
    "Here these are the pixels, whatever the read-out was; without such a layer nothing is read."
    train, data = tiny.DATA.train.thinned(60), tiny.DATA.test.thinned(40)
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    with torch.no_grad(): model[1].weight.zero_()
    flat = [part.batch(range(len(part)))[0].flatten(1).numpy() for part in (train, data)]
    fit = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(flat[0], train.y)
    assert read_out_afresh(model, train, data, batch_size=7) == fit.score(flat[1], data.y)
    assert read_out_afresh(model, train, train) == fit.score(flat[0], train.y) > .9
    assert math.isnan(read_out_afresh(nn.Sequential(nn.Conv2d(1, 10, 16), nn.Flatten()), train, data))


def test_templates_against_a_loop():
    data = load_data("digits").train.thinned(60)
    m = net()[0].float()
    units = [3, 200, 301]
    found = template_similarity(m, data, units, batch_size=17)
    x, y = data.batch(range(len(data)))
    x, (rows, outside) = x - x.mean(0), off_local_rows(m, units)
    means = {c: x[y == c].mean(0) for c in y.unique().tolist()}
    cosine = lambda a, b: (a*b).sum() / (a.norm()*b.norm())
    for i in range(3):
        by_image = torch.stack([cosine(rows[i], image*outside[i]) for image in x])
        by_class = {c: cosine(rows[i], mean*outside[i]) for c, mean in means.items()}
        best = max(by_class, key=lambda c: abs(by_class[c]))
        assert found.image[i] == by_image.abs().argmax()
        assert math.isclose(found.image_similarity[i], by_image[found.image[i]], abs_tol=1e-5)
        assert found.class_name[i] == data.classes[best]
        assert math.isclose(found.class_similarity[i], by_class[best], abs_tol=1e-5)


def test_thinned_keeps_classes_in_proportion():
    sorted_by_class = Data(*(tiny.DATA))._replace(train=load_data("digits").train).train
    order = sorted_by_class.y.argsort(stable=True)
    sorted_by_class = type(sorted_by_class)(sorted_by_class.x[order], sorted_by_class.y[order], sorted_by_class.classes,
                                            sorted_by_class.mean, sorted_by_class.std, "sorted")
    assert sorted_by_class.thinned(100).y.bincount().min() >= 8


def test_tied_layers_count_once():
    torch.manual_seed(0)
    a, b = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
    b.weight, b.bias = a.weight, a.bias
    model = embed(nn.Sequential(a, nn.ReLU(), b, nn.Flatten(), nn.Linear(32, 3)), (2, 4, 4))
    assert dimensions(model).loc["all"].sum() == sum(p.numel() for p in model.parameters())
    assert math.isclose(shares(model).loc["all", "norm"], model[0].weight.norm(), rel_tol=1e-6)


def test_empty_slots_are_no_part():
    for conv in (nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)):
        m = embed(conv, (conv.in_channels, 16, 16), to="lcn")
        before = squares(m)
        with torch.no_grad(): m.weight.add_(7*(m.geometry.reads < 0)[:, None, :, None])
        assert squares(m) == before


@pytest.mark.parametrize("wrong, words", [
    (lambda m: off_local_rows(m, 5), "units must be a list of some of 0 to 511"),
    (lambda m: off_local_rows(m, [.5]), "units must be a list"),
    (lambda m: off_local_rows(embed(nn.Conv2d(1, 2, 3), (1, 16, 16), to="lcn"), [1]),
     "need a fully-connected layer, not LocallyConnected"),
    (lambda m: project(net(), {"0.weight": torch.zeros(3)}, PARTS),
     r"has 0.weight of shape \(3,\), the network of shape"),
    (lambda m: project(net(), {"9.weight": torch.zeros(3)}, PARTS), "the network has no such parameter"),
    (lambda m: template_similarity(embed(nn.Conv2d(1, 2, 3), (1, 8, 8)), tiny.DATA.train), "take the first layer"),
    (lambda m: split(torch.zeros(3, 3), m.geometry), "the weight must be a matrix"),
    (lambda m: ablate(net(), "other"), "parts must be some of convolutional, unshared, off_local, not 'other'"),
    (lambda m: ablation(net(), tiny.DATA.test), "call .float"),
    (lambda m: template_similarity(m, tiny.DATA.train.thinned(1).__class__(tiny.DATA.train.x[:0], tiny.DATA.train.y[:0],
        tiny.DATA.train.classes, tiny.DATA.train.mean, tiny.DATA.train.std, "nothing")), "there must be images")])
def test_bad_input_gets_a_sentence(wrong, words):
    with pytest.raises(ValueError, match=words): wrong(net()[0])


def test_repeated_parts_count_once():
    model = net()
    vector = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    once, twice = project(model, vector, "unshared"), project(model, vector, ["unshared", "unshared"])
    assert all(torch.equal(once[name], twice[name]) for name in once)


# Complex weights: real and imaginary part together

def parts_of(m):
    "A layer with complex weights, and two with their real and imaginary parts."
    real, imaginary = (copy.deepcopy(m) for _ in range(2))
    whole = copy.deepcopy(m).to(torch.complex128)
    with torch.no_grad():
        for name, p in whole.named_parameters():
            x, y = torch.randn(2, *p.shape, dtype=torch.float64)
            p.copy_(torch.complex(x, y)), real.get_parameter(name).copy_(x), imaginary.get_parameter(name).copy_(y)
    return whole, real, imaginary


def close_sum(whole, a, b, power=2):
    assert all(math.isclose(w**power, p**power + q**power, rel_tol=1e-9, abs_tol=1e-12)
               for w, p, q in zip(whole, a, b, strict=True)), (whole, a, b)


INSTRUMENTS = {
    "squares": lambda m: [x**.5 for x in squares(m).values()], "norm": lambda m: shares(m)["norm"],
    "shares": lambda m: (shares(m).iloc[:, :3].mul(shares(m)["norm"]**2, axis=0)**.5).to_numpy().flatten(),
    "residuals": lambda m: residuals(m).to_numpy().flatten(),
    "biases": lambda m: bias_spread(m)[["mean", "spread"]].to_numpy().flatten(),
    "split": lambda m: [p.abs().square().sum().item()**.5 for p in split(m.weight, m.geometry).values()],
    "project": lambda m: [p.abs().square().sum().item()**.5 for part in ("convolutional", "unshared", "off_local")
                          for p in project(m, dict(m.named_parameters()), part).values()],
    "ablate": lambda m: [p.abs().square().sum().item()**.5 for p in ablate(m, "convolutional").parameters()],
    "profile": lambda m: radial_profile(m).mean_square**.5,
    "rows": lambda m: [off_local_rows(m, [0, 3])[0].abs().square().sum().item()**.5],
}


@pytest.mark.parametrize("what", INSTRUMENTS)
@pytest.mark.parametrize("to", ["fcn", "lcn"])
@CASES
def test_complex_weights_count_with_both_parts(what, to, name):
    "Every square is that of the real part plus that of the imaginary part, to the last kind of padding."
    if to == "lcn" and what in ("profile", "rows"): return
    whole, real, imaginary = parts_of(layer(name, to=to))
    close_sum(*map(INSTRUMENTS[what], (whole, real, imaginary)))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("to", ["fcn", "lcn"])
@pytest.mark.parametrize("size", [4, 32])
def test_a_complex_embedding_is_convolutional(dtype, to, size):
    "Small and in pieces, conjugated views too."
    net = embed(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, dtype=dtype)), (2, size, size), to)
    table, norm = shares(net), torch.linalg.vector_norm(net[0].weight.to(torch.complex128)).item()
    assert math.isclose(table.loc["all", "norm"], norm, rel_tol=1e-5)
    assert math.isclose(table.loc["all", "convolutional"], 1, rel_tol=1e-6) and (residuals(net) < 1e-5*norm).all().all()
    with torch.no_grad(): net[0].weight.data = net[0].weight.conj()
    assert math.isclose(shares(net).loc["all", "norm"], norm, rel_tol=1e-5)


class Moduli(nn.Module):
    def forward(self, x): return x.abs().flatten(1)


def complex_net():
    return embed(nn.Sequential(nn.Conv2d(1, 2, 3, dtype=torch.complex128), Moduli(), nn.Linear(392, 10).double()),
                 (1, 16, 16))


@pytest.mark.parametrize("wrong, words", [
    (lambda m: template_similarity(m[0], tiny.DATA.train),
     "templates are likened to real images, and this layer has complex weights"),
    (lambda m: gradient(m, [(torch.ones(2, 1, 16, 16), torch.tensor([0, 1]))]),
     "the parameters are torch.complex128 and torch.float64; curvature needs a network all in float32 or all "
     "in float64"),
    (lambda m: loss_line(m, [(torch.ones(2, 1, 16, 16), torch.tensor([0, 1]))], random_direction(m), [.1]),
     "curvature needs a network all in float32 or all in float64"),
    (lambda m: ablation(m, tiny.DATA.test), "call .float"),
])
def test_what_complex_weights_do_not_allow(wrong, words):
    with pytest.raises(ValueError, match=words): wrong(complex_net())


@pytest.mark.parametrize("parts", ["convolutional", ("unshared", "off_local"), "other"])
def test_a_complex_direction_has_length_one(parts):
    d = random_direction(complex_net(), parts)
    assert math.isclose(sum(x.abs().square().sum().item() for x in d.values()), 1, rel_tol=1e-9)
    assert d["0.weight"].imag.any() or parts == "other"
