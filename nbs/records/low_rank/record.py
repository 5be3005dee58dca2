"""python record.py FOLDER [OUT]: the record, from a folder of images train/CLASS/*.jpg and test/CLASS/*.jpg.
Networks are stored in OUT/cells; if interrupted, rerun the same command; it resumes."""
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from efcn_nb.service.timing import take_turns
from efcn_nb.materials.data import Data, load_folder
from efcn_nb.ladder.tensor_formats import FORMATS, fit_rank, hold_to_rank, tensor_shape
from efcn_nb.studies.low_rank import low_rank_grid, LowRankSettings, post_hoc_study

torch.set_num_threads(1)
folder, out = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else ".")
data = load_folder(folder, size=(16, 16), name="CIFAR-10 (JPEG), 10,000 images, 16x16")
data = Data(data.train.thinned(10_000), data.test.thinned(5_000))
settings = LowRankSettings(epochs=3, search_epochs=2, lrs=(.005, .01, .02), seeds=(0, 1, 2), precision="bf16")
ratios = (2, 5, 15, 50, 150, 500)


def grid(arms, ratios, settings=settings, trained=True):
    return low_rank_grid(data, arms, ratios, settings, trained, out/"cells")


def keep(name, *tables):
    table = pd.concat(tables, ignore_index=True)
    table.to_csv(out/f"{name}.csv", index=False, float_format="%.6g")
    places = {e: 0 for t in tables for e in t.attrs.get("environments", [])}
    print(name, len(table), "rows", *places, sep="\n", flush=True)


def step(conv, x):
    "A step of one layer, forward and backward."
    conv.zero_grad()
    conv(x).square().mean().backward()


def composed(conv):
    "Its kernel alone."
    conv.zero_grad()
    conv.weight.sum().backward()


def cost(format, ratio, shuffled):
    dense, held = (nn.Conv2d(52, 52, 5, padding=2) for _ in range(2))
    hold_to_rank(held, format, fit_rank(format, tensor_shape(held), ratio), shuffled)
    x = torch.randn(100, 52, 4, 4, requires_grad=True)
    parts = dict(dense=lambda: step(dense, x), held=lambda: step(held, x), composed=lambda: composed(held))
    times = take_turns(parts, repeat=30)
    base = times["dense"]
    return dict(format=format, ratio=ratio, shuffled=shuffled, dense_ms=1e3*base, held=times["held"]/base,
                composed=times["composed"]/base)


shuffles = ("everything", "none", "channels", "window", "pixels")
keep("dense", grid([("dense", "none"), ("dense", "pixels")], [1]))
keep("tt", grid([("tt", s) for s in shuffles], ratios))
keep("frozen", grid([("dense", "none"), ("tt", "none"), ("tt", "everything")], (2, 50, 500), trained=False))
keep("cost", pd.DataFrame([cost(f, r, s) for f in FORMATS for r in (2, 50, 500) for s in ("none", "everything")]))
for f in ("tr", "tucker", "cp"):
    keep(f, grid([(f, "everything"), (f, "none")], (2, 15, 150, 500), replace(settings, lrs=(.005, .02))))
keep("post_hoc", post_hoc_study(data, (5, 50, 500), settings, pixels=[False], folder=out/"cells"))
longer = replace(settings, epochs=12, lrs=(.01,))
keep("longer", grid([("tt", "everything"), ("dense", "none")], (500,), longer),
     grid([("tt", "everything")], (500,), longer, trained=False))
