"The documentation site builds without a network, and a broken link fails the build."
import re, subprocess, sys
from html import unescape
from urllib.parse import unquote

import pytest
from execnb.nbio import mk_cell, new_nb, write_nb

import keep

pytest.importorskip("myst_nb")


def build(root):
    return subprocess.run([sys.executable, root / "docs/build.py"], cwd=root, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(project):
    done = build(project)
    assert done.returncode == 0, done.stdout + done.stderr
    return project / "_docs"


def test_every_notebook_has_a_page(site):
    for path in keep.notebooks(): assert (site / path.relative_to(keep.ROOT / "nbs").with_suffix(".html")).exists()


def test_pages_need_no_network(site):
    for file in site.rglob("*.html"):
        outside = r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]*)"'
        loaded = re.findall(outside, file.read_text())
        assert not loaded, f"{file.name} loads {loaded}"
    assert list(site.rglob("KaTeX_Main-Regular.woff2"))


def test_links_within_the_site(site):
    ids = {file.resolve(): set(re.findall(r'\bid="([^"]+)"', file.read_text())) for file in site.rglob("*.html")}
    for file in ids:
        for link in re.findall(r'<a [^>]*href="([^"]+)"', file.read_text()):
            if re.match("[a-z]+:", link): continue
            page, _, anchor = unquote(unescape(link)).partition("#")
            target = (file.parent / page).resolve() if page else file
            assert target.exists(), f"{file.name} links to {link}"
            assert not anchor or target not in ids or anchor in ids[target], f"{file.name} links to {link}"


def test_broken_link_fails_the_build(tmp_path):
    root = keep.working_copy(tmp_path)
    for path in keep.notebooks(root): path.unlink()
    write_nb(new_nb([mk_cell("# efcn_nb\n\n[away](nowhere.ipynb)", "markdown")]), root / "nbs/index.ipynb")
    done = build(root)
    assert done.returncode and "nowhere" in done.stderr
