"""Losses of examples and their slopes, against weights that are really moved."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from narrowgauge.engine.coreset.slopes import example_losses, slopes
from narrowgauge.engine.micro_batch import NOT_LEARNED, MicroBatch
from narrowgauge.optimizers import Grass

EPSILON = 1e-3
SIZES: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}


def llama() -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=32, **SIZES)).double().eval()
    model.config.use_cache = False
    return model


def batch() -> MicroBatch:
    """Of different lengths, learned in part."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 50, (4, 16), generator=generator)
    mask = torch.arange(16)[None] < torch.tensor([16, 9, 12, 5])[:, None]
    learned = mask & (torch.arange(16)[None] >= torch.tensor([3, 2, 8, 0])[:, None])
    return MicroBatch(tokens * mask, torch.where(learned, tokens, NOT_LEARNED), attention_mask=mask.long())


def losses_one_by_one(model: Any, given: MicroBatch) -> torch.Tensor:
    found = []
    assert given.attention_mask is not None
    for tokens, labels, mask in zip(given.tokens, given.labels, given.attention_mask, strict=True):
        length = int(mask.sum())
        with torch.no_grad():
            logits = model(input_ids=tokens[None, :length]).logits[0, :-1]
        wanted = labels[1:length]
        found.append(cross_entropy(logits[wanted != NOT_LEARNED], wanted[wanted != NOT_LEARNED]))
    return torch.stack(found)


def test_losses_are_those_of_each_example_alone() -> None:
    model = llama()
    assert torch.allclose(example_losses(model, batch()).double(), losses_one_by_one(model, batch()), atol=1e-6)


@pytest.mark.parametrize("whole_forwards", [False, True])
@pytest.mark.parametrize("name", ["model.layers.2.self_attn.v_proj", "model.layers.0.mlp.down_proj"])
def test_slopes_are_those_of_moved_weights(name: str, whole_forwards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the differences of fp32 losses are noise
    model, given = llama(), batch()
    weight = model.get_submodule(name).weight
    directions = torch.randn(3, *weight.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = slopes(model, name, given, directions, EPSILON, whole_forwards=whole_forwards)
    expected = []
    for direction in directions:
        sides = []
        for sign in (1.0, -1.0):
            moved = llama()
            moved.get_submodule(name).weight.data += sign * EPSILON * direction
            sides.append(losses_one_by_one(moved, given))
        expected.append((sides[0] - sides[1]) / (2 * EPSILON))
    assert torch.allclose(found, torch.stack(expected, dim=1), rtol=1e-9, atol=1e-10)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(input_ids=given.tokens).logits, llama()(input_ids=given.tokens).logits)


def test_layers_below_are_computed_once_and_come_back() -> None:
    model, calls = llama(), []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append("first"))
    model.model.layers[2].mlp.register_forward_hook(lambda *_: calls.append("last"))
    name = "model.layers.2.self_attn.v_proj"
    directions = torch.randn(4, 24, 24, dtype=torch.float64)
    slopes(model, name, batch(), directions, EPSILON, whole_forwards=False)
    assert (calls.count("first"), calls.count("last")) == (1, 8)
    model(input_ids=batch().tokens)
    assert calls.count("first") == 2
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_compact_layers_and_adapters_have_slopes() -> None:
    model: Any = llama()
    name = "model.layers.2.self_attn.v_proj"
    directions = torch.randn(2, 24, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = slopes(model, name, batch(), directions, EPSILON, whole_forwards=False)
    optimizer = Grass(model, density=0.25)
    assert name in {layer.name for layer in optimizer.layers}
    assert torch.allclose(slopes(model, name, batch(), directions, EPSILON, whole_forwards=False), expected)


def test_an_adapters_slopes_are_those_of_its_moved_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # as above

    def adapted() -> Any:
        model = llama()
        config = LoraConfig(r=3, lora_alpha=6, target_modules=["v_proj"])
        return inject_adapter_in_model(config, model).double().eval()

    name = "model.layers.2.self_attn.v_proj.lora_B.default"
    directions = torch.randn(2, 24, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    model, expected = adapted(), []
    found = slopes(model, name, batch(), directions, EPSILON, whole_forwards=False)
    weight, before = model.get_submodule(name).weight, model.get_submodule(name).weight.clone()
    for direction in directions:
        sides = []
        for sign in (1.0, -1.0):
            weight.data = before + sign * EPSILON * direction
            sides.append(losses_one_by_one(model, batch()))
        weight.data = before
        expected.append((sides[0] - sides[1]) / (2 * EPSILON))
    assert torch.allclose(found, torch.stack(expected, dim=1), rtol=1e-9, atol=1e-10)
