"""The tables of options in ``docs/`` are those of the code."""

import runpy
from pathlib import Path

import pytest

from tests.support.command import ROOT

TABLES = runpy.run_path(str(ROOT / "docs" / "tables.py"))
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if "<!-- table: " in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_code(page: Path) -> None:
    assert page.read_text() == TABLES["with_tables"](page.read_text()), "run: python docs/tables.py"


def test_every_table_is_in_a_page() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert all(f"<!-- table: {name} -->" in text for name in TABLES["TABLES"])
