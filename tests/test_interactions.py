"Interactions between pixels, against PyTorch's own pooling and loops over pairs."
import copy
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from efcn_nb.instruments.interactions import first_weights, interaction_profile, interaction_strength
from efcn_nb.materials.controls import permute_pixels, pixel_order
from efcn_nb.materials.models import make_dense

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("pool", [
    nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(3, 1),
    nn.MaxPool2d((1, 3), (2, 1))])
def test_influence_through_pooling_by_hand(pool):
    "The windows that PyTorch's own pooling reads, one pixel alight at a time."
    norm = nn.BatchNorm2d(2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-2., .5]))
        norm.running_var.copy_(torch.tensor([4., 9.]))
    cnn = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), norm, nn.ReLU(), pool, nn.Flatten())
    cnn.append(nn.Linear(cnn(torch.zeros(2, 1, 5, 5)).shape[1], 3)).eval()
    out = cnn[5].weight.detach().abs().sum(0)
    alight = torch.eye(50).view(50, 2, 5, 5)
    reads = (pool(alight) > 0).flatten(1).float() # max of one bright pixel: 1 where the window holds it
    scale = (norm.weight.abs()/(norm.running_var + norm.eps).sqrt()).detach().repeat_interleave(25)
    torch.testing.assert_close(first_weights(cnn, (1, 5, 5))[1], reads @ out * scale, atol=1e-5, rtol=1e-5)


def test_interactions_of_permuted_pixels_are_put_back():
    net, order = make_dense((2, 5, 5), 3, [8]), pixel_order((2, 5, 5), 1)
    moved = copy.deepcopy(net)
    with torch.no_grad(): moved[2].weight.copy_(permute_pixels(net[2].weight, (2, 5, 5), order))
    a, b = interaction_profile(net, (2, 5, 5)), interaction_profile(moved, (2, 5, 5), order)
    pd.testing.assert_frame_equal(a, b, rtol=1e-4)
    assert not np.allclose(a.strength, interaction_profile(moved, (2, 5, 5)).strength, rtol=1e-3)


def test_profile_is_the_mean_over_pairs_of_one_colour():
    shape, net = (2, 3, 4), make_dense((2, 3, 4), 3, [5])
    S, place = interaction_strength(net, shape), torch.cartesian_prod(*map(torch.arange, shape))
    by = {}
    for a, b in itertools.permutations(range(24), 2):
        distance = (place[a,1:] - place[b,1:]).abs().max().item()
        if place[a,0] == place[b,0]: by.setdefault(distance, []).append(S[a, b].item())
    mean = np.mean(sum(by.values(), []))
    want = [np.mean(by[d])/mean for d in (1, 2, 3)]
    np.testing.assert_allclose(interaction_profile(net, shape).strength, want, rtol=1e-4)


@pytest.mark.parametrize("net,said", [
    (nn.Linear(4, 2), "an nn.Sequential, not from a Linear"),
    (nn.Sequential(nn.Flatten()), "no layer with weights"),
    (nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Softmax(1), nn.Linear(3, 2)), "through Softmax is not known"),
    (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)),
     "without running statistics"),
    (nn.Sequential(nn.Conv2d(1, 1, 1), nn.MaxPool2d(2, 1), nn.MaxPool2d(1, dilation=2), nn.Flatten(), nn.Linear(1, 1)),
     "through MaxPool2d is not known"),
])
def test_networks_that_cannot_be_read(net, said):
    with pytest.raises(ValueError) as e: interaction_profile(net, (1, 2, 2))
    assert said in str(e.value)


def test_interactions_of_no_image():
    with pytest.raises(ValueError, match="not in inputs of shape"):
        interaction_profile(nn.Sequential(nn.Linear(4, 2)), (4,))
