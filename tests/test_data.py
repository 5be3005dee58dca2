"""Every source in its true format, the cache, bad input, batches: `efcn_nb.data` against oracles of another kind."""
import copy
import gzip
import hashlib
import os
import pickle
import random
import struct
import tarfile
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST, ImageFolder

import keep
from efcn_nb.materials import data
from efcn_nb.materials.data import Data, Dataset, channel_stats, load_data, stratified_split


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def write_image(path, seed, size=(6, 5), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def flat(tmp_path):
    "FOLDER/<class>/*: two classes of six PNG images."
    for k in range(12): write_image(tmp_path / "pets" / ("cat", "dog")[k % 2] / f"{k:02}.png", k)
    return tmp_path / "pets"


@pytest.fixture
def split(tmp_path):
    "FOLDER/train/<class>/* and FOLDER/test/<class>/*, JPEG among them."
    for part, n in ("train", 8), ("test", 4):
        for k in range(n):
            write_image(tmp_path / "pets" / part / ("cat", "dog")[k % 2] / f"{k}.{('png', 'jpg')[k // 2 % 2]}",
                        100*n + k)
    return tmp_path / "pets"


def same(a, b): return (a.train.fingerprint, a.test.fingerprint) == (b.train.fingerprint, b.test.fingerprint)


# Dataset

@pytest.mark.parametrize("index", [[3, 0, 3], torch.tensor([19]), range(4), []], ids=str)
def test_picked_samples(index):
    whole, part = photos(), photos().picked(index)
    where = torch.as_tensor(index, dtype=torch.long)
    assert torch.equal(part.x, whole.x[where]) and torch.equal(part.y, whole.y[where])
    assert (part.classes, part.name) == (whole.classes, whole.name) and torch.equal(part.mean, whole.mean)


BALANCED = dict(ordered=torch.arange(5).repeat_interleave(12), in_turn=torch.arange(60) % 5,
                mixed=(torch.arange(60) % 5)[torch.randperm(60, generator=torch.Generator().manual_seed(1))])


@pytest.mark.parametrize("size", [1, 4, 5, 7, 20, 60])
@pytest.mark.parametrize("case", BALANCED)
def test_blocks_of_balanced_classes_are_disjoint_and_balanced(case, size):
    "Exactly, where blocks hold all classes equally often; up to rounding at both ends of a block otherwise."
    y = BALANCED[case]
    whole = Dataset(torch.zeros(len(y), 1, 2, 2), y, list("abcde"), torch.zeros(1), torch.ones(1), "numbers")
    order = whole.class_by_class()
    assert sorted(order.tolist()) == list(range(len(y)))
    for block in order.split(size):
        counts = y[block].bincount(minlength=5)
        if size % 5 == 0: assert (counts == len(block)//5).all()
        assert (counts - len(block)/5).abs().max() < 2
    assert torch.equal(order, whole.class_by_class(0)) and not torch.equal(order, whole.class_by_class(1))


@pytest.mark.parametrize("counts", [(1, 1, 40), (3, 10, 29), (7, 14, 21), (42, 0, 1)])
def test_blocks_of_unbalanced_classes_have_the_shares_of_the_whole(counts):
    "Up to rounding at both ends of a block."
    y = torch.arange(3).repeat_interleave(torch.tensor(counts))
    whole = Dataset(torch.zeros(len(y), 1, 2, 2), y, list("abc"), torch.zeros(1), torch.ones(1), "numbers")
    order = whole.class_by_class(2)
    assert sorted(order.tolist()) == list(range(len(y)))
    shares = torch.tensor(counts)/len(y)
    for size in (6, 7, 14):
        for block in order.split(size):
            assert (y[block].bincount(minlength=3) - len(block)*shares).abs().max() < 2


def photos(n=20):
    x = torch.randint(256, (n, 3, 8, 8), generator=seeded(), dtype=torch.uint8)
    return Dataset(x, torch.arange(n) % 4, list("abcd"), *channel_stats(x), "photos")


def test_batch_is_normalised_as_torchvision_does():
    photo, index = photos(), torch.tensor([7, 0, 7, 19])
    x, y = photo.batch(index)
    pipeline = transforms.Compose([transforms.ToTensor(),
                                   transforms.Normalize(photo.mean.tolist(), photo.std.tolist())])
    expected = torch.stack([pipeline(image.permute(1, 2, 0).numpy()) for image in photo.x[index]])
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)
    assert x.dtype == torch.float32 and torch.equal(y, photo.y[index])


@pytest.mark.parametrize("spatial", [(9,), (4, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_any_number_of_axes(spatial, dtype):
    x = torch.randint(256, (30, 2, *spatial), generator=seeded()).to(dtype)
    before = x.clone()
    one = Dataset(x, torch.zeros(30, dtype=torch.int64), ["a"], *channel_stats(x), "noise")
    batch = one.batch(range(30))[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(batch.mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.std(1, correction=0), torch.ones(2), atol=1e-5, rtol=0)
    assert one.shape == (2, *spatial) and torch.equal(one.x, before)


@pytest.mark.parametrize("x", [torch.full((3, 1, 7, 7), 7, dtype=torch.uint8),
                               *(torch.full((n, 1, 11, 13), v) for n, v in [(3, .1), (7, .7), (50, 1/3)])])
def test_constant_channel_divides_by_one(x):
    mean, std = channel_stats(x)
    assert std.tolist() == [1.]
    batch = Dataset(x, torch.zeros(len(x), dtype=torch.int64), ["a"], mean, std, "flat").batch([0, 1, 2])[0]
    assert batch.abs().max() < 1e-6


def test_shuffling():
    numbered = photos()
    numbered = Dataset(numbered.x, torch.arange(20), list(range(20)), numbered.mean, numbered.std, "numbered")
    def order(generator=None): return torch.cat([y for _, y in numbered.batches(6, generator)]).tolist()
    assert order() == list(range(20))
    assert order(seeded(1)) == order(seeded(1)) != order(seeded(2))
    assert sorted(order(seeded(1))) == list(range(20)) != order(seeded(1))
    going_on = seeded(1)
    assert order(going_on) != order(going_on)
    assert [len(y) for _, y in numbered.batches(6, seeded())] == [6, 6, 6, 2]
    for x, y in numbered.batches(6, seeded(3)): assert torch.equal(x, numbered.batch(y)[0])


def test_permutation_is_drawn_at_once():
    one, other = seeded(), seeded()
    unused = photos().batches(3, one)
    torch.randperm(20, generator=other)
    assert torch.equal(one.get_state(), other.get_state())
    next(unused)
    assert torch.equal(one.get_state(), other.get_state())


def test_fingerprint_sees_content_only():
    photo = photos()
    assert photo.fingerprint == photos().fingerprint == photo.to("cpu").fingerprint
    changes = dict(x=photo.x.flip(0), y=photo.y.flip(0), mean=photo.mean + 1e-6, std=photo.std + 1e-6)
    seen = {data.replace(photo, **{k: v}).fingerprint for k, v in changes.items()}
    assert len(seen | {photo.fingerprint}) == 5
    assert data.replace(photo, x=photo.x.view(20, 3, 4, 16)).fingerprint != photo.fingerprint
    assert data.replace(photo, name="other").fingerprint == photo.fingerprint


@pytest.mark.parametrize("change, message", [
    (dict(x=torch.zeros(20, 3, 2, dtype=torch.float64)), "uint8 or float32"),
    (dict(y=torch.zeros(19, dtype=torch.int64)), "one label for each of the 20 images"),
    (dict(y=torch.zeros(20)), "int64"),
    (dict(y=torch.full((20,), 4)), "between 0 and 3"),
    (dict(y=torch.full((20,), -1)), "between 0 and 3"),
    (dict(std=torch.ones(1)), "3 entries"),
    (dict(y=torch.zeros(20, 1, dtype=torch.int64)), "one label for each of the 20 images"),
    (dict(y=list(range(20))), "y is a list: make it a tensor"),
    (dict(y=torch.zeros(20, dtype=torch.int32)), "int64"), (dict(y=torch.full((20,), float("nan"))), "int64"),
    (dict(y=torch.ones(20, dtype=torch.bool)), "int64"),
    (dict(x=np.zeros((20, 3, 8, 8), np.uint8)), "x is a ndarray: make it a tensor"),
    (dict(x=torch.zeros(20)), r"x has the shape \(20,\)"),
    (dict(x=torch.zeros(20, 3, 8, 8, dtype=torch.int64)), "uint8 or float32"),
    (dict(classes=list("abca")), "a name of its own"), (dict(classes=["a"]), "between 0 and 0"),
    (dict(std=torch.tensor([1., 0., 1.])), "std positive"),
    (dict(x=torch.zeros(20, 3, 8, 8, requires_grad=True)), "x requires gradients: give x.detach()"),
    (dict(mean=torch.zeros(3, requires_grad=True)), "mean requires gradients"),
    (dict(mean=torch.full((3,), float("nan"))), "must be finite"), (dict(std=-torch.ones(3)), "std positive")])
def test_dataset_parts_must_fit(change, message):
    with pytest.raises(ValueError, match=message): data.replace(photos(), **change)


def changed(part, **change): return data.replace(part, **change)


def spoilt(part, value):
    x = part.x.float()
    x[3, 0, 2, 2] = value
    return changed(part, x=x)


@pytest.mark.parametrize("change, message", [
    (lambda a: (a, changed(a, classes=list("abdc"))),
     r"label 2 is c in the one and d in the other: say test.with_classes\(train.classes\)"),
    (lambda a: (changed(a, classes=list("dcba")), a), "in different orders"),
    (lambda a: (a, changed(a, classes=list("abce"))), "only in train: d; only in test: e"),
    (lambda a: (a, changed(a, classes=list("abcde"))), r"different classes \(only in test: e\)"),
    (lambda a: (changed(a, classes=list("abcdef")), a), r"different classes \(only in train: e, f\)"),
    (lambda a: (a, changed(a, x=a.x[:, :, :7])),
     r"the test images have the shape \(3, 7, 8\): there must be test images, of the shape \(3, 8, 8\)"),
    (lambda a: (a, changed(a, x=a.x[:, :1], mean=a.mean[:1], std=a.std[:1])), r"the shape \(1, 8, 8\)"),
    (lambda a: (a, changed(a, x=a.x.flatten(2))), r"the shape \(3, 64\)"),
    (lambda a: (changed(a, y=a.y*0, classes=["a"]), changed(a, y=a.y*0, classes=["a"])),
     "all images are of one class, a: classification needs two"),
    (lambda a: (changed(a, y=a.y*0 + 2), changed(a, y=a.y*0 + 2)), "all images are of one class, c"),
    (lambda a: (spoilt(a, float("nan")), a), "1 of 20 training images hold NaN or infinite numbers, image 3 first"),
    (lambda a: (a, spoilt(a, float("inf"))), "1 of 20 test images hold NaN or infinite numbers, image 3 first"),
    (lambda a: (spoilt(a, -float("inf")), a), "1 of 20 training images")])
def test_splits_must_belong_together(change, message):
    train, test = change(photos())
    ways = (lambda: Data(train, test), lambda: Data(train=train, test=test), lambda: Data._make([train, test]),
            lambda: Data(train, train)._replace(test=test))
    for way in ways:
        with pytest.raises(ValueError, match=message) as caught: way()
        assert "\n" not in str(caught.value)


def test_data_stay_a_pair():
    a, b = photos(), changed(photos(), x=photos().x.flip(0))
    both = Data(a, b, notes=["one"])
    train, test = both
    assert (train, test) == (a, b) and both._fields == ("train", "test") and len(both) == 2 and Data(a, b).notes == ()
    for kept in both.to("cpu"), both._replace(test=a), pickle.loads(pickle.dumps(both)), copy.copy(both):
        assert kept.notes == ("one",) and isinstance(kept, Data)
    with pytest.raises(TypeError): Data(a, b, a)
    for n in 0, 1: Data(changed(a, x=a.x[:n], y=a.y[:n]), changed(b, x=b.x[:1], y=b.y[:1]))  # training says it


@pytest.mark.parametrize("make, said", [
    (lambda a: Data(a, None), "not of NoneType"), (lambda a: Data((1, 2), (3, 4)), "not of tuple"),
    (lambda a: Data(a.x, a.x), "not of Tensor"),
    (lambda a: load_data(a), r"one Dataset, a split: say Data\(train, test"),
    (lambda a: load_data(None), "or a folder of images, .* not None"), (lambda a: load_data(3), "not 3"),
    (lambda a: load_data([1, 2]), r"not \[1, 2\]"), (lambda a: load_data(b"x"), "not b'x'")])
def test_what_are_no_data(make, said):
    with pytest.raises(ValueError, match=said) as caught: make(photos())
    assert "\n" not in str(caught.value)


def test_a_collection_comes_in_its_own_size():
    with pytest.raises(ValueError, match="size is for folders of images: digits comes in its own size"):
        load_data("digits", size=8)


def test_bad_batches():
    with pytest.raises(ValueError, match="batch_size must be a whole number, 1 or more, not 0"): photos().batches(0)
    # a mask is no index
    with pytest.raises((RuntimeError, IndexError)):
        photos().batch(torch.ones(20, dtype=torch.bool))
    with pytest.raises((RuntimeError, IndexError)): photos().batch([20])
    with pytest.raises(ValueError, match="n must be a whole number, 1 or more, not 0"): photos().thinned(0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_batches_on_the_gpu():
    photo = photos()
    for (x, y), (gx, gy) in zip(photo.batches(6, seeded()), photo.to("cuda").batches(6, seeded())):
        torch.testing.assert_close(gx.cpu(), x)
        assert gx.is_cuda and torch.equal(gy.cpu(), y)
    assert photo.to("cuda").fingerprint == photo.fingerprint


# Splits and digits

def test_split_is_stratified_and_seeded():
    y = torch.tensor([0]*50 + [1]*20 + [2]*10)[torch.randperm(80, generator=seeded())]
    train, test = stratified_split(y, .2, seeded())
    assert torch.equal(torch.cat([train, test]).sort().values, torch.arange(80))
    assert y[test].bincount().tolist() == [10, 4, 2]
    assert torch.equal(test, stratified_split(y, .2, seeded())[1])
    assert not torch.equal(test, stratified_split(y, .2, seeded(1))[1])


@pytest.mark.parametrize("share", [0, 1, -.1, 1.5, float("nan")])
def test_share_outside(share):
    with pytest.raises(ValueError, match="between 0 and 1"): load_data(test_share=share)


def test_share_that_empties_a_class():
    with pytest.raises(ValueError, match="no test image"): load_data(test_share=.001)
    with pytest.raises(ValueError, match="no training image"): load_data(test_share=.999)


def test_shifted_digits_are_whole_and_everywhere():
    centred, shifted = load_data(shift=False), load_data()
    corners = set()
    for a, b in zip(centred.train.x[:, 0, 4:12, 4:12], shifted.train.x[:, 0]):
        windows = b.unfold(0, 8, 1).unfold(1, 8, 1)
        at = (windows == a).all(-1).all(-1).nonzero()
        assert len(at) and b.sum() == a.sum()
        if len(at) == 1: corners.add(tuple(at[0].tolist()))
    assert len(corners) == 81
    assert torch.equal(centred.train.y, shifted.train.y)
    assert same(shifted, load_data()) and not same(shifted, load_data(seed=1))
    names = [load_data().train.name, load_data(shift=False).test.name, load_data(name="scans").test.name]
    assert names == ["digits", "digits (centred)", "scans"]


def test_both_splits_share_the_training_normalisation():
    for part in load_data():
        mean, std = channel_stats(load_data().train.x)
        assert torch.equal(part.mean, mean) and torch.equal(part.std, std)


def test_no_global_random_state_is_used(flat):
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = load_data(), load_data(flat)
    list(first[0].train.batches(100, seeded()))
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    assert torch.equal(before[0], after[0]) and np.array_equal(before[1], after[1]) and before[2] == after[2]
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    assert same(load_data(), first[0]) and same(load_data(flat), first[1])


# torchvision's collections, in files of the true formats

def md5(path): return hashlib.md5(Path(path).read_bytes()).hexdigest()


def write_cifar(root, make, monkeypatch):
    "The python pickles of CIFAR-10 or CIFAR-100, four images a file; torchvision's checksums are made to agree."
    folder, rng, written = root / make.base_folder, np.random.default_rng(0), {}
    folder.mkdir(parents=True)
    key = "labels" if make is CIFAR10 else "fine_labels"
    for attribute in "train_list", "test_list":
        sums = []
        for name, _ in getattr(make, attribute):
            pixels, labels = rng.integers(0, 256, (4, 3072), dtype=np.uint8), rng.integers(0, 10, 4).tolist()
            (folder / name).write_bytes(pickle.dumps({"data": pixels, key: labels}))
            sums.append([name, md5(folder / name)])
            written.setdefault(attribute, []).append((pixels, labels))
        monkeypatch.setattr(make, attribute, sums)
    meta = dict(make.meta)
    (folder / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: [f"class {i}" for i in range(10)]}))
    monkeypatch.setattr(make, "meta", meta | {"md5": md5(folder / meta["filename"])})
    return {k: (np.concatenate([p for p, _ in v]), sum([y for _, y in v], [])) for k, v in written.items()}


@pytest.mark.parametrize("source, make, name", [("cifar10", CIFAR10, "CIFAR-10"), ("cifar100", CIFAR100, "CIFAR-100")])
def test_cifar(source, make, name, tmp_path, monkeypatch):
    written = write_cifar(tmp_path, make, monkeypatch)
    loaded = load_data(source, root=tmp_path)
    for part, (pixels, labels) in zip(loaded, written.values()):
        assert np.array_equal(part.x.flatten(1), pixels) and part.y.tolist() == labels
        assert (part.shape, part.name, part.classes[3]) == ((3, 32, 32), name, "class 3")
    constants = torch.tensor([.491, .482, .447]), torch.tensor([.247, .243, .262])
    own = channel_stats(loaded.train.x)
    for value, expected in zip((loaded.test.mean, loaded.test.std), constants if source == "cifar10" else own):
        assert torch.equal(value, expected)


def test_cifar_is_unpacked_from_torchvisions_archive(tmp_path, monkeypatch):
    written = write_cifar(tmp_path / "made", CIFAR10, monkeypatch)
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(root / CIFAR10.filename, "w:gz") as archive:
        archive.add(tmp_path / "made" / CIFAR10.base_folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(root / CIFAR10.filename))
    assert np.array_equal(load_data("cifar10", root=root).train.x.flatten(1), written["train_list"][0])


def idx(a): return bytes([0, 0, 8, a.ndim]) + b"".join(n.to_bytes(4, "big") for n in a.shape) + a.tobytes()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("source, make, name",
                         [("mnist", MNIST, "MNIST"), ("fashion_mnist", FashionMNIST, "Fashion-MNIST")])
def test_mnist(source, make, name, packed, tmp_path, monkeypatch):
    raw, rng, written, sums = tmp_path / make.__name__ / "raw", np.random.default_rng(0), [], []
    raw.mkdir(parents=True)
    for part, n in ("train", 6), ("t10k", 3):
        written.append((rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), rng.integers(0, 10, n, dtype=np.uint8)))
        for a, kind in zip(written[-1], ("images-idx3-ubyte", "labels-idx1-ubyte")):
            path = raw / f"{part}-{kind}{'.gz' * packed}"
            path.write_bytes(gzip.compress(idx(a)) if packed else idx(a))
            sums.append((f"{part}-{kind}.gz", md5(path)))
    monkeypatch.setattr(make, "resources", sums)
    for part, (x, y) in zip(load_data(source, root=tmp_path, download=packed), written):
        assert np.array_equal(part.x[:, 0], x) and np.array_equal(part.y, y)
        assert (part.shape, part.name, len(part.classes)) == ((1, 28, 28), name, 10)


@pytest.mark.parametrize("source, make", [("cifar10", CIFAR10), ("cifar100", CIFAR100), ("mnist", MNIST),
                                          ("fashion_mnist", FashionMNIST)])
def test_missing_collection(source, make, tmp_path, monkeypatch):
    nowhere = f"file://{tmp_path}/nowhere/"
    monkeypatch.setattr(make, *(("mirrors", [nowhere]) if hasattr(make, "mirrors") else ("url", nowhere + "x.tar.gz")))
    for download, reason in (False, "download is False"), (True, "downloading it failed"):
        with pytest.raises(FileNotFoundError, match="is not complete in") as error:
            load_data(source, root=tmp_path / "root", download=download)
        assert reason in str(error.value) and str(tmp_path / "root") in str(error.value)
        assert "\n" not in str(error.value)


def test_cut_file_of_a_collection(tmp_path, monkeypatch):
    write_cifar(tmp_path, CIFAR10, monkeypatch)
    with open(tmp_path / CIFAR10.base_folder / "data_batch_3", "r+b") as file: file.truncate(100)
    with pytest.raises(FileNotFoundError, match="CIFAR-10 is not complete"):
        load_data("cifar10", root=tmp_path, download=False)


# Folders of images

@pytest.mark.parametrize("layout", ["flat", "split"])
def test_folder_equals_image_folder(layout, request):
    folder = request.getfixturevalue(layout)
    loaded = load_data(folder)
    if layout == "flat":
        whole = ImageFolder(folder)
        index = stratified_split(torch.tensor(whole.targets), .2, seeded())
        expected = [[whole[k] for k in part.tolist()] for part in index]
    else: expected = [list(ImageFolder(folder / part)) for part in ("train", "test")]
    for part, samples in zip(loaded, expected):
        assert len(part) == len(samples) and part.classes == ["cat", "dog"] and part.name == "pets"
        for x, y, (image, label) in zip(part.x, part.y, samples):
            assert np.array_equal(x.permute(1, 2, 0), np.asarray(image)) and y == label


def test_folder_arguments(flat, monkeypatch):
    assert load_data(flat, name="CIFAR-10 (JPEG)").test.name == "CIFAR-10 (JPEG)"
    assert len(load_data(flat, test_share=.5).test) == 6
    assert not same(load_data(flat), load_data(flat, seed=1))
    monkeypatch.chdir(flat.parent)
    assert same(load_data("pets"), load_data(flat)) and load_data("./pets/").train.name == "pets"
    monkeypatch.chdir(flat)
    assert same(load_data("."), load_data(flat)) and load_data(".").train.name == "pets"


def test_hidden_and_cache_folders_are_no_classes(flat):
    for name in ".ipynb_checkpoints", "cat.cache": (flat / name).mkdir()
    (flat / "notes.txt").write_text("no image")
    assert load_data(flat).train.classes == ["cat", "dog"]


def test_grey_only_if_all_are(flat):
    for path in flat.rglob("*.png"): write_image(path, 0, mode="L")
    assert load_data(flat).train.shape == (1, 5, 6)
    write_image(flat / "dog" / "11.png", 1)
    loaded = load_data(flat)
    assert loaded.train.shape == (3, 5, 6)
    grey = torch.tensor(np.asarray(Image.open(flat / "cat" / "00.png")))
    k = loaded.train.y.tolist().index(0)
    assert all(torch.equal(channel, grey) for channel in loaded.train.x[k])


@pytest.mark.parametrize("size, shape", [(4, (3, 4, 4)), ((3, 7), (3, 3, 7)), ([5, 6], (3, 5, 6))])
def test_size(flat, size, shape):
    write_image(flat / "cat" / "00.png", 0, size=(9, 9))
    loaded = load_data(flat, size=size, test_share=.5)
    assert loaded.train.shape == shape
    images = [Image.open(p).resize(shape[:0:-1], Image.Resampling.BILINEAR) for p in sorted((flat / "cat").iterdir())]
    found = {x.numpy().tobytes() for part in loaded for x in part.x}
    assert all(np.asarray(image).transpose(2, 0, 1).tobytes() in found for image in images)


@pytest.mark.parametrize("size", [0, -3, 2.5, (3,), (3, 0), "8"])
def test_bad_size(flat, size):
    with pytest.raises(ValueError, match="size is .* positive number of pixels"): load_data(flat, size=size)


def fails(source, *words, error=(ValueError, FileNotFoundError), **kwargs):
    with pytest.raises(error) as caught: load_data(source, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and all(str(word) in text for word in words), text


def test_no_such_folder(tmp_path):
    fails(tmp_path / "gone", "gone does not exist")
    fails(Path("gone"), "gone does not exist")
    (tmp_path / "images.tar").write_bytes(b"")
    fails(tmp_path / "images.tar", "is a file, not a folder")


def test_empty_folder(tmp_path):
    fails(tmp_path, tmp_path, "no class folders", "<class>")
    (tmp_path / "loose.png").write_bytes(b"")
    fails(tmp_path, "no class folders")
    for part in "train", "test": (tmp_path / part).mkdir()
    fails(tmp_path, "no class folders")



@pytest.mark.parametrize("layout, empty",
                         [("flat", ["bird"]), ("split", ["train/bird", "test/bird"]), ("split", ["test/dog"])])
def test_class_folder_without_images(layout, empty, request):
    folder = request.getfixturevalue(layout)
    for name in empty:
        (folder / name).mkdir(exist_ok=True)
        for path in (folder / name).iterdir(): path.unlink()
        (folder / name / "notes.txt").write_text("no image")
    fails(folder, f"class folder {folder / empty[0]} holds no image")


@pytest.mark.parametrize("content", [b"", b"no image", "cut"])
def test_broken_image(flat, content):
    path = flat / "dog" / "03.png"
    path.write_bytes(path.read_bytes()[:60] if content == "cut" else content)
    fails(flat, f"{path} cannot be read as an image", "replace or remove")


def test_cut_jpeg(split):
    path = split / "test" / "cat" / "2.jpg"
    path.write_bytes(path.read_bytes()[:-40])
    fails(split, f"{path} cannot be read as an image")


def test_different_sizes(flat):
    odd = write_image(flat / "dog" / "05.png", 0, size=(7, 5))
    fails(flat, f"{flat / 'cat' / '00.png'} has 5x6", f"{odd} 5x7", "say size=(5,6)")


def test_bad_share_is_said_before_decoding(flat, monkeypatch):
    monkeypatch.setattr(data, "_load_images", None)
    fails(flat, "class cat (6 images) no test image", test_share=.01)


# Folders as people have them

TWO = ["cat", "dog"]


def needs(kind):
    "Skip where PIL was built without a format."
    if kind in ("AVIF", "WEBP", "JPEG2000") and not features.check({"JPEG2000": "jpg_2000"}.get(kind, kind.lower())):
        pytest.skip(f"PIL was built without {kind}")


def split_tree(train, test, classes=TWO): return [f"{part}/{c}" for part in (train, test) for c in classes]


def plant(root, folders, extra=(), links=()):
    "Four images in each of `folders`; `extra` files, images whatever their names say; `links` (name, target)."
    for k, folder in enumerate(folders):
        for i in range(4): write_image(root / folder / f"{i}.png", 10*k + i)
    for k, name in enumerate(extra):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((5, 6, 3), k, np.uint8)).save(root / name, "PNG")
    for name, target in links: (root / name).symlink_to(root / target, target_is_directory=(root / target).is_dir())
    return root


PAIRS = [("Train", "Test"), ("TRAIN", "TEST"), ("training", "testing"), ("Training", "Test"), ("train", "testing"),
         ("training_set", "test_set"), ("train-set", "TestSet"), ("trainset", "testset"),
         ("Train Images", "Test Images"),
         ("01_train", "02_test"), ("seg_train", "seg_test"), ("train2017", "test2017"),
         ("seg_train/seg_train", "seg_test/seg_test"), ("train/images", "test/images"), ("data/train", "data/test"),
         ("a/b/c/Train", "a/b/c/Test")]


@pytest.mark.parametrize("train, test", PAIRS)
def test_parts_by_any_name(tmp_path, train, test):
    loaded = load_data(plant(tmp_path / "pets", split_tree(train, test)), cache=False)
    assert (len(loaded.train), len(loaded.test), loaded.train.classes, loaded.test.classes) == (8, 8, TWO, TWO)
    first = np.asarray(Image.open(tmp_path / "pets" / train / "cat" / "0.png")).transpose(2, 0, 1)
    assert np.array_equal(loaded.train.x[0], first)


@pytest.mark.parametrize("folders, classes", [
    (["images/cat", "images/dog"], TWO), (["pets/images/all/cat", "pets/images/all/dog"], TWO),
    (["val/cat", "val/dog"], TWO),
    (["valid", "invalid"], ["invalid", "valid"]), (["train", "car", "plane"], ["car", "plane", "train"]),
    (["test", "exam"], ["exam", "test"]), (["test1", "test2"], ["test1", "test2"]),
    (["test tube", "train station"], ["test tube", "train station"]),
    (["crash_test", "train_ride"], ["crash_test", "train_ride"]), (["cat/2019", "cat/2020", "dog"], TWO),
    (["car", "train_ride/a", "train_ride/b"], ["car", "train_ride"]),
    (["test strip", "train strip", "other"], ["other", "test strip", "train strip"]),
    (["crash test", "crash train"], ["crash test", "crash train"]),
    (["test_cat", "test_dog", "train_cat", "train_dog"], ["test_cat", "test_dog", "train_cat", "train_dog"]),
    (["test_cat", "test_dog", "train_cat"], ["test_cat", "test_dog", "train_cat"]),
    (["A", "a"], ["A", "a"]), (["images", "photos"], ["images", "photos"])])
def test_classes_are_found(tmp_path, folders, classes):
    loaded = load_data(plant(tmp_path, folders), cache=False, test_share=.25)
    assert loaded.train.classes == classes and len(loaded.train) + len(loaded.test) == 4*len(folders)


PLAIN = split_tree("train", "test")
LEFT_OUT = [  # what lies in the tree besides, its links, what is said of it, whether a warning is due
    (TWO, ["cat/.ipynb_checkpoints/0-checkpoint.png"], [], "hidden, or left by a system: 1 (cat/.ipynb_checkpoints)",
     False),
    (TWO, ["cat/._0.png", "dog/.DS_Store", "dog/Thumbs.db", "cat/desktop.ini", ".directory", "dog/deep/.hidden/x.png"],
     [], "hidden, or left by a system: 6", False),
    (TWO, ["__MACOSX/cat/._0.png", ".git/x.png", "__MACOSX/cat/x.png"], [], "hidden, or left by a system: 2", False),
    (TWO, ["cat/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "cat/__MACOSX/0.png"], [], "hidden, or left by a system: 2",
     False),
    (["pets/cat", "pets/dog"], ["__MACOSX/pets/cat/._0.png"], [], "the classes are the folders of pets", False),
    (PLAIN, ["train/.ipynb_checkpoints/0.png", "test/cat/.ipynb_checkpoints/0.png", "test/dog/._1.png"], [],
     "hidden, or left by a system: 3", False),
    (PLAIN, ["val/cat/0.png", "val/dog/0.png"], [], "validation images, which nothing uses: 1 (val)", False),
    (PLAIN, ["Validation/cat/0.png", "extra/0.png"], [], "folders beside train and test: 1 (extra)", True),
    (TWO, ["cat/5.heic", "cat/6.HEIC", "dog/9.svg"], [],
     "files with the ending .heic, which PIL does not read: 2 (cat/5.heic, ...)", True),
    (TWO, ["cat/4.eps", "dog/a.pdf", "cat/b.h5"], [],
     "files with the ending .pdf, which PIL does not read: 1 (dog/a.pdf)", True),
    (TWO, ["a.png", "b.jpg"], [], "images above the class folders, which belong to none: 2 (a.png, ...)", True),
    (PLAIN, ["train/a.png"], [], "images above the class folders, which belong to none: 1 (train/a.png)", True),
    (TWO, [], [("loop", ".")], "links to folders that are read already: 1 (loop)", True),
    (TWO, [], [("cat/loop", ".")], "links to folders that are read already: 1 (cat/loop)", True),
    (TWO, [], [("cat/self", "cat")], "links to folders that are read already: 1 (cat/self)", True),
    (["images/cat", "images/dog"], [], [("images/loop", ".")],
     "links to folders that are read already: 1 (images/loop)", True),
    (PLAIN, [], [("train/loop", "."), ("test/cat/loop", "test")], "links to folders that are read already: 2", True),
    (["cat/2019", "cat/2020", "dog/2019", "dog/2020"], [], [], "all class folders hold the same folders (2019, 2020)",
     True),
    (["cat/deep", "dog"], [], [("cat/later", "cat/deep")], "links to folders that are read already: 1 (cat/later)",
     True)]


@pytest.mark.parametrize("folders, extra, links, said, warned", LEFT_OUT)
def test_what_is_left_out_is_said(tmp_path, folders, extra, links, said, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load_data(plant(tmp_path / "pets", folders, extra, links), cache=False, test_share=.25)
    assert len(loaded.train) + len(loaded.test) == 4*len(folders) and loaded.train.classes == TWO
    text = loaded.describe()
    assert said in text and bool(caught) == warned
    assert "training images, too" not in text and "more than one class" not in text
    plain = load_data(plant(tmp_path / "plain" / "pets", folders), cache=False, test_share=.25)
    assert same(loaded, plain)


@pytest.mark.parametrize("layout", ["flat", "split"])
def test_an_ordinary_folder_has_nothing_to_say(layout, request):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_data(request.getfixturevalue(layout), cache=False).notes == ()


UNUSABLE = [
    (["cat"], [], [], ["one class only, cat"]),
    (["train/cat", "test/cat"], [], [], ["one class only, cat"]),
    (["images"], [], [], ["one class only, images"]),
    (split_tree("train", "val"), [], [], ["holds a folder train but none named test", "rename val"]),
    (split_tree("Train", "Validation"), [], [], ["holds a folder Train but none named test", "rename Validation"]),
    (["training/cat", "training/dog"], [], [],
     ["holds a folder training but none named test", "/training to have a share"]),
    (split_tree("train", "test") + ["Training/cat"], [], [], ["Training and train, one part twice"]),
    (["train/cat", "train/dog"], ["test/0.png", "test/1.png"], [],
     ["test holds no class folders, but 2 images without a class"]),
    (["cat/train", "cat/test", "dog/train", "dog/test"], [], [],
     ["cat holds training and test folders", "above the classes"]),
    ([], ["0.png", "1.jpg"], [], ["no class folders, but 2 images without a class"]),
    (["cat", "dog"], ["fish/a.heic", "fish/.b.png"], [],
     ["fish holds no image (hidden, or left by a system: 1; files with the ending .heic, which PIL does not read: 1)"]),
    (["images/cat", "images/dog"], ["annotations/cat.xml"], [],
     ["annotations holds no image", "or name", "/images if its folders are the classes"]),
    (["images"], ["annotations/list.txt"], [],
     ["annotations holds no image", "images lie flat, without class folders", "/<class>"]),
    (["train/cat", "train/dog", "train/fish", "test/cat", "test/dog", "test/bird"], [], [],
     ["only in train: fish; only in test: bird"]),
    (["train/A", "train/a", "test/a", "test/b"], [], [], ["only in train: A; only in test: b"]),
    (["train/cat", "train/dog"], [], [("test", "train")], ["train and", "test are one folder"]),
    (["train/cat", "train/dog", "test/dog"], [], [("test/cat", "train/cat")],
     ["cat in", "test and cat in", "train are one folder"]),
    (["cat", "dog"], [], [("kitty", "cat")], ["cat and kitty", "are one folder"]),
    (["cat", "dog"], [], [("cat/9.png", "gone.png")], ["cat/9.png is a link that leads nowhere"]),
    (["cat", "dog"], [], [("fish", "gone")], ["fish is a link that leads nowhere"]),
    (["A\u0308pfel", "\u00c4pfel"], [], [], ["have one name, written in two ways"])]


@pytest.mark.parametrize("folders, extra, links, said", UNUSABLE)
def test_unusable_trees(tmp_path, folders, extra, links, said):
    fails(plant(tmp_path, folders, extra, links), *said, cache=False)


@pytest.mark.filterwarnings("ignore:.*training images, too")
@pytest.mark.parametrize("pairs, names", [
    ([("\u00c4pfel", "A\u0308pfel"), ("b", "b")], ["b", "\u00c4pfel"]),
    ([("A\u0308pfel", "\u00c4pfel"), ("b", "b")], ["\u00c4pfel", "b"]),
    ([("Cat", "cat"), ("Dog", "DOG")], ["Cat", "Dog"]), ([("a", "A"), ("B", "b")], ["B", "a"]),
    ([("a", "a"), ("A", "A"), ("b", "B")], ["A", "a", "b"]),
    ([("cat ", "cat"), ("dog", "dog")], ["cat ", "dog"]),
    ([("Stra\u00dfe", "STRASSE"), ("x", "x")], ["Stra\u00dfe", "x"]), ([("10", "10"), ("9", "9")], ["10", "9"])])
def test_classes_of_the_parts_are_matched_by_name(tmp_path, pairs, names):
    for k, pair in enumerate(pairs):
        for part, name in zip(("train", "test"), pair):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("L", (4, 4), k).save(tmp_path / part / name / "0.png")
    loaded = load_data(tmp_path, cache=False)
    assert loaded.train.classes == loaded.test.classes == names
    shades = {data._same_name(name): k for k, (name, _) in enumerate(pairs)}
    for part in loaded: assert {names[y]: int(x[0, 0, 0]) for x, y in zip(part.x, part.y)} == shades


@pytest.mark.parametrize("ending, kind", [
    (".jfif", "JPEG"), (".jpe", "JPEG"), (".JPG", "JPEG"), (".gif", "GIF"), (".avif", "AVIF"), (".jp2", "JPEG2000"),
    (".tga", "TGA"), (".pbm", "PPM"), (".dib", "DIB"), (".ico", "ICO"),
    ("", "PNG"), ("", "JPEG"), ("", "WEBP"), ("", "TIFF")])
def test_whatever_pil_reads_is_read(tmp_path, ending, kind):
    needs(kind)
    for k in range(8):
        path = tmp_path / TWO[k % 2] / f"{k}{ending}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_data(tmp_path, cache=False, test_share=.25).train) == 6


@pytest.mark.parametrize("what, said", [("folder", "dog cannot be read (Permission denied)"),
    ("image", "dog/2.png cannot be read (Permission denied)")])
def test_what_may_not_be_read(tmp_path, monkeypatch, what, said):
    plant(tmp_path, TWO)
    scan, read = os.scandir, Path.read_bytes
    def closed(real, name):
        def ask(path):
            if str(path).endswith(name): raise PermissionError(13, "Permission denied")
            return real(path)
        return ask
    if what == "folder": monkeypatch.setattr(data.os, "scandir", closed(scan, "/dog"))
    else: monkeypatch.setattr(data.Path, "read_bytes", closed(read, "dog/2.png"))
    fails(tmp_path, said, "change its permissions", cache=False)


def test_images_that_occur_twice_are_counted(tmp_path):
    root = plant(tmp_path, split_tree("train", "test"))
    copies = {"test/cat/copy.png": "train/cat/0.png", "test/dog/other.png": "train/cat/1.png",
              "train/cat/copy.png": "train/dog/0.png"}
    for copy, source in copies.items(): (root / copy).write_bytes((root / source).read_bytes())
    with pytest.warns(UserWarning) as caught: text = load_data(root, cache=False).describe()
    for said in "too: 2 of 10", "more than one class: 2": assert any(said in str(w.message) for w in caught)
    assert "test images that are training images, too: 2 of 10" in text
    assert "images that stand in more than one class: 2" in text
    assert "2 classes, training + test images: cat 5 + 5, dog 4 + 5" in text
    assert "training images, too" not in load_data().describe()


def test_memory_is_asked_before_decoding(tmp_path, monkeypatch):
    plant(tmp_path, TWO)
    monkeypatch.setattr(data, "_decode", None)
    monkeypatch.setattr(data, "free_memory", lambda: 1000)
    for cache in None, False: fails(tmp_path, "8 images of 0.0 MB", "say size=64", error=MemoryError, cache=cache)
    fails(tmp_path, "say a size smaller than 5x6", error=MemoryError, size=(5, 6), cache=False)
    monkeypatch.setattr(data, "_decode", lambda raw, size=None: np.zeros((3, 2, 2), np.uint8))
    assert len(load_data(tmp_path, size=2, cache=False).train) == 6


# Decoding

def saved(image, kind="PNG", **kwargs):
    image.save(file := BytesIO(), kind, **kwargs)
    return file.getvalue()


COLOURS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind, mode", [(kind, mode) for kind, modes in {
    "PNG": "1 L LA P RGB RGBA", "JPEG": "L RGB CMYK", "GIF": "1 L P RGB", "BMP": "1 L P RGB RGBA",
    "TIFF": "1 L LA P RGB RGBA CMYK YCbCr", "WEBP": "L RGB RGBA", "PPM": "1 L RGB",
    "TGA": "L LA P RGB RGBA", "JPEG2000": "L LA RGB RGBA", "SGI": "L RGB RGBA", "PCX": "1 L P RGB",
    "AVIF": "RGB RGBA"}.items() for mode in modes.split()])
def test_ordinary_images_are_what_pil_makes_of_them(kind, mode):
    needs(kind)
    raw = saved(COLOURS.convert(mode), kind)
    with Image.open(BytesIO(raw)) as image:
        expected = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    assert np.array_equal(np.moveaxis(data._decode(raw), 0, -1).squeeze(), expected)
    small = Image.fromarray(expected).resize((3, 4), Image.Resampling.BILINEAR)
    assert np.array_equal(np.moveaxis(data._decode(raw, (4, 3)), 0, -1).squeeze(), np.asarray(small))


def png16(channels, kind):
    "A PNG of 16 bits a channel."
    a = (np.arange(4*5*channels) * 3).reshape(4, 5, channels).astype(">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in a)
    def chunk(name, content): return struct.pack(">I", len(content)) + name + content + struct.pack(">I",
        zlib.crc32(name + content))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 4, 16, kind, 0, 0, 0)) + chunk(b"IDAT",
        zlib.compress(lines)) + chunk(b"IEND", b"")


def tiff16(channels):
    "A little-endian TIFF, not compressed, of 16 bits a channel."
    pixels = (np.arange(4*5*channels) * 3).astype("<u2").tobytes()
    at = 8 + len(pixels)
    tags = [(256, 4, 1, 5), (257, 4, 1, 4), (258, 3, channels, None), (259, 3, 1, 1),
        (262, 3, 1, 1 if channels < 3 else 2), (273, 4, 1, 8), (277, 3, 1, channels), (278, 4, 1, 4),
        (279, 4, 1, len(pixels))]
    if channels in (2, 4): tags.append((338, 3, 1, 2))
    tail = at + 2 + 12*len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, kind, n,
        (16 if n == 1 else 16 | 16 << 16 if n == 2 else tail) if value is None else value) for tag, kind, n,
        value in tags)
    return b"II*\0" + struct.pack("<I", at) + pixels + struct.pack("<H",
        len(tags)) + entries + bytes(4) + struct.pack(f"<{channels}H", *[16]*channels)


