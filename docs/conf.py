"Sphinx settings; the site is built by docs/build.py."
import inspect, re
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
config = ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

project = cfg["lib_name"]
author = copyright = cfg["author"]
version = release = cfg["version"]

extensions = ["myst_nb", "sphinxcontrib.katex", "sphinx_copybutton", "sphinx_design"]
highlight_language = "none"  # of blocks that name none; code cells are Python
nb_execution_mode = "off"  # the notebooks' saved outputs are shown
nb_code_prompt_show = "Show source"
nb_code_prompt_hide = "Hide source"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a symbol's heading may come straight below the title
add_module_names = True
toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 90
copybutton_selector = "div.cell_input pre, div.highlight-python pre, :not(.output) > div.highlight-none pre"

html_theme = "furo"
pygments_dark_style = "github-dark"  # the theme's own underlines imports
html_title = f"{project} {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = [str(ROOT / "_sphinx/extra")]
html_baseurl = cfg.get("doc_host", "") and cfg["doc_host"] + cfg.get("doc_baseurl", "") + "/"
katex_css_path = "katex/katex.min.css"  # KaTeX 0.16.22, the version that sphinxcontrib-katex renders with
exclude_patterns = ["_build", "extra"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
smartquotes = False


def shallow_navigation(app, page, template, context, doctree):
    "All pages stand on one level: no need to copy what is on them into the navigation of every page."
    tree = context.get("toctree")
    if tree: context["toctree"] = lambda **options: tree(**{**options, "maxdepth": 1})


def breakable_title(app, page, template, context, doctree):
    "The name of a module breaks at its dots."
    body = context.get("body") or ""
    context["body"] = re.sub(r"(?<=<h1>)[\w.]+(?=<a )", lambda m: m[0].replace(".", ".<wbr>"), body, count=1)


def setup(app):
    app.connect("html-page-context", shallow_navigation, priority=100)  # before the theme's
    app.connect("html-page-context", breakable_title)


def linkcode_resolve(domain, info):
    "The address of an object's source in the repository."
    thing = import_module(info["module"])
    for part in info["fullname"].split("."): thing = getattr(thing, part, None)
    thing = inspect.unwrap(thing) if callable(thing) else getattr(thing, "fget", thing)
    try: line, file = inspect.getsourcelines(thing)[1], Path(inspect.getsourcefile(thing)).relative_to(ROOT)
    except (TypeError, OSError, ValueError): return None
    return f"{cfg['git_url']}/blob/{cfg['branch']}/{file.as_posix()}#L{line}"


if cfg.get("git_url"): extensions.append("sphinx.ext.linkcode")
