"""Run folders as ``narrowgauge train`` writes them, with numbers that a test knows."""

import json
from pathlib import Path
from typing import Any

BEGIN = 1_800_000_000.0
MEMORY = {"peak_memory": 600 * 2**20, "resident_before_model": 400 * 2**20}


def loss_at(step: int, lr: float) -> float:
    return 2.0 + 8.0 * lr / step


def write_run(folder: Path, *, lr: float = 0.5, steps: int = 20, restarted_after: int | None = None) -> Path:
    """A finished run with offload; between ``restarted_after`` and the next step it stood still for an hour."""
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = [{"step": 0, "eval_loss": 9.0, "time": BEGIN + 5}]
    now = BEGIN + 10.0
    for step in range(1, steps + 1):
        now += 2.0 + (3600.0 if restarted_after is not None and step == restarted_after + 1 else 0.0)
        lines.append(
            {
                "step": step,
                "loss": loss_at(step, lr),
                "lr": lr,
                "grad_norm": 1.0 / step,
                "tokens": 1000 * step,
                "tokens_per_second": 500.0,
                "mfu": 0.25,
                "memory": {"now": 2**30, "peak": 2**31},
                "time": now,
                "bytes": {
                    "reduced": 0,
                    "gathered": 0,
                    "saved_activations_peak": 30 * 2**20,
                    "saved_activations_peak_resident": 12 * 2**20,
                    "offload_written": 18 * 2**20,
                    "offload_read": 18 * 2**20,
                },
                "seconds": {"step": 2.0, "forward": 0.5, "backward": 1.0, "optimizer": 0.5, "io_stall": 0.0},
            }
        )
    lines.append({"step": steps, "eval_loss": 2.5, "time": now + 1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    starts = [{"time": BEGIN, "host": "node<1>", "world_size": 1, "after_step": 0, "slurm_job": "71"}]
    if restarted_after is not None:
        starts.append({**starts[0], "time": BEGIN + 3000, "after_step": restarted_after, "slurm_job": "72"})
        (folder / "ends.jsonl").write_text(json.dumps({"time": BEGIN + 60, "after_step": restarted_after}) + "\n")
    (folder / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    config = {"optimizer": {"type": "Grass", "params": {"lr": lr, "density": 0.125}}}
    (folder / "config.json").write_text(json.dumps({"config": config, "steps": steps, "world_size": 1}))
    summary = {
        "schema_version": 1,
        "steps": steps,
        "tokens_per_second": 500.0,
        "bytes": {"optimizer_state": 2**20, "optimizer_state_dense": 2**22, **MEMORY},
        "forecast": {
            "peak_tensor_memory": {"predicted": 110 * 2**20, "measured": 100 * 2**20},
            "reduced_per_step": {"predicted": 0, "measured": None},
        },
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
