"""Export the notebooks, execute the stale ones for keeps, render README.md.

    python tests/keep.py                  what is stale: its code, its outputs or a module that it imports has changed
    python tests/keep.py 08_embedding     these, stale or not
    python tests/keep.py --all            every notebook
    python tests/keep.py --check          only say what is stale; exit status 1 if anything is
    python tests/keep.py --export         only export: nbdev_export, and parameters documented in docstrings
    python tests/keep.py --compare        rerun the gallery (or the named notebooks) at full size in a temporary
                                          copy and compare its outputs with the saved ones, writing nothing

Each notebook runs in a process of its own; one that fails is left as it was, also if what it says about its numbers
does not hold (EFCN_NB_STRICT is set). Runs are kept in EFCN_NB_RUNS, else in nbs/gallery/efcn_runs; where there were
none, a notebook of the gallery says from now on how long it took. Cells marked `#| notest`, `#| cuda` or
`#| data` are not run and keep the outputs that they have. `#| eval: false` is honoured.
"""
import argparse, ast, base64, contextlib, functools, hashlib, io, json, math, multiprocessing, os, posixpath, re
import shutil, sys, tempfile, time, traceback, types
from importlib.util import resolve_name
from pathlib import Path

from fastcore import __version__ as fastcore_version

if int(fastcore_version.split(".")[0]) >= 2:
    raise SystemExit(f"The notebooks need fastcore 1.x (nbdev 2 does), but fastcore {fastcore_version} is installed. "
                     "Something installed later has replaced it: run `pip install -e '.[dev]'` again.")

from execnb.nbio import dict2nb, nb2str, read_nb
from execnb.shell import CaptureShell
from IPython.core.inputtransformer2 import TransformerManager
from nbdev.clean import _nbdev_clean
from nbdev.process import extract_directives

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "efcn_nb"
STAMP = "fresh"  # the notebook metadata key that holds the stamp
NEVER_RUN = {"notest", "cuda", "data"}
IMAGES = "nbs/images"  # where the README's figures lie
KEPT = "nbs/gallery/efcn_runs"  # results of long computations, which git ignores


# Which notebooks there are, and what they import

def notebooks(root=ROOT):
    "All notebooks in the order in which they run: library by number, gallery, index."
    nbs = root / "nbs"
    found = [path for path in nbs.rglob("*.ipynb") if not any(part[0] in "._" for part in path.relative_to(nbs).parts)]
    return sorted(found, key=lambda path: (path.stem == "index", is_gallery(path), path.name))


def is_gallery(path): return path.parent.name == "gallery"


def code_cells(nb): return [cell for cell in nb.cells if cell.cell_type == "code"]


@functools.cache
def own_imports(source, package=PACKAGE):
    "Dotted names that the Python text `source`, a module inside `package`, imports from our own package."
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return frozenset(name for name in names if name.split(".")[0] == PACKAGE)


def module_file(name, root=ROOT):
    "The file of the module called `name`, None if that is no module (a function, say)."
    path = root.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def module_sources(names, root=ROOT):
    "Texts of the modules `names` and of all that they import from our package, by file name."
    sources, todo = {}, list(names)
    while todo:
        name = todo.pop()
        file = module_file(name, root)
        if file is None or str(file) in sources: continue
        sources[str(file)] = text = file.read_text(encoding="utf-8")
        todo += own_imports(text, package=name if file.stem == "__init__" else name.rpartition(".")[0])
    return {name: sources[name] for name in sorted(sources)}


# Fresh and clean

def stamp(nb, root=ROOT):
    "Hash of the notebook's code and outputs and of the modules that it imports, comment lines of those left out."
    code = [cell.source for cell in code_cells(nb)]
    python = TransformerManager().transform_cell  # turns magics into Python
    names = {name for source in code for name in own_imports(python(source))}
    modules = ["\n".join(line for line in text.splitlines() if not line.startswith("#"))
               for text in module_sources(names, root).values()]
    outputs = json.dumps([cell.outputs for cell in code_cells(nb)], sort_keys=True)
    return hashlib.sha256("\0".join([*code, *modules, outputs]).encode()).hexdigest()[:16]


