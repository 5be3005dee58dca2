"""Every source in its true format, the cache, bad input, batches: `efcn_nb.data` against oracles of another kind."""
import gzip
import hashlib
import os
import pickle
import random
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST, ImageFolder

from efcn_nb import data
from efcn_nb.data import Data, Dataset, channel_stats, load_data, stratified_split


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
        for k in range(n): write_image(tmp_path / "pets" / part / ("cat", "dog")[k % 2] / f"{k}.{('png', 'jpg')[k // 2 % 2]}", 100*n + k)
    return tmp_path / "pets"


def same(a, b): return (a.train.fingerprint, a.test.fingerprint) == (b.train.fingerprint, b.test.fingerprint)


# Dataset

def photos(n=20):
    x = torch.randint(256, (n, 3, 8, 8), generator=seeded(), dtype=torch.uint8)
    return Dataset(x, torch.arange(n) % 4, list("abcd"), *channel_stats(x), "photos")


def test_batch_is_normalised_as_torchvision_does():
    photo, index = photos(), torch.tensor([7, 0, 7, 19])
    x, y = photo.batch(index)
    pipeline = transforms.Compose([transforms.ToTensor(), transforms.Normalize(photo.mean.tolist(), photo.std.tolist())])
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


@pytest.mark.parametrize("x", [torch.full((3, 1, 7, 7), 7, dtype=torch.uint8), *(torch.full((n, 1, 11, 13), v) for n, v in [(3, .1), (7, .7), (50, 1/3)])])
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
    (dict(std=torch.ones(1)), "3 entries")])
def test_dataset_parts_must_fit(change, message):
    with pytest.raises(ValueError, match=message): data.replace(photos(), **change)


def test_bad_batches():
    with pytest.raises(ValueError, match="at least 1"): photos().batches(0)
    with pytest.raises((RuntimeError, IndexError)): photos().batch(torch.ones(20, dtype=torch.bool))  # a mask is no index
    with pytest.raises((RuntimeError, IndexError)): photos().batch([20])


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


def test_centred_digits_are_the_published_ones():
    centred = load_data(shift=False)
    train, test = stratified_split(torch.tensor(load_digits().target), .2, seeded())
    for part, index in zip(centred, (train, test)):
        levels = np.rint(part.x[:, 0, 4:12, 4:12].numpy() * (16/255))
        assert np.array_equal(levels, load_digits().images[index])
        assert np.array_equal(part.y, load_digits().target[index])
        border = part.x.clone()
        border[:, :, 4:12, 4:12] = 0
        assert not border.any()
    assert centred.train.x.max() == 255 and centred.train.shape == (1, 16, 16)


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
    assert [load_data().train.name, load_data(shift=False).test.name, load_data(name="scans").test.name] == ["digits", "digits (centred)", "scans"]


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
    for value, expected in zip((loaded.test.mean, loaded.test.std), constants if source == "cifar10" else own): assert torch.equal(value, expected)


def test_cifar_is_unpacked_from_torchvisions_archive(tmp_path, monkeypatch):
    written = write_cifar(tmp_path / "made", CIFAR10, monkeypatch)
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(root / CIFAR10.filename, "w:gz") as archive: archive.add(tmp_path / "made" / CIFAR10.base_folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(root / CIFAR10.filename))
    assert np.array_equal(load_data("cifar10", root=root).train.x.flatten(1), written["train_list"][0])


def idx(a): return bytes([0, 0, 8, a.ndim]) + b"".join(n.to_bytes(4, "big") for n in a.shape) + a.tobytes()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("source, make, name", [("mnist", MNIST, "MNIST"), ("fashion_mnist", FashionMNIST, "Fashion-MNIST")])
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


@pytest.mark.parametrize("source, make", [("cifar10", CIFAR10), ("cifar100", CIFAR100), ("mnist", MNIST), ("fashion_mnist", FashionMNIST)])
def test_missing_collection(source, make, tmp_path, monkeypatch):
    nowhere = f"file://{tmp_path}/nowhere/"
    monkeypatch.setattr(make, *(("mirrors", [nowhere]) if hasattr(make, "mirrors") else ("url", nowhere + "x.tar.gz")))
    for download, reason in (False, "download is False"), (True, "downloading it failed"):
        with pytest.raises(FileNotFoundError, match="is not complete in") as error: load_data(source, root=tmp_path / "root", download=download)
        assert reason in str(error.value) and str(tmp_path / "root") in str(error.value) and "\n" not in str(error.value)


def test_cut_file_of_a_collection(tmp_path, monkeypatch):
    write_cifar(tmp_path, CIFAR10, monkeypatch)
    with open(tmp_path / CIFAR10.base_folder / "data_batch_3", "r+b") as file: file.truncate(100)
    with pytest.raises(FileNotFoundError, match="CIFAR-10 is not complete"): load_data("cifar10", root=tmp_path, download=False)


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


def test_unknown_name(): fails("cifar", "unknown data 'cifar'", "digits, cifar10, cifar100, mnist, fashion_mnist")


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



@pytest.mark.parametrize("layout, empty", [("flat", ["bird"]), ("split", ["train/bird", "test/bird"]), ("split", ["test/dog"])])
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


def test_sixteen_bits(flat):
    Image.fromarray(np.zeros((5, 6), np.uint16)).save(flat / "cat" / "00.png")
    fails(flat, flat / "cat" / "00.png", "more than 8 bits")


def test_different_sizes(flat):
    odd = write_image(flat / "dog" / "05.png", 0, size=(7, 5))
    fails(flat, f"{flat / 'cat' / '00.png'} has 5x6", f"{odd} 5x7", "say size=(5,6)")


def test_different_classes(split):
    write_image(split / "test" / "fish" / "0.png", 0)
    fails(split, "different classes", "fish")


