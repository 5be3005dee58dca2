"Images that are in memory, and data sets of other libraries, in one call."
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset
from torchvision.datasets import FakeData
from torchvision.transforms import ToTensor

from efcn_nb.experiments.relaxation import relax, Study
from efcn_nb.materials.data import load_data

COLOUR = np.random.default_rng(0).integers(0, 256, (40, 8, 9, 3), np.uint8)
GREY, Y = COLOUR[..., 0], np.arange(40) % 4
NAMES = np.array(["ant", "bee", "cat", "dog"])[Y]
FIRST = torch.tensor(COLOUR).permute(0, 3, 1, 2)


def together(found):
    "Images of both parts in the order in which they were given, recognised by their pixels, and their labels."
    x, y = (torch.cat([getattr(part, k) for part in found]) for k in "xy")
    return {image.numpy().tobytes(): label for image, label in zip(x, y.tolist())}


# What is taken

class Plain:
    "The least that a data set has to have."
    def __init__(self, items): self.items = items
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]


PAIRS = dict(
    channels_last=(COLOUR, Y), channels_first=(FIRST.numpy(), Y), tensors=(FIRST, torch.tensor(Y)),
    as_list=[COLOUR, Y], whole=(COLOUR.astype(int), Y.astype(float)), images=([*COLOUR], [*Y]),
    of_pil=([*map(Image.fromarray, COLOUR)], Y.tolist()), of_tensors=([*FIRST], [*torch.tensor(Y)]),
    series=(COLOUR, pd.Series(Y, index=range(60, 100))), column=(COLOUR, Y[:, None]), one_hot=(COLOUR, np.eye(4)[Y]),
    one_hot_list=(COLOUR, np.eye(4)[Y].tolist()), objects=(np.array([None, *COLOUR], dtype=object)[1:], Y),
    tensor_dataset=TensorDataset(FIRST, torch.tensor(Y)), items=[*zip(COLOUR, Y)],
    plain=Plain([*zip(FIRST, Y.tolist())]),
    lists=[[image, label, "more"] for image, label in zip(COLOUR, Y)],
    dicts=[dict(label=label, img=image) for image, label in zip(COLOUR, Y)],
    subset=Subset(TensorDataset(FIRST, torch.tensor(Y)), range(40)), by_name=dict(train=(COLOUR, Y)))


@pytest.mark.parametrize("form", PAIRS)
def test_the_same_images_in_all_forms(form, capsys):
    found = load_data(PAIRS[form])
    assert found.train.x.dtype == torch.uint8 and found.train.shape == (3, 8, 9)
    assert together(found) == {image.numpy().tobytes(): label for image, label in zip(FIRST, Y.tolist())}
    assert [part.y.bincount().tolist() for part in found] == [[8]*4, [2]*4]
    said = "of 40 images 32 train and 8 test, 0.2 of each class, drawn by seed 0"
    assert said in found.describe() and capsys.readouterr().err == f"images: {said}\n"


@pytest.mark.parametrize("x, shape, kind", [
    (GREY, (1, 8, 9), "uint8"), (GREY[:, None], (1, 8, 9), "uint8"), (GREY[..., None], (1, 8, 9), "uint8"),
    (GREY > 99, (1, 8, 9), "uint8"), (COLOUR/255, (3, 8, 9), "float32"), (GREY.astype(int) - 9, (1, 8, 9), "float32"),
    (FIRST.to(torch.bfloat16), (3, 8, 9), "float32"),
    (FIRST/9.*torch.ones(1, requires_grad=True), (3, 8, 9), "float32"),
    ([Image.fromarray(image.astype(np.uint16)*200) for image in GREY], (1, 8, 9), "float32"),
    ([*GREY[:20], *COLOUR[20:]], (3, 8, 9), "uint8"), (np.zeros((40, 2, 4, 6, 6)) + Y[:, None, None, None, None],
    (2, 4, 6, 6), "float32")], ids=range(11))
