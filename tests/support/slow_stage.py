"""A pytest plugin that runs slow tests until a given time: those near changed code first, the others in turn.

``pytest -p tests.support.slow_stage -m slow --until SECONDS``, in seconds since 1970: no test starts after that time,
none runs more than ``_GRACE`` beyond it, and what was left out is reported as skipped.
"""

import hashlib
import signal
import subprocess
import time
from collections.abc import Generator, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

_ROOT = Path(__file__).parents[2]
_GRACE = 180.0
_LONGEST = 600.0
_TESTS_OF = {"cluster": "launcher"}
_CONCERNS_ALL = ("tests/support", "tests/conftest.py", "pyproject.toml", "constraints.txt")


def git(root: Path, *words: str) -> str:
    """What git prints; empty where it fails or is not there."""
    try:
        result = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)  # noqa: S603, S607
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def changed_files(root: Path) -> list[str] | None:
    """The files changed by the last merge if HEAD is one, else since the last merge; None where the history is cut."""
    if git(root, "rev-parse", "--is-shallow-repository") != "false":
        return None
    parents = git(root, "log", "-1", "--format=%P").split()
    if not parents:
        return None
    last_merge = git(root, "rev-list", "--merges", "--first-parent", "-n", "1", "HEAD")
    base = parents[0] if len(parents) > 1 else last_merge or parents[0]
    return git(root, "diff", "--name-only", "--no-renames", base, "HEAD").splitlines()


def concerns(test_file: str, changed: Iterable[str]) -> bool:
    """Whether a test file's folder, or the folder it mirrors, or one above or below it, holds a changed file."""
    parts = PurePosixPath(test_file).parent.parts[1:]
    own = (_TESTS_OF.get(parts[0], parts[0]), *parts[1:]) if parts else ()
    for path in changed:
        if path.startswith(_CONCERNS_ALL):
            return True
        folder = PurePosixPath(path.removeprefix("tests/")).parent.parts
        shared = min(len(own), len(folder))
        if shared and own[:shared] == folder[:shared]:
            return True
    return False


def in_order(test_files: Iterable[str], changed: list[str] | None, commit: str) -> list[str]:
    """Test files near the change first; within each part, the sorted files begin at a place that the commit decides."""
    files = sorted(set(test_files))
    first = [file for file in files if changed is None or concerns(file, changed)]
    others = [file for file in files if file not in first]
    turn = int(hashlib.sha256(commit.encode()).hexdigest(), 16)
    return [part[(i + turn) % len(part)] for part in (first, others) for i in range(len(part))]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--until", type=float, required=True, help="seconds since 1970 after which no test starts")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Clock(float(config.option.until)))


class _Clock:
    def __init__(self, until: float) -> None:
        self._until = until

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        files = in_order(map(_file_of, items), changed_files(_ROOT), git(_ROOT, "rev-parse", "HEAD"))
        place = {file: number for number, file in enumerate(files)}
        items.sort(key=lambda item: place[_file_of(item)])

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """A time limit per test: the end of the stage, or so long that it must hang."""
        if time.time() >= self._until:
            item.add_marker(pytest.mark.skip(reason="left out, the time is up"))
            return (yield)
        remaining = self._until + _GRACE - time.time()

        def stop(number: int, frame: Any) -> None:
            if remaining > _LONGEST:
                pytest.fail(f"ran for more than {_LONGEST:.0f} s")
            pytest.skip("left out, the time is up")

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(1e-3, min(remaining, _LONGEST)))
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _file_of(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]
