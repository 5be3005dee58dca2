"Distillation, against networks and least squares written out, and made-up tables whose gaps are known."
import copy
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import efcn_nb.studies.distillation as study
from efcn_nb.materials.data import Data, Dataset, load_data
from efcn_nb.ladder.embedding import embed
from efcn_nb.ladder.layers import FullyConnected, LocallyConnected
from efcn_nb.materials.models import count_weights
from efcn_nb.experiments.runs import run_id
from efcn_nb.studies.distillation import (
    CONVS, MLPS, NETWORKS, STUDENTS, Splits, TransferSet, augment, distil, distillation_claims, distillation_grid,
    distillation_study, embedded_students, find_student, gaps, load_logits, make_student, make_teacher,
    merge_bottleneck, split_validation, standardise, standardised, start_or_architecture, starting_network,
    store_logits, student, student_width, teach, teacher_logits, tensor_digest, transfer_batches, transfer_set, tuned)
from efcn_nb.training.loop import Diverged, evaluate

FAST = dict(lrs=[1e-2], epochs=2, search_epochs=1, seeds=[0, 1])


pytestmark = pytest.mark.usefixtures("one_thread")


def noise(n, shape=(1, 8, 8), classes=3, seed=0):
    "Noise with labels."
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randint(256, (n, *shape), generator=draw).to(torch.uint8), torch.arange(n) % classes
    return Dataset(x, y, [*map(str, range(classes))], torch.zeros(shape[0]), torch.ones(shape[0]), "noise")


def taught(images, copies=1, seed=0, scale=1., offset=0.):
    "A transfer set whose logits are a linear function of the standardised images."
    draw = torch.Generator().manual_seed(1)
    W = torch.randn(len(images.classes), images.x[0].numel(), generator=draw)
    return TransferSet(images, copies, seed, scale*(standardise(images.x).flatten(1) @ W.T) + offset)


@pytest.fixture(scope="module")
def small():
    "Splits of a few digits, and a transfer set that two teachers have answered."
    data = load_data("digits")
    splits = split_validation(Data(data.train.thinned(250), data.test.thinned(60)))
    transfer, table = teach(splits, transfer_set(splits.train, 2, 1, fill="constant"), teachers=2, width=4, epochs=2)
    return splits, transfer, table


# Images

def test_standardise_is_numpys():
    x = noise(5, (3, 4, 6)).x
    flat = x.numpy().reshape(5, -1).astype(float)
    want = (flat - flat.mean(1, keepdims=True))/flat.std(1, keepdims=True)
    np.testing.assert_allclose(standardise(x).reshape(5, -1), want, atol=1e-5)


@pytest.mark.parametrize("value", [0, 3, 77, 255])
def test_even_images_become_zero(value): assert not standardise(torch.full((2, 3, 5, 7), value, dtype=torch.uint8)).any()


def test_standardise_forgets_brightness_and_contrast():
    x = noise(4).x.float()
    torch.testing.assert_close(standardise(x*.3 + 20), standardise(x), atol=1e-4, rtol=0)


def test_validation_is_split_off_the_training_images():
    data = Data(noise(90), noise(30, seed=1))
    splits = split_validation(data, .2, seed=3)
    assert [len(s) for s in splits] == [72, 18, 30]
    assert splits.validation.y.bincount().tolist() == [6, 6, 6]
    key = lambda x: {t.numpy().tobytes() for t in standardise(x)}
    assert key(splits.train.x) | {t.numpy().tobytes() for t in splits.validation.x} == key(data.train.x)
    assert not key(splits.train.x) & {t.numpy().tobytes() for t in splits.validation.x}
    assert splits.test.x.equal(standardise(data.test.x)) and splits.test.batch([3])[0].equal(splits.test.x[[3]])
    assert not split_validation(data, .2, seed=4).train.x.equal(splits.train.x)


@pytest.mark.parametrize("scale", [1e-3, .05, 3.])
def test_standardise_keeps_faint_images(scale):
    x = torch.randn(6, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(standardise(scale*x), standardise(x), atol=1e-4, rtol=0)


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
    with pytest.raises(ValueError, match="width of a (student|teacher) must be 1 or more, not 0"): build()


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


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("budget", [1_500, 4_321, 100_000])
def test_budget_is_met_and_used(name, budget):
    kind, shape = find_student(name), (1, 16, 16)
    width = student_width(*kind, budget, shape, 10)
    with torch.device("meta"): sizes = [count_weights(make_student(*kind, w, shape, 10)) for w in (width, width + 1)]
    assert sizes[0] <= budget < sizes[1]


def test_weights_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    a, b, c = (nn.utils.parameters_to_vector(student(2, 1, 2_000, (1, 8, 8), 3, seed=s).parameters()) for s in (0, 0, 1))
    assert a.equal(b) and not a.equal(c) and torch.get_rng_state().equal(state)


def test_bottleneck_can_be_asked_for():
    count = lambda net: sum(isinstance(a, nn.Linear) and isinstance(b, nn.Linear) for a, b in zip(net, net[1:]))
    build = lambda name, bottleneck: count(make_student(*STUDENTS[name], 4, (1, 8, 8), 3, bottleneck))
    assert [name for name in STUDENTS if build(name, None)] == ["mlp1", "conv1"]
    assert {build(name, True) for name in STUDENTS} == {1} and {build(name, False) for name in STUDENTS} == {0}


@pytest.mark.parametrize("convs, hidden, shape, words", [
    (-1, 1, (1, 16, 16), "0 to 4 convolutional layers, not -1"), (5, 1, (1, 16, 16), "0 to 4 convolutional layers, not 5"),
    (0, 0, (1, 16, 16), "1 to 5 hidden dense layers, not 0"), (2, 6, (1, 16, 16), "1 to 5 hidden dense layers, not 6"),
    (1, 1, (1, 2, 9), "too small for the poolings of 1 convolutional layers; they need 3x3"), (4, 1, (1, 16, 7), "they need 8x8"),
    (0, 1, (64,), r"\(channels, height, width\), not at inputs of shape \(64,\)")])
def test_impossible_students(convs, hidden, shape, words):
    for build in (lambda: make_student(convs, hidden, 4, shape, 10), lambda: student(convs, hidden, 10_000, shape, 10)):
        with pytest.raises(ValueError, match=words): build()


def test_budget_that_no_width_meets():
    with pytest.raises(ValueError, match="no width meets a budget of 60 weights: the narrowest network has "): student(0, 1, 60, (1, 8, 8), 10)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown student 'resnet'; known are mlp1, mlp2"): find_student("resnet")
    with pytest.raises(ValueError, match="unknown network 'cnn'; known are conv, efcn"): starting_network("cnn", student(1, 1, 900, (1, 8, 8), 3), (1, 8, 8), 3)


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
    net = nn.Sequential(nn.Linear(7, 2, bias=biases[0]), nn.Linear(2, 6, bias=biases[1]), nn.Linear(6, 4, bias=biases[0])).double()
    x = torch.randn(9, 7, dtype=torch.double)
    merged = merge_bottleneck(net)
    assert len(merged) == 1 and torch.linalg.matrix_rank(merged[0].weight) == 2
    torch.testing.assert_close(merged(x), net(x), atol=1e-14, rtol=0)
    assert (merged[0].bias is None) == (biases == (False, False))


def test_nothing_to_merge():
    with pytest.raises(ValueError, match="no bottleneck to merge"): merge_bottleneck(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)))


