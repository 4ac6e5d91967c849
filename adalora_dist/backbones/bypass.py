"""Linear maps whose weight a model computes with itself, past anything that is put around them.

Mamba multiplies by ``dt_proj.weight`` and hands ``out_proj.weight`` to a kernel, RWKV divides ``output.weight`` in
place, torch's own attention takes ``out_proj.weight``. An adapter there would be trained on one path and left out on
another, without a word. Which linear maps these are is read from the source of the model's classes, because that needs
neither weights nor data, nor the kernels that are installed on some machines only: it works on the meta device and for
partitioned models, and sees a path that only another machine takes.

What counts: ``.weight`` of a submodule in any method that a forward may reach, unless only its type, device or shape is
asked for; and every submodule that is handed to an autograd function of the model's own, which computes with it where
no graph is made, and again in its own backward (Reformer's reversible layers). Branches that the model's own settings
rule out do not count (BLOOM's slow sum, with ``pretraining_tp`` 1).
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Collection
from functools import cache, cached_property
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from adalora_dist.io.collector import no_collection

_METADATA = {
    *("dtype", "device", "shape", "ndim", "is_meta", "is_cuda", "layout", "requires_grad"),
    *("size", "dim", "numel", "element_size", "is_floating_point", "stride", "is_contiguous"),
}
_QUESTIONS = {"isinstance", "hasattr", "type", "id", "callable"}
_BEFORE_FORWARD = re.compile(
    r"__init__|__del__|_?(init|initialize|reset|tie|set|get_(input|output)|resize|prune|load|from_|save|copy|convert|fuse"
    r"|freeze|post_init|smart_apply|extra_repr).*"
)
"""Names of methods that build, load or change a model before it computes."""
_FRAMEWORK = ("torch.nn.modules.module", "transformers.modeling_utils", "transformers.generation", "builtins", "typing")
_NEVER_TAKEN = {("DisentangledSelfAttention", "in_proj"): "only for query_states, which no DeBERTa model passes"}
"""(class, linear map) -> why a branch that reads its weight is not taken, though settings do not say so."""
_MAX_CALLS = 3
_UNKNOWN, _ANY = "?", "*"  # at the start of a path: whatever leads there; within one: an element of a list
_ALL = "**"  # at the end of one: it, and everything below

Path = tuple[str, ...]


class _Read(NamedTuple):
    path: Path
    """From the module to the linear map."""
    where: str
    conditions: tuple[tuple[ast.expr, bool], ...]
    """Under which the code is reached, each with its value."""


def weights_read_directly(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Which of the linear maps ``names`` the model's code reads the weight of, and where: {name: "Class.method"}.

    A class without source (written in C, typed at a prompt) is taken not to.
    """
    found: dict[str, str] = {}
    for prefix, module in model.named_modules():
        inside = f"{prefix}." if prefix else ""
        kind: Any = type(module)
        with no_collection():  # syntax trees stay
            reads = _reads_of(kind)
        for read in reads:
            if not all(_value(test, module) in (wanted, None) for test, wanted in read.conditions):
                continue
            if (type(module).__name__, read.path[-1]) in _NEVER_TAKEN:
                continue
            pattern = re.compile(_pattern(read.path))
            for name in names:
                if name.startswith(inside) and pattern.fullmatch(f"{name[len(inside) :]}."):
                    found.setdefault(name, read.where)
    return found


def _pattern(path: Path) -> str:
    """Regular expression of the dotted names that a path can stand for, each with a dot behind it."""
    ways = {_UNKNOWN: r"(?:.+\.)?", _ANY: r"[^.]+\.", _ALL: r"(?:.+\.)?"}
    return "".join(ways.get(part, re.escape(part) + r"\.") for part in path)


@cache
def _reads_of(kind: type) -> tuple[_Read, ...]:
    """Every direct read in the methods of a class, its bases' included where they are not overridden."""
    seen: set[str] = set()
    reads: list[_Read] = []
    for base in kind.__mro__:
        if base is object or base.__module__.startswith(_FRAMEWORK):
            continue
        for name, function in vars(base).items():
            plain = inspect.unwrap(getattr(function, "__func__", getattr(function, "fget", function)))
            if not isinstance(plain, FunctionType) or name in seen or _BEFORE_FORWARD.fullmatch(name):
                continue
            tree = _tree_of(plain)
            if tree is None:
                continue
            if not _calls_super(tree):
                seen.add(name)
            reads += _Walk(kind, plain, {_first_argument(tree): ()}, 0).reads_of(tree)
    return tuple(reads)