def patched(raw, mark, offset, change):
    "`raw` with the byte at `offset` behind `mark` changed."
    at = raw.find(mark) + offset
    return raw[:at] + bytes([change(raw[at])]) + raw[at+1:]


DEEP = {"PNG grey": png16(1, 0), "PNG grey, alpha": png16(2, 4), "PNG RGB": png16(3, 2), "PNG RGBA": png16(4, 6),
    "TIFF grey": tiff16(1), "TIFF RGB": tiff16(3), "TIFF RGBA": tiff16(4),
        "PGM": b"P5 2 1 65535\n" + bytes(4), "PGM of 12 bits": b"P5 2 1 4095\n" + bytes(4),
        "PPM": b"P6 2 1 65535\n" + bytes(12), "PPM in words": b"P3 1 1 1000\n 0 500 1000\n",
        "integers": saved(Image.new("I", (3, 2)), "TIFF"), "floats": saved(Image.new("F", (3, 2)), "TIFF"),
        "JPEG 2000 grey": saved(Image.new("I;16", (8, 8)), "JPEG2000"),
        "JPEG 2000 RGB": patched(saved(COLOURS, "JPEG2000"), b"\xff\x4f\xff\x51", 4 + 38, lambda b: 15),
        "SGI": b"\x01\xda\0\x02\0\x03" + struct.pack(">HHH", 2, 1, 3) + bytes(500) + bytes(12)}