# The transfer set

@pytest.mark.parametrize("fill", ["reflect", "constant"])
def test_shift_is_padding_and_cropping(fill):
    x, s = noise(40, (2, 5, 6)).x, 2
    padded = np.pad(x.numpy(), [(0, 0), (0, 0), (s, s), (s, s)], mode=fill)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 6), axis=(2, 3))                 # n, c, i, j, h, w
    moved = augment(x, torch.Generator().manual_seed(5), s, fill=fill).numpy()
    matches = (windows == moved[:, :, None, None]).all((1, 4, 5))                                    # n, i, j
    assert moved.dtype == np.uint8 and matches.any((1, 2)).all()
    assert matches.any(0).sum() > 15                                                                 # of 25 places


@pytest.mark.parametrize("fill", ["reflect", "constant"])
def test_augmentation_image_by_image(fill):
    "The same draws, one image after the other: down and to the right where they are positive."
    x, s = noise(30, (3, 7, 9)).x, 2
    got, draw = augment(x, torch.Generator().manual_seed(3), s, True, fill), torch.Generator().manual_seed(3)
    down, right = torch.randint(-s, s + 1, (2, 30), generator=draw).tolist()
    turned = (torch.rand(30, generator=draw) < .5).tolist()
    assert {*down} == {*right} == {*range(-s, s + 1)}
    for image, d, r, t, found in zip(x.numpy(), down, right, turned, got.numpy()):
        padded = np.pad(image[:, :, ::-1] if t else image, [(0, 0), (s, s), (s, s)], mode=fill)
        np.testing.assert_array_equal(found, padded[:, s - d:s - d + 7, s - r:s - r + 9])


def test_copies_keep_their_labels():
    images = noise(30)
    transfer = transfer_set(images, 3, 1, seed=2)
    assert transfer.images.y.equal(torch.cat([images.y]*3)) and transfer_set(images, 2).images.x.equal(torch.cat([images.x]*2))
    draw = torch.Generator().manual_seed(2)
    assert transfer.images.x.equal(torch.cat([augment(images.x, draw, 1) for _ in range(3)]))


def test_order_is_the_seeds():
    a, b = (torch.cat([x for x, _ in transfer_batches(taught(noise(30), seed=seed), 1)]) for seed in (0, 1))
    assert not a.equal(b)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    assert b.equal(standardise(noise(30).x[order]))


def test_mirror_and_nothing():
    x = noise(200, (1, 3, 4)).x
    turned = augment(x, torch.Generator().manual_seed(0), mirror=True)
    same, flipped = (turned == x).flatten(1).all(1), (turned == x.flip(3)).flatten(1).all(1)
    assert (same | flipped).all() and 60 < flipped.sum() < 140
    assert augment(x, torch.Generator()).equal(x)


@pytest.mark.parametrize("settings, words", [(dict(shift=8), "a shift of 8 pixels does not go with images of shape"), (dict(shift=-1), "a shift of -1 pixels"),
                                             (dict(fill="wrap"), "'reflect' or 'constant', not 'wrap'"), (dict(copies=0), "at least one copy")])
def test_impossible_changes(settings, words):
    with pytest.raises(ValueError, match=words): transfer_set(noise(9), **settings)


def test_same_images_in_the_same_order():
    transfer = taught(transfer_set(noise(30), 3, 1, seed=2).images, copies=3)
    first, second = (list(transfer_batches(transfer, 4, 7)) for _ in range(2))
    assert len(first) == 4*math.ceil(30/7) and all(a.equal(c) and b.equal(d) for (a, b), (c, d) in zip(first, second))
    x = torch.cat([x for x, _ in first])
    key = lambda part: sorted(t.numpy().tobytes() for t in part)
    copies = standardise(transfer.images.x).split(30)
    assert all(key(x[30*e:30*e + 30]) == key(copies[e % 3]) for e in range(4))
    assert not x[:30].equal(x[90:]), "the same copy in another order"
    labels = list(transfer_batches(transfer, 4, 7, "labels"))
    assert all(a.equal(c) for (a, _), (c, _) in zip(first, labels))