@pytest.mark.parametrize("there, missing", [("train", "test"), ("test", "train")])
def test_half_a_split(split, there, missing):
    (split / missing).rename(split / "val")
    fails(split, f"holds a folder {there} but none named {missing}")


def test_bad_share_is_said_before_decoding(flat, monkeypatch):
    monkeypatch.setattr(data, "load_images", None)
    fails(flat, "class cat (6 images) no test image", test_share=.01)


def test_size_is_for_folders(): fails("digits", "size is for folders", size=8)


# The cache

@pytest.fixture
def decoded(monkeypatch):
    "Paths decoded so far."
    real, paths = data.decode_images, []
    def spy(files, n, size=None): return real((paths.append(path) or (path, raw) for path, raw in files), n, size)
    monkeypatch.setattr(data, "decode_images", spy)
    return paths


@pytest.fixture
def read(monkeypatch):
    "Sizes of the contents compared or decoded so far."
    real, sizes = data._Content.__iter__, []
    monkeypatch.setattr(data._Content, "__iter__", lambda self: (sizes.append(len(raw)) or (path, raw) for path, raw in real(self)))
    return sizes


@pytest.fixture
def rested(monkeypatch): monkeypatch.setattr(data, "_rest", -10)


def kept(folder): return sorted(folder.glob("*.safetensors"))


def test_second_load_reads_no_image(flat, rested, decoded, read):
    first = load_data(flat)
    assert len(decoded) == len(read) == 12
    assert same(first, load_data(flat)) and len(read) == 12
    assert same(first, load_data(flat, cache=False)) and len(decoded) == 24
    assert len(kept(flat.with_name("pets.cache"))) == 1 and {p.name for p in flat.iterdir()} == {"cat", "dog"}


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
    assert [p.suffix for p in flat.with_name("pets.cache").iterdir()] == [".safetensors"]


def test_changed_content_with_old_size_and_date(flat, rested):
    for path in flat.rglob("*.png"): Image.open(path).save(path.with_suffix(".bmp")), path.unlink()
    first, path = load_data(flat), flat / "cat" / "00.bmp"
    before, raw = path.stat(), bytearray(path.read_bytes())
    raw[-3] ^= 255
    path.write_bytes(raw)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns) and after.st_ctime_ns != before.st_ctime_ns
    second = load_data(flat)
    assert not same(first, second) and same(second, load_data(flat, cache=False))


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
    file, = kept(flat.with_name("pets.cache"))
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
    note, = [p for p in flat.with_name("pets.cache").iterdir() if not p.suffix]
    for text in b"", b"../../etc/passwd", b"\xff\x00", b"0"*64:
        note.write_bytes(text)
        assert same(first, load_data(flat)) and note.read_text() == kept(note.parent)[0].stem


def test_deleted_cache_file(flat, rested, decoded):
    first = load_data(flat)
    kept(flat.with_name("pets.cache"))[0].unlink()
    assert same(first, load_data(flat)) and len(decoded) == 24


def test_unwritable_place_costs_a_warning(flat, rested):
    flat.with_name("pets.cache").write_text("a file where the folder should be")  # stops root as well
    with pytest.warns(UserWarning, match="not kept.*cache=") as caught: loaded = load_data(flat)
    assert len(caught) == 1 and same(loaded, load_data(flat, cache=False))


def test_failed_write_leaves_nothing(flat, rested, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(data, "save_file", full)
    with pytest.warns(UserWarning, match="No space left"): load_data(flat)
    assert not list(flat.with_name("pets.cache").glob("*.tmp")) + kept(flat.with_name("pets.cache"))


def test_cache_elsewhere_or_nowhere(flat, rested, tmp_path, decoded):
    load_data(flat, cache=False)
    assert not flat.with_name("pets.cache").exists()
    load_data(flat, cache=tmp_path / "here" / "there")
    assert len(kept(tmp_path / "here" / "there")) == 1 and not flat.with_name("pets.cache").exists()
    flat.rename(tmp_path / "moved")
    load_data(tmp_path / "moved", cache=str(tmp_path / "here" / "there"))
    assert len(decoded) == 24  # keyed by content: the folder's own name does not matter


def test_cached_file_is_readable_as_any_other(flat, rested):
    load_data(flat)
    plain = flat.parent / "plain"
    plain.touch()
    assert kept(flat.with_name("pets.cache"))[0].stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("terminal", [False, True])
def test_a_bar_only_on_a_terminal(flat, terminal, monkeypatch):
    asked = []
    monkeypatch.setattr(data.sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(data, "tqdm", lambda items, disable, **kwargs: asked.append((disable, kwargs["total"])) or items)
    load_data(flat)
    assert asked == [(not terminal, 12)]


# All of CIFAR-10, if there is a copy

@pytest.mark.skipif("EFCN_NB_CIFAR" not in os.environ, reason="EFCN_NB_CIFAR names no folder with CIFAR-10 as image files")
def test_sixty_thousand_images(tmp_path):
    loaded = [load_data(os.environ["EFCN_NB_CIFAR"], cache=tmp_path, name="CIFAR-10 (JPEG)") for _ in range(2)]
    assert same(*loaded) and isinstance(loaded[0], Data)
    assert (len(loaded[0].train), len(loaded[0].test), loaded[0].train.shape) == (50_000, 10_000, (3, 32, 32))
    assert loaded[0].train.y.bincount().tolist() == [5000]*10
    torch.testing.assert_close(loaded[0].train.mean, torch.tensor([.491, .482, .447]), atol=.005, rtol=0)
    torch.testing.assert_close(loaded[0].train.std, torch.tensor([.247, .243, .262]), atol=.005, rtol=0)
