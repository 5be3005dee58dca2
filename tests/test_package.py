"The package installs from a wheel and works far from its source, without the tools that made it."
import ast, configparser, importlib, os, re, shutil, subprocess, sys
from importlib.metadata import distributions

import pytest

import keep

TOOLS = ("nbdev", "execnb", "IPython", "pytest", "hypothesis")  # what a user need not have

# Run by `python -I`: imports argv[3:] with only argv[1] (the installed package) and the requirements in reach,
# as though the modules named in argv[2] were not installed.
IMPORT = """
import importlib, pkgutil, sys
from importlib.machinery import PathFinder
site, missing, names = sys.argv[1], sys.argv[2].split(","), sys.argv[3:]
finders = [finder for finder in sys.meta_path if "editable" not in str(finder)]
class Installed:
    find_distributions = PathFinder.find_distributions
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in missing: return None
        return next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
sys.meta_path[:] = [Installed]
sys.path.insert(0, site)
package = importlib.import_module("%s")
names = names or [module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names: assert importlib.import_module(name).__file__.startswith(site), name
print(len(names))
""" % keep.PACKAGE


def run(*command, cwd, **env):
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_module_imports(site, tmp_path):
    modules = [file for file in (keep.ROOT / keep.PACKAGE).rglob("*.py") if file.stem != "__init__"]
    count = run(sys.executable, "-I", "-c", IMPORT, site, ",".join(TOOLS), cwd=tmp_path)
    assert int(count) >= len(modules)


def test_plots_import_without_torch(site, tmp_path):
    plots = f"{keep.PACKAGE}.experiments.plots"
    run(sys.executable, "-I", "-c", IMPORT, site, ",".join((*TOOLS, "torch")), plots, cwd=tmp_path)


START = """
import contextlib, io, sys
LATER = {"pandas", "matplotlib", "seaborn", "torchvision", "sklearn", "scipy", "tensorly", "fastcore.test",
         "torch._dynamo", "torch.distributed.tensor"}
def early(*more): return sorted({*LATER, *more} & sys.modules.keys())
import efcn_nb
print("the package", *early("torch"))
from efcn_nb import embed
print("embed", *early())
from efcn_nb.cli import efcn_bench, efcn_relax
for command in efcn_relax, efcn_bench:
    for argv in ["--help"], ["--nothing"]:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            with contextlib.suppress(SystemExit): command(argv)
        print(command.__name__, *argv, *early())
assert {*efcn_nb.__all__, "__version__"} <= {*dir(efcn_nb)} and "import_module" not in dir(efcn_nb)
for name in efcn_nb.__all__: assert getattr(efcn_nb, name).__name__ == name
try: efcn_nb.nothing
except AttributeError as error: print(error)
"""


def test_the_face_and_a_help_text_import_nothing_that_they_do_not_need(tmp_path):
    "And the face offers its names, and imports them when they are asked for."
    said = run(sys.executable, "-c", START, cwd=tmp_path, PYTHONPATH=str(keep.ROOT)).splitlines()
    assert said == ["the package", "embed", "efcn_relax --help", "efcn_relax --nothing", "efcn_bench --help",
                    "efcn_bench --nothing", "module 'efcn_nb' has no attribute 'nothing'"]


COMES_FOR = """embed convert nearest_cnn reinitialize relax Study summary claims shares ablation load_data
plot_study plot_curves plot_gains plot_relax_times plot_claims""".split()


def star():
    "What a star import offers."
    space = {}
    exec(f"from {keep.PACKAGE} import *", space)
    return {name for name in space if not name.startswith("__")}