@pytest.mark.parametrize("scale, offset", [(1, 0), (50, -300), (1e-3, 7)])
def test_targets_forget_scale_and_offset_of_logits(scale, offset):
    targets = [torch.cat([z for _, z in transfer_batches(taught(noise(50), scale=s, offset=o), 1)]) for s, o in ((1, 0), (scale, offset))]
    torch.testing.assert_close(*targets, atol=1e-3, rtol=0)
    assert abs(targets[0].mean()) < 1e-5 and abs(targets[0].std() - 1) < 1e-5
    assert targets[1].argmax(1).equal(targets[0].argmax(1))


def test_logits_that_do_not_fit():
    images = noise(12)
    for shape in [(11, 3), (12, 4), (12,)]:
        with pytest.raises(ValueError, match="do not fit a transfer set of 12 images and 3 classes"): TransferSet(images, logits=torch.zeros(shape))
    with pytest.raises(ValueError, match="not finite"): TransferSet(images, logits=torch.full((12, 3), math.inf))
    with pytest.raises(ValueError, match="12 images cannot be 5 copies"): TransferSet(images, 5)
    for copies in (0, -1):
        with pytest.raises(ValueError, match=f"at least one copy of the images, not {copies}"): TransferSet(images, copies)
    with pytest.raises(ValueError, match="not finite"): TransferSet(images, logits=torch.full((12, 3), math.nan))


def test_digest_tells_everything():
    t = taught(noise(12), 2)
    logits, x = t.logits.clone(), t.images.x.clone()
    logits[3, 1] += 1e-5
    x[0, 0, 0, 0] ^= 1
    others = [replace(t, copies=3), replace(t, seed=1), replace(t, logits=None), replace(t, logits=logits), replace(t, images=replace(t.images, x=x)), t]
    assert len({o.digest for o in others}) == 6 and replace(t).digest == t.digest


# Teachers

def test_average_of_logits(small):
    nets, images = [make_teacher((1, 16, 16), 10, 2, s) for s in range(3)], small[0].test
    for net in nets: net(torch.randn(20, 1, 16, 16))
    want = sum(net.eval()(images.x) for net in nets)/3
    bright = replace(images, x=30*images.x + 9)
    torch.testing.assert_close(teacher_logits(nets, bright), want.detach(), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="at least one teacher"): teacher_logits([], images)
    nets[1].train()
    torch.testing.assert_close(teacher_logits(nets, images, batch_size=7), want.detach(), atol=1e-5, rtol=0)
    assert nets[1].training and not nets[0].training
    with pytest.raises(ValueError, match="the same classes, not 10 and 4"): teacher_logits([nets[0], make_teacher((1, 16, 16), 4, 2)], images)
    with pytest.raises(ValueError, match="at least 8x8 pixels"): make_teacher((1, 16, 7), 10)


def test_teachers_by_hand(small):
    "Each is trained with its own seed on labels; logits are averaged, and the table tells validation from test images."
    splits, transfer, table = small
    nets = [make_teacher((1, 16, 16), 10, 4, seed) for seed in (0, 1)]
    for net in nets: distil(net, transfer, 2, .01, target="labels")
    answers = lambda x: [net.eval()(x).detach() for net in nets]
    torch.testing.assert_close(transfer.logits, sum(answers(standardise(transfer.images.x)))/2, atol=1e-4, rtol=1e-4)
    for column, part in dict(validation=splits.validation, accuracy=splits.test).items():
        z = answers(part.x)
        want = [(a.argmax(1) == part.y).double().mean().item() for a in (*z, z[0] + z[1])]
        np.testing.assert_allclose(table[column], want, atol=1e-9)
    names = "".join(type(m).__name__[0] for m in nets[0])
    assert names == "CBRCMBR"*3 + "FL" and [m.out_channels for m in nets[0] if isinstance(m, nn.Conv2d)] == [4, 4, 8, 8, 16, 16]


def test_teachers_answer_once(small, tmp_path, monkeypatch):
    splits, transfer, table = small
    bare, settings = replace(transfer, logits=None), dict(teachers=2, width=4, epochs=2, folder=tmp_path)
    first, rows = teach(splits, bare, **settings)
    assert first.logits.equal(transfer.logits) and rows.equals(table), "with a folder or without"
    assert [*rows.teacher] == ["0", "1", "average"]
    monkeypatch.setattr(study, "distil", lambda *_: pytest.fail("trained again"))
    assert teach(splits, bare, **settings)[0].logits.equal(transfer.logits)
    monkeypatch.undo()
    next(tmp_path.glob("teacher-*")).write_bytes(b"broken")
    with pytest.raises(ValueError, match="is damaged .*delete it, and the teacher is asked again"): teach(splits, bare, **settings)
    with pytest.raises(ValueError, match="at least one teacher, not 0"): teach(splits, bare, teachers=0)


def test_stored_logits(tmp_path):
    path, z = tmp_path/"deep"/"z", dict(a=torch.randn(4, 3), b=torch.randn(2, 3))
    store_logits(path, z, "mine")
    assert all(load_logits(path, "mine")[k].equal(z[k]) for k in "ab")
    with pytest.raises(ValueError, match="answer other images or come from another teacher"): load_logits(path, "yours")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 8
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="digest is wrong"): load_logits(path, "mine")


def test_logits_where_no_file_can_be(small, tmp_path):
    splits, transfer, _ = small
    (tmp_path/"file").write_text("in the way")
    for write in (lambda: store_logits(tmp_path/"file"/"z", dict(a=torch.zeros(2, 2)), "mine"), lambda: teach(splits, replace(transfer, logits=None), folder=tmp_path/"file"),
                  lambda: distillation_grid(splits, transfer, ["mlp1"], [2_000], folder=tmp_path/"file", **FAST)):
        with pytest.raises(OSError, match="file cannot be made a folder .*choose another"): write()
    with pytest.raises(ValueError, match="is a folder, no file of logits"): load_logits(tmp_path, "mine")


