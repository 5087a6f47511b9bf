"""Locks that killed builds leave behind."""

import shutil
import subprocess
from pathlib import Path

from narrowgauge.offload.backends.deepspeed_build import remove_stale_locks, stale_locks


def test_compilers_that_outlived_their_build_are_waited_for(tmp_path: Path) -> None:
    """The lock was removed, without a word, while ninja still wrote what the next build read."""
    ninja = shutil.copy(str(shutil.which("sleep")), tmp_path / "ninja")
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    (tmp_path / "elsewhere").mkdir()
    said: list[str] = []
    with (
        subprocess.Popen([ninja, "1"], cwd=lock.parent) as left,  # noqa: S603
        subprocess.Popen([ninja, "60"], cwd=tmp_path / "elsewhere") as other,  # noqa: S603
    ):
        assert stale_locks(tmp_path / "extensions") == [lock]
        remove_stale_locks(tmp_path / "extensions", said.append)
        assert left.poll() == 0
        other.terminate()
    assert not lock.exists()
    assert said == [
        f"waiting for compilers that were left in {lock.parent} by a build that was killed",
        "cpu_adam: the lock of a build that was killed is removed",
    ]
