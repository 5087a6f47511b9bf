"""``model.path`` under the ``megatron`` engine: each process rank reads its own boxes of a Hugging Face folder."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from narrowgauge.engine.backends import backend_of
from narrowgauge.engine.backends.megatron.folder import FolderWeights
from tests.support.cases import cases
from tests.support.megatron_models import hf_config
from tests.support.megatron_ranks import MegatronPool
from tests.support.megatron_runs import VOCAB, run_config

CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "llama": ("llama", 4, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "tied": ("qwen2", 2, {"pipeline_parallel": 2}),
    "experts": ("mixtral", 4, {"expert_parallel": 2, "expert_tensor_parallel": 2}),
    "shared-expert": ("qwen2_moe", 2, {"expert_parallel": 2}),
    "qk-norm-experts": ("qwen3_moe", 2, {"expert_parallel": 2}),
}
TOKENS = torch.arange(1, 13)[None] * 7 % VOCAB


def saved_model(family: str, folder: Path) -> Any:
    """In several files. All weights are drawn, biases too."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(hf_config(family))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1).add_(1.0 if parameter.ndim == 1 else 0.0)
    model.save_pretrained(folder, max_shard_size="40KB")
    return model.eval()


def built(family: str, layout: dict[str, Any], folder: str) -> dict[str, Any]:
    """The model as a run builds it."""
    from narrowgauge.engine.backends.megatron.schedule import next_token_logits
    from narrowgauge.engine.backends.megatron.whole import Gathering

    messages: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("narrowgauge.engine.backends.megatron.first_values")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    config = run_config("megatron", family, layout, model={"path": folder})
    assert config.parsed.model is not None
    model: Any = backend_of("megatron").construct(config.parsed.model, hf_config(family), config)
    logger.removeHandler(handler)
    held = sum(part.numel for parameter, _ in model.local_parameters() for part in parameter.parts)
    shapes = {
        name: tuple(p.shape) for name, p in AutoModelForCausalLM.from_config(hf_config(family)).named_parameters()
    }
    weights: dict[str, Tensor] = {name: weight.clone() for name, weight in Gathering(model, shapes).weights()}
    return {"weights": weights, "logits": next_token_logits(model.eval(), TOKENS), "held": held, "said": messages}


@pytest.mark.parametrize(("family", "ranks", "layout"), cases(CASES, slow=CASES.keys() - {"llama"}))
def test_ranks_read_what_they_hold(
    megatron_ranks: MegatronPool, tmp_path: Path, family: str, ranks: int, layout: dict[str, Any]
) -> None:
    """Bit for bit the weights; logits as transformers' from the same folder; no more bytes than a rank's own."""
    model = saved_model(family, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    found = megatron_ranks.run(built, family, layout, str(tmp_path), ranks=ranks)
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits[:, -1]
    weights = {name: p.detach() for name, p in model.named_parameters()}
    assert found[0]["weights"].keys() == weights.keys()
    assert all(torch.equal(found[0]["weights"][name], weights[name]) for name in weights)
    total = sum(p.nbytes for p in weights.values())
    for rank in found:
        assert float((rank["logits"] - expected).abs().max()) < 2e-6 * float(expected.abs().max())
        assert rank["said"] == [f"{tmp_path}: {4 * rank['held']} bytes of the weights read"]
        assert 4 * rank["held"] < total
    if family == "llama":
        # Norms are on both tensor-parallel ranks; embedding and head each on half of the stages.
        assert sum(4 * rank["held"] for rank in found) < 1.02 * total


@pytest.mark.slow
def test_a_folder_of_another_form_is_read_whole_and_said_so(megatron_ranks: MegatronPool, tmp_path: Path) -> None:
    model = saved_model("llama", tmp_path)
    for path in tmp_path.glob("*.safetensors*"):
        path.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    found = megatron_ranks.run(built, "llama", {"tensor_parallel": 2}, str(tmp_path), ranks=2)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    assert all(torch.equal(found[0]["weights"][name], weights[name]) for name in weights)
    assert [len(rank["said"]) for rank in found] == [1, 0]
    assert "every process rank reads all of them" in found[0]["said"][0]


def test_a_folder_that_lacks_a_weight_or_has_another_shape_is_not_read_in_parts(tmp_path: Path) -> None:
    """transformers then says what is wrong with it."""
    model = saved_model("llama", tmp_path)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert FolderWeights(tmp_path, "llama").holds(shapes)
    assert not FolderWeights(tmp_path, "llama").holds({**shapes, "model.norm.weight": (33,)})
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    lost = content["weight_map"]["lm_head.weight"]
    content["weight_map"] = {name: file for name, file in content["weight_map"].items() if file != lost}
    index.write_text(json.dumps(content))
    assert not FolderWeights(tmp_path, "llama").holds(shapes)