@pytest.mark.parametrize("what", DEEP)
def test_more_than_eight_bits(what):
    Image.open(BytesIO(DEEP[what])).close()  # a sound header
    with pytest.raises(ValueError, match="with more than 8 bits a channel"): data._decode(DEEP[what])


@pytest.mark.skipif(not features.check("avif"), reason="PIL was built without AVIF")
def test_more_than_eight_bits_in_avif():
    raw = saved(COLOURS, "AVIF")
    assert data._decode(raw).shape == (3, 6, 8)
    depths = [data._bits_of["AVIF"](None, content)
        for content in (raw, patched(raw, b"av1C", 6, lambda b: b | 64))]  # PIL writes 8 bits only
    assert depths == [8, 10]


@pytest.mark.parametrize("ok", [b"P5 2 1 255\n" + bytes(2), b"P5 2 1 100\n" + bytes(2), b"P6 2 1 255\n" + bytes(6),
    b"P2 1 1 15\n 7\n", b"P4 8 1\n\xaa"])
def test_eight_bits_or_fewer(ok): assert data._decode(ok).dtype == np.uint8


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind, mode", [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "LA"),
    ("WEBP", "RGB"), ("TIFF", "RGB"), ("TIFF", "L"), ("MPO", "RGB")])
def test_photographs_stand_upright(kind, mode, turn):
    exif = Image.Exif()
    exif[274] = turn
    preview = dict(save_all=True, append_images=[COLOURS.resize((4, 3))]) if kind == "MPO" else {}
    raw = saved(COLOURS.convert(mode), kind, exif=exif, **preview)
    with Image.open(BytesIO(raw)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("L" if mode in ("L", "LA") else "RGB"))
    assert upright.shape[:2] == ((6, 8) if turn < 5 else (8, 6))
    assert np.array_equal(np.moveaxis(data._decode(raw), 0, -1).squeeze(), upright)
    assert data._decode(raw, (8, 6)).shape[1:] == (8, 6)


