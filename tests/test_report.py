"The page of a study holds what it should, on its own, whatever became of the study."
import base64
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

import tiny
from efcn_nb.cli import efcn_relax
from efcn_nb.report import report

VOID = {"meta", "link", "img", "line", "circle"}
SMALL = dict(epochs=1, batch_size=100, relax_times=[0, 1], elcn_times=[])


class Page(HTMLParser):
    "The elements of a page, its text, and whether every element is closed in its place."
    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID: self.open.append(tag)

    def handle_startendtag(self, tag, attributes): self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag): assert tag in VOID or self.open.pop() == tag, tag

    def handle_data(self, text):
        if not {"style"} & {*self.open}: self.texts.append(text)

    def all(self, tag): return [attributes for name, attributes in self.elements if name == tag]


def page(source, folder, **options): return Page(report(source, folder/"page.html", **options).read_text("utf-8"))


@pytest.fixture(autouse=True)
def quickly(request, monkeypatch):
    "Figures are made, but not rendered, unless a test is about them."
    if request.node.get_closest_marker("slow") or "figures" in request.node.name: return
    if any(word in request.node.name for word in ("escaped", "diverged", "command", "fails", "alone")):
        monkeypatch.setattr("efcn_nb.report._figures", lambda story: ([], []))
    monkeypatch.setattr("efcn_nb.report._as_png", lambda figure: plt.close(figure) or "")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **kw: Path(path).write_bytes(b"png"))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    study = tiny.study(tmp_path_factory.mktemp("report")/"study", **SMALL, seeds=2, arms=["slowed"], validation=20)
    study.run(progress=False)
    return study


def test_what_a_page_holds(study, tmp_path):
    found = page(study, tmp_path)
    for words in ("The primary claim is not judged", "Of 12 claims", "every eFCN ends above the FCN", "CNN at its end",
                  "80 training and", "learning rate 0.1", "relax times 0, 1", "rivals slowed", "How to run it again",
                  "relax_times=[0, 1]", f"torch {torch.__version__}"):
        assert words in found.text, words
    verdicts = [a["class"].split()[1] for a in found.all("td") if a.get("class", "").startswith("verdict")]
    assert len(verdicts) == 12 and {"not-judged"} < {*verdicts}
    assert len(found.all("svg")) == 12 - verdicts.count("not-judged")
    assert any("points, 95 % interval from" in svg["aria-label"] for svg in found.all("svg"))


def test_figures_are_in_the_page_and_are_described(study, tmp_path):
    images = page(study, tmp_path).all("img")
    assert len(images) == 4
    for image in images:
        kind, _, content = image["src"].partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(content).startswith(b"\x89PNG")
        assert len(image["alt"]) > 60 and ("%" in image["alt"] or "points" in image["alt"])


