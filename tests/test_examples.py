"""The scripts of ``examples/`` run, and say what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import BIN, ROOT, environment

EXAMPLES = ROOT / "examples"


def output_of(words: list[str], folder: Path) -> str:
    env = environment(PATH=f"{BIN}:{environment()['PATH']}")
    done = subprocess.run(  # noqa: S603
        words, cwd=folder, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def figures(pattern: str, printed: str) -> tuple[str, ...]:
    """The groups of a pattern that the output must hold."""
    match = re.search(pattern, printed)
    assert match is not None, printed
    return match.groups()


@pytest.mark.alone
def test_plain_pytorch_resumes_to_the_bit_and_offloads(tmp_path: Path) -> None:
    printed = output_of([sys.executable, str(EXAMPLES / "plain_pytorch.py"), str(tmp_path)], tmp_path)
    first, last, resumed = figures(r"loss (\S+) -> (\S+), resumed (\S+)", printed)
    assert float(last) < float(first)
    assert resumed == last
    written, share = figures(r"([\d,]+) bytes written, (\d+)% of", printed)
    assert int(written.replace(",", "")) > 1_000_000
    assert int(share) < 60


@pytest.mark.slow
def test_zero(tmp_path: Path) -> None:
    printed = output_of([sys.executable, str(EXAMPLES / "zero.py"), str(tmp_path / "saved")], tmp_path)
    first, last = figures(r"loss (\S+) -> (\S+) after 10 steps", printed)
    assert float(last) < float(first)


@pytest.mark.slow
def test_train_export_generate(tmp_path: Path) -> None:
    words = [
        "/bin/bash",
        str(EXAMPLES / "train_export_generate.sh"),
        "--set",
        f'data.train=["{ROOT}/optimizers/**/*.py"]',
        "--set",
        f'data.validation=["{ROOT}/README.md"]',
    ]
    printed = output_of(words, tmp_path)
    assert (tmp_path / "runs" / "tiny" / "summary.json").is_file()
    (more,) = figures(r"(?s)def main\((.+)\Z", printed)
    assert more.strip()