# Training

def test_gradients_are_clipped():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad(): net[1].weight.mul_(100)
    norm = lambda: torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item()
    for clip in (1., .3):
        distil(net, taught(noise(20)), 1, 1e-4, clip=clip)
        assert abs(norm() - clip) < 1e-4


def test_precision_reaches_the_products():
    transfer, seen = taught(noise(20)), []
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    net.register_forward_hook(lambda module, x, y: seen.append(y.dtype) if module.training else None)
    for precision in ("fp32", "bf16"): distil(net, transfer, 1, .01, precision=precision)
    assert seen == [torch.float32, torch.bfloat16]


def test_products_of_the_backward_pass(monkeypatch):
    "They have the precision of the forward pass: a GPU would use its own otherwise."
    open_now, real = [], study.products
    from contextlib import contextmanager
    @contextmanager
    def watched(*args):
        open_now.append(args[0])
        with real(*args): yield
        open_now.pop()
    monkeypatch.setattr(study, "products", watched)
    net, seen = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), []
    net[1].weight.register_hook(lambda g: seen.append([*open_now]))
    distil(net, taught(noise(20)), 1, .01)
    assert seen == [["fp32"]] and not open_now


def test_training_of_a_broken_last_step(small):
    "Weights that are not finite are no result, though every loss was."
    net = student(0, 1, 2_000, (1, 16, 16), 10)
    with torch.no_grad(): net[-1].weight.fill_(math.nan)
    assert all(math.isnan(v) for v in study._score(lambda: net, small[0], ["validation", "test"]).values())


def test_distil_is_adam_written_out():
    "The same steps with Adam's formulas, in double precision."
    transfer, (lr, epochs, batch) = taught(noise(20)), (.01, 3, 8)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    w = [p.detach().double().clone().requires_grad_() for p in net.parameters()]
    m, v, steps = [torch.zeros_like(p) for p in w], [torch.zeros_like(p) for p in w], 9
    for k, (x, z) in enumerate(transfer_batches(transfer, epochs, batch)):
        grads = torch.autograd.grad((x.double().flatten(1) @ w[0].T + w[1] - z).square().mean(), w)
        norm = torch.sqrt(sum(g.square().sum() for g in grads))
        for i, g in enumerate(grads):
            g = g*min(1, 1/norm)
            m[i], v[i] = .9*m[i] + .1*g, .999*v[i] + .001*g*g
            w[i].data -= lr*(1 - k/steps) * m[i]/(1 - .9**(k+1)) / ((v[i]/(1 - .999**(k+1))).sqrt() + 1e-8)
    losses = distil(net, transfer, epochs, lr, batch)
    assert len(losses) == steps
    for p, q in zip(net.parameters(), w): torch.testing.assert_close(p.detach().double(), q.detach(), atol=1e-5, rtol=0)


def test_distil_finds_a_linear_teacher():
    transfer = taught(noise(200))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    assert distil(net, transfer, 150, .02, 50)[-4:].mean() < 1e-3
    x, z = standardise(transfer.images.x), transfer.logits
    assert (net(x).argmax(1) == z.argmax(1)).float().mean() > .97


def test_labels_are_learned_without_a_teacher():
    bare = replace(taught(noise(60)), logits=None)
    net = student(0, 1, 4_000, (1, 8, 8), 3)
    losses = distil(net, bare, 60, .01, 20, "labels")
    assert abs(losses[0] - math.log(3)) < .2 and losses[-1] < .1
    with pytest.raises(ValueError, match="holds no logits yet"): distil(net, bare, 1, .01)


@pytest.mark.parametrize("settings, words", [(dict(lr=0), "learning rates must be positive numbers, not 0"), (dict(lr=-.1), "not -0.1"), (dict(lr=math.nan), "not nan"), (dict(lr=math.inf), "not inf"),
                                             (dict(epochs=0), "at least one epoch, not 0"), (dict(batch_size=0), "batch_size must be 1 or more, not 0"),
                                             (dict(precision="fp8"), "precision must be one of"), (dict(target="soft"), "'teacher' or 'labels', not 'soft'")])
def test_impossible_training(settings, words):
    net = student(0, 1, 4_000, (1, 8, 8), 3)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=words): distil(net, taught(noise(20)), **(dict(epochs=1, lr=.1) | settings))
    assert all(before[k].equal(v) for k, v in net.state_dict().items())


def test_classes_that_differ():
    with pytest.raises(ValueError, match="the student answers 4 classes, teacher and transfer set have 3"): distil(student(0, 1, 4_000, (1, 8, 8), 4), taught(noise(20)), 1, .1)


def test_images_that_differ(small):
    with pytest.raises(ValueError, match=r"does not take images of shape \(1, 8, 8\)"): distil(student(0, 1, 4_000, (1, 16, 16), 3).eval(), taught(noise(20)), 1, .1)
    for grid in (distillation_grid, embedded_students):
        with pytest.raises(ValueError, match=r"images of shape \(1, 8, 8\) and 3 classes, the splits have \(1, 16, 16\) and 10"): grid(small[0], taught(noise(20)), **FAST)


# The grid

def test_grid_is_training_by_hand(small):
    splits, transfer, _ = small
    table = distillation_grid(splits, transfer, ["conv1", "mlp2"], [2_000], targets=["labels", "teacher"], **FAST)
    assert len(table) == 8 and not table.at_edge.any()
    row = table[(table.student == "conv1") & (table.target == "labels") & (table.seed == 1)].iloc[0]
    net = student(1, 1, 2_000, (1, 16, 16), 10, seed=1)
    distil(net, transfer, 2, 1e-2, target="labels")
    assert row.accuracy == evaluate(net, splits.test)["accuracy"] and row.validation == evaluate(net, splits.validation)["accuracy"]
    assert (row.convs, row.hidden, row.weights) == (1, 1, count_weights(net)) and row.width == net[0].out_channels


