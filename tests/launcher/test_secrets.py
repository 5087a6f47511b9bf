"""Secrets in a configuration reach the ranks, and neither logs nor files."""

import json
from pathlib import Path

import pytest

from tests.launcher.conftest import Call
from tests.support.command import run, tiny_config

SECRET = "hf_q7Zw2kd81"  # noqa: S105


@pytest.mark.slow
def test_they_are_in_no_output_and_no_file(call: Call, corpus: Path, tmp_path: Path) -> None:
    launch = {
        "processes_per_node": 1,
        "threads_per_process": 1,
        "environment": {"MY_VALUE": SECRET, "OMP_SCHEDULE": SECRET},
    }
    comet = {"enabled": False, "api_key": SECRET}
    config = tiny_config(corpus, tmp_path, launch=launch, comet=comet)
    words = ["launch", str(config), "--set", f"launch.environment.OTHER={SECRET}"]
    replaced = ["--set", f"launch={json.dumps({'environment': {'A': SECRET}})}"]
    only_printed = [call(*words, "--dry-run"), call(*words, *replaced, "--dry-run")]
    for done in (run(*words), *only_printed):
        assert done.returncode == 0, done.stderr
        assert SECRET not in done.stdout + done.stderr
        assert "MY_VALUE=***" in done.stdout or "A=***" in done.stdout
    run_dir = tmp_path / "run"
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert any("tensorboard" in str(path) for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    saved = json.loads((run_dir / "config.json").read_text())
    assert saved["config"]["comet"]["api_key"] == "***"
    assert saved["config"]["launch"]["environment"] == {"MY_VALUE": "***", "OMP_SCHEDULE": "***"}


def test_they_are_in_no_error_message(call: Call, corpus: Path, tmp_path: Path) -> None:
    config = str(tiny_config(corpus, tmp_path))
    for override in (f'launch.environment={{"A": ["{SECRET}"]}}', f'data.train=["https://user:{SECRET}@host/*.txt"]'):
        done = call("train", config, "--set", override)
        assert done.returncode == 2
        assert SECRET not in done.stdout + done.stderr
