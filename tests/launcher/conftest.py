"""The command in this process, for what needs none of its own."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from narrowgauge.launcher.main import main
from tests.support.command import ROOT

Call = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """``narrowgauge WORDS`` with changed environment variables; like :func:`tests.support.command.run` to look at."""

    def attempt(*words: str, **extra: str) -> "subprocess.CompletedProcess[str]":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            # What the command sets is taken back after the test.
            monkeypatch.setenv(name, "0")
            monkeypatch.delenv(name)
        for name, value in extra.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["narrowgauge", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return subprocess.CompletedProcess(words, code or 0, printed.out, printed.err)

    return attempt