def test_learning_rates_are_chosen_without_test_images(small):
    "Other test images, the same rates; and every search asks for validation images alone."
    splits, transfer, _ = small
    asked = []
    def run(cell, lr, seed, epochs, parts, **_):
        asked.append((epochs, seed, tuple(parts)))
        return [dict.fromkeys(parts, 1 - (math.log10(lr) + 2)**2 + .1*seed*("test" in parts))]
    table = tuned(run, [dict(cell=1), dict(cell=2)], [1e-3, 1e-2, 1e-1], [0, 1], 3, 7, {})
    assert {a for a in asked if a[0] == 3} == {(3, study.SEARCH_SEED, ("validation",))} and sum(a[0] == 3 for a in asked) == 6
    assert {a for a in asked if a[0] == 7} == {(7, s, ("validation", "test")) for s in (0, 1)}
    assert (table.lr == 1e-2).all() and not table.at_edge.any() and list(table.columns) == ["cell", "seed", "lr", "at_edge", "validation", "accuracy"]
    other = splits._replace(test=standardised(noise(50, (1, 16, 16), 10)))
    rates = [distillation_grid(s, transfer, ["mlp1"], [2_000], **(FAST | dict(lrs=[1e-5, 1e-2]))) for s in (splits, other)]
    assert rates[0].lr.equals(rates[1].lr) and rates[0].at_edge.all() and not rates[0].accuracy.equals(rates[1].accuracy)


def test_divergence_loses_the_search():
    def run(cell, lr, seed, epochs, parts, **_): return [dict.fromkeys(parts, math.nan if lr > limit else lr)]
    limit = .05
    assert (tuned(run, [dict(cell=1)], [.01, .03, .1], [0], 1, 1, {}).lr == .03).all()
    limit = 0
    with pytest.raises(Diverged, match="every learning rate diverged; try smaller ones than 0.01"): tuned(run, [dict(cell=1)], [.01, .1], [0], 1, 1, {})


def test_rates_and_seeds_go_with_their_cells():
    "Every cell has another best rate, and the rates come in any order."
    best = dict(a=1e-3, b=1e-1, c=1e-2, d=1e-3)
    def run(cell, lr, seed, epochs, parts, **_): return [{part: -abs(math.log10(lr/best[cell])) + (seed if part == "test" else 0) for part in parts}]
    table = tuned(run, [dict(cell=c) for c in "abcd"], [1e-1, 1e-3, 1e-2], np.arange(2), 3, 7, {})
    assert [*table.cell] == [*"aabbccdd"] and [*table.seed] == [0, 1]*4 and [*table.lr] == [best[c] for c in table.cell]
    assert [*table.at_edge] == [c != "c" for c in table.cell] and (table.validation == 0).all() and (table.accuracy == table.seed).all()
    level = lambda cell, lr, seed, epochs, parts, **_: [dict.fromkeys(parts, .5)]
    assert (tuned(level, [dict(cell=1)], [.1, .01, .03], [0], 1, 1, {}).lr == .01).all(), "of equal rates, the smallest"
    for cells, seeds in ([[], [0]], [[dict(cell=1)]*2, [0]], [[dict(cell=1)], []]):
        with pytest.raises(ValueError, match="is empty|twice"): tuned(level, cells, [.1], seeds, 1, 1, {})


def test_cells_are_known_by_all_that_determines_them(small):
    splits, transfer, _ = small
    common = lambda s=splits, t=transfer, b=100, p="fp32": run_id(study._common(s, t, b, p))
    other = replace(splits.test, x=splits.test.x + 1)
    assert len({common(), common(splits._replace(test=other)), common(splits._replace(validation=other)), common(t=replace(transfer, seed=7)), common(b=7), common(p="bf16")}) == 6


def test_teachers_are_known_by_all_that_determines_them(small, tmp_path):
    splits, bare = small[0], replace(small[1], logits=None)
    other = replace(splits.test, x=splits.test.x + 1)
    for s, t, more in [(splits, bare, {}), (splits._replace(test=other), bare, {}), (splits._replace(validation=other), bare, {}), (splits, replace(bare, seed=7), {}), (splits, bare, dict(batch_size=50)), (splits, bare, dict(lr=.02))]:
        teach(s, t, **(dict(teachers=1, width=1, epochs=1, folder=tmp_path) | more))
    assert len([*tmp_path.glob("teacher-*")]) == 6


def test_diverged_seed_is_missing(small, monkeypatch):
    def broken(model, *rest): raise Diverged("the loss was not finite")
    monkeypatch.setattr(study, "distil", broken)
    table = distillation_grid(*small[:2], ["mlp1"], [2_000], **FAST)
    assert table.accuracy.isna().all() and len(table) == 2


def test_grid_resumes(small, tmp_path, monkeypatch):
    splits, transfer, _ = small
    grid = lambda **more: distillation_grid(splits, transfer, ["mlp1"], [2_000], folder=tmp_path, **(FAST | more))
    first, trained, real = grid(), [], study.distil
    monkeypatch.setattr(study, "distil", lambda *a: (trained.append(a), real(*a)))
    assert grid().equals(first) and not trained
    assert grid(seeds=[0, 1, 2]).iloc[:2].equals(first) and len(trained) == 1
    logits = transfer.logits.clone()
    logits[0, 0] += 1
    distillation_grid(splits, replace(transfer, logits=logits), ["mlp1"], [2_000], folder=tmp_path, **FAST)
    assert len(trained) == 3, "another teacher is another cell"


