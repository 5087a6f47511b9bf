"""English prose that every Python brings along: the docstrings of the standard library, and the topics of its ``help``.

The text depends on the Python's version alone; its fingerprint is part of every result.
"""

import ast
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from narrowgauge.engine.data.cache import build_once
from narrowgauge.engine.data.corpus import stdlib_files

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def prose_files(cache: Path) -> list[Path]:
    """A file for each module with docstrings and for each topic, in the order of their names; made once."""
    folder = build_once(cache / "prose" / platform.python_version(), _write)
    return sorted(folder.glob("*.txt"))


def _write(target: Path) -> None:
    target.mkdir()
    # Documentation that classes repeat is written once.
    seen: set[str] = set()
    for number, path in enumerate(stdlib_files()):
        own = [text for text in docstrings(path) if not (text in seen or seen.add(text))]
        if own:
            (target / f"module-{number:04d}.txt").write_text("\n\n".join(own) + "\n")
    for name, text in sorted(topics.items()):
        (target / f"topic-{name}.txt").write_text(text)


def docstrings(path: Path) -> Iterator[str]:
    """Of the module, its classes and functions; none of a file that this Python cannot parse, as tests have some."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text
