"What a module offers, as Sphinx's Python domain wants it: signature, docstring, a table of parameters."
import ast, inspect, re, types
from functools import cache
from importlib import import_module

from fastcore.docments import docments

PACKAGE = "efcn_nb"
EMPTY = inspect.Parameter.empty


@cache
def face():
    "The names that `import efcn_nb` offers, and the modules where they are defined."
    package = import_module(PACKAGE)
    return {name: getattr(package, name).__module__ for name in package.__all__}


def defined(source):
    "Names of the public definitions in a cell."
    return [name for name in all_defined(source) if not any(part.startswith("_") for part in name.split("."))]


def all_defined(source):
    "Names of the definitions in a cell, in their order: functions, classes, patched methods, constants."
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): names.append(owner(node) + node.name)
        elif isinstance(node, ast.Assign): names += [t.id for t in node.targets if isinstance(t, ast.Name)]
    return names


def owner(node):
    "`Class.` for a function that is patched into a class."
    patched = [d for d in node.decorator_list if re.match(r"patch\b", ast.unparse(d))]
    return f"{ast.unparse(node.args.args[0].annotation)}." if patched else ""


def found(module, name):
    "The object called `name` in `module`, None if there is none."
    at = module
    for part in name.split("."):
        at = inspect.getattr_static(at, part, None)
        if isinstance(at, (staticmethod, classmethod)): at = at.__func__
    return at


def full_name(module, name):
    "The name by which pages link to an object: that of the package's face, if it is offered there."
    home = PACKAGE if face().get(name.split(".")[0]) == module.__name__ else module.__name__
    return f"{home}.{name}"


def said(thing):
    "A docstring without the sections that repeat the signature's comments: they become the table."
    text = inspect.cleandoc(getattr(thing, "__doc__", None) or "")
    return re.split(r"^(?:Parameters|Returns)\n-+$", text, flags=re.M)[0].strip()


def first_sentence(thing):
    paragraph = " ".join(said(thing).split("\n\n")[0].split())
    return unlinked(re.split(r"(?<=[.?!])\s+(?=[A-Z`])", paragraph)[0], thing)


def unlinked(text, thing):
    "The names of the parameters of `thing`, in backticks, as literals, which do not become links."
    names = {p.name for p in parameters(thing)[1]}
    return re.sub(r"(?<![`}])`(\w+)`(?!`)", lambda m: literal(m[1]) if m[1] in names else m[0], text)


def literal(text): return f"{{literal}}`{text}`"


def document(module, name, patched=()):
    "Documentation of `name` as a directive of Sphinx's Python domain, whose content is markdown."
    thing = found(module, name)
    kind, signature = "data", ""
    if isinstance(thing, property) or "." in name and not callable(thing): kind = "property"
    elif inspect.isclass(thing): kind = "class"
    elif callable(thing): kind = "method" if "." in name else "function"
    if kind in ("class", "method", "function"): signature = arguments(thing, drop_self=kind == "method")
    home = full_name(module, name).removesuffix(f".{name}")
    options = [f":module: {home}"]
    if home != module.__name__: options.append(f":canonical: {module.__name__}.{name}")
    body = [] if kind == "data" else [escaped(unlinked(said(thing), thing))]
    if signature: body.append(table(thing, drop_self=kind == "method"))
    if kind == "class": body += [method(member, name, options[0]) for member in methods(thing, patched)]
    text = "\n\n".join(filter(None, body))
    return f"::::::{{py:{kind}}} {name}{signature}\n" + "\n".join(options) + f"\n\n{text}\n::::::"


def methods(cls, patched):
    "Public methods and properties in the body of a class that have docstrings; patched ones have their own cells."
    return [(name, thing) for name, thing in vars(cls).items()
            if not name.startswith("_") and f"{cls.__name__}.{name}" not in patched
            and isinstance(thing, (types.FunctionType, staticmethod, classmethod, property)) and said(thing)]


def method(member, owner, module):
    name, thing = member
    bare = thing.__func__ if isinstance(thing, (staticmethod, classmethod)) else thing
    kind = "property" if not callable(bare) else "method"
    drop = not isinstance(thing, staticmethod)
    signature = arguments(bare, drop_self=drop) if kind == "method" else ""
    rows = table(bare, drop_self=drop) if kind == "method" else ""
    text = "\n\n".join(filter(None, [escaped(unlinked(said(bare), bare)), rows]))
    return f":::::{{py:{kind}}} {owner}.{name}{signature}\n{module}\n\n{text}\n:::::"


def parameters(thing, drop_self=False):
    try: given = inspect.signature(thing)
    except (TypeError, ValueError): return None, []
    return given, [p for i, p in enumerate(given.parameters.values()) if not (drop_self and i == 0)]


def arguments(thing, drop_self=False):
    "The signature without types, which stand in the table."
    given, kept = parameters(thing, drop_self)
    if given is None: return "()"
    bare = [p.replace(annotation=EMPTY, default=p.default if p.default is EMPTY else Shown(p.default)) for p in kept]
    back = given.return_annotation
    arrow = "" if back in (EMPTY, None) or inspect.isclass(thing) else f" -> {type_name(back)}"
    return str(inspect.Signature(bare)) + arrow


class Shown:
    "A default as it is shown: in full if it is short, by its name if it has one."
    def __init__(self, value): self.value = value
    def __repr__(self):
        if isinstance(self.value, type) or inspect.isroutine(self.value): return self.value.__name__
        text = repr(self.value)
        return text if len(text) <= 40 and not text.startswith("<") else "..."


def type_name(kind):
    if isinstance(kind, str): return kind
    if isinstance(kind, type) and not hasattr(kind, "__origin__"): return kind.__name__
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", str(kind))


def table(thing, drop_self=False):
    "Parameters and result with types, defaults and the comments of the signature; nothing if nobody comments any."
    given, kept = parameters(thing, drop_self)
    if given is None: return ""
    try: comments = docments(thing, full=True, returns=True)
    except (TypeError, ValueError, OSError, SyntaxError, AttributeError, KeyError): return ""
    comment = {name: unlinked(" ".join((row.get("docment") or "").split()), thing) for name, row in comments.items()}
    if not any(comment.values()): return ""
    rows = []
    for p in kept:
        kind = type_name(p.annotation) if p.annotation is not EMPTY else kind_of(p.default)
        name = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
        default = "" if p.default is EMPTY else code(repr(Shown(p.default)))
        rows.append((literal(name), code(kind), default, comment.get(p.name, "")))
    back = given.return_annotation
    if comment.get("return") and not inspect.isclass(thing):
        rows.append(("_returns_", code("" if back is EMPTY else type_name(back)), "", comment["return"]))
    lines = [f"| {' | '.join(map(cell, row))} |" for row in rows]
    head = "| Parameter | Type | Default | Meaning |\n|---|---|---|---|\n"
    return "::::{div} parameters\n" + head + "\n".join(lines) + "\n::::"


def kind_of(default): return "" if default is EMPTY or default is None else type(default).__name__


def code(text): return f"`{text}`" if text else ""


def cell(text): return escaped(text).replace("|", r"\|")


def escaped(text):
    "Markdown in which the asterisks of (N, *spatial) are asterisks."
    return "".join(re.sub(r"(?<!\w)(\*+)(?=\w)", lambda m: m[1].replace("*", r"\*"), part) if i % 2 == 0 else part
                   for i, part in enumerate(re.split(r"(`[^`]*`|\$[^$]*\$)", text)))