def is_fresh(path, root=ROOT):
    nb = read_nb(path)
    return nb.metadata.get(STAMP) == stamp(nb, root)


def cleaned(nb):
    "A copy of the notebook as nbdev_clean leaves it."
    nb = dict2nb(json.loads(nb2str(nb)))
    _nbdev_clean(nb)
    return nb


# Execution

HANGS = 3600  # seconds: nothing waits for ever, and no busy machine is taken for one that hangs
PRELOAD = ["torch", "torchvision", "matplotlib.pyplot", "pandas", "seaborn", "scipy.stats", "sklearn.datasets",
           "nbdev.test", "torch._dynamo"]
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(PRELOAD)


def started(function, *args):
    """A process of its own that does `function(*args)`, and what receives whether that succeeded, and the result.

    It takes no time to start because it has torch loaded already."""
    receiver, sender = processes.Pipe(duplex=False)
    child = processes.Process(target=_report, args=(sender, function, args))
    child.start()
    sender.close()
    return child, receiver


def in_child(function, *args, timeout=None):
    "`function(*args)` in a process of its own."
    return result(*started(function, *args), timeout=timeout)


def result(child, receiver, timeout=None):
    "What a process that was `started` returns, as soon as it does."
    try:
        if not receiver.poll(timeout): raise TimeoutError(f"still running after {timeout} seconds")
        succeeded, value = receiver.recv()
    except EOFError: raise RuntimeError("the process died (out of memory?)") from None
    else: child.join(5)  # so that it can clean up
    finally:
        child.kill()
        child.join()
    if not succeeded: raise RuntimeError(value)
    return value


def _report(sender, function, args):
    try: result = True, function(*args)
    except NotebookError as error: result = False, str(error)
    except BaseException: result = False, traceback.format_exc()
    sender.send(result)


def printed(text, *argv):
    "What the Python text `text` prints, run as a script with these arguments: for `in_child` and `started`."
    sys.argv = ["-c", *argv]
    with contextlib.redirect_stdout(io.StringIO()) as out: exec(compile(text, "<string>", "exec"), vars(_fresh_main()))
    return out.getvalue()


def _fresh_main():
    sys.modules["__main__"] = types.ModuleType("__main__")
    return sys.modules["__main__"]


class NotebookError(Exception): "A cell failed."


QUOTES = {"index"}  # shows figures and tables of the notebooks beside it


def set_apart(path, folder):
    "The notebook at `path` alone in `folder`, so that it reads nothing beside it; where it is if it quotes others."
    return path if path.stem in QUOTES else Path(shutil.copy(path, folder))


def as_the_gate_runs(path):
    "The gallery at a small size; what a notebook says has to hold; runs go beside the notebook."
    os.environ.update(EFCN_NB_QUICK="1", EFCN_NB_STRICT="1", EFCN_NB_RUNS=str(path.parent / "efcn_runs"))


# How long a reader waits

MINUTES = "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()
WAITS = {"a few seconds": 5, "about ten seconds": 15, "about twenty seconds": 25, "about half a minute": 45,
         "about a minute": 90} | {f"about {count} minutes": 60*minutes + 30 for minutes, count in enumerate(MINUTES, 2)}
WAIT = re.compile(r"(?<=\*Runs for ).+?(?= on two cores)")  # stands at the top of each gallery notebook


def wait(seconds):
    "A time in coarse words, which do not change from run to run."
    return next((words for words, most in WAITS.items() if seconds < most), "more than a quarter of an hour")


def tell_wait(nb, seconds, first):
    "Put the time that the notebook took into its text. Only a `first` run, which found nothing stored, may shorten it."
    top, known = nb.cells[0], [*WAITS, wait(math.inf)]
    found, words = WAIT.search(top.source), wait(seconds)
    if not found: return
    if not first and found[0] in known: words = max(found[0], words, key=known.index)
    top.source = top.source[:found.start()] + words + top.source[found.end():]


def seconds_since(start, processor):
    "What a run takes where nobody else computes: no longer than its processor time, or half of that on two cores."
    used = sum(os.times()[:4]) - processor
    return max(used/2, min(time.time() - start, used))


