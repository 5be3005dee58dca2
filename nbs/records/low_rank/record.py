"python record.py FOLDER [OUT]: the record, from a folder of images train/CLASS/*.jpg and test/CLASS/*.jpg; cells are kept in OUT/cells, so that it goes on where it was interrupted."
import sys
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from efcn_nb.service.timing import take_turns
from efcn_nb.materials.data import Data, load_folder
from efcn_nb.ladder.tensor_formats import FORMATS, fit_rank, hold_to_rank, tensor_shape
from efcn_nb.studies.low_rank import low_rank_grid, post_hoc_study

torch.set_num_threads(1)
folder, out = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else ".")
data = load_folder(folder, size=(16, 16), name="CIFAR-10 (JPEG), 10,000 images, 16x16")
data = Data(data.train.thinned(10_000), data.test.thinned(5_000))
settings, ratios = dict(epochs=3, search_epochs=2, lrs=(.005, .01, .02), seeds=(0, 1, 2), precision="bf16", folder=out/"cells"), (2, 5, 15, 50, 150, 500)


def keep(name, *tables):
    table = pd.concat(tables, ignore_index=True)
    table.to_csv(out/f"{name}.csv", index=False, float_format="%.6g")
    print(name, len(table), "rows", *{e: 0 for t in tables for e in t.attrs.get("environments", [])}, sep="\n", flush=True)


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
    times = take_turns(dict(dense=lambda: step(dense, x), held=lambda: step(held, x), composed=lambda: composed(held)), repeat=30)
    return dict(format=format, ratio=ratio, shuffled=shuffled, dense_ms=1e3*times["dense"], held=times["held"]/times["dense"], composed=times["composed"]/times["dense"])


keep("dense", low_rank_grid(data, [("dense", "none"), ("dense", "pixels")], [1], **settings))
keep("tt", low_rank_grid(data, [("tt", s) for s in ("everything", "none", "channels", "window", "pixels")], ratios, **settings))
keep("frozen", low_rank_grid(data, [("dense", "none"), ("tt", "none"), ("tt", "everything")], (2, 50, 500), trained=False, **settings))
keep("cost", pd.DataFrame([cost(f, r, s) for f in FORMATS for r in (2, 50, 500) for s in ("none", "everything")]))
for f in ("tr", "tucker", "cp"): keep(f, low_rank_grid(data, [(f, s) for s in ("everything", "none")], (2, 15, 150, 500), **(settings | dict(lrs=(.005, .02)))))
keep("post_hoc", post_hoc_study(data, (5, 50, 500), pixels=[False], folder=out/"cells", epochs=3, precision="bf16"))
settings |= dict(epochs=12, lrs=(.01,))
keep("longer", low_rank_grid(data, [("tt", "everything"), ("dense", "none")], (500,), **settings), low_rank_grid(data, [("tt", "everything")], (500,), trained=False, **settings))