def test_pixels_and_channels(x, shape, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_data((x, Y)).train
    assert (found.shape, str(found.x.dtype)) == (shape, f"torch.{kind}")


def test_names_of_classes():
    assert load_data((COLOUR, NAMES)).train.classes == ["ant", "bee", "cat", "dog"]
    assert load_data((COLOUR, pd.Series(NAMES, dtype="category"))).test.classes == ["ant", "bee", "cat", "dog"]
    assert load_data((COLOUR, Y*3 - 1)).train.classes == ["-1", "2", "5", "8"]
    data = TensorDataset(FIRST, torch.tensor(Y % 2))
    data.classes = ["no", "yes", "perhaps"]
    assert load_data(Subset(data, range(40))).train.classes == ["no", "yes"]


def test_paths_of_images(tmp_path):
    for k, image in enumerate(COLOUR): Image.fromarray(image).save(tmp_path/f"{k}.png")
    paths = [tmp_path/f"{k}.png" for k in range(40)]
    assert together(load_data((paths, Y))) == together(load_data((COLOUR, Y)))
    with pytest.raises(ValueError, match="image 1: .*nothing.png cannot be read"):
        load_data(([paths[0], tmp_path/"nothing.png"], [0, 1]))


def test_a_data_set_of_torchvision_with_its_transform():
    found = load_data(FakeData(30, (3, 8, 8), 3, ToTensor()))
    assert found.train.name == "FakeData" and found.train.x.dtype == torch.float32 and found.train.x.max() <= 1
    assert load_data(FakeData(30, (3, 8, 8), 3), name="noise").test.name == "noise"


@pytest.mark.parametrize("parts", [
    lambda a, b: (a, b), lambda a, b: [a, b], lambda a, b: dict(train=a, test=b), lambda a, b: dict(test=b, train=a),
    lambda a, b: (a, [*zip(*b)]), lambda a, b: [TensorDataset(*map(torch.tensor, part)) for part in (a, b)],
    lambda a, b: dict(train=a, validation=b, extra=b)], ids=range(7))
def test_with_a_part_to_test_on(parts, capsys):
    found = load_data(parts((GREY[:30], Y[:30]), (GREY[30:], Y[30:])))
    assert torch.equal(found.train.x[:, 0], torch.tensor(GREY[:30])) and found.test.y.tolist() == Y[30:].tolist()
    assert not capsys.readouterr().err
    notes = "test images are the part validation", "parts that nothing uses: extra"
    assert not found.notes or found.notes == notes


def test_split_by_seed_and_share():
    found, other = load_data((GREY, Y), seed=1, test_share=.5), load_data((GREY, Y), test_share=.5)
    assert len(found.train) == len(found.test) == 20 and not torch.equal(found.test.x, other.test.x)
    assert found.train.fingerprint == load_data((GREY, Y), seed=1, test_share=.5).train.fingerprint


@pytest.mark.parametrize("x", [[GREY[0], GREY[1, 2:]]*20, GREY, GREY/255, [*map(Image.fromarray, GREY)],
                               [Image.fromarray(GREY[0]), Image.fromarray(COLOUR[1, :5])]*20], ids=range(5))
def test_resized(x):
    found = load_data((x, Y), size=(4, 5)).train
    assert found.shape[1:] == (4, 5)
    means = [torch.tensor(np.asarray(image, float)).mean() for image in (x if isinstance(x, list) else [])]
    if means: assert abs(found.x.float().mean() - sum(means)/40) < 10


def test_later_changes_of_the_array_are_not_seen():
    x = GREY.copy()
    found = load_data(((x, Y), (x[:8] + 1, Y[:8])))
    before, x[:] = found.train.fingerprint, 0
    assert found.train.fingerprint == before


def test_data_stay_as_they_are():
    data = load_data((GREY, Y))
    assert load_data(data) is data and load_data([*data]).train is data.train


# Columns, as the library datasets has them

class Columns(Plain):
    "What such a data set shows of itself."
    def __init__(self, features, *columns):
        self.features, self.column_names = features, [*features]
        super().__init__([dict(zip(features, row)) for row in zip(*columns)])


def feature(kind, **known): return type(kind, (), known)()


IMAGE, CLASSES = feature("Image"), feature("ClassLabel", names=["ant", "bee", "cat", "dog"])


@pytest.mark.parametrize("features", [dict(photo=IMAGE, kind=CLASSES), dict(img=None, label=feature("Value")),
                                      dict(x=feature("Array3D"), kind=CLASSES)], ids=range(3))
def test_columns_by_type_or_name(features):
    found = load_data(Columns(features, [*map(Image.fromarray, COLOUR)], Y.tolist()))
    assert together(found) == together(load_data((COLOUR, Y)))
    assert found.train.classes == (CLASSES.names if CLASSES in features.values() else [*"0123"])


def test_several_columns_have_to_be_told():
    data = Columns(dict(image=IMAGE, fine=CLASSES, coarse=CLASSES), GREY, Y, Y % 2)
    said = r"several columns may \(fine, coarse\) hold the labels: .*columns=\('image', 'coarse'\)"
    with pytest.raises(ValueError, match=said): load_data(data)
    assert load_data(data, columns=("image", "coarse")).train.classes == ["ant", "bee"]
    with pytest.raises(ValueError, match="columns is 'fine': it must be a pair"): load_data(data, columns="fine")
    with pytest.raises(ValueError, match=r"no column \(a, b\) seems to hold the images"):
        load_data(Columns(dict(a=None, b=CLASSES), GREY, Y))


def test_hidden_labels():
    train, test = (Columns(dict(image=IMAGE, label=CLASSES), GREY, y) for y in (Y, 0*Y - 1))
    with pytest.raises(ValueError, match="labels run from -1 to 3, .*take another part to test on"):
        load_data(dict(train=train, test=test))


def test_the_real_library():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=CLASSES.names))
    data = datasets.Dataset.from_dict(dict(image=[*map(Image.fromarray, COLOUR)], label=Y), features=features)
    expected = together(load_data((COLOUR, Y)))
    for source in data, data.with_format("torch"), data.with_format("numpy"), datasets.DatasetDict(train=data):
        found = load_data(source)
        assert together(found) == expected and found.train.classes == CLASSES.names
    with pytest.raises(ValueError, match="has no length"): load_data(data.to_iterable_dataset())


