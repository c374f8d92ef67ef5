"""Faults made in real source, systematically: one change to the syntax tree of a function, and the module around it."""

import ast
import contextlib
import importlib
import sys
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_OTHER = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
_FLIPPED = {ast.Gt: ast.Lt, ast.Lt: ast.Gt, ast.GtE: ast.LtE, ast.LtE: ast.GtE, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
# functions and methods that are left out: the value stays what went in
_LEFT_OUT = {"exp", "log", "tanh_of", "logistic", "sigmoid", "erf", "sqrt", "row_sum", "column_sum", "sum", "t", "conj"}
_LEFT_OUT |= {"square", "clamp", "maximum", "minimum", "abs", "sign", "log_softmax", "one_hot", "power", "neg"}
# half precision is another matter: the check runs in double
_NOT_HERE = {"HALF", "dtype", "wide", "narrow", "float", "is_complex", "is_grad_enabled", "tangents_possible"}

WRONG, RAISED = "wrong", "raised"  # how a fault is found: by results that differ, or since nothing runs at all


@dataclass(frozen=True)
class Mutant:
    """A change in `function` of the module `path`: the source before and after, and the line where it begins."""

    path: str
    function: str
    before: str
    after: str
    line: str
    number: int  # among those of the same text
    tree: ast.Module
    place: tuple

    def code(self) -> types.CodeType:
        """Compile the module with the change."""
        holder, field, index, node, changed = self.place
        _put(holder, field, index, changed)
        try:
            return compile(ast.fix_missing_locations(self.tree), self.path, "exec")
        finally:
            _put(holder, field, index, node)

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.path.rsplit(".", 1)[-1], self.function, self.before, self.after

    def __str__(self) -> str:
        return f"{'.'.join(self.key[:2])}: {self.before}  ->  {self.after}  in  {self.line}" + f"  #{self.number}" * (
            self.number > 0
        )


def mutants(path: str, functions: set[str]) -> Iterator[Mutant]:
    """Yield every fault in these functions of a module, "name" or "Class.name"; in a factory, "factory.Class.name"."""
    source = Path(sys.modules[path].__file__ if path in sys.modules else importlib.import_module(path).__file__)
    tree = ast.parse(source.read_text(encoding="utf-8"))
    seen: Counter[tuple[str, ...]] = Counter()
    found, lines = dict(_functions(tree)), source.read_text(encoding="utf-8").splitlines()
    assert functions <= found.keys(), f"{path} has no {functions - found.keys()}"
    for name in sorted(functions):
        for holder, field, index, node in _nodes(found[name]):
            for changed in _faults(node):
                ast.copy_location(changed, node)
                ast.fix_missing_locations(changed)
                line = lines[node.lineno - 1].strip()
                place = holder, field, index, node, changed
                text = name, ast.unparse(node), ast.unparse(changed), line
                yield Mutant(path, *text, seen[text], tree, place)
                seen[text] += 1


def _functions(node, prefix=""):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            if isinstance(child, ast.FunctionDef):
                yield prefix + child.name, child
            yield from _functions(child, f"{prefix}{child.name}.")
        else:
            yield from _functions(child, prefix)


def _put(holder, field, index, node):
    if index is None:
        setattr(holder, field, node)
    else:
        getattr(holder, field)[index] = node


def _names(node):
    return {
        n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute)
    }


def _nodes(function):
    """Where each node of the body is held; annotations, docstrings and half precision are left out."""
    pending = [(function, "body", i, n) for i, n in reversed(list(enumerate(function.body)))]
    while pending:
        holder, field, index, node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.If | ast.IfExp) and _names(node.test) & _NOT_HERE:
            continue
        yield holder, field, index, node
        inner = []
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "ctx", "op", "ops", "decorator_list"):
                continue
            if isinstance(value, ast.AST):
                inner.append((node, name, None, value))
            elif isinstance(value, list):
                inner += [(node, name, i, v) for i, v in enumerate(value) if isinstance(v, ast.AST)]
        pending += reversed(inner)


