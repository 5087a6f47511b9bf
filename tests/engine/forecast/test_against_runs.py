"""What is told ahead of a run, against what the run measures."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import tiny_config, under_megatron
from tests.support.forked import run

MODEL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
STEPS = 6


def optimizer(kind: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": {"lr": 0.002, **params}}}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1_000_000, **more}}


GRASS = optimizer("Grass", matrix_lr_scale=0.2, density=0.25, refresh_interval=3)
OFFLOAD = {"path": ".", "min_tensor_bytes": 65536, "keep_resident": 0.0}
MIXTURE = {"model_type": "mixtral", "num_hidden_layers": 4, "num_local_experts": 4, "num_key_value_heads": 4}
CODEC = {"codec": "mesa8", "min_tensor_bytes": 65536}
RECOMPUTED = {"model": {"config": MODEL, "gradient_checkpointing": "non-reentrant"}}

CASES: dict[str, dict[str, Any]] = {
    "dense-1": {**zero(1), **optimizer("AdamW")},
    "grass-1": {**zero(1), **GRASS},
    "grass-2": {**zero(2), **GRASS, "gradient_accumulation_steps": 2},
    "grass-3": {**zero(3), **GRASS},
    "grass-1-bf16": {**zero(1), **GRASS, "bf16": {"enabled": True}},
    "grass-1-recomputed": {**zero(1), **GRASS, **RECOMPUTED},
    "galore-1": {**zero(1), **optimizer("GaLore", matrix_lr_scale=0.2, density=0.125, refresh_interval=3)},
    "muon-1": {**zero(1), **optimizer("Grass", base="Muon", density=0.25, refresh_interval=3)},
    "normuon-3": {**zero(3), **optimizer("Grass", base="NorMuon", density=0.25, refresh_interval=3)},
    "frugal-2": {**zero(2), **optimizer("Frugal", density=0.25, refresh_interval=3)},
    "dense-1-sampled": {**zero(1), **optimizer("AdamW"), "sampled_backward": {"method": "wta_crs", "keep": 0.3}},
    "dense-1-mixture": {**zero(1), **optimizer("AdamW"), "model": {"config": {**MODEL, **MIXTURE}}},
    "grass-2-mixture": {**zero(2), **GRASS, "model": {"config": {**MODEL, **MIXTURE}}},
    "grass-1-saved": {**zero(1), **GRASS, "activation_offload": OFFLOAD},
    "grass-1-inputs": {**zero(1), **GRASS, "activation_offload": {**OFFLOAD, "granularity": "layer_inputs"}},
    "grass-ddp": {"engine": "ddp", "zero_optimization": {"stage": 0}, **GRASS},
    "dense-tensor-parallel": {**under_megatron(tensor_parallel=2), **optimizer("AdamW")},
    "grass-tensor-parallel": under_megatron(tensor_parallel=2),
    "frugal-tensor-parallel": {**under_megatron(tensor_parallel=2), **optimizer("Frugal")},
    "dense-pipeline": {**under_megatron(pipeline_parallel=2), **optimizer("AdamW"), "gradient_accumulation_steps": 2},
    "grass-sequence-parallel": under_megatron(tensor_parallel=2, sequence_parallel=True),
    "dense-recomputed-parallel": {
        **under_megatron(tensor_parallel=2, sequence_parallel=True, recompute="full"),
        **optimizer("AdamW"),
    },
    "dense-bf16-parallel": {**under_megatron(tensor_parallel=2), **optimizer("AdamW"), "bf16": {"enabled": True}},
    "dense-bf16-recomputed-parallel": {
        **under_megatron(tensor_parallel=2, sequence_parallel=True, recompute="full"),
        **optimizer("AdamW"),
        "bf16": {"enabled": True},
    },
    # Of these each process rank has as many tokens, however its experts share them; of the first the experts' capacity
    # is so small that all are full.
    "dense-experts-parallel": {
        **under_megatron(expert_parallel=2, expert_capacity_factor=0.5),
        **optimizer("AdamW"),
        "model": {"config": {**MODEL, **MIXTURE}},
    },
    "dense-experts-data-parallel": {
        **under_megatron(balance_loss="global"),
        **optimizer("AdamW"),
        "model": {"config": {**MODEL, **MIXTURE}},
    },
    "grass-experts-sequence-parallel": {
        **under_megatron(tensor_parallel=2, sequence_parallel=True),
        "model": {"config": {**MODEL, **MIXTURE}},
    },
    "dense-context-parallel": {**under_megatron(context_parallel=2), **optimizer("AdamW")},
    "grass-interleaved": {
        **under_megatron(pipeline_parallel=2, virtual_pipeline=3),
        "gradient_accumulation_steps": 2,
    },
    "grass-data-parallel": under_megatron(),
    "grass-1-encoded": {**zero(1), **GRASS, "activation_offload": {**CODEC, "path": None}},
    "grass-1-inputs-encoded": {
        **zero(1),
        **GRASS,
        "activation_offload": {**OFFLOAD, **CODEC, "granularity": "layer_inputs"},
    },
    "dense-tensor-zero": {**under_megatron(tensor_parallel=2), **optimizer("AdamW"), **zero(1)},
    "grass-zero-2": {**under_megatron(), **zero(2)},
    "dense-zero-3": {**under_megatron(), **optimizer("AdamW"), **zero(3)},
    "dense-zero-3-bf16": {**under_megatron(), **optimizer("AdamW"), **zero(3), "bf16": {"enabled": True}},
    "dense-tensor-zero-3": {**under_megatron(tensor_parallel=2), **optimizer("AdamW"), **zero(3)},
}


def told(changes: dict[str, Any], corpus: Path, folder: Path) -> dict[str, dict[str, float]]:
    """The entry ``forecast`` of the summary of a run on two ranks, with its sizes."""
    settings = {
        "model": {"config": MODEL},
        "data": {
            "train": [f"{corpus}/*.txt"],
            "vocab_size": 600,
            "sequence_length": 128,
            "cache_dir": str(corpus / "cache"),
        },
        "training": {"steps": STEPS, "eval_sequences": 4},
        "train_batch_size": 8 * changes.get("gradient_accumulation_steps", 1),
        "gradient_accumulation_steps": 1,
        **changes,
    }
    if {"tensor_parallel", "pipeline_parallel", "context_parallel"} & changes.get("megatron", {}).keys():
        # One rank's share of the data.
        settings["train_batch_size"] //= 2
    path = tiny_config(corpus, folder, **settings)
    result = run("train", str(path), ranks=2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "told ahead, against what was measured: memory in tensors" in result.stdout
    return json.loads((folder / "run" / "summary.json").read_text())["forecast"]


# Where AdamW steps, DeepSpeed compiles it for a minute.
@pytest.mark.quick("grass-1", "grass-sequence-parallel")
@pytest.mark.parametrize("name", CASES)
def test_memory_and_traffic(name: str, corpus: Path, tmp_path: Path) -> None:
    """Memory is what the C library gave out, of which the interpreter's own is a few MB."""
    found = told(CASES[name], corpus, tmp_path)
    print(name, found)  # noqa: T201 (shown with -s, and where it fails)
    memory = found["peak_tensor_memory"]
    assert memory["measured"] > 30 << 20
    assert memory["predicted"] == pytest.approx(memory["measured"], rel=0.1)
    for kind in ("reduced_per_step", "gathered_per_step"):
        assert found[kind]["predicted"] == pytest.approx(found[kind]["measured"], rel=0.03, abs=100)
    sent = found.get("activations_per_step")
    # Under ZeRO they are not counted.
    if sent is not None and sent["measured"] is not None:
        assert sent["predicted"] == pytest.approx(sent["measured"], rel=0.03)
        assert (sent["measured"] > 1e5) == ("data-parallel" not in name)