def test_the_face_offers_what_people_come_for():
    "And the stub, which editors and type checkers read, the same from the same modules."
    face = importlib.import_module(keep.PACKAGE)
    assert {*COMES_FOR} <= {*face.__all__} == keep.in_child(star) and face.__version__ == settings()["version"]
    stub = ast.parse((keep.ROOT / keep.PACKAGE / "__init__.pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    assert {alias.asname: node.module for node in imports for alias in node.names} == face._HOMES


def test_the_package_says_that_it_is_typed(site):
    assert {"py.typed", "__init__.pyi"} <= {file.name for file in (site / keep.PACKAGE).iterdir()}


def moved():
    "Import the modules of the first version and what they offer; what is said of a name that is not there."
    import efcn_nb
    from efcn_nb.data import load_data
    from efcn_nb.embedding import embed
    from efcn_nb.relaxation import claims, relax
    assert (embed, claims, relax, load_data) == (efcn_nb.embed, efcn_nb.claims, efcn_nb.relax, efcn_nb.load_data)
    for name, homes in efcn_nb._MOVED.items():
        importlib.import_module(f"efcn_nb.{name}")
        for home in homes.split(): importlib.import_module(f"efcn_nb.{home}")
    try: importlib.import_module("efcn_nb.embedding").nothing
    except AttributeError as error: return str(error)


def test_modules_of_the_first_version_are_found_by_their_old_names():
    said = keep.in_child(moved)
    assert said.startswith("efcn_nb.embedding has no nothing; since 0.1.0 its names are in ladder.embedding, ")


READS = """
import sys
from efcn_nb.service.records import record_folder, record_names
print(*(path.relative_to(sys.argv[1]).as_posix() for name in record_names() for path in record_folder(name).iterdir()
        if path.is_file()))
"""


def test_records_are_installed_without_the_scripts_that_make_them(site, tmp_path):
    said = run(sys.executable, "-c", READS, site, cwd=tmp_path, PYTHONPATH=str(site)).split()
    there = (path for path in (keep.ROOT / keep.PACKAGE / "records").rglob("*") if path.is_file())
    assert sorted(said) == sorted(path.relative_to(keep.ROOT).as_posix() for path in there)


def settings():
    config = configparser.ConfigParser()
    config.read(keep.ROOT / "settings.ini")
    return config["DEFAULT"]


def test_metadata(site):
    found, = distributions(path=[str(site)])
    assert (found.metadata["Name"], found.version) == (keep.PACKAGE, settings()["version"])
    assert not [line for line in found.requires if "extra ==" not in line and line.startswith(TOOLS)]
    assert {entry.group for entry in found.entry_points} == {"console_scripts"}
    assert not list(site.rglob("_modidx.py")), "nbdev's index of symbols is for the installation in development mode"
    classifiers = found.metadata.get_all("Classifier")
    assert f"Programming Language :: Python :: {settings()['min_python']}" in classifiers
    assert "relax('digits'" in found.read_text("METADATA")  # README


def test_readme_reads_well_away_from_the_repository(project, tmp_path):
    "Its links lead to the address that is set; while none is, they are text, and images are left out."
    text = (project / "setup.py").read_text(encoding="utf-8")
    function = text[text.index("def long_description"):text.index("\n\nsetup(")]
    for address in ("", "https://forge.net/me/efcn_nb"):
        names = dict(re=re, Path=lambda name: project / name, repository=address, cfg=settings())
        exec(function, names)
        readme = names["long_description"]()
        assert not re.findall(r"\]\((?![a-z]+:|#)", re.sub(r"^```.*?^```", "", readme, flags=re.M | re.S))
        assert ("![" in readme) == bool(address) and "`embed`" in readme


def test_version_is_one():
    "In the settings, the citation and the change log."
    version = settings()["version"]
    assert re.search(rf"^version: {re.escape(version)}$", (keep.ROOT / "CITATION.cff").read_text(), flags=re.M)
    assert re.search(rf"^## {re.escape(version)}$", (keep.ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert f"version = {{{version}}}" in (keep.ROOT / "README.md").read_text(encoding="utf-8")


def test_workflow_is_valid():
    "As a linter for such files sees it, where one is installed; the workflow itself runs one, too."
    file = keep.ROOT / ".github/workflows/site.yml"
    linters = [["actionlint"], ["check-jsonschema", "--builtin-schema", "vendor.github-workflows"]]
    found = [command for command in linters if shutil.which(command[0])]
    if not found: pytest.skip("neither actionlint nor check-jsonschema is installed")
    run(*found[0], file, cwd=keep.ROOT)


@pytest.mark.parametrize("script", settings()["console_scripts"].split())
def test_console_command_helps(script, site, tmp_path):
    command, _, target = script.partition("=")
    if not keep.module_file(target.partition(":")[0]): pytest.skip(f"no {target} yet")
    assert "--help" in run(site / "bin" / command, "--help", cwd=tmp_path, PYTHONPATH=str(site))
