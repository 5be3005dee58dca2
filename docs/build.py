"""Build the documentation site from the notebooks, without a network: python docs/build.py

The notebooks become pages, the exported modules an index of the API, Sphinx makes the site. No cell is executed: saved
outputs are shown, and documentation is read off the imported modules. A broken link fails the build. The site is in
_docs/index.html.
"""
import argparse, ast, base64, io, os, re, shutil, sys
from importlib import import_module
from pathlib import Path

from execnb.nbio import dict2nb, mk_cell, nb2dict, read_nb, write_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import extract_directives
from PIL import Image
from sphinx.cmd.build import build_main

import api

ROOT = Path(__file__).resolve().parents[1]
NBS, PAGES = ROOT / "nbs", ROOT / "_sphinx"
SECTIONS = dict(gallery="Findings", ladder="Ladder", materials="Materials", training="Training",
                instruments="Instruments", experiments="Experiments", studies="Studies", service="Service")  # by folder
TEXTS = ("CHANGELOG", "CONTRIBUTING")
PYTHON = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"},
          "language_info": {"name": "python", "pygments_lexer": "python"}}


FINDINGS = "**[All findings](findings.md)**: each is one notebook, with its figures and in words."


# Pages

class Page:
    "A notebook on its way to becoming a page."
    def __init__(self, path):
        self.path, self.folder, self.nb = path, path.relative_to(NBS).parent.as_posix(), read_nb(path)
        for cell in self.nb.cells: cell.directives = extract_directives(cell) if cell.cell_type == "code" else {}
        exported = [cell.directives["default_exp"][0] for cell in self.nb.cells if "default_exp" in cell.directives]
        self.module = import_module(f"{api.PACKAGE}.{exported[0]}") if exported else None
        self.names = {name: number for number, cell in enumerate(self.nb.cells) if is_exported(cell)
                      for name in api.defined(cell.source) if self.module and documented(self.module, name)}
        things = [api.found(self.module, name) for name in self.names]
        self.taken = {p.name for thing in things for p in api.parameters(thing)[1]} - {*self.names}  # parameters

    @property
    def docname(self): return self.path.relative_to(NBS).with_suffix("").as_posix()

    @property
    def title(self):
        "A module is called by its full name, so that a study is told apart from a finding of the same name."
        if self.module: return self.module.__name__
        return self.nb.cells[0].source.splitlines()[0].lstrip("# ")


def is_exported(cell): return "export" in cell.directives or "exporti" in cell.directives


def documented(module, name): return name in module.__all__ or "." in name and name.split(".")[0] in module.__all__


def cells_of(page):
    "The cells of the page: title, summary, what the package's face offers, then the notebook."
    first, *others = page.nb.cells
    title, _, quote = first.source.partition("\n")
    cells = [mk_cell(f"# {page.title if page.module else title.lstrip('# ')}\n{quote}\n\n{notebook_links(page)}",
                     "markdown")]
    main = [name for name, home in api.face().items() if page.module and home == page.module.__name__]
    if page.names: cells += [mk_cell(text, "markdown") for text in (summary(page, main), *documents(page, main))]
    formula = False
    for number, cell in enumerate(others, 1):
        if cell.cell_type == "raw": continue
        if cell.cell_type == "markdown":
            formula = "$$" in cell.source or re.search(r"\$[^$]*=[^$]*\$", cell.source)
            cells.append(cell)
            continue
        if cell.directives.keys() & {"hide", "default_exp"}: continue
        if is_exported(cell):
            mine = [name for name, place in page.names.items() if place == number]
            cells += [mk_cell(text, "markdown") for text in documents(page, [n for n in mine if n not in main])]
            above = [name for name in mine if name in main]
            if above: cells.append(mk_cell(f"The source of {links(page, above)}:", "markdown"))
            shown = formula and re.search("^def ", cell.source, flags=re.M)  # where a formula becomes code
            if not shown: fold(cell)
            formula = False
        present(cell)
        cells += as_text(cell)
    return cells


def fold(cell):
    "Hide the source behind a bar that says what is in it."
    cell.metadata.tags = ["hide-input"]
    names = ", ".join(api.all_defined(cell.source))
    shown = {f"code_prompt_{verb}": f"{verb.title()} source: {names}" for verb in ("show", "hide")}
    if names: cell.metadata["mystnb"] = shown


def documents(page, names): return [api.document(page.module, name, page.names) for name in names]


def links(page, names): return ", ".join(f"{{py:obj}}`{name} <{api.full_name(page.module, name)}>`" for name in names)


def summary(page, main):
    "A table of what the module offers: first what nothing else in it uses, then the helpers of that."
    tops = [name for name in page.names if "." not in name and not isinstance(api.found(page.module, name), DATA)]
    if not tops: return ""
    used = {node.id for cell in page.nb.cells if is_exported(cell) for node in ast.walk(ast.parse(cell.source))
            if isinstance(node, ast.Name)}
    order = [*main, *sorted((name for name in tops if name not in main), key=used.__contains__)]
    said = {name: api.cell(api.first_sentence(api.found(page.module, name))) for name in order}
    rows = [f"| {links(page, [name])} | {said[name]} |" for name in order]
    return "::::{div} summary\n| Name | What it is |\n|---|---|\n" + "\n".join(rows) + "\n::::"


