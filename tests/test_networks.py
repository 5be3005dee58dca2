"Networks by name: of libraries, of this package, from files; and what is said of names that are none."
import sys
import types

import pytest
import torch
from torch import nn

from efcn_nb.cli import efcn_embed
from efcn_nb.materials.networks import find_network

FILE = """
import torch
from torch import nn
import beside

class Net(nn.Sequential):
    def __init__(self): super().__init__(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2*36, 3))

def make(width=2): return nn.Conv2d(1, width, 3)
def wide(width): return make(width)
def number(): return 3
def broken(): return nn.Conv2d(1, 2, 3, groups=5)
def leave(): raise SystemExit(2)
made = nn.Conv2d(1, 1, 3)
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path/"mine.py").write_text(FILE)
    (tmp_path/"beside.py").touch()
    yield tmp_path/"mine.py"
    sys.modules.pop("beside", None)


def command(capsys, *argv):
    "What the command prints, or the one line with which it ends."
    try: efcn_embed([*map(str, argv)])
    except SystemExit as end:
        assert str(end.code).startswith("efcn_embed: ") and len(str(end.code).splitlines()) == 1, end.code
        return end.code
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["squeezenet1_1", "torchvision.squeezenet1_1", "torchvision.models.squeezenet1_1"])
def test_names_of_torchvision(name):
    assert find_network(name)[1:] == ((3, 224, 224), "torchvision")


def test_no_backbone_is_fetched(monkeypatch):
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *a, **kw: pytest.fail("fetches weights"))
    with torch.device("meta"): assert isinstance(find_network("lraspp_mobilenet_v3_large").network, nn.Module)


def test_names_of_this_package():
    assert find_network("small").input_shape == (1, 16, 16)
    assert find_network("efcn_nb.small", (2, 20, 20)).network[0].in_channels == 2


def test_names_of_timm(monkeypatch):
    "A library of that name is asked for its own; names may have a tag behind a dot."
    made = nn.Conv2d(3, 1, 3)
    made.pretrained_cfg = dict(input_size=(3, 99, 99))
    timm = types.SimpleNamespace(list_models=lambda: ["tiny", "resnet18"], create_model=lambda name, pretrained: made)
    monkeypatch.setitem(sys.modules, "timm", timm)
    for name in ("tiny", "timm.tiny", "timm.resnet18", "timm.tiny.a1_in1k", "tiny.a1_in1k"):
        assert find_network(name) == (made, (3, 99, 99), "timm"), name
    assert find_network("resnet18").origin == "torchvision"
    with pytest.raises(ValueError, match="near are tiny"): find_network("timm.tinny")


@pytest.mark.parametrize("name, says", [
    ("resnet_18", "near are resnet18"), ("torchvision.models.alexnett", "in torchvision; near are alexnet"),
    ("efcn_nb.skiny", "in efcn_nb; near are skinny"), ("", "no network is called ''"),
    ("zzzz", "no network is called")])
def test_unknown_names(name, says):
    with pytest.raises(ValueError, match=says): find_network(name)


def test_timm_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr("efcn_nb.materials.networks._is_there", lambda library: False)
    with pytest.raises(ValueError, match="needs timm, which is not installed"): find_network("timm.resnet18")


@pytest.mark.parametrize("function, kind", [("make", nn.Conv2d), ("Net", nn.Sequential), ("made", nn.Conv2d)])
def test_functions_classes_and_networks_in_files(file, function, kind):
    path = [*sys.path]
    found = find_network(f"{file}:{function}")
    assert isinstance(found.network, kind) and found.input_shape is None and sys.path == path


@pytest.mark.parametrize("function, says", [
    ("", "say which function"), (":", "say which function"), (":mak", "has no function mak; it has Net, make, wide"),
    (":wide", "a function without arguments \\(missing a required argument: 'width'"),
    (":number", "must return a network \\(torch.nn.Module\\), not int"), (":broken", "fails \\(ValueError: "),
    (":leave", "fails \\(SystemExit: 2")])
def test_what_is_wrong_with_functions(file, function, says):
    with pytest.raises(ValueError, match=says) as end: find_network(f"{file}{function}")
    assert len(str(end.value).splitlines()) == 1


@pytest.mark.parametrize("text, says", [
    ("import nothing_of_that_name", "cannot be imported \\(ModuleNotFoundError: "), ("def f(:", "SyntaxError"),
    ("raise SystemExit", "SystemExit"), ("x = 1", "it has no function"), (None, "there is no file")])
def test_what_is_wrong_with_files(tmp_path, text, says):
    if text is not None: (tmp_path/"mine.py").write_text(text)
    with pytest.raises(ValueError, match=says): find_network(f"{tmp_path}/mine.py:f")


def test_the_command(file, tmp_path, capsys):
    "Sizes by layer and in sum, and what fits; table and picture if there is a folder for them."
    out = command(capsys, f"{file}:Net", "--shape", "1,8,8", "--out", tmp_path/"costs")
    for words in ("on one image of 1x8x8 (as asked)", "2x6x6", "4.6 k", "other layers", "Trimming saves nothing",
                  "eFCN: 19.6 kB fit, and so do 58.8 kB in training", "costs.png"):
        assert words in out, words
    assert {p.name for p in (tmp_path/"costs").iterdir()} == {"costs.csv", "costs.png"}
    says = command(capsys, f"{file}:Net", "--shape", "1,8,8", "--out", tmp_path/"costs")
    assert "holds costs.csv already" in says


def test_trimming_is_said(capsys):
    out = command(capsys, "efcn_nb.small", "--shape", "1,13,13")
    assert "would make outputs that nothing reads" in out
    assert "Trim" not in command(capsys, "efcn_nb.small", "--shape", "1,13,13", "--no-trim")


@pytest.mark.parametrize("argv, says", [
    (["efcn_nb.small", "--layers", "a"], "no convolution is called 'a'"), (["nonsense"], "no network is called"),
    (["FILE:make"], "needs --shape"), (["FILE:make", "--shape", "3,8,8"], "does not fit the model"),
    (["FILE:make", "--shape", "1,2,2"], "does not fit the model")])
def test_what_the_command_refuses(file, capsys, argv, says):
    assert says in command(capsys, *[word.replace("FILE", str(file)) for word in argv])


def test_layers_of_the_command(capsys):
    out = command(capsys, "efcn_nb.skinny", "--layers", "3,6")
    assert "\n3 " in out and "\n6 " in out and "\n0 " not in out