def test_nothing_is_fetched(study, tmp_path):
    "Neither pictures nor styles nor scripts; the page forbids it to the browser, too."
    found = page(study, tmp_path)
    assert not found.all("script") and not found.all("iframe")
    assert {link["rel"] for link in found.all("link")} == {"icon"}
    assert all(url.startswith("data:") for name in ("img", "link") for a in found.all(name)
               for url in [a.get("src") or a["href"]])
    assert "url(" not in (tmp_path/"page.html").read_text() and "@import" not in (tmp_path/"page.html").read_text()
    policy, = [a["content"] for a in found.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_what_users_wrote_is_escaped(study, tmp_path):
    found = page(study, tmp_path, title="<script>x</script> & more", command="efcn_relax --name '<b>'")
    assert not found.all("script") and not found.all("b")
    assert "<script>x</script> & more" in found.text and "efcn_relax --name '<b>'" in found.text


def test_a_folder_tells_what_its_study_tells(study, tmp_path):
    "All but the data; and the command that is kept there."
    shutil.copytree(study.out, tmp_path/"copy")
    (tmp_path/"copy"/"command.txt").write_text("efcn_relax --seeds 2\nsome machine\n")
    first, second = page(study, tmp_path), page(tmp_path/"copy", tmp_path)
    assert [a["alt"] for a in first.all("img")] == [a["alt"] for a in second.all("img")]
    assert "efcn_relax --seeds 2" in second.text and "Unfinished" not in second.text
    assert first.text.partition("How to run")[0].split("Outcomes")[0] == second.text.split("Outcomes")[0]


def test_a_table_alone(study, tmp_path):
    found = page(study.measured(), tmp_path)
    assert "Of 12 claims" in found.text and "The command is not known" in found.text


def test_pages_repeat_to_the_byte(study, tmp_path):
    first = report(study, tmp_path/"a.html").read_bytes()
    assert report(study, tmp_path/"b.html").read_bytes() == first


def test_an_interrupted_study(study, tmp_path):
    "Its page shows what had been measured, from the study and from its folder."
    shutil.copytree(study.out, tmp_path/"cut")
    for run in [*(tmp_path/"cut").glob("relaxed-*relax1-*")]: (run/"finished.json").unlink()
    found = page(tmp_path/"cut", tmp_path)
    assert "Unfinished: 2 of" in found.text and "measured so far" in found.text and len(found.all("img")) == 4
    again = tiny.study(tmp_path/"cut", **SMALL, seeds=2, arms=["slowed"], validation=20)
    assert f"Unfinished: 2 of {len(again.plan())} runs" in page(again, tmp_path).text


def test_a_study_that_has_not_begun(tmp_path):
    study = tiny.study(tmp_path/"study", **SMALL)
    for source in (study, tmp_path/"study", pd.DataFrame()):
        found = page(source, tmp_path)
        assert "nothing has been measured yet" in found.text and not found.all("img")
        assert ("Unfinished" in found.text) == (source is not None and not isinstance(source, pd.DataFrame))


CASES = {
    "without FCN": (lambda t: t[t.network != "fcn"], "There is no fully-connected baseline (FCN)"),
    "one seed": (lambda t: t[t.seed == 0], "One seed."),
    "without relaxed networks": (lambda t: t[t.network.isin(["cnn", "fcn"])], "The claims are not judged"),
    "a CNN alone": (lambda t: t[t.network == "cnn"], "The claims are not judged"),
    "before training": (lambda t: t[t.epoch == 0], "Figures"),
    "outcomes alone": (lambda t: t[t.epoch == t.groupby(["network", "relax", "seed"], dropna=False)
                                   .epoch.transform("max")], "Of 12 claims"),
}


@pytest.mark.parametrize("name", CASES)
def test_parts_of_a_study(study, tmp_path, name):
    keep, says = CASES[name]
    found = page(keep(study.measured()), tmp_path)
    assert says in found.text, found.text
    if name == "one seed": assert all("interval from" not in svg["aria-label"] for svg in found.all("svg"))


def test_diverged_runs_are_named(tmp_path):
    study = tiny.study(tmp_path/"study", **SMALL | dict(relax_times=[1], relaxed_lr=1e38))
    study.run(progress=False)
    for source in (study, study.out, study.measured()):
        found = page(source, tmp_path)
        assert "Diverged" in found.text and len(found.all("li")) == 1, found.text


def test_all_runs_diverged(tmp_path, capsys):
    "The command writes the page, too, before it fails."
    flags = [*tiny.FLAGS, "--elcn", "", "--lr", "1e38", "--out", f"{tmp_path}/s", "--report", f"{tmp_path}/page.html"]
    with pytest.raises(SystemExit, match="all other runs diverged"): efcn_relax(flags)
    found = Page((tmp_path/"page.html").read_text())
    assert "Diverged" in found.text and "its CNN diverged before it could be relaxed" in found.text


def test_the_command(tmp_path, capsys):
    "It says where the page is, and the page says the command; a second pass writes the same page over it."
    flags = [*tiny.FLAGS, "--relax", "0", "--elcn", "", "--out", f"{tmp_path}/s",
             "--report", f"{tmp_path}/new/page.html"]
    efcn_relax(flags)
    assert f"Report: {tmp_path}/new/page.html" in capsys.readouterr().out
    first = (tmp_path/"new/page.html").read_text()
    assert f"--report {tmp_path}/new/page.html" in Page(first).text
    efcn_relax(flags)
    assert (tmp_path/"new/page.html").read_text() == first
    assert [p.name for p in (tmp_path/"new").iterdir()] == ["page.html"]


@pytest.mark.parametrize("name, says", [
    ("page", "ends in .html"), ("page.txt", "say '"), ("folder.html", "is a folder"),
    ("mine.html", "no report of this"),
    ("file/page.html", "cannot be made a folder"), ("locked/page.html", "cannot be written")])
def test_what_cannot_be_written_is_refused_before_training(tmp_path, name, says, monkeypatch):
    (tmp_path/"folder.html").mkdir()
    (tmp_path/"mine.html").write_text("<p>mine</p>")
    (tmp_path/"file").touch()
    if name.startswith("locked"):
        def refuse(path, content): raise OSError(f"{path} could not be written") from PermissionError("no")
        monkeypatch.setattr("efcn_nb.report.write_atomic", refuse)
    with pytest.raises(SystemExit) as end:
        efcn_relax([*tiny.FLAGS, "--out", f"{tmp_path}/s", "--report", f"{tmp_path}/{name}"])
    assert end.value.code.startswith("efcn_relax: ") and says in end.value.code
    assert len(end.value.code.splitlines()) == 1 and not [*(tmp_path/"s").glob("*/")]
    assert (tmp_path/"mine.html").read_text() == "<p>mine</p>"


@pytest.mark.parametrize("source, says", [(3, "must be a Study"), ("nowhere", "there is no folder"),
                                          (".", "holds no study"), (pd.DataFrame(dict(a=[1])), "does not name")])
def test_what_is_no_study(tmp_path, source, says, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says): report(source, "page.html")
    assert not [*tmp_path.iterdir()]


def test_a_page_that_fails_leaves_the_old_one(study, tmp_path, monkeypatch):
    before = report(study, tmp_path/"page.html").read_bytes()
    monkeypatch.setattr("efcn_nb.service.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError): report(study, tmp_path/"page.html", title="other")
    assert (tmp_path/"page.html").read_bytes() == before and len([*tmp_path.iterdir()]) == 1


def chromium(page, *options):
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program: pytest.skip("no Chromium")
    command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


PROBE = """<script>addEventListener("load", () => {
const root = document.documentElement, images = [...document.images];
const said = {width: root.scrollWidth <= root.clientWidth + 1, images: images.every(i => i.naturalWidth > 400),
  dark: getComputedStyle(document.body).backgroundColor, tables: [...document.querySelectorAll(".wide")].every(
    t => t.getBoundingClientRect().right <= root.clientWidth + 1)};
document.body.dataset.said = JSON.stringify(said)})</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("options, dark", [((), False), (("--window-size=400,800",), False),
                                           (("--blink-settings=preferredColorScheme=0",), True)])
def test_in_a_browser(study, tmp_path, options, dark):
    "Pictures load, nothing is wider than the window (tables scroll), and the ground is dark where that is asked for."
    text = report(study, tmp_path/"page.html").read_text()
    probe = text.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    (tmp_path/"probe.html").write_text(probe.replace("</body>", f"{PROBE}</body>"))
    said = chromium(tmp_path/"probe.html", *options, "--dump-dom", "--virtual-time-budget=5000")
    said = said.partition('data-said="')[2].partition('"')[0].replace("&quot;", "")
    assert "width:true" in said and "images:true" in said and "tables:true" in said, said
    assert ("rgb(255, 255, 255)" in said) != dark


@pytest.mark.slow
def test_on_paper(study, tmp_path):
    chromium(report(study, tmp_path/"page.html"), f"--print-to-pdf={tmp_path/'page.pdf'}")
    assert (tmp_path/"page.pdf").read_bytes().startswith(b"%PDF")
