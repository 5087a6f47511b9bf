"""Which ninja compiles."""

import shutil
from pathlib import Path

import pytest

from narrowgauge.offload.backends.deepspeed_build import prefer_own_ninja
from tests.support.command import BIN


def test_the_environments_ninja_goes_before_the_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``make`` built with Debian's ninja and an activated environment with its own: each compiled again."""
    (tmp_path / "ninja").write_text("#!/bin/sh\n")
    (tmp_path / "ninja").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{BIN}:/usr/bin")
    assert shutil.which("ninja") == str(tmp_path / "ninja")
    for _ in range(2):
        prefer_own_ninja()
        assert shutil.which("ninja") == str(BIN / "ninja")
        assert shutil.which("sh") is not None