@pytest.mark.parametrize("note", [0, 9, 17])
def test_odd_notes_of_orientation_say_nothing(note):
    exif = Image.Exif()
    exif[274] = note
    assert np.array_equal(data._decode(saved(COLOURS, exif=exif)), data._decode(saved(COLOURS)))
    assert data._decode(saved(COLOURS, "JPEG", exif=b"Exif\0\0no exif at all")).shape == (3, 6, 8)


def drawn(mode, ink, ground, clear=0):
    "A line of `ink` on `ground`, whose alpha is `clear`."
    n = len(mode) - 1
    image = Image.new(mode, (4, 4), (*[ground]*n, clear))
    for i in range(4): image.putpixel((i, i), (*[ink]*n, 255))
    return image


@pytest.mark.parametrize("kind, image, line, sheet", [
    ("PNG", drawn("RGBA", 0, 0), 0, 255), ("PNG", drawn("LA", 0, 0), 0, 255), ("WEBP", drawn("RGBA", 0, 0), 0, 255),
    ("TIFF", drawn("RGBA", 0, 0), 0, 255),  # black ink
    ("PNG", drawn("RGBA", 255, 255), 255, 0),
    ("PNG", drawn("LA", 255, 0), 255, 0),  # white ink
    ("PNG", drawn("RGBA", 100, 7), 100, 255), ("PNG", drawn("RGBA", 100, 100, 51), 100, 224),
    ("PNG", drawn("LA", 0, 0, 254), 0, 1), ("PNG", drawn("LA", 9, 9, 77), 9, 181),  # grey, partly transparent
    ("PNG", drawn("RGBA", 9, 200, 255), 9, 200),
    ("PNG", drawn("LA", 9, 200, 255), 9, 200)])  # opaque
