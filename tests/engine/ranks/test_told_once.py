"""Exit codes and the rank: batch scripts and docs say the same numbers, and one module reads the variable."""

import re
from pathlib import Path

import pytest

from narrowgauge.engine.ranks.exit_codes import EXIT_BAD_INPUT, EXIT_HUNG, EXIT_NOTHING_SAVED, EXIT_PREEMPTED
from tests.support.command import ROOT


def test_the_numbers_that_users_scripts_know() -> None:
    assert (EXIT_BAD_INPUT, EXIT_PREEMPTED, EXIT_HUNG, EXIT_NOTHING_SAVED) == (2, 75, 76, 77)


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sbatch")), ids=lambda path: path.stem)
def test_batch_scripts_do_not_try_again_what_is_bad_input_or_was_asked_to_end(script: Path) -> None:
    known = [int(number) for number in re.findall(r'"\$code" -(?:eq|ne) (\d+)', script.read_text())]
    assert set(known) == {0, EXIT_BAD_INPUT, EXIT_PREEMPTED, EXIT_NOTHING_SAVED}


def test_the_docs_list_all() -> None:
    table = (ROOT / "docs" / "cluster.md").read_text().partition("| exit code of")[2].partition("\n\n")[0]
    assert [int(number) for number in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)] == [
        0,
        1,
        EXIT_BAD_INPUT,
        EXIT_PREEMPTED,
        EXIT_HUNG,
        EXIT_NOTHING_SAVED,
    ]


def test_one_module_reads_the_rank() -> None:
    found = {
        str(path.relative_to(ROOT))
        for folder in ("engine", "launcher", "optimizers", "offload")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"[\"'](RANK|WORLD_SIZE)[\"']", path.read_text())
    }
    assert found == {"engine/ranks/environment.py"}
