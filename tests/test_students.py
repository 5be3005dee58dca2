"Students, teachers and embedded students, against networks written out."
import pytest
import torch
from torch import nn

from efcn_nb.instruments.students import (
    STUDENT_NETWORKS, STUDENTS, find_student, make_student, make_teacher, merge_bottleneck, starting_network, student)
from efcn_nb.ladder.embedding import embed
from efcn_nb.ladder.layers import FullyConnected, LocallyConnected
from efcn_nb.materials.models import count_weights


pytestmark = pytest.mark.usefixtures("one_thread")


# Students

def test_layers_of_the_deepest_student():
    "Where it pools, by shape and values: the largest of four."
    net = make_student(4, 1, 2, (1, 24, 16), 3)
    assert [m.kernel_size for m in net if isinstance(m, nn.MaxPool2d)] == [2, 2, 2]
    names = "".join(type(m).__name__[0] for m in net)
    assert names == "CMRCMRCRCMRFLRL" and all(m.kernel_size == (5, 5) for m in net if isinstance(m, nn.Conv2d))
    x = net[0](torch.randn(2, 1, 24, 16))
    assert net[1](x).equal(x.unflatten(2, (12, 2)).unflatten(4, (8, 2)).amax((3, 5)))


@pytest.mark.parametrize("build", [lambda: make_student(1, 1, 0, (1, 8, 8), 3), lambda: make_teacher((1, 8, 8), 3, 0)])
def test_width_below_one(build):
    with pytest.raises(ValueError, match="width must be a whole number, 1 or more, not 0"): build()


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 11, 9)])
def test_student_by_hand(name, shape):
    "The number of weights, layer by layer, and the shape of the answer."
    (convs, hidden), w, classes = find_student(name), 5, 4
    c, h, v = shape
    n = 0
    for pool in {0: [], 1: [3], 2: [2, 2], 3: [2, 2, 2], 4: [2, 2, 1, 2]}[convs]:
        n, c, h, v = n + 25*c*w + w, w, h//pool, v//pool
    units, into = (4*w if convs else w), c*h*v
    if convs < 2 and hidden == 1: n, into = n + into*-(-units//4), -(-units//4)
    for _ in range(hidden): n, into = n + into*units + units, units
    net = make_student(convs, hidden, w, shape, classes)
    assert count_weights(net) == n + into*classes + classes
    assert net(torch.zeros(2, *shape)).shape == (2, classes)


def test_weights_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    a, b, c = (nn.utils.parameters_to_vector(student(2, 1, 2_000, (1, 8, 8), 3, seed=s).parameters())
               for s in (0, 0, 1))
    assert a.equal(b) and not a.equal(c) and torch.get_rng_state().equal(state)


def test_bottleneck_can_be_asked_for():
    count = lambda net: sum(isinstance(a, nn.Linear) and isinstance(b, nn.Linear) for a, b in zip(net, net[1:]))
    build = lambda name, bottleneck: count(make_student(*STUDENTS[name], 4, (1, 8, 8), 3, bottleneck))
    assert [name for name in STUDENTS if build(name, None)] == ["mlp1", "conv1"]
    assert {build(name, True) for name in STUDENTS} == {1} and {build(name, False) for name in STUDENTS} == {0}


@pytest.mark.parametrize("convs, hidden, shape, words",
                         [(-1, 1, (1, 16, 16), "convs must be a whole number from 0 to 4, not -1"),
                          (5, 1, (1, 16, 16), "from 0 to 4, not 5"),
                          (0, 0, (1, 16, 16), "hidden must be a whole number from 1 to 5, not 0"),
                          (2, 6, (1, 16, 16), "from 1 to 5, not 6"),
                          (1, 1, (1, 2, 9), "with 1 convolutional layers take images .* of at least 3x3 pixels, not"),
                          (4, 1, (1, 16, 7), "at least 8x8 pixels"),
                          (0, 1, (64,), r"\(channels, height, width\) of at least 1x1 pixels, not \(64,\)")])
def test_impossible_students(convs, hidden, shape, words):
    for build in (lambda: make_student(convs, hidden, 4, shape, 10), lambda: student(convs, hidden, 10_000, shape, 10)):
        with pytest.raises(ValueError, match=words): build()


def test_budget_that_no_width_meets():
    with pytest.raises(ValueError, match="no width meets a budget of 60 weights: the narrowest network has "):
        student(0, 1, 60, (1, 8, 8), 10)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown student 'resnet'; known are mlp1, mlp2"): find_student("resnet")
    with pytest.raises(ValueError, match="unknown network 'cnn'; known are conv, efcn"):
        starting_network("cnn", student(1, 1, 900, (1, 8, 8), 3), (1, 8, 8), 3)


# The bottleneck

@pytest.mark.parametrize("convs, hidden", [(0, 1), (0, 4), (1, 1), (3, 2)])
def test_merging_keeps_the_function(convs, hidden):
    net = make_student(convs, hidden, 6, (2, 8, 8), 5, bottleneck=True).double()
    x = torch.randn(30, 2, 8, 8, dtype=torch.double)
    merged = merge_bottleneck(net)
    assert (merged(x) - net(x)).abs().max() <= 1e-15*100
    assert sum(isinstance(m, nn.Linear) for m in merged) == hidden + 1
    assert all(p.data_ptr() not in {q.data_ptr() for q in net.parameters()} for p in merged.parameters())


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_merging_chains_and_biases(biases):
    net = nn.Sequential(nn.Linear(7, 2, bias=biases[0]), nn.Linear(2, 6, bias=biases[1]),
                        nn.Linear(6, 4, bias=biases[0])).double()
    x = torch.randn(9, 7, dtype=torch.double)
    merged = merge_bottleneck(net)
    assert len(merged) == 1 and torch.linalg.matrix_rank(merged[0].weight) == 2
    torch.testing.assert_close(merged(x), net(x), atol=1e-14, rtol=0)
    assert (merged[0].bias is None) == (biases == (False, False))


# Embedded students

def test_starts():
    conv, shape = student(2, 1, 1_200, (1, 16, 16), 10), (1, 16, 16)
    x = torch.randn(8, *shape)
    made = {name: starting_network(name, conv, shape, 10, seed=4) for name in STUDENT_NETWORKS}
    for name in ("conv", "efcn", "elcn"): torch.testing.assert_close(made[name](x), conv(x), atol=1e-5, rtol=1e-4)
    kinds = dict(efcn=FullyConnected, fcn=FullyConnected, elcn=LocallyConnected, lcn=LocallyConnected)
    for name, kind in kinds.items(): assert sum(isinstance(m, kind) for m in made[name].modules()) == 2
    assert count_weights(made["fcn"]) == count_weights(embed(conv, shape)) and count_weights(
        made["lcn"]
    ) == count_weights(embed(conv, shape, to="lcn"))
    assert (made["fcn"][0].weight != 0).float().mean() > .99 and (made["efcn"][0].weight != 0).float().mean() < .15
    for p in conv.parameters():
        assert all(p.data_ptr() != q.data_ptr() for net in made.values() for q in net.parameters())


def test_fresh_weights_are_the_seeds():
    conv = student(2, 1, 900, (1, 16, 16), 10)
    def vector(name, seed):
        return nn.utils.parameters_to_vector(starting_network(name, conv, (1, 16, 16), 10, seed).parameters())
    for name in ("fcn", "lcn", "mlp"):
        assert vector(name, 3).equal(vector(name, 3)) and not vector(name, 3).equal(vector(name, 4))
    for name in ("conv", "efcn", "elcn"): assert vector(name, 3).equal(vector(name, 4))