@pytest.mark.parametrize("settings, words", [
    (dict(students=["mlp1", "mlp6"]), "unknown student 'mlp6'"), (dict(students=[]), "students is empty"), (dict(seeds=[]), "seeds is empty"), (dict(targets=[]), "targets is empty"), (dict(students="mlp1"), r"must be a list, such as \['mlp1'\]"),
    (dict(students=["mlp1", "conv1", "mlp1"]), "students holds 'mlp1' twice"), (dict(budgets=[2_000, 2_000]), "budgets holds 2000 twice"), (dict(seeds=[1, 1]), "seeds holds 1 twice"),
    (dict(seeds=[study.SEARCH_SEED]), "which the search uses"), (dict(seeds=[.5]), "seeds must be whole numbers"), (dict(lrs=.1), "learning rates to try are a list"), (dict(lrs=["a"]), "must be positive numbers, not a"),
    (dict(epochs=1.5), "must be whole numbers, not 1.5"), (dict(batch_size=2.5), "must be whole numbers"), (dict(budgets=[10]), "no width meets a budget of 10 weights"),
    (dict(lrs=[]), "at least one learning rate"), (dict(lrs=[.1, 0]), "learning rates must be positive"), (dict(epochs=0), "at least one epoch"), (dict(targets=["soft"]), "'teacher' or 'labels'")])
def test_impossible_grids_cost_nothing(small, settings, words, tmp_path):
    with pytest.raises(ValueError, match=words): distillation_grid(*small[:2], **(FAST | dict(folder=tmp_path) | settings))
    assert not list(tmp_path.iterdir())


# Embedded students

def test_starts(small):
    conv, shape = student(2, 1, 1_200, (1, 16, 16), 10), (1, 16, 16)
    x = small[0].test.x[:8]
    made = {name: starting_network(name, conv, shape, 10, seed=4) for name in NETWORKS}
    for name in ("conv", "efcn", "elcn"): torch.testing.assert_close(made[name](x), conv(x), atol=1e-5, rtol=1e-4)
    kinds = dict(efcn=FullyConnected, fcn=FullyConnected, elcn=LocallyConnected, lcn=LocallyConnected)
    for name, kind in kinds.items(): assert sum(isinstance(m, kind) for m in made[name].modules()) == 2
    assert count_weights(made["fcn"]) == count_weights(embed(conv, shape)) and count_weights(made["lcn"]) == count_weights(embed(conv, shape, to="lcn"))
    assert (made["fcn"][0].weight != 0).float().mean() > .99 and (made["efcn"][0].weight != 0).float().mean() < .15
    for p in conv.parameters(): assert all(p.data_ptr() != q.data_ptr() for net in made.values() for q in net.parameters())


def test_fresh_weights_are_the_seeds():
    conv = student(2, 1, 900, (1, 16, 16), 10)
    vector = lambda name, seed: nn.utils.parameters_to_vector(starting_network(name, conv, (1, 16, 16), 10, seed).parameters())
    for name in ("fcn", "lcn", "mlp"): assert vector(name, 3).equal(vector(name, 3)) and not vector(name, 3).equal(vector(name, 4))
    for name in ("conv", "efcn", "elcn"): assert vector(name, 3).equal(vector(name, 4))


def test_embedded_students(small, tmp_path):
    splits, transfer, _ = small
    run = lambda: embedded_students(splits, transfer, budget=1_200, relax_times=[1], folder=tmp_path, **FAST)
    table = run()
    assert run().equals(table) and table.groupby(["network", "relax"]).size().to_dict() == {
        (n, t): 2 for n, t in [("conv", 0), ("conv", 1), ("efcn", 0), ("efcn", 1), ("elcn", 0), ("elcn", 1), ("fcn", 0), ("lcn", 0), ("mlp", 0)]}
    at = table.set_index(["network", "relax", "seed"]).sort_index()
    for n in ("efcn", "elcn"):
        for t in (0, 1): np.testing.assert_allclose(at.start[n, t], at.start["conv", t], atol=1.01/60)
    conv = student(2, 1, 1_200, (1, 16, 16), 10, seed=1)
    distil(conv, transfer, 1, 1e-2)
    net = embed(conv, (1, 16, 16))
    distil(net, transfer, 2, 1e-2)
    assert at.accuracy["efcn", 1, 1] == evaluate(net, splits.test)["accuracy"]


def test_relax_times_in_other_forms(small):
    run = lambda **more: embedded_students(*small[:2], **(FAST | dict(budget=900, networks=["fcn"]) | more))
    first = run(relax_times=1)
    assert first.equals(run(relax_times=np.array([1]))) and set(zip(first.network, first.relax)) == {("conv", 0), ("fcn", 0)}
    assert [*run(networks=["conv"], relax_times=[0]).network] == ["conv"]*2


def test_diverged_convolution_is_missing(small, monkeypatch):
    "It diverges with one seed, when taught for three epochs; nothing else is lost."
    real = study.distil
    def broken(model, transfer, epochs, *rest):
        if epochs == 3 and model[0].weight.equal(second): raise Diverged("the loss was not finite")
        return real(model, transfer, epochs, *rest)
    second = student(2, 1, 900, (1, 16, 16), 10, seed=1)[0].weight.detach().clone()
    monkeypatch.setattr(study, "distil", broken)
    table = embedded_students(*small[:2], budget=900, relax_times=[3], networks=["conv", "efcn", "fcn"], **FAST)
    lost = (table.relax == 3) & (table.seed == 1)
    assert table.accuracy.isna().equals(lost) and table.start.isna().equals(lost) and (table.weights > 0).all()
    parts = start_or_architecture(table).set_index(["relax", "part"])
    assert [*parts.n[0]] == [2]*3 and [*parts.n[3]] == [1]*3
    assert abs(parts.gap[3, "whole"] - parts.gap[3, "start"] - parts.gap[3, "constraint"]) < 1e-12


