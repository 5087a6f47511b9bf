"""A mixture of experts from a configuration to an exported model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.command import run, tiny_config

MODEL = {
    "model_type": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_local_experts": 4,
    "max_position_embeddings": 32,
}


@pytest.mark.slow
def test_a_mixture_is_trained_compact_and_exported(corpus: Path, tmp_path: Path) -> None:
    """It was refused: 87 % of its matrices were dense."""
    from transformers import AutoModelForCausalLM

    training = {"steps": 6, "eval_interval": 6, "eval_sequences": 5, "checkpoint_interval": 6}
    config = tiny_config(corpus, tmp_path, engine="ddp", model={"config": MODEL}, training=training)
    raw = json.loads(config.read_text())
    config.write_text(json.dumps({k: v for k, v in raw.items() if k != "zero_optimization"}))
    result = run("train", str(config))
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    experts, attention, routers = 2 * 4 * 3 * 32 * 48, 2 * 4 * 32 * 32, 2 * 4 * 32
    total = experts + attention + routers
    assert summary["matrices"] == {
        "total": total,
        "compact": experts + attention,
        "share": round((experts + attention) / total, 4),
        "dense": {"model.layers.*.mlp.gate.weight": routers},
    }
    assert summary["parameters"]["compact"] == (experts + attention) // 4
    assert summary["eval_loss"] < summary["eval_loss_first"]
    folder = tmp_path / "exported"
    assert run("export", str(tmp_path / "run"), str(folder)).returncode == 0
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-6" / "model.safetensors")
    found = model.state_dict()
    assert saved.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in saved.items())
