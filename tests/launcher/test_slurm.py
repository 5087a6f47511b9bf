"""``narrowgauge slurm render``; jobs: ``tests/cluster``."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.launcher.conftest import Call
from tests.launcher.report.folders import loss_at, write_run
from tests.support.command import ROOT, tiny_config


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


@pytest.mark.parametrize(
    "value", ["USR1@300", "B:USR2@300", "B:TERM@60", "R:USR1@300", "B:USR1@", "B:USR1@0", "B:12", "300"]
)
def test_a_signal_that_the_script_does_not_hear_is_refused(
    call: Call, corpus: Path, tmp_path: Path, value: str
) -> None:
    """Without ``B:`` the job saved and did not come back; ``B:USR2`` killed the shell."""
    done = call("slurm", "render", config_of(corpus, tmp_path, signal=value))
    assert done.returncode == 2
    assert f"launch.slurm: signal: expected B:USR1@SECONDS, got '{value}'" in done.stderr


@pytest.mark.parametrize(
    ("time", "signal", "seconds"),
    [("5", None, 360), ("1", "B:USR1@40", 100), ('"00:02:00"', "B:USR1@60", 120), ('"0-00:01"', "B:USR1", 120)],
)
def test_a_job_that_would_be_asked_to_end_before_it_has_begun_is_refused(
    call: Call, corpus: Path, tmp_path: Path, time: str, signal: str | None, seconds: int
) -> None:
    """It went back into the queue again and again."""
    changes = {} if signal is None else {"signal": signal}
    done = call("slurm", "render", config_of(corpus, tmp_path, **changes), "--set", f"launch.slurm.time={time}")
    assert done.returncode == 2
    assert f"launch.slurm: time: expected more than {seconds} seconds with the signal" in done.stderr


@pytest.mark.parametrize("value", ['"a\\nb"', '"x;$(id)"', '"`id`"', '" a"', "[1]", "1.5"])
def test_an_option_that_would_be_read_otherwise_is_refused(
    call: Call, corpus: Path, tmp_path: Path, value: str
) -> None:
    done = call("slurm", "render", config_of(corpus, tmp_path), "--set", f"launch.slurm.comment={value}")
    assert done.returncode == 2
    assert "launch.slurm: comment: expected text" in done.stderr


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("partion", "partion: unknown option of sbatch; did you mean 'partition'?"),
        ("gpus_per_node", "option of sbatch without its dashes, got 'gpus_per_node'; did you mean 'gpus-per-node'?"),
        ("setups", "setups: unknown option of sbatch; did you mean 'setup'?"),
    ],
)  # fmt: skip
def test_an_unknown_option_is_answered_with_the_nearest(
    call: Call, corpus: Path, tmp_path: Path, key: str, message: str
) -> None:
    done = call("slurm", "render", config_of(corpus, tmp_path, **{key: 1}))
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr


def parsed(script: str, tmp_path: Path) -> list[str]:
    """The lines of a script that bash can read."""
    path = tmp_path / "job.sbatch"
    path.write_text(script)
    found = subprocess.run(["/bin/bash", "-n", str(path)], capture_output=True, text=True, check=False)  # noqa: S603
    assert found.returncode == 0, found.stderr
    return script.splitlines()


def test_setup_flags_and_values_with_spaces(call: Call, corpus: Path, tmp_path: Path) -> None:
    setup = ["module load cuda/12.4", 'source "$HOME/venv/bin/activate"']
    config = config_of(
        corpus, tmp_path, setup=setup, exclusive=True, requeue=False, comment="two words", **{"bb-of-our-site": "x"}
    )
    lines = parsed(call("slurm", "render", config).stdout, tmp_path)
    assert lines.count("#SBATCH --exclusive") == 1
    assert '#SBATCH --comment="two words"' in lines
    assert "#SBATCH --bb-of-our-site=x" in lines
    assert not any("--requeue" in line for line in lines)
    # Before the strictness about variables, and before the ranks are launched.
    begins = lines.index(setup[0])
    assert lines[begins - 1 : begins + 3] == ["set -eo pipefail", *setup, "set -euo pipefail"]
    assert begins < next(i for i, line in enumerate(lines) if line.startswith("narrowgauge launch"))
    refused = call("slurm", "render", config_of(corpus, tmp_path, setup=["a\nb"]))
    assert "launch.slurm: setup: expected lines of shell, one each, got 'a\\nb'" in refused.stderr


def test_a_sweep_is_over_the_values_of_any_key(call: Call, corpus: Path, tmp_path: Path) -> None:
    sweep = {"key": "optimizer.params.density", "values": [0.125, 0.25, 0.5], "at_once": 2}
    config = config_of(corpus, tmp_path, sweep=sweep)
    script = call("slurm", "render", config, "--script", "sweep").stdout
    lines = parsed(script, tmp_path)
    assert lines.count("#SBATCH --array=0-2%2") == 1
    begins = lines.index("key=optimizer.params.density")
    ends = next(i for i, line in enumerate(lines) if line.startswith("narrowgauge launch"))
    # What bash makes of it, for the last of the array.
    body = "\n".join(
        [*lines[begins:ends], lines[ends].removesuffix("&").replace("narrowgauge launch", 'printf "%s\\n"')]
    )
    environment = {"SLURM_ARRAY_TASK_ID": "2", "folder": "runs/sweep", "config": "a b.json"}
    done = subprocess.run(["/bin/bash", "-euc", body], env=environment, capture_output=True, text=True, check=True)  # noqa: S603
    words = ["a b.json", "--set", "optimizer.params.density=0.5", "--set", "logging.run_dir=runs/sweep-density-0.5"]
    assert done.stdout.splitlines() == words
    assert "launch.slurm.sweep: expected --script sweep with it" in call("slurm", "render", config).stderr
    odd = config_of(corpus, tmp_path, sweep={"values": ["a b"]})
    assert "sweep.values: expected numbers or words, got 'a b'" in call("slurm", "render", odd).stderr


@pytest.mark.parametrize(
    ("sweep", "options", "message"),
    [
        ({"key": "optimizer.params.densty", "values": [1]}, {}, "densty: unknown key; did you mean 'density'?"),
        ({"key": "optimizer.params.density", "values": [0.5, 2]}, {}, "density: expected"),
        ({"values": [0.1, 0.2, 0.1]}, {}, "sweep.values: expected each value once, got 0.1 twice"),
        ({"values": [0.1]}, {"array": "0-9"}, "array: expected none beside sweep"),
        ({"key": "logging.run_dir", "values": ["a", "b"]}, {}, "sweep.key: expected another than logging.run_dir"),
        ({"key": "launch.slurm.mem", "values": [1, 2]}, {}, "sweep.key: expected none of launch.slurm, which"),
    ],
)  # fmt: skip
def test_a_sweep_that_a_job_would_refuse_is_refused_before(
    call: Call, corpus: Path, tmp_path: Path, sweep: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    done = call("slurm", "render", config_of(corpus, tmp_path, sweep=sweep, **options), "--script", "sweep")
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize("name", ["llama-1b-pretrain", "llama-7b-finetune", "llama-13b-pretrain"])
def test_a_configuration_for_one_server_asks_for_one_node(call: Call, tmp_path: Path, name: str) -> None:
    """It asked for the four nodes of the script, with the batch of eight GPUs."""
    lines = parsed(call("slurm", "render", f"8gpu/{name}").stdout, tmp_path)
    assert [line for line in lines if line.startswith("#SBATCH --nodes")] == ["#SBATCH --nodes=1"]


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_the_ranks_of_a_job_run_in_the_container(call: Call, corpus: Path, tmp_path: Path, runtime: str) -> None:
    """``launch --dry-run`` inside an allocation; which nodes it has, ``scontrol`` says."""
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin", "scontrol", "printf 'n1\\nn2\\n'")
    program(tmp_path / "bin", "srun", "")
    container = {
        "runtime": runtime,
        "image": "/images/our image.sif",
        "mounts": ["/data:/data:ro"],
        "python": "/opt/py",
    }
    config = config_of(corpus, tmp_path, container=container)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    done = call("launch", config, "--dry-run", **job, PATH=f"{tmp_path}/bin:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    inside = words[words.index("/opt/py") :]
    assert inside[:7] == ["/opt/py", "-m", "narrowgauge.launcher.agent", "--nnodes", "2", "--rdzv-backend", "c10d"]
    around = words[words.index(f"{tmp_path}/bin/srun") : words.index("/opt/py")]
    if runtime == "pyxis":
        expected = ["--container-image=/images/our image.sif", f"--container-mounts={ROOT}:{ROOT},/data:/data:ro"]
        assert around[-3:] == [*expected, f"--container-workdir={ROOT}"]
    else:
        binds = ["--bind", f"{ROOT}:{ROOT}", "--bind", "/data:/data:ro"]
        assert around[-9:] == ["apptainer", "exec", "--pwd", str(ROOT), *binds, "/images/our image.sif"]


def test_status_shows_the_losses_and_the_time_left(call: Call, corpus: Path, tmp_path: Path) -> None:
    config = config_of(corpus, tmp_path)
    (write_run(tmp_path / "run", lr=0.5, restarted_after=8) / "summary.json").unlink()
    (tmp_path / "run" / "starts.jsonl").write_text('{"time": 1.0, "after_step": 0, "slurm_job": null}\n' * 2)
    done = call("slurm", "status", config, "--set", "training.steps=50")
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"│ ([\w/ ]+?) +│ (.+?) +│", done.stdout))
    assert rows == {
        "step": "20 of 50",
        "loss": f"{loss_at(20, 0.5):.4f}",
        "validation loss": "2.5000 after step 20",
        "tokens/s": "500",
        "MFU": "25.0%",
        # 30 steps of 2 s; for an hour it did not run.
        "left": "1m 00s of training",
        "restarts": "1",
        "state": "not known: not a SLURM job",
    }