@pytest.mark.parametrize("settings, words", [(dict(name="mlp3"), "mlp3 has no convolution to embed; choose one of conv1"), (dict(relax_times=[-2]), "whole numbers of epochs"), (dict(relax_times=[.5]), "whole numbers"),
                                             (dict(networks=["conv", "vit"]), "unknown networks vit"), (dict(networks=["fcn", "fcn"]), "networks holds 'fcn' twice"), (dict(seeds=[]), "seeds is empty"), (dict(name="conv9"), "unknown student"), (dict(lrs=[]), "at least one learning rate"), (dict(budget=5), "no width meets")])
def test_impossible_embedded_students(small, settings, words):
    with pytest.raises(ValueError, match=words): embedded_students(*small[:2], **(FAST | settings))


# Tables

def made_grid(accuracy, seeds=4, budgets=(1_000, 10_000), spread=.004):
    "A grid whose accuracies are a function of (convs, hidden, budget, target), plus noise."
    draw = np.random.default_rng(0)
    return pd.DataFrame([dict(student=name, convs=c, hidden=h, budget=b, target=target, seed=seed, validation=a, accuracy=a + spread*draw.standard_normal())
                         for name, (c, h) in STUDENTS.items() for b in budgets for target in ("teacher", "labels") for seed in range(seeds) for a in [accuracy(c, h, b, target)]])


def test_gaps_that_are_known():
    table = made_grid(lambda c, h, b, t: .3 + .2*(c > 0) + .03*c + .01*h*(b > 1_000), spread=0)
    found = gaps(table)
    mean = found.groupby(["gap", "budget"]).difference.mean()
    np.testing.assert_allclose(mean["convolutional"], [.32, .32 - .04], atol=1e-12)
    np.testing.assert_allclose(mean["one convolution"], [.23, .23 - .04], atol=1e-12)
    np.testing.assert_allclose(mean["depth, MLPs"], [0, .04], atol=1e-12)
    np.testing.assert_allclose(mean["depth, convolutional"], [.09, .09], atol=1e-12)
    assert set(found[found.gap == "convolutional"].better) == {"conv4"} and len(found) == 4*2*4


def test_choice_is_by_validation_not_test():
    table = made_grid(lambda c, h, b, t: .5, spread=0)
    table.loc[table.student == "conv2", "validation"] = .6
    table.loc[table.student == "conv3", "accuracy"] = .9
    assert set(gaps(table).query("gap == 'convolutional'").better) == {"conv2"}


def test_seed_that_is_missing_is_left_out():
    table = made_grid(lambda c, h, b, t: .3 + .2*(c > 0))
    table.loc[(table.student == "mlp1") & (table.seed == 0), "accuracy"] = math.nan
    assert distillation_claims(table).n[0] in (3, 4) and distillation_claims(table).verdict[0] == "holds"


def test_missing_seeds_are_not_counted():
    "Of the larger student one seed is missing; of those that are averaged, one."
    table = made_grid(lambda c, h, b, t: .3 + .2*(c > 0) - .1*(h > 1) + .05*(t == "teacher"))
    lost = (table.target == "teacher") & (table.seed == 2) & (table.student == "mlp1") & (table.budget == 10_000)
    table.loc[lost, "accuracy"] = math.nan
    found = distillation_claims(table).set_index("claim")
    assert [*found.n.iloc[[4, 6, 7]]][:2] == [3, 3] and "over mlp1 of 10,000" in found.effect.iloc[4]


def test_effects_by_hand():
    "From the rows of a grid, without pivots: the pairs are those of equal seeds."
    table = made_grid(lambda c, h, b, t: .3 + .2*(c > 0) + .01*h + .03*c + .05*(t == "teacher") + .01*math.log10(b), spread=.03).sample(frac=1, random_state=0)
    A = {(r.student, r.budget, r.target, r.seed): r.accuracy for r in table.itertuples()}
    found = distillation_claims(table).set_axis(VERDICTS)
    sides = dict(zip(VERDICTS, [("conv4", "mlp5"), ("conv1", "mlp5"), ("mlp5", "mlp1"), ("conv4", "conv1")]))
    for claim, (better, worse) in sides.items():
        d = {b: np.array([A[better, b, "teacher", s] - A[worse, b, "teacher", s] for s in range(4)]) for b in (1_000, 10_000)}
        text = [f"{100*d[b].mean():+.1f} points at {b:,} weights, {better} over {worse}" for b in d]
        assert found.effect[claim] in text and found.spread[claim] in [f"{100*x.std(ddof=1):.1f} points" for x in d.values()]
    small = [(np.mean([A["conv4", 1_000, "teacher", s] - A[k, 10_000, "teacher", s] for s in range(4)]), k) for k in MLPS]
    assert found.effect["3a"] in [f"{100*m:+.1f} points, conv4 of 1,000 over {k} of 10,000 weights" for m, k in small]
    each = [np.mean([A[k, b, "teacher", s] - A[k, b, "labels", s] for k in STUDENTS for b in (1_000, 10_000)]) for s in range(4)]
    assert found.effect["4a"] == f"{100*np.mean(each):+.1f} points, mean of 18 students" and found.spread["4a"] == f"{100*np.std(each, ddof=1):.1f} points"


def test_tables_without_rows():
    assert [*gaps(made_grid(lambda c, h, b, t: .5).query("student == 'conv1'")).columns] == ["gap", "budget", "better", "worse", "seed", "difference"]
    table = pd.DataFrame([dict(network=n, relax=t, seed=0, accuracy=.5) for n, t in [("conv", 0), ("efcn", 0), ("efcn", 4), ("fcn", 0)]])
    assert set(start_or_architecture(table).relax) == {0} and not len(start_or_architecture(table[:1])) and "share" in start_or_architecture(table[:1])


VERDICTS = ["1a", "1b", "2a", "2b", "3a", "3b", "4a", "4b"]

