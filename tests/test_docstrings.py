"Users see what the comments behind parameters say, wherever Python shows docstrings."
import inspect, pydoc
from dataclasses import is_dataclass
from importlib import import_module

import pytest
from fastcore.docments import docments

import keep
from docstrings import with_sections
from test_imports import NUMBERS

FUNCTION = '''
def scale(
    x:int, # what is scaled
    by=2., shift=0., # numbers; {numbers}
    wrap=False,
    *more,    # further ones
    **options # of the scale
)->int:       # scaled
    "One sentence that says what it does."
    return x*by
'''
DOCUMENTED = '''One sentence that says what it does.

Parameters
----------
x : int
    what is scaled
by : default 2.0
    numbers; {numbers}
shift : default 0.0
    numbers; {numbers}
wrap : bool, default False
*more
    further ones
**options
    of the scale

Returns
-------
int
    scaled
'''


def made(source):
    "What `source` defines, with sections."
    space = {}
    exec(with_sections(source), space)
    return space


def test_comments_become_sections_and_the_rest_stays():
    assert inspect.getdoc(made(FUNCTION)["scale"]).strip() == DOCUMENTED.strip()
    before, _, after = FUNCTION.split('"')
    assert with_sections(FUNCTION).split('"""')[::2] == [before, after]


ONE = "    'Do.'\n    return a"
CASES = {
    "alike in one line": (f"def f(\n    a=1, b=1 # both\n):\n{ONE}", "a, b : default 1\n    both"),
    "a class": ("class C:\n    'Do.'\n    def __init__(self, a, # one\n        b=2 # two\n    ): self.a = a",
                "a\n    one\nb : default 2\n    two"),
    "a dataclass": ("from dataclasses import dataclass\n@dataclass\nclass C:\n    'Do.'\n    a: int = 1 # one\n"
                    "    b: int = 2", "a : int, default 1\n    one\nb : int, default 2"),
    "no docstring": ("def f(a, # one\n     b):\n    return a", "a\n    one\nb"),
    "delegated": ("from fastcore.meta import delegates\ndef g(a=1, # one\n    b=2 # two\n): return a\n"
                  f"@delegates(g)\ndef f(a=3, # three\n    **kwargs):\n{ONE}",
                  "a : default 3\n    three\nb : default 2\n    two"),
    "in one line": ("def f(a, # one\n    b): 'Do.'; return a", "a\n    one\nb"),
    "nothing said": (f"def f(a, b):\n{ONE}", None),
    "a private name": (f"def _f(a): # one\n{ONE}", None)}


@pytest.mark.parametrize("source, section", CASES.values(), ids=CASES)
def test_sections(source, section):
    doc = inspect.getdoc([*made(source).values()][-1])
    if section is None: assert doc == "Do."
    else: assert doc.removeprefix("Do.\n\n").strip() == "Parameters\n----------\n" + section


def test_a_docstring_that_documents_parameters_by_hand_is_refused():
    "Also one that nbdev_update has carried from a module into its notebook."
    with pytest.raises(ValueError, match="the docstring of scale documents parameters; comments"):
        with_sections(with_sections(FUNCTION))


def words(text): return " ".join((text or "").split())


def offered(module):
    "Names and things that a module offers, with the public methods of classes."
    for name in module.__all__:
        thing = getattr(module, name)
        yield name, thing
        if not isinstance(thing, type): continue
        for method, function in vars(thing).items():
            own = getattr(function, "__func__", function)
            if not method.startswith("_") and inspect.isfunction(own): yield f"{name}.{method}", own


def unseen(thing):
    "Comments behind parameters of `thing` that its docstring does not have."
    if isinstance(thing, type) and not is_dataclass(thing) and "__init__" not in vars(thing): return []
    said, doc = docments(thing), words(inspect.getdoc(thing))
    return [text for text in said.values() if text and words(text) not in doc]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_comment_behind_a_parameter_is_in_its_docstring(name):
    module = import_module(f"{keep.PACKAGE}.{name}")
    wrong = {symbol: unseen(thing) for symbol, thing in offered(module) if callable(thing)}
    assert not {symbol: texts for symbol, texts in wrong.items() if texts}


def test_help_and_jupyter_show_parameters():
    "And those that `relax` leaves to `Study`."
    from IPython.core.oinspect import Inspector
    from efcn_nb import embed, relax, Study
    from efcn_nb.ladder.geometry import ConvGeometry
    says = {embed: "left untouched", Study: "epochs at which the CNN becomes an eFCN", relax: "rate of the baseline",
            Study.run: "False to show none", ConvGeometry: "because nothing reads them"}
    try: inspector = Inspector()
    except TypeError: inspector = Inspector(theme_name="nocolor")  # IPython 9
    for thing, text in says.items():
        assert text in words(pydoc.render_doc(thing, renderer=pydoc.plaintext))
        assert text in words(inspector._mime_format(inspector.info(thing)["docstring"])["text/plain"])