def test_transparent_ground(kind, image, line, sheet):
    a = data._decode(saved(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})))
    assert len(a) == len(image.mode) - 1
    assert all(np.array_equal(channel, np.where(np.eye(4), line, sheet)) for channel in a)


def palette(transparency):
    image = Image.fromarray(np.eye(4, dtype=np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 0, 0, 0])
    return saved(image, transparency=transparency)


@pytest.mark.parametrize("raw, line, sheet", [
    (palette(0), 0, 255), (palette(1), 255, 0), (palette(bytes([0, 255])), 0, 255), (palette(bytes([51, 255])), 0, 204),
    (saved(Image.fromarray(np.eye(4, dtype=np.uint8)*9), transparency=0), 9, 255),
    (saved(Image.fromarray(np.eye(4, dtype=np.uint8)*255), transparency=0), 255, 0),
    (saved(Image.fromarray((np.eye(4, dtype=np.uint8)*9)).convert("RGB"), transparency=(0, 0, 0)), 9, 255)])
def test_transparent_colours(raw, line, sheet):
    assert all(np.array_equal(channel, np.where(np.eye(4), line, sheet)) for channel in data._decode(raw))


def test_what_is_all_transparent_keeps_its_colours():
    bare = COLOURS.copy()
    bare.putalpha(0)
    assert np.array_equal(data._decode(saved(bare)), np.asarray(COLOURS).transpose(2, 0, 1))
    assert np.array_equal(data._decode(saved(Image.new("RGBA", (4, 4), (9, 9, 9, 0)))), np.full((3, 4, 4), 255))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames(kind, flat):
    raw = saved(COLOURS, kind, save_all=True, append_images=[COLOURS.transpose(Image.Transpose.ROTATE_180)])
    with pytest.raises(ValueError, match="it holds 2 frames or pages"): data._decode(raw)
    path = flat / "cat" / f"film.{kind.lower()}"
    path.write_bytes(raw)
    fails(flat, f"{path} cannot be read as an image (it holds 2 frames or pages", cache=False)


