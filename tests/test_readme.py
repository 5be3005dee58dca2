"README.md is what nbs/index.ipynb renders to."
import re

import pytest

import pandas as pd

import keep
from efcn_nb.experiments.relaxation import read_protocol

pytestmark = pytest.mark.skipif(not (keep.ROOT / "nbs/index.ipynb").exists(), reason="no index yet")


def test_readme_equals_index():
    assert not keep.stale_readme(), "run python tests/keep.py index"


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", (keep.ROOT / "README.md").read_text())
    assert not [target for target in targets if not (keep.ROOT / target).exists()]


def test_links_are_seen_from_the_root():
    markdown = "[a](00_geometry.ipynb#x) ![b](images/b.png) [c](../LICENSE) [d](https://d.org) [e](#e) `[f](f.md)`"
    assert keep.relink(markdown) == ("[a](nbs/00_geometry.ipynb#x) ![b](nbs/images/b.png) [c](LICENSE) "
                                     "[d](https://d.org) [e](#e) `[f](f.md)`")


def test_ci_runs_the_readme_command():
    command = (keep.ROOT / ".ci/run").read_text().splitlines()[-1]
    assert command in (keep.ROOT / "README.md").read_text(), f"the README should give the test command {command}"


def test_numbers_of_the_gpu_record():
    "What README says of the record at paper size is what the record holds."
    rows = pd.read_csv(keep.ROOT / "efcn_nb/records/gpu/outcomes.csv").set_index(["block", "network", "relax"])
    text = (keep.ROOT / "README.md").read_text(encoding="utf-8")
    for network in ("efcn", "annealed", "slowed"):
        row = rows.loc["paper", network, 18]
        assert f"{100*row['test']:.1f} ± {100*row['spread']:.1f} %" in text, network
    for block, relax in (("paper", 18), ("4,000", 0), ("4,000", 5), ("4,000", 10)):
        row = rows.loc[block, "efcn", relax]
        assert f"{100*row['gain_best_rival']:.1f} ± {100*row['half_best_rival']:.1f}" in text, (block, relax)


@pytest.mark.parametrize("record", ["photographs_1k", "needle_digits"])
def test_primary_claims(record):
    "What README says of the primary claim is what the record holds."
    row = pd.read_csv(keep.ROOT / f"efcn_nb/records/{record}/claims.csv").iloc[0]
    text = " ".join((keep.ROOT / "README.md").read_text(encoding="utf-8").split())
    assert row.claim.startswith("P") and f"{row.effect}, interval {row.interval}" in text

