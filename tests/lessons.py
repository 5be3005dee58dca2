"Noise with labels, and a transfer set whose teacher is linear: for the tests of transfer sets and distillation."
import torch

from efcn_nb.instruments.transfer_sets import TransferSet, standardise
from efcn_nb.materials.data import Dataset


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