DATA = (dict, list, tuple, str, int, float, set, frozenset, type(None))


def notebook_links(page):
    "Where the notebook is: as a file to download, and what opens it; in the repository."
    to_root = "../" * page.docname.count("/")
    file, place = f"notebooks/{page.docname}.ipynb", page.path.relative_to(ROOT).as_posix()
    parts = [f'<a href="{to_root}{file}" download>Download notebook</a>']
    parts.append(f"open it with <code>jupyter lab {page.path.name}</code>")
    address = f"{get_config().git_url}/blob/{get_config().branch}/{place}"
    linked = f'<a href="{address}"><code>{place}</code></a>' if get_config().git_url else f"<code>{place}</code>"
    parts.append(f"in the repository {linked}")
    github = re.match(r"https://github\.com/([^/]+/[^/]+)", get_config().git_url)
    if github:
        at = f"https://colab.research.google.com/github/{github[1].removesuffix('.git')}/blob/{get_config().branch}"
        parts.append(f'<a href="{at}/{place}">Colab</a>')
    return f'<p class="notebook">{" · ".join(parts)}</p>'


def present(cell):
    "nbdev's `#| key: value` lines as what myst-nb understands."
    said = {key.rstrip(":"): " ".join(value) for key, value in cell.directives.items()}
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    hide = {"echo": "remove-input", "output": "remove-output", "include": "remove-cell"}
    hidden = [tag for key, tag in hide.items() if said.get(key) == "false"]
    cell.metadata["tags"] = cell.metadata.get("tags", []) + hidden
    if "fig-alt" in said: cell.metadata.setdefault("mystnb", {})["image"] = {"alt": said["fig-alt"]}
    for output in cell.get("outputs") or []:
        if "text/html" in output.get("data", {}): output["data"]["text/html"] = worded(output["data"]["text/html"])


def worded(html):
    "A table in which cells of many words are told from numbers: only they may wrap."
    def cell(match):
        tag = match[0]
        return tag.replace('class="', 'class="words ') if 'class="' in tag else f'{tag[:-1]} class="words">'
    return re.sub(r"<t[dh]\b[^>]*>(?=[^<]{25})", cell, "".join(html))


def as_text(cell):
    "The cell; one whose output is markdown becomes text, whose links lead to other pages."
    outputs = cell.get("outputs") or []
    texts = [output.get("data", {}).get("text/markdown") for output in outputs]
    if not texts or None in texts: return [cell]
    cell.outputs = []
    shown = [] if "remove-input" in cell.metadata.get("tags", []) else [cell]
    return [*shown, *(mk_cell("".join(text), "markdown") for text in texts)]


def link_names(cell, page, known):
    "Turn the names of documented objects, in backticks, into links; not those of columns, nor of parameters."
    documentation = cell.source.startswith("::::")  # knows the parameters of each function
    def link(match):
        name = match[1]
        if name in page.taken and match[2] is None and not documentation: return match[0]
        target = known.get((page.module and page.module.__name__, name)) or known.get(name)
        return f"{{py:obj}}`{name} <{target}>`" if target else match[0]
    leave = r"(^(?:```|~~~).*?^(?:```|~~~)$|\[[^\]]*\]\([^)]*\)|\{py:obj\}`[^`]*`)"  # code, links
    parts = re.split(leave, cell.source, flags=re.M | re.S)
    name = r"(?<!column )(?<!columns )(?<![`}])`([A-Za-z_][\w.]*)(\(\))?`(?!`)"
    parts[::2] = [re.sub(name, link, part) for part in parts[::2]]
    cell.source = "".join(parts)


def names_of(pages):
    "The documented objects by name, and by module and name: first those of the package's face."
    known = {}
    for page in pages:
        for name in page.names:
            full = api.full_name(page.module, name)
            known[page.module.__name__, name] = known[f"{page.module.__name__}.{name}"] = known[full] = full
            if name not in known or full.startswith(f"{api.PACKAGE}.{name}"): known[name] = full
    return known


# What connects the pages

def of_the_site(text):
    "Links of the README to other files at the top of the repository."
    def link(match): return f"[{match[1]}]({match[2].lower()}.md)" if match[2] in TEXTS else match[1]
    return re.sub(r"\[([^\]]*)\]\(\.\./([A-Z]+)(?:\.\w+)?\)", link, text)