# What is not

class Stream(IterableDataset):
    def __iter__(self): return zip(GREY, Y)


HOLED = COLOUR/255
HOLED[3, 0, 0, 0] = np.nan
WRONG = [
    ((GREY, Y[1:]), "there are 40 images and 39 labels"),
    (((GREY, Y), (GREY[1:], Y)), "there are 39 test images and 40 labels"),
    ((GREY, Y + .5), "label 0.5 of image 0 is neither a whole number nor a class name"),
    ((GREY, np.array([*NAMES[:39], None], dtype=object)), "label None of image 39|label ant of image 0"),
    ((GREY, np.ones((40, 4))/4), r"labels have the shape \(40, 4\) and are not one-hot"),
    ((GREY, [None]*40), "a pair of ndarray .* and list: the second must be labels"),
    ((HOLED, Y), "1 of 40 images hold NaN or infinite numbers, image 3 first"),
    ((GREY + 1j, Y), "images are of the type complex128: numbers are needed"),
    (([GREY[0], GREY[1, 1:]]*20, Y), r"image 0 has 8x9 pixels and image 1 7x9 .*load_data\(data, size=\(8,9\)\)"),
    (([GREY[0], COLOUR[0, ..., :2]]*20, Y), "images differ in their channels"),
    (([GREY[0], "of what?"]*20, Y), "image 1: of what.* cannot be read as an image"),
    (([GREY[0], 3]*20, Y), "image 1 is no image but int"),
    ((GREY, Y*0), "all images are of one class, 0"), ((GREY, [0]*39 + [1]), "class 1 has one image only"),
    (((GREY[:2], Y[:2]), (GREY, Y)), "class 2 has test images but no training image"),
    ((GREY.reshape(40, -1)[:, :64], Y), r"images have the shape \(40, 64\): .*give x.reshape\(-1, 8, 8\)"),
    ((GREY[:0], Y[:0]), "there is no image"), ([], r"not \[\]"), (((GREY, Y), (COLOUR, Y)), r"uint8 \(1, 8, 9\) and"),
    (((GREY, Y), (GREY/255, Y)), "training images are uint8 .* and test images float32"),
    (((GREY, Y), (GREY, NAMES)), "of two kinds, numbers and words"),
    (GREY, r"one ndarray: give labels, too, as in \(x, y\)"), ((GREY, COLOUR), "the second must be labels"),
    ((GREY, Y, GREY, Y), r"4 things: say \(\(x_train, y_train\), \(x_test, y_test\)\)"),
    (zip(GREY, Y), "a zip, which has no length: collect its items first"), (Stream(), "a Stream, which has no length"),
    (DataLoader(TensorDataset(FIRST)), r"a DataLoader: give its data set, loader.dataset"),
    (TensorDataset(FIRST), "an item of the data is tuple: it must be a pair"),
    ([(GREY[0], 0), (GREY[1], 1), 5], "item 2 of the data is not"),
    (dict(x=GREY, y=Y), "the data have the parts x, y: say which"), (object(), "data must be one of digits, cifar10")]


@pytest.mark.parametrize("source, said", WRONG, ids=range(len(WRONG)))
def test_wrong_data_in_one_sentence(source, said):
    with pytest.raises(ValueError, match=said) as error: load_data(source)
    assert len(str(error.value).splitlines()) == 1


def test_too_many_images(monkeypatch):
    monkeypatch.setattr("efcn_nb.materials.data.free_memory", lambda: 1000)
    with pytest.raises(MemoryError, match="40 images need .* are free: say size=64"): load_data(([*GREY], Y))


# Studies

SMALL = dict(width=2, epochs=1, seeds=1, relax_times=[0], elcn_times=[], batch_size=40, device="cpu")


def test_relax_takes_a_pair_and_finds_its_runs_again(tmp_path, monkeypatch):
    monkeypatch.setenv("EFCN_NB_RUNS", str(tmp_path/"runs"))
    monkeypatch.chdir(tmp_path)
    table = relax((GREY, Y), **SMALL)
    study = Study([*zip(GREY, Y)], **SMALL)
    assert not study.unfinished() and study.out.parent == tmp_path/"runs" and study.measured().equals(table)
    other = GREY.copy()
    other[7, 0, 0] ^= 1
    for changed in (other, Y), (GREY, Y[::-1]): assert Study(changed, **SMALL).unfinished() == study.plan()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"], "nothing beside the notebook"
