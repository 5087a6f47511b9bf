"""``narrowgauge slurm render``; jobs: ``tests/cluster``."""

from pathlib import Path
from typing import Any

import pytest

from tests.launcher.conftest import Call
from tests.support.command import tiny_config


def config_of(corpus: Path, folder: Path, **slurm: Any) -> str:
    options = {"nodes": 2, "gpus-per-node": None, "cpus-per-task": 1, "mem": None, "time": 30, **slurm}
    return str(tiny_config(corpus, folder, launch={"processes_per_node": 1, "slurm": options}))


def test_a_script_holds_the_configurations_options(call: Call, corpus: Path, tmp_path: Path) -> None:
    lines = call("slurm", "render", config_of(corpus, tmp_path, partition="main", nodes=3)).stdout.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert lines.count("#SBATCH --nodes=3") == 1
    assert lines.count("#SBATCH --partition=main") == 1
    assert not any(line.startswith(("#SBATCH --gpus-per-node", "#SBATCH --mem")) for line in lines)
    assert [line for line in lines if line.startswith("#SBATCH --signal")] == ["#SBATCH --signal=B:USR1@300"]


@pytest.mark.parametrize("value", ["USR1@300", "B:USR2@300", "B:TERM@60", "R:USR1@300", "B:USR1@", "B:12", "300"])
def test_a_signal_that_the_script_does_not_hear_is_refused(
    call: Call, corpus: Path, tmp_path: Path, value: str
) -> None:
    """Without ``B:`` the job saved and did not come back; ``B:USR2`` killed the shell."""
    done = call("slurm", "render", config_of(corpus, tmp_path, signal=value))
    assert done.returncode == 2
    assert f"launch.slurm: signal: expected B:USR1@SECONDS, got '{value}'" in done.stderr


@pytest.mark.parametrize("value", ['"a b"', '"x;$(id)"', '"`id`"'])
def test_an_option_that_is_no_word_is_refused(call: Call, corpus: Path, tmp_path: Path, value: str) -> None:
    done = call("slurm", "render", config_of(corpus, tmp_path), "--set", f"launch.slurm.comment={value}")
    assert done.returncode == 2
    assert "launch.slurm: " in done.stderr
    assert "expected a word without spaces and quotes, got " in done.stderr