def _faults(node):
    """What may stand in the place of a node."""
    match node:
        case ast.BinOp(left, op, right):
            if type(op) in _OTHER:
                yield ast.BinOp(left, _OTHER[type(op)](), right)
            if isinstance(op, ast.Sub | ast.Div | ast.MatMult | ast.Pow):
                yield ast.BinOp(right, op, left)
            yield left
            if not isinstance(op, ast.Pow):
                yield right
        case ast.UnaryOp(ast.USub(), operand):
            yield operand
        case ast.Constant(value) if isinstance(value, int | float) and not isinstance(value, bool):
            yield ast.Constant(value + 1 if isinstance(value, int) else value * 1.001 if value else 0.5)
        case ast.Compare(left, [op], right) if type(op) in _FLIPPED:
            yield ast.Compare(left, [_FLIPPED[type(op)]()], right)
        case ast.IfExp(_, body, orelse):
            yield body
            yield orelse
        case ast.Call(ast.Name("where"), [condition, a, b]):
            yield ast.Call(ast.Name("where", ast.Load()), [condition, b, a], [])
        case ast.Call(ast.Name(name), [first, *_]) if name in _LEFT_OUT:
            yield first
        case ast.Call(ast.Attribute(receiver, name), arguments) if name in _LEFT_OUT:
            yield arguments[0] if isinstance(receiver, ast.Name) and receiver.id == "torch" else receiver
        case ast.Return(ast.Tuple(elements)) if len(elements) > 1:
            wanted = [e for e in elements if not (isinstance(e, ast.Constant) and e.value is None)]
            wanted = [e for e in wanted if not isinstance(e, ast.Starred)]
            for e in wanted:
                yield ast.Return(ast.Tuple([ast.Constant(None) if o is e else o for o in elements], ast.Load()))
            if len(wanted) > 1:
                a, b = wanted[:2]
                swapped = [b if e is a else a if e is b else e for e in elements]
                yield ast.Return(ast.Tuple(swapped, ast.Load()))
        case ast.Assign([ast.Tuple(targets)], ast.Attribute(_, "saved_tensors")) if len(targets) > 1:
            yield ast.Assign([ast.Tuple([targets[1], targets[0], *targets[2:]], ast.Store())], node.value)
        case ast.Assign([ast.Name(name)], value) if name in _names(value) and not isinstance(value, ast.IfExp):
            yield ast.Pass()
        case ast.BoolOp(_, [first, *_]):
            yield first


class Namespace:
    """Modules made anew, in this order, one of them mutated."""

    def __init__(self, mutant: Mutant | None, paths: tuple[str, ...]) -> None:
        self.modules = {}
        with self._in_place():
            for path in paths:
                changed = mutant is not None and path == mutant.path
                self._make(path, mutant.code() if changed else _code(path))

    def __getattr__(self, name):
        for module in reversed(self.modules.values()):
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(name)

    def _make(self, path, code):
        module = types.ModuleType(path)
        self.modules[path] = sys.modules[path] = module
        package, name = path.rsplit(".", 1)
        if isinstance(getattr(sys.modules[package], name, None), types.ModuleType):
            setattr(sys.modules[package], name, module)
        exec(code, module.__dict__)

    @contextlib.contextmanager
    def _in_place(self):
        """Let `import` find the modules that are made, as long as they are being made."""
        before = dict(sys.modules)
        try:
            yield
        finally:
            for path in self.modules:
                sys.modules[path] = before[path]
                package, name = path.rsplit(".", 1)
                if isinstance(getattr(sys.modules[package], name, None), types.ModuleType):
                    setattr(sys.modules[package], name, before[path])


_CODE: dict[str, types.CodeType] = {}


def _code(path):
    if path not in _CODE:
        file = importlib.util.find_spec(path).origin
        _CODE[path] = compile(Path(file).read_text(encoding="utf-8"), path, "exec")
    return _CODE[path]
