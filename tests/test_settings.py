"Settings of studies are one value: however they were given, equal ones are equal."
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from efcn_nb.studies.distillation import DistillationSettings
from efcn_nb.studies.low_rank import LowRankSettings
from efcn_nb.studies.pruning import PruningSettings
from efcn_nb.studies.separation import DigitSettings, PatternSettings
from efcn_nb.studies.topology import TopologySettings

STUDIES = [DistillationSettings, LowRankSettings, PruningSettings, TopologySettings]
WAYS = dict(list=list, array=np.array, generator=iter, range=lambda seeds: range(len(seeds)),
            numbers_of_numpy=lambda seeds: [np.int64(seed) for seed in seeds])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("study", STUDIES)
def test_seeds_in_any_form_are_the_same_settings(study, way):
    given = study(seeds=WAYS[way]((0, 1, 2)))
    assert given == study(seeds=(0, 1, 2)) and given.seeds == (0, 1, 2)
    assert {type(seed) for seed in given.seeds} == {int}


@pytest.mark.parametrize("study, name, value", [
    (DistillationSettings, "epochs", np.int64(3)), (LowRankSettings, "width", np.int32(8)),
    (PruningSettings, "steps", np.int64(100)), (PruningSettings, "widths", np.array([16, 16])),
    (TopologySettings, "zeta", np.float64(.25)), (TopologySettings, "keep", np.array([0, 1])),
    (TopologySettings, "keep", []), (TopologySettings, "kinds", iter(["cnn", "dense"]))])
def test_numbers_of_numpy_are_pythons_own(study, name, value):
    kept = getattr(study(**{name: value}), name)
    assert type(kept) in (int, float, tuple)
    assert all(type(one) in (int, str) for one in kept) if type(kept) is tuple else True


@pytest.mark.parametrize("study", STUDIES)
def test_settings_cannot_be_changed(study):
    with pytest.raises(FrozenInstanceError): study().seeds = (3,)
    assert replace(study(), seeds=[3]).seeds == (3,)


@pytest.mark.parametrize("study", [LowRankSettings, PruningSettings, TopologySettings])
def test_equal_settings_have_one_hash(study): assert hash(study(seeds=[0, 1])) == hash(study(seeds=(0, 1)))


WRONG = [
    (TopologySettings, dict(seeds=3), "seeds must be a list"),
    (TopologySettings, dict(seeds=[12346]), "seed 12346 chooses the learning rates"),
    (DistillationSettings, dict(larger_mlps=5), "larger_mlps must be a list, empty for none"),
    (DistillationSettings, dict(label_budgets=None), "label_budgets must be a list, empty for none"),
    (DistillationSettings, dict(transfer="abc"), "transfer must be a dict"),
    (PruningSettings, dict(seeds=[-1]), "0 or more")]


@pytest.mark.parametrize("study, settings, says", WRONG)
def test_impossible_settings(study, settings, says):
    with pytest.raises(ValueError, match=says): study(**settings)


@pytest.mark.parametrize("study, seeds", [
    (PruningSettings, [12345]), (DistillationSettings, [20_000]), (TopologySettings, [20_000])])
def test_seeds_that_no_search_uses_are_allowed(study, seeds): assert study(seeds=seeds).seeds == tuple(seeds)


@pytest.mark.parametrize("study", [PatternSettings, DigitSettings])
@pytest.mark.parametrize("seed", ["x", 1.5, True])
def test_a_seed_is_a_whole_number(study, seed):
    with pytest.raises(ValueError, match="seed must be a whole number"): study("cnn", 16, seed=seed)