@pytest.mark.parametrize("raw, said", [(b"", "it is empty"), (b"<html>not found</html>", "PIL knows no such format"),
    (b"\0\5\x16\7" + bytes(60), "PIL knows no such format")])
def test_broken_files_in_words(flat, raw, said):
    (flat / "cat" / "00.png").write_bytes(raw)
    fails(flat, f"00.png cannot be read as an image ({said}): replace or remove it", cache=False)


# The cache

@pytest.fixture
def decoded(monkeypatch):
    "Paths decoded so far."
    real, paths = data._decode_images, []
    def spy(files, n, size=None): return real((paths.append(path) or (path, raw) for path, raw in files), n, size)
    monkeypatch.setattr(data, "_decode_images", spy)
    return paths


@pytest.fixture
def read(monkeypatch):
    "Sizes of the contents compared or decoded so far."
    real, sizes = data._Content.__iter__, []
    monkeypatch.setattr(data._Content, "__iter__",
                        lambda self: (sizes.append(len(raw)) or (path, raw) for path, raw in real(self)))
    return sizes


@pytest.fixture
def rested(monkeypatch): monkeypatch.setattr(data, "_rest", -10)


def kept(folder): return sorted(folder.glob("*.safetensors"))


def own(folder, size=None):
    "Where the images of `folder` are kept if nobody says where."
    return data._own_cache(folder, size)


