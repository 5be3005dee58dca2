"README.md is what nbs/index.ipynb renders to."
import re

import pytest

import keep

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