def is_run(cell):
    directives = extract_directives(cell, remove=False)
    return not NEVER_RUN & directives.keys() and directives.get("eval:", [""])[0].lower() != "false"


def execute(path, root=ROOT):
    "Run the notebook at `path` from top to bottom at full size; return its cleaned, stamped text."
    os.environ.pop("EFCN_NB_QUICK", None)
    os.environ["EFCN_NB_STRICT"] = "1"
    if root != ROOT: os.environ.pop("EFCN_NB_RUNS", None)  # a copy reads no runs but its own
    runs = Path(os.environ.setdefault("EFCN_NB_RUNS", str(root / KEPT)))
    sys.path.insert(0, str(root))
    os.chdir(path.parent)
    nb, first, start, processor = read_nb(path), not runs.exists(), time.time(), sum(os.times()[:4])
    shell = CaptureShell(path, mpl_format="png")
    shell.run("set_matplotlib_formats('png', metadata={'Software': None})")  # no matplotlib version in the bytes
    for number, cell in enumerate(nb.cells):
        if cell.cell_type != "code" or not is_run(cell): continue
        cell.outputs = []
        shell.cell(cell)
        if shell.exc:
            trace = "".join(traceback.format_exception(shell.exc))
            raise NotebookError(f"{path.name}, cell {number}:\n\n{cell.source}\n\n{trace}")
    tell_wait(nb, seconds_since(start, processor), first)
    nb.metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    nb = cleaned(nb)
    nb.metadata[STAMP] = stamp(nb, root)
    return nb2str(nb)


def write(path, content):
    "Write text or bytes to `path` at one stroke: whole or not at all."
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, path)


# README.md

def readme(root=ROOT):
    "What nbs/index.ipynb renders to: the text of README.md, and its figures as {path: bytes}."
    parts, images = [], {}
    for cell in read_nb(root / "nbs/index.ipynb").cells:
        directives = extract_directives(cell) if cell.cell_type == "code" else {}
        if "hide" in directives or directives.get("include:") == ["false"]: continue
        source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
        if cell.cell_type == "markdown": parts.append(relink(source))
        if cell.cell_type != "code": continue
        if source and directives.get("echo:") != ["false"]: parts.append(fenced(source, "python"))
        for output in cell.outputs:
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "text/markdown" in data: parts.append(relink(joined(data["text/markdown"])))
            elif "image/png" in data:
                path = f"{IMAGES}/index-{len(images) + 1}.png"
                images[path] = base64.b64decode(data["image/png"])
                parts.append(f"![{' '.join(directives.get('fig-alt:', [])) or 'figure'}]({path})")
            else: parts.append(fenced(joined(data["text/plain"])))
    return "\n\n".join(filter(None, parts)) + "\n", images


def joined(text): return "".join(text).strip("\n")


def fenced(text, language=""): return f"```{language}\n{text}\n```"


def relink(markdown):
    "Links of a file in nbs/ as seen from the root; code, addresses and anchors stay."
    def seen_from_root(match): return match[1] + posixpath.normpath("nbs/" + match[2])
    fences = re.split(r"(^```.*?^```|`[^`\n]+`)", markdown, flags=re.M | re.S)
    return "".join(part if part.startswith("`") else re.sub(r"(\]\()(?![a-z]+:|#|/)([^)\s]+)", seen_from_root, part)
                   for part in fences)


def readme_files(root=ROOT):
    "README.md and its figures as they should be: {path: bytes}."
    if not (root / "nbs/index.ipynb").exists(): return {}
    text, images = readme(root)
    return {root / "README.md": text.encode(), **{root / path: image for path, image in images.items()}}


def stale_readme(root=ROOT):
    "Those of README.md and its figures that are missing, out of date or left over."
    files = readme_files(root)
    wrong = [path for path, content in files.items() if not path.exists() or path.read_bytes() != content]
    return wrong + [path for path in (root / IMAGES).glob("index-*.png") if path not in files]


# The commands

def export(root=ROOT):
    """nbdev_export in a process of its own: it is bound to the folder in which it is called first.

    Documentation of parameters goes into docstrings, see docstrings.py."""
    in_child(_export, root)


