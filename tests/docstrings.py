"""Documentation of parameters where Python looks for it: in docstrings.

The notebooks document a parameter once, by a comment behind it. When they are exported, `Sections` writes those
comments into the docstrings of the modules too, so that `help`, Jupyter and editors show them.
"""
import ast, io, re, textwrap, tokenize
from typing import NamedTuple

from nbdev.process import Processor

WIDTH = 117  # of lines, the quotation marks apart; as wide as those of notebooks may be, which stay


class Parameter(NamedTuple):
    name: str
    kind: str  # type and default in words
    text: str

    def heading(self): return f"{self.name} : {self.kind}" if self.kind else self.name


class Sections(Processor):
    "A processor of nbdev's export: adds `Parameters` and `Returns` to the docstrings of what a notebook offers."
    def begin(self): self.known = {}  # parameters of the functions and classes so far, by name

    def cell(self, cell):
        if cell.cell_type == "code" and cell.directives_.keys() & {"export", "exports", "exporti"}:
            cell.source = with_sections(cell.source, self.known)


def with_sections(source, known=None):
    "`source` with sections in the docstrings of public functions, methods and classes; `known` is filled."
    known, lines, said = {} if known is None else known, source.split("\n"), comments(source)
    changes = []
    for node, public in documented(ast.parse(source).body):
        parameters, returned = signature(node, said, known)
        known[node.name] = parameters
        if public and (any(one.text for one in parameters) or returned and returned.text):
            changes.append(change(node, sections(parameters, returned), lines))
    for start, end, text in sorted(changes, reverse=True): lines[start:end] = text
    return "\n".join(lines)


def comments(source):
    "The comment in each line that has one behind code, by its number."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("#").strip() for token in tokens
            if token.type == tokenize.COMMENT and token.line[:token.start[1]].strip()}


def documented(body):
    "Functions, classes and methods in `body`, each with whether it is offered to users."
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)): continue
        yield node, not node.name.startswith("_")
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from ((method, public) for method, public in documented(node.body) if method.name != "__init__")


def signature(node, said, known):
    "The parameters of a function or class with what comments have `said`, and what a function returns, or None."
    if isinstance(node, ast.ClassDef):
        init = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
        return (signature(init[0], said, known)[0] if init else fields(node, said)), None
    return with_delegated(node, arguments(node, said), known), result(node, said)


def fields(node, said):
    "The fields of a dataclass or named tuple; none of another class."
    bases = [ast.unparse(base) for base in (*node.bases, *node.decorator_list)]
    if not any(re.search(r"\b(dataclass|NamedTuple)\b", base) for base in bases): return []
    return [parameter(one.target.id, one.annotation, one.value, said.get(one.end_lineno, ""))
            for one in node.body if isinstance(one, ast.AnnAssign)]


def arguments(node, said):
    "The parameters of a function, but for `self`; those in one line share its comment."
    a, found = node.args, []
    plain = [*a.posonlyargs, *a.args]
    defaults = [None]*(len(plain) - len(a.defaults)) + a.defaults
    stars = [*zip(plain, defaults), *[(a.vararg, None)]*bool(a.vararg), *zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg and not delegates(node): stars.append((a.kwarg, None))
    for one, default in stars:
        star = "*" if one is a.vararg else "**" if one is a.kwarg else ""
        end = (default or one).end_lineno
        text = "" if node.returns and end == node.returns.lineno else said.get(end, "")
        found.append(parameter(star + one.arg, one.annotation, default, text))
    of_class = found and found[0].name in ("self", "cls")
    return found[1:] if of_class else found


def delegates(node):
    "The class or function to which the decorator `delegates` of `node` leaves the keywords, or None."
    calls = [one for one in node.decorator_list if isinstance(one, ast.Call) and ast.unparse(one.func) == "delegates"]
    return calls[0].args[0].id if calls else None


def with_delegated(node, own, known):
    "Parameters of `node`, its `own` first, with what is said of them where it delegates to, in an earlier cell."
    if delegates(node) is None: return own
    there = {one.name: one for one in known[delegates(node)]}
    found = [one._replace(text=one.text or there[one.name].text) if one.name in there else one for one in own]
    return found + [one for one in there.values() if one.name not in {one.name for one in own}]


def parameter(name, annotation, default, text):
    "What is said of a parameter; without annotation, truth values alone have a type: others often take more than one."
    kind = [ast.unparse(annotation)] if annotation else []
    if not kind and isinstance(getattr(default, "value", None), bool): kind = ["bool"]
    if default: kind.append(f"default {ast.unparse(default)}")
    return Parameter(name, ", ".join(kind), text)


def result(node, said):
    "What a function returns, from the comment behind the bracket that ends its parameters."
    lines = range(node.returns.lineno, node.returns.end_lineno + 1) if node.returns else after_parameters(node)
    text = next((said[line] for line in lines if line in said), "")
    return Parameter(ast.unparse(node.returns) if node.returns else "", "", text) if text or node.returns else None


def after_parameters(node):
    "Numbers of the lines between the last parameter of a function and its body."
    a = node.args
    parts = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg, *a.defaults, *a.kw_defaults]
    last = max((one.end_lineno for one in parts if one), default=node.lineno)
    return range(last + 1, node.body[0].lineno)


def sections(parameters, returned):
    "Lines in the form of NumPy's docstrings."
    found, blocks = [], []
    for one in parameters:
        if blocks and blocks[-1][-1].text == one.text != "" and blocks[-1][-1].kind == one.kind: blocks[-1].append(one)
        else: blocks.append([one])
    if any(one.text for one in parameters): found += ["Parameters", "-"*len("Parameters")]
    for block in blocks if found else ():
        found += [block[0]._replace(name=", ".join(one.name for one in block)).heading(), *indented(block[0].text)]
    if returned and returned.text:
        heading = [returned.heading()] if returned.name else []
        found += [""]*bool(found) + ["Returns", "-"*len("Returns"), *heading, *indented(returned.text)]
    return found


def indented(text): return textwrap.wrap(text, WIDTH - 8, initial_indent=" "*4, subsequent_indent=" "*4)


def change(node, added, lines):
    "Which of `lines` make way for the docstring of `node` with the `added` lines, and for what."
    text, first = ast.get_docstring(node), node.body[0]
    if text and any(line in ("Parameters", "Returns") for line in text.split("\n")):
        raise ValueError(f"the docstring of {node.name} documents parameters; comments behind them do that")
    start, end = first.lineno - 1, first.end_lineno if text else first.lineno - 1
    before, after = [], []
    margin = lines[start][:first.col_offset]
    if margin.strip():  # the body stands in the line of the definition
        before, margin = [margin.rstrip()], " "*(node.col_offset + 4)
        rest = lines[end - 1 if text else start][first.end_col_offset if text else first.col_offset:].lstrip("; ")
        after, end = [margin + rest]*bool(rest), end if text else start + 1
    said = (wrapped(text, WIDTH - len(margin)) + [""] if text else []) + added
    return start, end, [*before, *(margin + line if line else "" for line in quoted(said)), *after]


def quoted(said):
    "The lines `said` as a docstring."
    whole = '"""' + "\n".join(said) + '\n"""'
    if "\\" in whole: whole = "r" + whole
    if ast.literal_eval(whole) != "\n".join(said) + "\n": raise ValueError(f"cannot quote {said[0]}")
    return whole.split("\n")


def wrapped(text, width):
    "The lines of `text`, long ones in several."
    return [part for line in text.split("\n") for part in textwrap.wrap(line, width, drop_whitespace=True) or [""]]
