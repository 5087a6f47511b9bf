"""The floors of the code: imports go down, in no circle, and only DeepSpeed's own folders name DeepSpeed's objects."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command import ROOT

# kernels.py lies in the folder narrowgauge itself, below all others.
FLOORS = {"launcher": 2, "integrations": 2, "engine": 1, "optimizers": 0, "offload": 0, "kernels": -1}
# ZeRO-3's attributes on parameters, the wrappers' flat groups, and any import of the package.
DEEPSPEED = re.compile(r"\bds_\w+|_hp_mapping|bit16_groups|fp16_groups|^\s*(?:from|import) deepspeed", re.MULTILINE)
MEGATRON = re.compile(r"^\s*(?:from|import) megatron", re.MULTILINE)
WITHOUT_DEEPSPEED = (
    "optimizers",
    "offload/saving",
    "offload/transfer",
    "offload/storage",
    "engine/checkpoint",
    "engine/run",
    "engine/report",
    "engine/backends/ddp",
    "engine/backends/megatron",
)


def modules() -> dict[str, Path]:
    """All modules of the package by dotted name."""
    found = {"kernels": ROOT / "narrowgauge" / "kernels.py"}
    for top in FLOORS:
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_of(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The package's modules that a module imports when it is imported itself."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    later = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_types(function)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in later:
            continue
        if node.level:
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            source = ".".join([*base, *([node.module] if node.module else [])])
        else:
            source = (node.module or "").removeprefix("narrowgauge.")
        for alias in node.names:
            for target in (f"{source}.{alias.name}", source):
                if target in known and target != name:
                    yield target
                    break


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imports_of(name, path, known)) for name, path in known.items()}


def test_imports_between_the_top_folders_go_down(graph: dict[str, set[str]]) -> None:
    for name, targets in graph.items():
        own = name.split(".")[0]
        for target in targets:
            other = target.split(".")[0]
            assert other == own or FLOORS[other] < FLOORS[own], f"{name} imports {target}"


def test_no_import_goes_in_a_circle(graph: dict[str, set[str]]) -> None:
    finished: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in finished:
            for target in sorted(graph[name]):
                walk(target, (*way, name))
            finished.add(name)

    for name in graph:
        walk(name, ())


@pytest.mark.parametrize("folder", WITHOUT_DEEPSPEED)
def test_deepspeeds_objects_are_named_in_its_folders_only(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        found = DEEPSPEED.search(path.read_text())
        assert found is None, f"{path.relative_to(ROOT)} names {found.group(0)!r}"


def test_megatrons_modules_are_imported_in_its_folder_only() -> None:
    for name, path in modules().items():
        assert name.startswith("engine.backends.megatron") or MEGATRON.search(path.read_text()) is None, path


def test_no_engine_is_of_any_type() -> None:
    for path in modules().values():
        assert re.search(r"\bengine: Any", path.read_text()) is None, path
