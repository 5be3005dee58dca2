"""Build the documentation site from the notebooks, without a network: python docs/build.py

nbdev documents the exported symbols and links their names, Sphinx makes the pages. Nothing but imports and exported
definitions is executed; saved outputs are shown. A broken link fails the build. The site is in _docs/index.html.
"""
import argparse, os, re, shutil, sys
from inspect import cleandoc
from pathlib import Path

from execnb.nbio import dict2nb, mk_cell, nb2dict, read_nb, write_nb
from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html, nbglob
from nbdev.processors import FilterDefaults, rm_export
from sphinx.cmd.build import build_main

ROOT = Path(__file__).resolve().parents[1]
NBS, PAGES = ROOT / "nbs", ROOT / "_sphinx"
SECTIONS = dict(ladder="Ladder", materials="Materials", training="Training", instruments="Instruments",
                experiments="Experiments", studies="Studies", gallery="Findings", service="Service")  # by folder
PYTHON = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"},
          "language_info": {"name": "python", "pygments_lexer": "ipython3"}}


class Processors(FilterDefaults):
    "nbdev's, except that exported code stays, folded."
    def base_procs(self): return [fold_export if proc is rm_export else proc for proc in super().base_procs()]


def fold_export(cell):
    if cell.cell_type != "code": return
    if cell.directives_.keys() & {"hide", "default_exp"}: del cell["source"]
    elif cell.directives_.keys() & {"export", "exporti"}: cell.metadata.tags = ["hide-input"]


def page(path):
    "The notebook at `path` as a page: title, text, documentation above each folded definition."
    nb = read_nb(path)
    title = next(cell for cell in nb.cells if cell.cell_type == "markdown")
    cells = [mk_cell(title.source, "markdown")]  # nbdev keeps of this cell only the title and the quote, for Quarto
    Processors()(nb)
    at = 0  # where documentation goes: above the definition just seen
    for cell in nb.cells:
        if cell.cell_type == "raw" or cell.source.startswith("<!-- WARNING"): continue
        if cell.cell_type == "code" and re.search(r"^show_doc\(", cell.source, flags=re.M):
            place = at if getattr(cell, "has_sd", False) else len(cells)  # nbdev's own come in reverse order
            cells.insert(place, documentation(cell, path))
            continue
        if cell.cell_type == "code": present(cell)
        at = len(cells)
        cells += as_text(cell)
    return dict2nb(dict(cells=[nb2dict(cell) for cell in cells], metadata=PYTHON, nbformat=4, nbformat_minor=5))


def present(cell):
    "Quarto's `#| key: value` lines as what myst-nb understands."
    said = dict(re.findall(r"^#\|\s*([\w-]+):\s*(.*)$", cell.source, flags=re.M))
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    hide = {"echo": "remove-input", "output": "remove-output", "include": "remove-cell"}
    hidden = [tag for key, tag in hide.items() if said.get(key) == "false"]
    cell.metadata["tags"] = cell.metadata.get("tags", []) + hidden
    if "fig-alt" in said: cell.metadata["mystnb"] = {"image": {"alt": said["fig-alt"]}}


def as_text(cell):
    "The cell; one whose output is markdown becomes text, whose links lead to other pages."
    outputs = cell.get("outputs") or [] if cell.cell_type == "code" else []
    texts = [output.get("data", {}).get("text/markdown") for output in outputs]
    if not texts or None in texts: return [cell]
    cell.outputs = []
    shown = [] if "remove-input" in cell.metadata.get("tags", []) else [cell]
    return [*shown, *(mk_cell("".join(text), "markdown") for text in texts)]


def documentation(cell, path):
    "What `show_doc` has printed, as text with a label that links can name."
    text = "".join(cell.outputs[0]["data"]["text/markdown"])
    heading, signature, doc = re.search(r"^(#+ .*?)\n+(```python\n.*?\n```)(.*)", text, flags=re.M | re.S).groups()
    signature = re.sub(r"\[(`[^`]+`)\]\([^)]*\)", r"\1", signature)  # nbdev sets links inside the code, too
    doc = re.sub(r"\A\*(.*)\*$", r"\1", cleandoc(doc), flags=re.M)  # its italics trip over asterisks,
    doc = "".join(re.sub(r"(?<!\w)\*(?=\w)", r"\\*", part) if i % 2 == 0 else part  # as in (N, *spatial)
                  for i, part in enumerate(re.split(r"(`[^`]*`)", doc)))
    name = heading.lstrip("# ").replace("\\", "")
    return mk_cell(f"({label(address(path), name)})=\n{heading}\n\n{signature}\n\n{doc}", "markdown")


def address(path): return _nbpath2html(path.relative_to(NBS)).as_posix()


def label(address, name): return f"{address.removesuffix('.html')}.{name}".lower()


def link_within(cell, files, labels):
    "Turn nbdev's links to the published site into links between the pages, whose `files` are found by address."
    cfg = get_config()
    def inside(match):
        target = label(match[1], match[2])
        return f"](#{target})" if target in labels else f"]({files[match[1]]})"
    cell.source = re.sub(rf"\]\({re.escape(cfg.doc_host + cfg.doc_baseurl)}/([^)#]+)#([^)]+)\)", inside, cell.source)


def contents(paths):
    "The tables of contents: a section for each folder, in the order of `SECTIONS`; what lies in none comes last."
    order = [*SECTIONS, ""]
    def place(path): return order.index(path.relative_to(NBS).parent.as_posix().strip(".")), path.name
    found = {}
    for path in sorted((path for path in paths if path.stem != "index"), key=place):
        section = SECTIONS.get(path.parent.name, "Command line")
        found.setdefault(section, []).append(path.relative_to(NBS).with_suffix("").as_posix())
    return [mk_cell("```{toctree}\n:hidden:\n:caption: %s\n\n%s\n```" % (section, "\n".join(names)), "markdown")
            for section, names in found.items()]


def write_pages():
    "Write the sources of the site to _sphinx/."
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(NBS, PAGES, ignore=shutil.ignore_patterns("*.ipynb", "_*", ".*", "*.yml", "*.css", "efcn_runs"))
    paths = sorted(nbglob(NBS, as_path=True))
    pages = {path: page(path) for path in paths}
    texts = [cell.source for nb in pages.values() for cell in nb.cells]
    labels = {name for text in texts for name in re.findall(r"^\((.*)\)=$", text, re.M)}
    title = dict(cells=[mk_cell("# efcn_nb", "markdown")], metadata=PYTHON, nbformat=4, nbformat_minor=5)
    pages.setdefault(NBS / "index.ipynb", dict2nb(title))
    pages[NBS / "index.ipynb"].cells += contents(paths)
    addresses = {address(path): path for path in pages}
    for path, nb in pages.items():
        files = {name: os.path.relpath(other, path.parent) for name, other in addresses.items()}
        for cell in nb.cells:
            if cell.cell_type == "markdown": link_within(cell, files, labels)
        write_nb(nb, PAGES / path.relative_to(NBS))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=ROOT / "_docs", help="folder of the site (default _docs)")
    out = Path(parser.parse_args().out).resolve()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    write_pages()
    site = PAGES / "_build/html"
    options = ["-c", "docs", "-d", str(site.with_name("doctrees")), "-W", "--keep-going", "-q"]
    if build_main([*options, str(PAGES), str(site)]): return 1
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(site, out)
    print(f"The site is in {out / 'index.html'}")


if __name__ == "__main__": sys.exit(main())
