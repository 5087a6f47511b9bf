"""The tests marked ``gpu``."""

from typing import Any

import pytest

from benchmarks.gpu.stages import ROOT, Emit


class _Reporter:
    """Tells of each test as it ends."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit

    def pytest_collectreport(self, report: Any) -> None:
        # A file that needs what is not installed.
        if report.outcome == "skipped":
            self._emit(case=report.nodeid.removeprefix("tests/"), outcome="skipped", seconds=0.0)

    def pytest_runtest_logreport(self, report: Any) -> None:
        # A test has three parts; what comes before its body is told of only if the body is not reached.
        if report.when == "call" or report.outcome != "passed":
            self._emit(case=report.nodeid.removeprefix("tests/"), outcome=report.outcome, seconds=report.duration)


def run(emit: Emit, *, small: bool) -> None:
    """Raises ``RuntimeError`` if a test fails or none is found."""
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    code = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", *files], plugins=[_Reporter(emit)])
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest ended with {code!r}")
