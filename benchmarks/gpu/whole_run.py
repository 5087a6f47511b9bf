"""``narrowgauge train`` with the engine ``ddp``: the quickstart, from text to summary."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu.measure import MIB
from benchmarks.gpu.stages import ROOT, Emit


def cases(folder: str) -> dict[str, dict[str, Any]]:
    """Configurations by name; ``folder`` takes what is offloaded."""
    quickstart = json.loads((ROOT / "configs" / "quickstart.json").read_text())
    # One is of the other engine; without masters of the weights, AdamW is for fp32.
    del quickstart["zero_optimization"], quickstart["bf16"]
    offload = quickstart.pop("activation_offload") | {"path": folder}
    adamw = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0}}
    return {
        "AdamW": {**quickstart, "optimizer": adamw},
        "Grass 1/8": quickstart,
        "Grass 1/8, offload to disk": {**quickstart, "activation_offload": offload},
    }


def run(emit: Emit, *, small: bool) -> None:
    from rich.console import Console

    from narrowgauge.engine.run.train import train

    with TemporaryDirectory() as folder:
        for number, (name, config) in enumerate(cases(folder).items()):
            overrides = ["engine=ddp", f"logging.run_dir={folder}/{number}", "logging.tensorboard=false"]
            overrides += [f"data.cache_dir={folder}/cache"]
            if small:
                overrides += ["training.steps=3", "training.eval_sequences=4", "training.sample_prompt=null"]
                overrides += [f'data.{part}=["{ROOT}/README.md"]' for part in ("train", "validation")]
                overrides += ["data.vocab_size=500", "data.sequence_length=32", "training.lr_schedule=null"]
            run_dir: Path = train(config, overrides=overrides, console=Console(stderr=True))
            summary = json.loads((run_dir / "summary.json").read_text())
            emit(
                case=name,
                steps=summary["steps"],
                loss=summary["loss_last"],
                **{
                    "validation loss": summary["eval_loss"],
                    "step ms": 1e3 * summary["seconds"]["step_median"],
                    "tokens/s": summary["tokens_per_second"],
                    "optimizer state MiB": summary["bytes"]["optimizer_state"] / MIB,
                    "peak MiB": summary["bytes"]["peak_memory"] / MIB,
                },
            )