def _export(root):
    import nbdev.export
    from docstrings import Sections
    from nbdev.doclinks import nbdev_export
    os.environ.pop("IN_TEST", None)  # nbdev exports nothing while this is set
    os.chdir(root)
    nbdev.export.Sections = Sections  # where nbdev looks for its processors
    nbdev_export(procs="Sections")


def working_copy(folder):
    "Copy the project into `folder`, without what runs and builds have left; return the folder."
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "efcn_runs", "*.part")
    for name in ("settings.ini", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        if (ROOT / name).exists(): shutil.copy(ROOT / name, folder)
    for name in (PACKAGE, "nbs", "docs"):
        if (ROOT / name).exists(): shutil.copytree(ROOT / name, Path(folder) / name, ignore=skip)
    return Path(folder)


def keep(paths):
    "Execute `paths` in order and save them; return the number of failures."
    failures = 0
    for path in paths:
        start = time.time()
        try: text = in_child(execute, path)
        except (RuntimeError, TimeoutError) as error:
            failures += 1
            print(f"{path.relative_to(ROOT)} FAILED and was left as it was\n{error}", flush=True)
            continue
        write(path, text)
        print(f"{path.relative_to(ROOT)} {time.time() - start:.1f} s, {len(text) / 1000:.0f} kB", flush=True)
    return failures


def compare(paths):
    "Rerun `paths` in a temporary copy; return the number of those whose outputs differ from the saved ones."
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        root = working_copy(folder)
        for path in paths:
            try: new = dict2nb(json.loads(in_child(execute, root / path.relative_to(ROOT), root)))
            except RuntimeError as error: differences = [str(error)]
            else: differences = [f"cell {i}: {line}" for i, (a, b) in enumerate(zip(read_nb(path).cells, new.cells))
                                 for line in output_differences(a.get("outputs", []), b.get("outputs", []))]
            different += bool(differences)
            said = "DIFFERENT" if differences else "same"
            print(f"{path.relative_to(ROOT)}: {said}", *differences, sep="\n  ", flush=True)
    return different


def output_differences(old, new):
    "What differs between two lists of outputs, a line each."
    if len(old) != len(new): return [f"{len(old)} outputs saved, {len(new)} now"]
    differences = []
    for was, now in zip(map(shown, old), map(shown, new)):
        for kind in sorted({*was, *now}):
            if was.get(kind) == now.get(kind): continue
            if kind.startswith("text"): differences.append(f"{kind}, saved: {was.get(kind)} now: {now.get(kind)}")
            else: differences.append(f"another {kind}")
    return differences


def shown(output):
    "What an output shows, by kind, without the name that pandas draws for a styled table."
    shows = output.get("data", {"text": output.get("text", "")})
    return {kind: re.sub(r"\bT_[0-9a-f]{5}(?=[_\W])", "T", joined(data)) for kind, data in shows.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks, with or without folder and ending")
    parser.add_argument("--all", action="store_true", help="every notebook, stale or not")
    parser.add_argument("--check", action="store_true", help="only say what is stale")
    parser.add_argument("--export", action="store_true", help="only export the notebooks")
    parser.add_argument("--compare", action="store_true", help="rerun in full and compare, writing nothing")
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    os.chdir(ROOT)

    every = notebooks()
    chosen = [path for path in every if path.stem in {Path(name).stem for name in args.names}]
    if len(chosen) < len(args.names): parser.error(f"the notebooks are {', '.join(path.stem for path in every)}")
    if args.check:
        stale = [path for path in every if not is_fresh(path)] + stale_readme()
        print(*[f"stale: {path.relative_to(ROOT)}" for path in stale] or ["all fresh"], sep="\n")
        return bool(stale)
    if args.export: return export()
    if args.compare: return compare(chosen or [path for path in every if is_gallery(path)])

    export()
    if not chosen: chosen = [path for path in every if args.all or not is_fresh(path)]
    failures = keep(chosen)
    export()  # cleaning may have given cells new ids, which stand in the modules
    files = readme_files()
    for path, content in files.items(): write(path, content)
    for path in stale_readme(): path.unlink()  # a figure left over
    return failures


if __name__ == "__main__": sys.exit(bool(main()))
