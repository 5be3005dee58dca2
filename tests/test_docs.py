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


def images(site):
    return [(file, tag) for file in site.rglob("*.html") for tag in re.findall(r"<img [^>]*>", file.read_text())]


def test_every_figure_says_what_it_shows(site):
    for file, tag in images(site):
        alt = unescape(re.search(r'alt="([^"]*)"', tag)[1])
        assert len(alt.split()) > 2 and not re.search(r"\.(?:png|svg|jpe?g)$", alt), f"{file.name}: {tag}"


def test_index_of_the_api(site):
    "What the package's face offers and what is defined by patching is in it, under the names to import."
    page = (site / "genindex.html").read_text()
    for name in ("efcn_nb.embed", "efcn_nb.Study.run", "efcn_nb.ladder.geometry.ConvGeometry"):
        assert f"#{name}\"" in page, name


def test_parameters_stand_in_a_table_once(site):
    page = (site / "ladder/08_embedding.html").read_text()
    entry = page[page.index('id="efcn_nb.embed"'):page.index('id="efcn_nb.convert"')]
    assert "any network with convolutions" in entry and entry.count("input_shape</span>") == 2  # signature, table
    assert "----" not in entry


def test_a_name_that_is_a_parameter_or_a_column_is_no_link(site):
    page = (site / "experiments/56_claims.html").read_text()
    assert page.count('#efcn_nb.instruments.subspaces.split"') == 0  # the parameter split='test'
    assert '#efcn_nb.ablation"' not in page and "measures.measure_ablation" in page  # the parameter, the function
    link = 'class="reference internal" href="#efcn_nb.experiments.claims.protocol_epochs" title='
    assert page.count(link) == 1  # in the summary, not the column


def test_folded_source_says_what_it_holds(site):
    assert "Show source: _require_memory<" in (site / "ladder/08_embedding.html").read_text()


def test_findings_come_first(site):
    page = (site / "index.html").read_text()
    found = [match.start() for match in re.finditer('href="findings.html"', page)]
    assert found[0] < page.index('href="ladder/00_geometry.html"')  # in the sidebar
    assert any(page.index("<h1>") < place < page.index("<h2>") for place in found)


def test_only_words_wrap_in_tables(site):
    cells = re.findall(r'<td[^>]*class="([^"]*)"[^>]*>([^<]+)</td>', (site / "gallery/claims.html").read_text())
    assert all(("words" in kind.split()) == (len(text) >= 25) for kind, text in cells)


def test_every_notebook_can_be_downloaded(site):
    for path in keep.notebooks():
        name = path.relative_to(keep.ROOT / "nbs")
        copied = site / "notebooks" / name
        assert copied.read_bytes() == path.read_bytes()
        page = (site / name.with_suffix(".html")).read_text()
        assert f'notebooks/{name.as_posix()}" download' in page and f"<code>nbs/{name.as_posix()}</code>" in page


def test_the_address_of_the_site_is_one_setting():
    "Neither the pages nor the metadata name a place that nobody has set."
    texts = [keep.ROOT / name for name in ("settings.ini", "setup.py", "README.md", "docs/conf.py", "docs/build.py")]
    assert not [file.name for file in texts if "example.org" in file.read_text(encoding="utf-8")]


def test_broken_link_fails_the_build(tmp_path):
    root = keep.working_copy(tmp_path)
    for path in keep.notebooks(root): path.unlink()
    write_nb(new_nb([mk_cell("# efcn_nb\n\n[away](nowhere.ipynb)", "markdown")]), root / "nbs/index.ipynb")
    done = build(root)
    assert done.returncode and "nowhere" in done.stderr