def test_second_load_reads_no_image(flat, rested, decoded, read):
    first = load_data(flat)
    assert len(decoded) == len(read) == 12
    assert same(first, load_data(flat)) and len(read) == 12
    assert same(first, load_data(flat, cache=False)) and len(decoded) == 24
    assert len(kept(own(flat))) == 1 and {p.name for p in flat.iterdir()} == {"cat", "dog"}


def test_split_and_seed_share_one_file(flat, rested, decoded):
    for kwargs in {}, dict(seed=1), dict(test_share=.5), dict(name="other"): load_data(flat, **kwargs)
    assert len(decoded) == 12
    load_data(flat, size=4)
    assert len(decoded) == 24 and load_data(flat).train.shape == (3, 5, 6) and len(decoded) == 24


def test_new_times_old_content(flat, rested, decoded, read):
    first = load_data(flat)
    for path in flat.rglob("*.png"): os.utime(path, (1, 1))
    assert same(first, load_data(flat)) and (len(decoded), len(read)) == (12, 24)
    assert same(first, load_data(flat)) and len(read) == 24  # the new times are noted


def test_young_files_are_compared_by_content(flat, decoded, read, monkeypatch):
    monkeypatch.setattr(data, "_rest", 1000)
    first = load_data(flat)
    assert same(first, load_data(flat)) and (len(decoded), len(read)) == (12, 24)
    assert {p.suffix for p in own(flat).iterdir()} == {".safetensors", ".txt"}


