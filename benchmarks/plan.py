"""What ``narrowgauge plan`` tells of LLaMA-7B and 13B, beside published figures and other projects' estimators.

python -m benchmarks.plan
"""

from collections.abc import Iterator
from typing import Any

from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from narrowgauge.engine.config.config import load_config
from narrowgauge.engine.forecast.forecast import Forecast, forecast
from narrowgauge.engine.forecast.hardware import GIB, gpu_named
from narrowgauge.engine.forecast.held import ACTIVATIONS, BUFFERS
from narrowgauge.engine.forecast.machine import Machine
from narrowgauge.engine.run.validate import check_for


def told(preset: str, *, gpus: int, gpu: str, length: int, micro: int, **changes: Any) -> Forecast:
    """The forecast of a packaged size in bf16, with layers recomputed."""
    raw: dict[str, Any] = {
        "model": {"preset": preset} | ({} if "megatron" in changes else {"gradient_checkpointing": "non-reentrant"}),
        "data": {"train": "stdlib", "vocab_size": 32000, "sequence_length": length},
        "training": {"steps": 1000},
        "logging": {"run_dir": "runs/plan"},
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True},
        **changes,
    }
    config, machine = load_config(raw), Machine(gpus=gpus, gpu=gpu_named(gpu))
    _, described = check_for(config, gpus)
    return forecast(config, described, world_size=gpus, machine=machine)


def optimizer(kind: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": {"lr": 0.001, **params}}}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


def row(name: str, found: Forecast, theirs: str) -> str:
    peak = found.peak
    states = peak.total - peak.bytes[ACTIVATIONS] - peak.bytes[BUFFERS]
    parts = (states, peak.bytes[BUFFERS], peak.bytes[ACTIVATIONS], peak.total)
    return f"| {name} | {' | '.join(f'{nbytes / GIB:.1f}' for nbytes in parts)} | {peak.when} | {theirs} |"


def rows() -> Iterator[str]:
    small = {"reduce_bucket_size": 50_000_000}
    grass = told(
        "llama-13b", gpus=1, gpu="a100-40", length=256, micro=4, **zero(1, **small), **optimizer("Grass", rank=64)
    )
    yield row("Grass, 13B, rank 64, one GPU", grass, "fits 40 GB (Grass, section 5)")
    galore = told(
        "llama-7b",
        gpus=1,
        gpu="rtx4090-24",
        length=256,
        micro=1,
        engine="ddp",
        **optimizer("GaLore", rank=1024, base="AdamW8bit"),
    )
    yield row("GaLore with 8-bit moments, 7B, rank 1024, one GPU", galore, "22 GB (GaLore, section 5.5)")
    for preset in ("llama-7b", "llama-13b"):
        for stage in (2, 3):
            dense = told(preset, gpus=8, gpu="h100-80", length=2048, micro=1, **zero(stage), **optimizer("AdamW"))
            total = dense.ranks[0][0].counts["total"]
            if stage == 2:
                _, theirs = estimate_zero2_model_states_mem_needs(total, 8, 1, False)
            else:
                # Its own sample's largest layer: the embedding.
                layer = 32000 * (4096 if preset == "llama-7b" else 5120)
                _, theirs, _ = estimate_zero3_model_states_mem_needs(total, layer, 8, 1, False, False, False)
            yield row(f"AdamW, {preset}, ZeRO-{stage}, 8 GPUs", dense, f"{theirs / GIB:.1f} states (DeepSpeed)")
        cut = {"engine": "megatron", "megatron": {"tensor_parallel": 2, "recompute": "full"}}
        dense = told(preset, gpus=8, gpu="h100-80", length=2048, micro=1, **cut, **optimizer("AdamW"))
        total = dense.ranks[0][0].counts["total"]
        yield row(f"AdamW, {preset}, TP2 DP4", dense, f"{total * (6 + 12 / 4) / GIB:.1f} states (Megatron)")


def main() -> None:
    print("| | states | buffers | activations | peak, GiB | when | published |\n|---|---:|---:|---:|---:|---|---|")
    for line in rows():
        print(line, flush=True)


if __name__ == "__main__":
    main()