@cache
def _tree_of(function: FunctionType) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def _first_argument(tree: ast.FunctionDef) -> str:
    arguments = [*tree.args.posonlyargs, *tree.args.args]
    return arguments[0].arg if arguments else ""


def _calls_super(tree: ast.FunctionDef) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "super" for node in ast.walk(tree))


class _Walk:
    """One function, with what its names stand for, relative to the module."""

    def __init__(self, kind: type, function: FunctionType, names: dict[str, Path], depth: int) -> None:
        self.kind, self.function, self.depth = kind, function, depth
        self.names = names
        self.conditions: list[tuple[ast.expr, bool]] = []
        self.reads: list[_Read] = []

    def reads_of(self, tree: ast.FunctionDef) -> list[_Read]:
        self.tree = tree
        for statement in tree.body:
            self._visit(statement)
        return self.reads

    @cached_property
    def parents(self) -> dict[ast.AST, ast.AST]:
        return {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}

    def _visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.If | ast.IfExp):
            self._visit(node.test)
            for branch, value in ((node.body, True), (node.orelse, False)):
                self.conditions.append((node.test, value))
                for part in branch if isinstance(branch, list) else [branch]:
                    self._visit(part)
                self.conditions.pop()
            return
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind(target, node.value)
        elif isinstance(node, ast.For | ast.comprehension):
            self._bind_element(node.target, node.iter)
        elif isinstance(node, ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp):
            for generator in node.generators:  # its names are used before it in the text
                self._bind_element(generator.target, generator.iter)
        elif isinstance(node, ast.Attribute) and node.attr == "weight":
            if (path := self._path(node.value)) and not self._asks_only(node):
                self._note(path)
        elif isinstance(node, ast.Call):
            self._call(node)
        for child in ast.iter_child_nodes(node):
            self._visit(child)

    def _note(self, path: Path) -> None:
        if not {_UNKNOWN, _ANY}.issuperset(path):
            where = f"{self.kind.__name__}.{self.function.__name__}"
            self.reads.append(_Read(path, where, tuple(self.conditions)))

    def _path(self, node: ast.AST) -> Path | None:
        """How to get from the module to what an expression stands for; None: nowhere that is known."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, (_UNKNOWN,))
        if isinstance(node, ast.Attribute):
            path = self._path(node.value)
            return None if path is None else (*path, node.attr)
        if isinstance(node, ast.Subscript):
            path = self._path(node.value)
            return None if path is None else (*path, _ANY)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            if len(node.args) >= 2 and isinstance(node.args[1], ast.Constant):
                path = self._path(node.args[0])
                return None if path is None else (*path, str(node.args[1].value))
        return None

    def _bind(self, target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Name):
            path = self._path(value)
            self.names[target.id] = path if path is not None else (_UNKNOWN,)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for name, part in zip(target.elts, value.elts, strict=True):
                self._bind(name, part)

    def _bind_element(self, target: ast.AST, iterable: ast.AST) -> None:
        """Loops over a list of modules, also through enumerate and zip."""
        if isinstance(iterable, ast.Call) and isinstance(iterable.func, ast.Name) and isinstance(target, ast.Tuple):
            first = 1 if iterable.func.id == "enumerate" else 0
            if first or iterable.func.id == "zip":
                for name, source in zip(target.elts[first:], iterable.args, strict=False):
                    self._bind_element(name, source)
            return
        if not isinstance(target, ast.Name):
            return
        if isinstance(iterable, ast.Tuple | ast.List):  # of which one element stands for all: each is looked at
            paths = [path for element in iterable.elts if (path := self._path(element))]
            self.names[target.id] = paths[0] if len(paths) == 1 else (_UNKNOWN,)
        else:
            path = self._path(iterable)
            self.names[target.id] = (*path, _ANY) if path is not None else (_UNKNOWN,)

    def _asks_only(self, node: ast.Attribute) -> bool:
        """Whether this use of a weight asks for its type, device or shape alone, or whether it is there."""
        parent = self.parents.get(node)
        if isinstance(parent, ast.Attribute):
            return parent.attr in _METADATA
        if isinstance(parent, ast.Compare):
            return all(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops)
        return isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id in _QUESTIONS

    def _call(self, node: ast.Call) -> None:
        """Follow a module that is handed to another function, or a weight that is asked for by name."""
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) >= 2:
            name, path = node.args[1], self._path(node.args[0])
            if isinstance(name, ast.Constant) and name.value == "weight" and path:
                self._note(path)
        passed = {k: path for k, arg in enumerate(node.args) if (path := self._path(arg)) and path[0] != _UNKNOWN}
        named = {
            keyword.arg: path
            for keyword in node.keywords
            if keyword.arg and (path := self._path(keyword.value)) and path[0] != _UNKNOWN
        }
        if self._is_autograd_function(node.func):
            for path in passed.values():
                self._note((*path, _ALL))
            return
        if not (passed or named) or self.depth == _MAX_CALLS:
            return
        called, is_method = self._function(node.func)
        tree = _tree_of(called) if called is not None else None
        if called is None or tree is None or tree is _tree_of(self.function):
            return
        arguments = [argument.arg for argument in (*tree.args.posonlyargs, *tree.args.args)]
        names: dict[str, Path] = {arguments[0]: ()} if is_method and arguments else {}
        for position, path in passed.items():
            if position + is_method < len(arguments):
                names[arguments[position + is_method]] = path
        walk = _Walk(self.kind, called, {**names, **named}, self.depth + 1)
        walk.conditions = list(self.conditions)
        self.reads += walk.reads_of(tree)

    def _is_autograd_function(self, node: ast.expr) -> bool:
        """Whether a call is ``F.apply(...)`` of an autograd function that the file of the model has."""
        if not isinstance(node, ast.Attribute) or node.attr != "apply" or not isinstance(node.value, ast.Name):
            return False
        found = self.function.__globals__.get(node.value.id)
        return isinstance(found, type) and issubclass(found, torch.autograd.Function)

    def _function(self, node: ast.expr) -> tuple[FunctionType | None, bool]:
        """What a call calls, if that is a method of the module or a function of its file; whether it takes self."""
        found: Any = None
        is_method = False
        if isinstance(node, ast.Name):
            found = self.function.__globals__.get(node.id)
        elif isinstance(node, ast.Attribute) and self._path(node.value) == ():
            declared = inspect.getattr_static(self.kind, node.attr, None)
            found = getattr(declared, "__func__", declared)
            is_method = not isinstance(declared, staticmethod)
        found = inspect.unwrap(found) if callable(found) else None
        return (found if isinstance(found, FunctionType) else None), is_method


def _value(test: ast.expr, module: nn.Module) -> bool | None:
    """What a condition on the module's own settings says; None where it depends on anything else."""
    if isinstance(test, ast.BoolOp):
        values = [_value(part, module) for part in test.values]
        decisive = isinstance(test.op, ast.Or)
        return decisive if decisive in values else None if None in values else not decisive
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = _value(test.operand, module)
        return None if value is None else not value
    try:
        return bool(_setting(test, module))
    except (_NotASetting, AttributeError, TypeError, ValueError, RuntimeError):
        return None


class _NotASetting(Exception):
    """An expression that something other than the module's settings decides."""


_COMPARED: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Gt: lambda a, b: a > b, ast.GtE: lambda a, b: a >= b, ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b, ast.Eq: lambda a, b: a == b, ast.NotEq: lambda a, b: a != b,
    ast.Is: lambda a, b: a is b, ast.IsNot: lambda a, b: a is not b,
}  # fmt: skip


def _setting(node: ast.expr, module: nn.Module) -> Any:
    """The value of an expression of ``self``'s plain attributes: numbers, words, switches; never tensors."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARED:
        left, right = _setting(node.left, module), _setting(node.comparators[0], module)
        return _COMPARED[type(node.ops[0])](left, right)
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts, node = [node.attr, *parts], node.value
    if not isinstance(node, ast.Name) or node.id != "self" or not parts or "training" in parts:
        raise _NotASetting
    value: Any = module
    for part in parts:
        value = getattr(value, part)
    if not isinstance(value, bool | int | float | str | None):
        raise _NotASetting
    return value