@pytest.mark.parametrize("accuracy, verdicts", [
    (lambda c, h, b, t: .3 + .2*(c > 0) + .03*(c + h) + .05*(t == "teacher"), ["holds"]*8),
    (lambda c, h, b, t: .6 - .1*(c > 0) - .03*(c + h) + 0.01*math.log10(b) - .05*(t == "teacher"), ["fails"]*8),
    (lambda c, h, b, t: .3 + .2*(c > 0)*(b < 5_000) - .02*(c > 1) - .03*h + .1*math.log10(b/1_000), ["undecided|fails"]*2 + ["fails"]*2 + [None, "holds"] + [None]*2)])
def test_claims_on_made_up_tables(accuracy, verdicts):
    found = distillation_claims(made_grid(accuracy))
    assert [*found.claim.str.split().str[0]] == VERDICTS
    for claim, verdict, want in zip(VERDICTS, found.verdict, verdicts):
        assert want is None or verdict in want.split("|"), (claim, verdict)


def test_claims_that_cannot_be_judged():
    table = made_grid(lambda c, h, b, t: .3 + .2*(c > 0)).query("target == 'teacher' and budget == 1000")
    found = distillation_claims(table).set_index("claim").verdict
    assert [*found.iloc[:2]] == ["holds"]*2 and [*found.iloc[4:]] == ["not judged"]*4
    assert (distillation_claims(table[table.student == "conv1"]).verdict == "not judged").all()
    assert set(distillation_claims(made_grid(lambda c, h, b, t: .3 + .2*(c > 0), seeds=1)).verdict) == {"undecided"}


def test_larger_mlps_only():
    "An MLP of the same size says nothing on whether a small student beats larger ones."
    table = made_grid(lambda c, h, b, t: .3 + .2*(c > 0) + .5*(b > 1_000)*(c == 0))
    row = distillation_claims(table[(table.convs == 0) | (table.budget == 1_000)]).iloc[4]
    assert row.verdict == "fails" and "of 1,000 over" in row.effect and "10,000 weights" in row.effect


def test_parts_add_up():
    draw = np.random.default_rng(1)
    cells = [("conv", 0), ("conv", 5), ("efcn", 0), ("efcn", 5), ("elcn", 0), ("elcn", 5), ("fcn", 0), ("lcn", 0), ("mlp", 0)]
    table = pd.DataFrame([dict(network=n, relax=t, seed=s, accuracy=draw.random()) for n, t in cells for s in range(3)])
    parts = start_or_architecture(table).set_index(["space", "relax", "part"])
    for space in ("fcn", "lcn"):
        for t in (0, 5):
            p = parts.loc[space, t]
            assert abs(p.gap["whole"] - p.gap["start"] - p.gap["constraint"]) < 1e-12 and abs(p.share["start"] + p.share["constraint"] - 1) < 1e-12
    A = table.set_index(["network", "relax", "seed"]).accuracy
    d = A["elcn", 5] - A["lcn", 0]
    assert abs(parts.gap["lcn", 5, "start"] - d.mean()) < 1e-12 and abs(parts.spread["lcn", 5, "start"] - d.std()) < 1e-12


# All of it

def test_study(tmp_path):
    data = load_data("digits")
    data = Data(data.train.thinned(200), data.test.thinned(50))
    settings = dict(transfer=dict(copies=2), teacher=dict(teachers=1, width=2, epochs=1), students=["mlp1", "conv1"], budgets=[1_500], larger_mlps=[3_000], label_budgets=[1_500],
                    embedded=dict(budget=1_000, name="conv1"), **(FAST | dict(epochs=1)))
    tables = distillation_study(data, tmp_path, **settings)
    assert set(tables) == {"teachers", "grid", "gaps", "claims", "embedded", "parts"} == {p.stem for p in tmp_path.glob("*.csv")}
    assert tables["grid"].groupby(["student", "target", "budget"]).size().to_dict() == {
        (s, t, b): 2 for s, t, b in [("conv1", "labels", 1_500), ("conv1", "teacher", 1_500), ("mlp1", "labels", 1_500), ("mlp1", "teacher", 1_500), ("mlp1", "teacher", 3_000)]}
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/"grid.csv"), tables["grid"], check_dtype=False)
    assert set(distillation_study(data, tmp_path, **(settings | dict(embedded=False)))) == {"teachers", "grid", "gaps", "claims"}
    rate = distillation_study(data, tmp_path, **(settings | dict(students=["mlp1"], embedded=dict(budget=1_000, name="conv1", networks=["fcn"], lrs=[5e-3], seeds=[4]))))["embedded"]
    assert set(rate.lr) == {5e-3} and set(rate.seed) == {4}, "what is said of the embedded ones goes before what is said of all"
    for wrong, words in [(dict(budgets=[9]), "no width meets"), (dict(budgets=[]), "budgets is empty"), (dict(students=[]), "students is empty"), (dict(larger_mlps=[1_500]), "budgets and larger_mlps holds 1500 twice"),
                         (dict(larger_mlps=[9]), "no width meets"), (dict(lrs=[]), "at least one learning rate"), (dict(seeds=[]), "seeds is empty"), (dict(epochs=0), "at least one epoch"), (dict(device="nope"), "no device 'nope'"),
                         (dict(embedded=dict(name="mlp1")), "no convolution to embed"), (dict(embedded=dict(networks=["vit"])), "unknown networks vit"), (dict(embedded=dict(budget=2)), "no width meets"), (dict(label_budgets=[9]), "no width meets")]:
        with pytest.raises(ValueError, match=words): distillation_study(data, tmp_path/"new", **(settings | wrong))
    with pytest.raises(TypeError, match="unexpected keyword argument 'nam'"): distillation_study(data, tmp_path/"new", **(settings | dict(embedded=dict(nam="conv1"))))
    assert not (tmp_path/"new").exists()
