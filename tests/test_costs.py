"What embedding would cost is what it costs: sizes, products and trimming of networks that are really embedded."
import math

import pytest
import torch
from torch import nn

import nets
from efcn_nb.ladder.costs import embedding_costs, fits_in_memory, plot_costs
from efcn_nb.ladder.embedding import embed
from efcn_nb.ladder.inspection import conv_geometries
from nets import conv_of, over_cases, residual, shape_of


def released(model, shape, to, trim=False):
    "Weights, biases and bytes of what `embed` makes."
    made = embed(model, shape, to, trim=trim, check=False)
    layers = [m for m in made.modules() if isinstance(m, nets.RELEASED[to])]
    return ([m.weight.numel() for m in layers], [0 if m.bias is None else m.bias.numel() for m in layers],
            sum(p.numel()*p.element_size() for p in made.parameters()))


def as_costed(costs, to):
    rows = costs[costs.network == dict(lcn="elcn", fcn="efcn")[to]].set_index("layer")
    layers = rows.drop(index=["all", "other layers"])
    return layers.weights.tolist(), layers.biases.tolist(), rows.bytes["all"]


@over_cases(40)
def test_sizes_of_any_convolution(case):
    "Transposed, grouped, dilated, with any padding, over one, two or three axes."
    conv, x = case
    costs = embedding_costs(conv, shape_of(x))
    for to in nets.RELEASED: assert as_costed(costs, to) == released(conv, shape_of(x), to)


@over_cases(40)
def test_products_of_any_convolution(case):
    "Counted one by one: entries of the kernel at each position, pixels that are read, entries of the matrix."
    conv, x = case
    g, = conv_geometries(conv, shape_of(x)).values()
    found = embedding_costs(conv, shape_of(x)).query("layer == 'all'").set_index("network").multiply_adds
    positions = math.prod(g.input_size if g.transposed else g.output_size)
    local = (g.reads >= 0).sum().item()*g.out_channels*g.in_channels//g.groups
    assert found.to_dict() == dict(cnn=positions*conv.weight.numel(), elcn=local, efcn=math.prod(g.matrix_shape))


def pool(*layers, size=3, stride=2): return [nn.MaxPool2d(size, stride), *layers]


NETWORKS = {
    "unread rows and columns": ((1, 4, 6), lambda: [nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), *pool()]),
    "unread rows alone": ((2, 6, 5), lambda: [nn.Conv2d(2, 3, 3, padding=1), *pool(nn.Conv2d(3, 2, 2))]),
    "nothing unread": ((1, 5, 5), lambda: [nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), *pool()]),
    "a convolution that strides": ((1, 8, 8), lambda: [nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 1, stride=2)]),
    "a softmax": ((1, 8, 8), lambda: [nn.Conv2d(1, 2, 3), nn.MaxPool2d(5), nn.Flatten(), nn.Softmax(1)]),
    "dead units": ((1, 8, 8), lambda: [nn.Conv2d(1, 2, 3, padding=1), nn.Threshold(1e6, 0), nn.Conv2d(2, 2, 3)]),
    "written in place": ((1, 4, 5), lambda: [nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(inplace=True), *pool()]),
    "one axis": ((1, 8), lambda: [nn.Conv1d(1, 2, 3, padding=1), nn.MaxPool1d(3, 2)]),
    "three axes": ((1, 4, 5, 4), lambda: [nn.Conv3d(1, 2, 3, padding=1), nn.MaxPool3d(3, 2, padding=(1, 0, 1))]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_trimmed(name):
    "Although few convolutions are tried: what `conv_geometries` finds by trying all."
    shape, layers = NETWORKS[name]
    model = nets.made(lambda: nn.Sequential(*layers()))
    rows = embedding_costs(model, shape, trim=True).query("network == 'efcn' and layer not in ['all', 'other layers']")
    found = conv_geometries(model, shape, trim=True)
    assert dict(zip(rows.layer, rows.output)) == {layer: g.out_shape for layer, g in found.items()}


@nets.BOTH
def test_a_trimmed_network_that_is_embedded(to):
    shape, layers = NETWORKS["unread rows alone"]
    model = nets.made(lambda: nn.Sequential(*layers()))
    assert as_costed(embedding_costs(model, shape, trim=True), to) == released(model, shape, to, trim=True)


@nets.BOTH
def test_a_residual_network(residual, to):
    "A layer that is called twice counts once."
    assert as_costed(embedding_costs(residual, (2, 5, 5), trim=True), to) == released(residual, (2, 5, 5), to)


def test_tied_kernels_are_summed_once():
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1))
    model[1].weight = model[0].weight
    rows = embedding_costs(model, (1, 6, 6), trim=True).set_index(["network", "layer"])
    assert rows.weights["efcn"].tolist() == [36**2, 36**2, 0, 36**2]
    assert rows.multiply_adds["efcn", "all"] == 2*36**2
    assert rows.bytes["efcn", "all"] == sum(4*p.numel() for p in embed(model, (1, 6, 6)).parameters())


