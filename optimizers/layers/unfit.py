"""Linear layers that would not train as compact ones, because nothing calls the ``forward`` that they would get."""

import ast
import inspect
import linecache
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache

from torch import nn


def unfit_layers(model: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """Which of the layers have to stay dense, and why, by name."""
    adapters = tuple(f"{name}." for name, module in model.named_modules() if _is_adapted(module))
    found: dict[str, str] = {}
    for name, module in linears.items():
        parent, _, own = name.rpartition(".")
        if "forward" in module.__dict__:
            found[name] = REPLACED
        elif name.startswith(adapters):
            found[name] = ADAPTER
        elif own in _only_read(type(model.get_submodule(parent))):
            found[name] = READ
        elif own in _also_read(type(model.get_submodule(parent))):
            found[name] = ALSO_READ
    return found


REPLACED = "its forward was replaced on the instance, as accelerate's hooks do: make the optimizer before them"
ADAPTER = "an adapter's, which is small already"
READ = "its weight is read without calling it"
ALSO_READ = "its weight is read besides calling it, and what is read would not train"


def _is_adapted(module: nn.Module) -> bool:
    """Whether it is one of peft's layers around a frozen one."""
    return any(base.__name__ == "BaseTunerLayer" for base in type(module).__mro__)


@cache
def _only_read(parent: type[nn.Module]) -> frozenset[str]:
    """The children whose ``weight`` the methods of a class use, none of which calls the child."""
    read, called = set[str](), set[str]()
    for base in parent.__mro__:
        if base is not nn.Module and issubclass(base, nn.Module):
            for method in _methods(base):
                for node in ast.walk(method):
                    if isinstance(node, ast.Call) and (child := _child(node.func)) is not None:
                        called.add(child)
                    read |= _weights_used_in(node)
    return frozenset(read - called)


@cache
def _also_read(parent: type[nn.Module]) -> frozenset[str]:
    """The children that a method of a class calls and whose ``weight`` it uses as well, in all cases."""
    found = set[str]()
    for base in parent.__mro__:
        if base is not nn.Module and issubclass(base, nn.Module):
            for method in _methods(base):
                nodes = [node for statement in method.body for node in _in_all_cases(statement)]
                called = {child for node in nodes if isinstance(node, ast.Call) and (child := _child(node.func))}
                found |= called & {name for node in nodes for name in _weights_used_in(node)}
    return frozenset(found)


def _in_all_cases(node: ast.AST) -> Iterator[ast.AST]:
    """A node and what is below it, without what a condition chooses."""
    yield node
    if not isinstance(node, ast.If | ast.IfExp | ast.Try | ast.BoolOp):
        for child in ast.iter_child_nodes(node):
            yield from _in_all_cases(child)


def _methods(cls: type[nn.Module]) -> list[ast.FunctionDef]:
    """Those whose source is at hand and that do not set the weights up."""
    try:
        defined = _classes(inspect.getsourcefile(cls) or "").get(cls.__qualname__)
    except (OSError, TypeError, SyntaxError):
        return []
    body = defined.body if defined is not None else []
    return [node for node in body if isinstance(node, ast.FunctionDef) and not _sets_up(node.name)]


# inspect.getsource parses the file anew for every class.
@lru_cache(maxsize=8)
def _classes(path: str) -> dict[str, ast.ClassDef]:
    """The definitions in a file of Python, by qualified name; of several the first."""
    found: dict[str, ast.ClassDef] = {}

    def visit(node: ast.AST, within: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = within
            if isinstance(child, ast.ClassDef):
                found.setdefault(within + child.name, child)
                inner = f"{within}{child.name}."
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = f"{within}{child.name}.<locals>."
            if not isinstance(child, ast.expr):
                visit(child, inner)

    visit(ast.parse("".join(linecache.getlines(path))), "")
    return found


def _sets_up(name: str) -> bool:
    return "init" in name or "reset" in name or "load" in name


def _weights_used_in(node: ast.AST) -> set[str]:
    """``x`` of each ``self.x.weight`` directly below a node, but where only its dtype, device or shape is asked."""
    if isinstance(node, ast.Attribute) and node.attr in ("dtype", "device", "shape", "data"):
        return set()
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr"):
        return set()
    children = (child for child in ast.iter_child_nodes(node) if isinstance(child, ast.Attribute))
    return {name for child in children if child.attr == "weight" and (name := _child(child.value)) is not None}


def _child(node: ast.AST) -> str | None:
    """``x`` of ``self.x``."""
    is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if is_own else None  # pyright: ignore[reportAttributeAccessIssue]
