"""Writes the tables in these pages from the code: ``python docs/tables.py``.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; :data:`TABLES` says what is in it.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from narrowgauge.offload import OffloadOptions
from narrowgauge.offload.backends import BACKENDS
from narrowgauge.offload.options import option_of
from narrowgauge.optimizers import OPTIMIZERS
from narrowgauge.optimizers.options import is_required, options_of

DOCS = Path(__file__).parent


def markdown(rows: Sequence[tuple[str, str, str]]) -> str:
    """Name, default and meaning of each option."""
    lines = ["| key | default | |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def shown_default(value: Any) -> str:
    """As JSON has it; empty where there is none."""
    if value is dataclasses.MISSING or value is None:
        return ""
    if isinstance(value, str | float):
        return f"`{value}`" if isinstance(value, str) else f"{value:g}"
    return json.dumps(value)


def offload_options() -> str:
    """Of ``ActivationOffload`` and the block ``activation_offload``."""
    rows = []
    for field in dataclasses.fields(OffloadOptions):
        option = option_of(field.name)
        meaning = option.meaning
        if field.name == "backend":
            names = ", ".join(f"`{name}` ({backend.title})" for name, backend in BACKENDS.items())
            meaning = f"{meaning} There are {names}."
        rows.append((f"`{field.name}`", option.shown or shown_default(field.default), meaning))
    return markdown(rows)


def optimizer_options(name: str) -> str:
    """Keywords of an optimizer's class and keys of ``optimizer.params``."""
    rows = []
    for option in options_of(OPTIMIZERS[name].options_type):
        default = "required" if is_required(option) else shown_default(option.default)
        rows.append((f"`{option.name}`", default, option.text.replace("``", "`").replace("|", "\\|")))
    return markdown(rows)


def families() -> str:
    """What the sweep over transformers' causal language models has found."""
    record = json.loads((DOCS / "families.json").read_text())
    lines = ["| `model_type` | compact | |", "|---|---|---|"]
    for family, found in record.items():
        if "share" in found:
            lines.append(f"| `{family}` | {found['share']:.2f} | |")
        else:
            ((kind, reason),) = found.items()
            said = {"refused": "refused", "untried": "not tried"}[kind]
            lines.append(f"| `{family}` | | {said}: {reason.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "families": families,
    "offload options": offload_options,
    **{f"{name} options": partial(optimizer_options, name) for name in OPTIMIZERS},
}


def with_tables(text: str) -> str:
    """A page with its tables as the code has them.

    Raises:
        KeyError: a table has no entry in :data:`TABLES`.
    """

    def replaced(found: re.Match[str]) -> str:
        return f"<!-- table: {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end of table -->"

    return re.sub(r"<!-- table: ([^>]+?) -->\n.*?<!-- end of table -->", replaced, text, flags=re.DOTALL)


def main() -> None:
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text()
        page.write_text(with_tables(text))


if __name__ == "__main__":
    main()