def test_some_layers_alone():
    "The others count as they are."
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(2*16, 3))
    rows = embedding_costs(model, (1, 8, 8), layers=["1"], trim=True).query("network == 'efcn'").set_index("layer")
    assert rows.index.tolist() == ["1", "other layers", "all"]
    made = embed(model, (1, 8, 8), layers=["1"])
    assert rows.weights["all"] + rows.biases["all"] == sum(p.numel() for p in made.parameters())
    assert (rows.training_bytes == 3*rows.bytes).all()


def test_on_the_device_meta_nothing_is_computed():
    def make(): return nn.Sequential(conv_of(2, 1, 2, 3, dtype=torch.float32), nn.Flatten(), nn.Linear(2*36, 3))
    with torch.device("meta"): model = make()
    assert embedding_costs(model, (1, 8, 8)).equals(embedding_costs(make(), (1, 8, 8)))
    with pytest.raises(ValueError, match="make it on the CPU"): embedding_costs(model, (1, 8, 8), trim=True)


def test_the_network_is_left_alone(residual):
    before, random_state = nets.frozen(residual), torch.get_rng_state()
    embedding_costs(residual, (2, 5, 5), trim=True)
    assert nets.unchanged(residual, before) and torch.equal(random_state, torch.get_rng_state())


@pytest.mark.parametrize("model, shape, says", [
    (nn.Linear(2, 2), (2,), "has no convolution"), (nn.Conv2d(3, 1, 3), (1, 8, 8), "does not fit the model"),
    (nets.OwnConv(1, 1, 3), (1, 8, 8), "may compute something else"), (3, (1, 8, 8), "must be a torch.nn.Module")])
def test_what_cannot_be_embedded_is_refused_in_the_same_words(model, shape, says):
    with pytest.raises(ValueError, match=says) as ours: embedding_costs(model, shape)
    with pytest.raises(ValueError) as theirs: embed(model, shape)
    assert str(ours.value) == str(theirs.value)


def test_fitting():
    costs = embedding_costs(nn.Conv2d(1, 2, 3), (1, 8, 8))
    most = costs.set_index(["layer", "network"]).bytes["all", "efcn"]
    fits = lambda free: fits_in_memory(costs, free=free).loc["efcn"].tolist()
    assert [fits(free) for free in (most - 1, most, 3*most)] == [[False, False], [True, False], [True, True]]


def test_only_the_largest_layers_are_drawn():
    model = nn.Sequential(*[nn.Conv2d(1, 1, 3) for _ in range(5)])
    ax = plot_costs(embedding_costs(model, (1, 12, 12)), free=10**6, most=2)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "1", "other layers", "all"]
    assert ax.get_title() == "the 2 largest of 5 convolutions"