def contents(pages, texts):
    "The tables of contents: a section for each folder, in the order of `SECTIONS`; what lies in none comes last."
    sections = {}
    for page in pages:
        if page.docname == "index": continue
        name = page.title.rpartition(".")[2] if page.module else page.title
        sections.setdefault(SECTIONS.get(page.folder, "Reference"), []).append(f"{name} <{page.docname}>")
    if "Findings" in sections: sections["Findings"].insert(0, "All findings <findings>")
    sections.setdefault("Reference", []).extend(["Index of the API <genindex>", *texts])
    return [mk_cell("```{toctree}\n:hidden:\n:caption: %s\n\n%s\n```" % (section, "\n".join(names)), "markdown")
            for section, names in sections.items()]


def reading_order(pages):
    "The pages by section and number; those of the gallery as README lists them."
    table = [data for page in pages if page.docname == "index" for cell in page.nb.cells
             for output in cell.get("outputs", []) for data in output.get("data", {}).get("text/markdown", [])]
    listed = re.findall(r"gallery/(\w+)\.ipynb", "".join(table).partition("**gallery**")[2])
    sections = [*SECTIONS, "."]
    def place(page):
        stem = page.path.stem
        return sections.index(page.folder), listed.index(stem) if stem in listed else len(listed), page.path.name
    return sorted(pages, key=place)


def findings(pages):
    "The page of all findings: a card for each, with its first figure, its question and its run time."
    cards = []
    for page in pages:
        title, *lines = page.nb.cells[0].source.splitlines()
        quote = " ".join(line.lstrip("> ") for line in lines if line.startswith(">"))
        thumbnail = first_figure(page)
        image = f":img-top: {thumbnail}\n:img-alt: {title.lstrip('# ')}, first figure\n" if thumbnail else ""
        footer = run_time(page) and f"\n\n:::{{card-footer}}\n{run_time(page)}\n:::"
        cards.append(f"::::{{grid-item-card}} {title.lstrip('# ')}\n:link: {page.docname}\n:link-type: doc\n{image}\n"
                     f"{quote}{footer}\n::::")
    return "# Findings\n\nEach in one notebook, with its figures and in words.\n\n" \
        ":::::{grid} 1 2 2 3\n:gutter: 3\n\n" + "\n".join(cards) + "\n:::::\n"


def first_figure(page):
    "Write the notebook's first figure as a small picture; its place."
    for cell in page.nb.cells:
        for output in cell.get("outputs", []):
            if "image/png" not in output.get("data", {}): continue
            picture = Image.open(io.BytesIO(base64.b64decode("".join(output["data"]["image/png"])))).convert("RGB")
            picture.thumbnail((520, 280))
            framed = Image.new("RGB", (520, 280), "white")
            framed.paste(picture, ((520 - picture.width)//2, (280 - picture.height)//2))
            (PAGES / "thumbnails").mkdir(exist_ok=True)
            framed.save(PAGES / f"thumbnails/{page.path.stem}.png")
            return f"thumbnails/{page.path.stem}.png"


def run_time(page):
    "What the notebook's top says of how long it runs, if it does."
    timed = re.search(r"\*(Runs for .+? on two cores)", page.nb.cells[0].source)
    return timed[1] if timed else ""


def write_pages():
    "Write the sources of the site to _sphinx/."
    shutil.rmtree(PAGES, ignore_errors=True)
    leave = ("_*", ".*", "*.yml", "*.css", "efcn_runs", "records")
    shutil.copytree(NBS, PAGES / "extra/notebooks", ignore=shutil.ignore_patterns(*leave))
    paths = sorted(nbglob(NBS, as_path=True))
    pages = reading_order([Page(path) for path in paths])
    known = names_of(pages)
    gallery = [page for page in pages if page.folder == "gallery"]
    if gallery: (PAGES / "findings.md").write_text(findings(gallery))
    texts = [(name, ROOT / f"{name}.md") for name in TEXTS if (ROOT / f"{name}.md").exists()]
    for name, file in texts: shutil.copy(file, PAGES / f"{name.lower()}.md")
    for page in pages:
        cells = cells_of(page)
        for cell in cells:
            if cell.cell_type == "markdown": link_names(cell, page, known)
        if page.docname == "index":
            if gallery: cells.insert(2, mk_cell(FINDINGS, "markdown"))
            for cell in cells: cell.source = of_the_site(cell.source)
            cells += contents(pages, [name.lower() for name, _ in texts])
        nb = dict(cells=[nb2dict(cell) for cell in cells], metadata=PYTHON, nbformat=4, nbformat_minor=5)
        for cell in nb["cells"]: cell.pop("directives", None)
        (PAGES / page.docname).parent.mkdir(exist_ok=True)
        write_nb(dict2nb(nb), PAGES / page.path.relative_to(NBS))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=ROOT / "_docs", help="folder of the site (default _docs)")
    out = Path(parser.parse_args().out).resolve()
    os.chdir(ROOT)
    write_pages()
    site = PAGES / "_build/html"
    options = ["-c", "docs", "-d", str(site.with_name("doctrees")), "-W", "--keep-going", "-q"]
    if build_main([*options, str(PAGES), str(site)]): return 1
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(site, out)
    print(f"The site is in {out / 'index.html'}")


sys.path.insert(0, str(ROOT))
if __name__ == "__main__": sys.exit(main())
