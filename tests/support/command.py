"""Running the command as a user does: in processes of its own, alone or under a launcher."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]


class Process(Protocol):
    """What has been started."""

    def poll(self) -> int | None: ...


def environment(**extra: str) -> dict[str, str]:
    """The caller's environment without a launcher's traces, and one thread per rank."""
    own = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    return {**own, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **extra}


def free_port() -> str:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def arguments(*words: str, ranks: int = 1, launcher: str = "torchrun") -> list[str]:
    """The command line of ``narrowgauge WORDS``, alone or on several ranks."""
    if ranks == 1:
        return [str(BIN / "narrowgauge"), *words]
    if launcher == "deepspeed":
        begin = [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", free_port(), "--module"]
        return [*begin, "narrowgauge.launcher", *words]
    return [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(ranks), "-m", "narrowgauge.launcher", *words]


def run(*words: str, ranks: int = 1, launcher: str = "torchrun", **extra: str) -> Any:
    """Run to the end; the result has ``returncode``, ``stdout`` and ``stderr``."""
    return subprocess.run(  # noqa: S603
        arguments(*words, ranks=ranks, launcher=launcher),
        env=environment(**extra),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def start(*words: str, ranks: int = 1, stderr: Any = subprocess.DEVNULL) -> "subprocess.Popen[str]":
    """Start and return at once."""
    return subprocess.Popen(  # noqa: S603
        arguments(*words, ranks=ranks),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        text=True,
    )


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, without one that is still being written."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def losses(run_dir: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(run_dir) if "loss" in record}


def wait_for_step(run_dir: Path, step: int, process: "Process | None" = None) -> None:
    """Wait until a run has taken a step; ``process`` must not end before."""
    deadline = time.monotonic() + 400
    while max(losses(run_dir), default=0) < step:
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, "it ended too early"
        time.sleep(0.01)


def under_megatron(**layout: Any) -> dict[str, Any]:
    """Blocks for :func:`tiny_config`: Grass under the ``megatron`` engine, cut over two ranks as ``layout`` says."""
    params = {"lr": 0.005, "matrix_lr_scale": 0.2, "density": 0.25, "refresh_interval": 5, "strata": 2}
    optimizer = {"type": "Grass", "params": params}
    return {"engine": "megatron", "megatron": layout, "zero_optimization": {"stage": 0}, "optimizer": optimizer}


def tiny_config(corpus: Path, folder: Path, **changes: Any) -> Path:
    """A run of seconds: a small LLaMA on a small text; top-level blocks can be replaced."""
    config: dict[str, Any] = {
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 32,
            }
        },
        "data": {
            "train": [f"{corpus}/*.txt"],
            "vocab_size": 600,
            "sequence_length": 32,
            "cache_dir": str(corpus / "cache"),
        },
        "training": {
            "steps": 12,
            "eval_interval": 4,
            "eval_sequences": 5,
            "checkpoint_interval": 4,
            "lr_schedule": {"type": "cosine", "warmup_steps": 2},
        },
        "logging": {"run_dir": str(folder / "run")},
        "train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "optimizer": {
            "type": "Grass",
            "params": {"lr": 0.005, "matrix_lr_scale": 0.2, "density": 0.25, "refresh_interval": 5},
        },
        **changes,
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path