def test_changed_content_with_old_size_and_date(flat, rested):
    for path in flat.rglob("*.png"): Image.open(path).save(path.with_suffix(".bmp")), path.unlink()
    first, path = load_data(flat), flat / "cat" / "00.bmp"
    before, raw = path.stat(), bytearray(path.read_bytes())
    raw[-3] ^= 255
    path.write_bytes(raw)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert after.st_ctime_ns != before.st_ctime_ns
    second = load_data(flat)
    assert not same(first, second) and same(second, load_data(flat, cache=False))


def test_new_rules_of_decoding_decode_anew(flat, rested, decoded, monkeypatch):
    monkeypatch.setattr(data, "_rules", 1)
    first = load_data(flat)
    monkeypatch.undo()
    monkeypatch.setattr(data, "_rest", -10)
    with monkeypatch.context() as m:
        def other_pixels(files, n, size=None):
            assert len(list(files)) == n
            return torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 1, 2, 2)
        m.setattr(data, "_decode_images", other_pixels)
        assert load_data(flat).train.shape == (1, 2, 2)  # the old images are not served
    monkeypatch.setattr(data, "_rules", 1)
    assert same(load_data(flat), first)


@pytest.mark.parametrize("change", ["add", "remove", "rename", "move"])
def test_changed_tree(flat, rested, change):
    first, path = load_data(flat), flat / "cat" / "00.png"
    if change == "add": write_image(flat / "cat" / "99.png", 99)
    elif change == "remove": path.unlink()
    else: path.rename(flat / ("cat" if change == "rename" else "dog") / "zz.png")
    second = load_data(flat)
    assert not same(first, second) and same(second, load_data(flat, cache=False))


@pytest.mark.parametrize("damage", ["cut", "empty", "pixel", "header", "garbage"])
def test_damaged_cache_is_noticed_and_rebuilt(flat, rested, decoded, damage):
    first = load_data(flat)
    file, = kept(own(flat))
    raw = bytearray(file.read_bytes())
    sound = bytes(raw)
    if damage == "pixel": raw[-1] ^= 1
    if damage == "header": raw[20] ^= 1
    file.write_bytes({"cut": raw[:len(raw) // 2], "empty": b"", "garbage": b"x"*len(raw)}.get(damage, raw))
    with pytest.warns(UserWarning, match="damaged"): again = load_data(flat)
    assert same(first, again) and len(decoded) == 24 and file.read_bytes() == sound
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(first, load_data(flat)) and len(decoded) == 24


def test_damaged_note(flat, rested, decoded):
    first = load_data(flat)
    note, = [p for p in own(flat).iterdir() if not p.suffix]
    for text in b"", b"../../etc/passwd", b"\xff\x00", b"0"*64:
        note.write_bytes(text)
        assert same(first, load_data(flat)) and note.read_text() == kept(note.parent)[0].stem


def test_deleted_cache_file(flat, rested, decoded):
    first = load_data(flat)
    kept(own(flat))[0].unlink()
    assert same(first, load_data(flat)) and len(decoded) == 24


def test_unwritable_place_costs_a_warning(flat, rested):
    own(flat).parent.mkdir(parents=True)
    own(flat).write_text("a file where the folder should be")  # stops root as well
    with pytest.warns(UserWarning, match="not kept.*cache=") as caught: loaded = load_data(flat)
    assert len(caught) == 1 and same(loaded, load_data(flat, cache=False))


def test_failed_write_leaves_nothing(flat, rested, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(data, "save_file", full)
    with pytest.warns(UserWarning, match="No space left"): load_data(flat)
    assert not list(own(flat).glob("*.tmp")) + kept(own(flat))


def test_cache_elsewhere_or_nowhere(flat, rested, tmp_path, decoded):
    load_data(flat, cache=False)
    assert not own(flat).exists()
    load_data(flat, cache=tmp_path / "here" / "there")
    assert len(kept(tmp_path / "here" / "there")) == 1 and not own(flat).exists()
    flat.rename(tmp_path / "moved")
    load_data(tmp_path / "moved", cache=str(tmp_path / "here" / "there"))
    assert len(decoded) == 24  # keyed by content: the folder's own name does not matter


def test_cached_file_is_readable_as_any_other(flat, rested):
    load_data(flat)
    plain = flat.parent / "plain"
    plain.touch()
    assert kept(own(flat))[0].stat().st_mode == plain.stat().st_mode


def test_the_folder_of_images_is_left_alone_and_the_first_use_is_said(flat, rested, capsys):
    load_data(flat)
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and f"are kept in {own(flat)}" in said and "cache=False" in said
    assert [*flat.parent.iterdir()] == [flat]
    load_data(flat)
    assert not capsys.readouterr().err


def test_an_old_cache_beside_the_folder_is_named(flat, capsys):
    flat.with_name("pets.cache").mkdir()
    load_data(flat)
    assert "pets.cache, where they were kept before, can be deleted" in capsys.readouterr().err


def test_stale_images_go(flat, rested):
    load_data(flat), load_data(flat, size=4)
    write_image(flat / "cat" / "99.png", 99)
    half = own(flat) / "images.1.tmp"  # of a process that was killed long ago
    half.write_text("half")
    os.utime(half, (1, 1))
    load_data(flat)
    assert len(kept(own(flat))) == len(kept(own(flat, (4, 4)))) == 1 and not half.exists()
    assert len([p for p in own(flat).iterdir() if not p.suffix]) == 1
    elsewhere = flat.rename(flat.with_name("moved"))
    load_data(elsewhere)
    assert [*own(flat).parent.iterdir()] == [own(elsewhere)], "nor are those kept whose folder is gone"


def test_images_are_read_where_the_cache_folder_is_a_file(flat, tmp_path, monkeypatch):
    monkeypatch.setenv("EFCN_NB_RUNS", str(write_image(tmp_path / "file.png", 0)))
    with pytest.warns(UserWarning, match="not kept.*cache=") as caught: loaded = load_data(flat)
    assert len(caught) == 1 and same(loaded, load_data(flat, cache=False))


def _load(folder): return load_data(folder).train.fingerprint


def test_two_processes_at_once(flat):
    found = [keep.started(_load, flat) for _ in range(2)]
    assert {keep.result(*process) for process in found} == {load_data(flat).train.fingerprint}


# All of CIFAR-10, if there is a copy

@pytest.mark.skipif("EFCN_NB_CIFAR" not in os.environ,
                    reason="EFCN_NB_CIFAR names no folder with CIFAR-10 as image files")
def test_sixty_thousand_images(tmp_path):
    loaded = [load_data(os.environ["EFCN_NB_CIFAR"], cache=tmp_path, name="CIFAR-10 (JPEG)") for _ in range(2)]
    assert same(*loaded) and isinstance(loaded[0], Data)
    assert (len(loaded[0].train), len(loaded[0].test), loaded[0].train.shape) == (50_000, 10_000, (3, 32, 32))
    assert loaded[0].train.y.bincount().tolist() == [5000]*10
    torch.testing.assert_close(loaded[0].train.mean, torch.tensor([.491, .482, .447]), atol=.005, rtol=0)
    torch.testing.assert_close(loaded[0].train.std, torch.tensor([.247, .243, .262]), atol=.005, rtol=0)
