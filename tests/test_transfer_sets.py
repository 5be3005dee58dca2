"Images, transfer sets, teaching and stored logits, against numpy and steps written out."
import copy
import math
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import efcn_nb.instruments.transfer_sets as room
import efcn_nb.training.loop as loop
from efcn_nb.instruments.students import make_teacher, student
from efcn_nb.instruments.transfer_sets import (
    Splits, TransferSet, augment, distil, load_logits, standardise, standardised, store_logits, teach, teacher_logits,
    transfer_batches, transfer_set)
from efcn_nb.materials.data import load_data
from lessons import noise, taught


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small():
    "Splits of a few digits, and a transfer set that two teachers have answered."
    data = load_data("digits")
    splits = Splits(data.train.thinned(200), standardised(data.train.thinned(50)), standardised(data.test.thinned(60)))
    transfer, table = teach(splits, transfer_set(splits.train, 2, 1, fill="constant"), teachers=2, width=4, epochs=2)
    return splits, transfer, table


# Images


@pytest.mark.parametrize("scale", [1e-3, .05, 3.])
def test_standardise_keeps_faint_images(scale):
    x = torch.randn(6, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(standardise(scale*x), standardise(x), atol=1e-4, rtol=0)


# The transfer set


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
    assert transfer.images.y.equal(torch.cat([images.y] * 3)) and transfer_set(images, 2).images.x.equal(
        torch.cat([images.x] * 2)
    )
    draw = torch.Generator().manual_seed(2)
    assert transfer.images.x.equal(torch.cat([augment(images.x, draw, 1) for _ in range(3)]))


def test_order_is_the_seeds():
    a, b = (torch.cat([x for x, _ in transfer_batches(taught(noise(30), seed=seed), 1)]) for seed in (0, 1))
    assert not a.equal(b)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    assert b.equal(standardise(noise(30).x[order]))


@pytest.mark.parametrize("settings, words",
                         [(dict(shift=8), "shift must be a whole number from 0 to 7, not 8"),
                          (dict(shift=-1), "from 0 to 7, not -1"),
                          (dict(fill="wrap"), "unknown fill 'wrap'; known are reflect, constant"),
                          (dict(copies=0), "copies must be a whole number, 1 or more, not 0")])
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
    targets = [torch.cat([z for _, z in transfer_batches(taught(noise(50), scale=s, offset=o), 1)])
               for s, o in ((1, 0), (scale, offset))]
    torch.testing.assert_close(*targets, atol=1e-3, rtol=0)
    assert abs(targets[0].mean()) < 1e-5 and abs(targets[0].std() - 1) < 1e-5
    assert targets[1].argmax(1).equal(targets[0].argmax(1))


def test_logits_that_do_not_fit():
    images = noise(12)
    for shape in [(11, 3), (12, 4), (12,)]:
        with pytest.raises(ValueError, match="do not fit a transfer set of 12 images and 3 classes"):
            TransferSet(images, logits=torch.zeros(shape))
    with pytest.raises(ValueError, match="not finite"): TransferSet(images, logits=torch.full((12, 3), math.inf))
    with pytest.raises(ValueError, match="12 images cannot be 5 copies"): TransferSet(images, 5)
    for copies in (0, -1):
        with pytest.raises(ValueError, match=f"1 or more, not {copies}"): TransferSet(images, copies)
    with pytest.raises(ValueError, match="not finite"): TransferSet(images, logits=torch.full((12, 3), math.nan))


def test_digest_tells_everything():
    t = taught(noise(12), 2)
    logits, x = t.logits.clone(), t.images.x.clone()
    logits[3, 1] += 1e-5
    x[0, 0, 0, 0] ^= 1
    others = [replace(t, copies=3), replace(t, seed=1), replace(t, logits=None), replace(t, logits=logits),
              replace(t, images=replace(t.images, x=x)), t]
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
    with pytest.raises(ValueError, match="the same classes, not 10 and 4"):
        teacher_logits([nets[0], make_teacher((1, 16, 16), 4, 2)], images)
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
    assert names == "CBRCMBR"*3 + "FL"
    assert [m.out_channels for m in nets[0] if isinstance(m, nn.Conv2d)] == [4, 4, 8, 8, 16, 16]


def test_teachers_answer_once(small, tmp_path, monkeypatch):
    splits, transfer, table = small
    bare, settings = replace(transfer, logits=None), dict(teachers=2, width=4, epochs=2, folder=tmp_path)
    first, rows = teach(splits, bare, **settings)
    assert first.logits.equal(transfer.logits) and rows.equals(table), "with a folder or without"
    assert [*rows.teacher] == ["0", "1", "average"]
    monkeypatch.setattr(room, "distil", lambda *_: pytest.fail("trained again"))
    assert teach(splits, bare, **settings)[0].logits.equal(transfer.logits)
    monkeypatch.undo()
    next(tmp_path.glob("teacher-*")).write_bytes(b"broken")
    with pytest.raises(ValueError, match="is damaged .*delete it, and the teacher is asked again"):
        teach(splits, bare, **settings)
    with pytest.raises(ValueError, match="teachers must be a whole number, 1 or more, not 0"):
        teach(splits, bare, teachers=0)


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
    for write in (lambda: store_logits(tmp_path / "file" / "z", dict(a=torch.zeros(2, 2)), "mine"),
                  lambda: teach(splits, replace(transfer, logits=None), folder=tmp_path / "file")):
        with pytest.raises(OSError, match="file cannot be made a folder .*choose another"): write()
    with pytest.raises(ValueError, match="is a folder, not a file of logits"): load_logits(tmp_path, "mine")


def test_teachers_are_known_by_all_that_determines_them(small, tmp_path):
    splits, bare = small[0], replace(small[1], logits=None)
    other = replace(splits.test, x=splits.test.x + 1)
    for s, t, more in [(splits, bare, {}), (splits._replace(test=other), bare, {}),
                       (splits._replace(validation=other), bare, {}), (splits, replace(bare, seed=7), {}),
                       (splits, bare, dict(batch_size=50)), (splits, bare, dict(lr=0.02))]:
        teach(s, t, **(dict(teachers=1, width=1, epochs=1, folder=tmp_path) | more))
    assert len([*tmp_path.glob("teacher-*")]) == 6


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
    open_now, real = [], loop._switched
    @contextmanager
    def watched(*args):
        open_now.append(args[0])
        with real(*args): yield
        open_now.pop()
    monkeypatch.setattr(loop, "_switched", watched)
    net, seen = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), []
    net[1].weight.register_hook(lambda g: seen.append([*open_now]))
    distil(net, taught(noise(20)), 1, .01)
    assert seen == [["fp32"]] and not open_now


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


@pytest.mark.parametrize("settings, words", [
    (dict(lr=0), "lr must be a positive number, not 0"),
    (dict(epochs=0), "epochs must be a whole number, 1 or more, not 0"),
    (dict(batch_size=0), "batch_size must be a whole number, 1 or more, not 0"),
    (dict(precision="fp8"), "precision must be one of"),
    (dict(target="soft"), "unknown target 'soft'; known are teacher, labels")])
def test_impossible_training(settings, words):
    net = student(0, 1, 4_000, (1, 8, 8), 3)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=words): distil(net, taught(noise(20)), **(dict(epochs=1, lr=.1) | settings))
    assert all(before[k].equal(v) for k, v in net.state_dict().items())


def test_classes_that_differ():
    with pytest.raises(ValueError, match="the student answers 4 classes, teacher and transfer set have 3"):
        distil(student(0, 1, 4_000, (1, 8, 8), 4), taught(noise(20)), 1, 0.1)


def test_images_that_differ(small):
    with pytest.raises(ValueError, match=r"does not take images of shape \(1, 8, 8\)"):
        distil(student(0, 1, 4_000, (1, 16, 16), 3).eval(), taught(noise(20)), 1, 0.1)
