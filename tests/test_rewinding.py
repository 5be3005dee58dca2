"Pruning with rewinding: numbers of weights, batches, masks, and training from the rewind step."
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from efcn_nb.ladder.embedding import embed
from efcn_nb.ladder.layers import FullyConnected
from efcn_nb.ladder.masks import prune_mask
from efcn_nb.materials.models import make_model
from efcn_nb.training.rewinding import (
    one_shot_masks, prunable, pruned_masks, step_batches, survivors, train_rewound)
from tiny import smooth_images as images

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed): return torch.Generator().manual_seed(seed)


def dense():
    hidden = [nn.Linear(128, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(8, 3))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.floats(0, .999), st.integers(0, 12))
@example(100, .29, 1) # 0.29*100 is 28.999999999999996
def test_survivors_are_those_that_prune_mask_leaves(size, fraction, rounds):
    try: left = survivors(size, fraction, rounds)
    except ValueError: return
    weight, mask = torch.randn(size, generator=seeded(0)), torch.ones(size, dtype=torch.bool)
    for n in left:
        assert mask.sum() == n > 0
        mask = prune_mask(weight, mask, fraction) if n is not left[-1] else mask


@pytest.mark.parametrize("fraction", [-.1, 1, 1., 7])
def test_fractions_that_leave_nothing_or_more(fraction):
    with pytest.raises(ValueError, match="prune fewer rounds or another fraction"): survivors(100, fraction, 1)


def test_steps_go_through_all_images_in_each_pass():
    data = images()
    seen = [x for x, _ in step_batches(data, 30, 0, 9, seed=2)]
    key = lambda xs: sorted(x.sum().item() for x in torch.cat(xs))
    assert len(seen) == 9 and key(seen[:3]) == key(seen[3:6]) == key(list(data.x.split(30)))
    assert not seen[0].equal(seen[3])
    assert all(a.equal(b) for a, (b, _) in zip(seen[4:], step_batches(data, 30, 4, 9, seed=2)))
    assert not seen[0].equal(next(step_batches(data, 30, 0, 1, seed=3))[0])
    assert len([*step_batches(data, 40, 0, 5, seed=2)]) == 5 # what fills no batch is left out


def test_what_is_pruned():
    net = dense()
    assert [net.get_submodule(n).weight.shape for n in prunable(net)] == [(12, 128), (8, 12)]
    assert len(prunable(net, last=True)) == 3
    net = embed(make_model("small", (1, 16, 16), 3, width=1), (1, 16, 16))
    assert [type(net.get_submodule(n)) for n in prunable(net, True)] == [FullyConnected, FullyConnected, nn.Linear]


def test_masks_hold_the_largest_weights():
    net = dense()
    masks = one_shot_masks(net, prunable(net), .3, 0)
    assert all(m.all() and m.shape == net.get_submodule(name).weight.shape for name, m in masks.items())
    for r in (1, 2, 3):
        masks, once = pruned_masks(net, masks, .3), one_shot_masks(net, prunable(net), .3, r)
        for name, mask in masks.items():
            size = net.get_submodule(name).weight.abs()
            assert mask.equal(once[name]) and size[mask].min() >= size[~mask].max()
            assert mask.sum() == survivors(size.numel(), .3, r)[r]


def test_a_rewound_network_is_a_copy():
    net, data = dense().train(), images()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    masks = one_shot_masks(net, prunable(net), .3, 2)
    ends = [train_rewound(net, masks, step_batches(data, 30, 0, 6, 1), .1) for _ in range(2)]
    assert all(net.state_dict()[name].equal(value) for name, value in before.items())
    assert all(a.equal(ends[1].state_dict()[name]) for name, a in ends[0].state_dict().items())
    for name, mask in masks.items():
        weight = ends[0].get_submodule(name).weight
        assert not weight[~mask].any() and not weight[mask].equal(before[f"{name}.weight"][mask])
