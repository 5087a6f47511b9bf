"""What a model needs for a token, counted a second time by hand."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PretrainedConfig

from narrowgauge.engine.report.flops import flops_per_token, known_peak, peak_of
from narrowgauge.engine.report.parameters import count_parameters

H, F, L, V, S = 64, 96, 3, 512, 32
SIZES: dict[str, Any] = {
    "hidden_size": H,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "vocab_size": V,
}
LAYER = 4 * H * H + 3 * H * F
ATTENTION = 12 * L * H * S


@pytest.mark.parametrize("tied", [False, True])
def test_dense_models_need_six_times_their_matrices_and_attention(tied: bool) -> None:
    config = LlamaConfig(**SIZES, num_key_value_heads=4, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    matrices = L * LAYER + V * H
    found = flops_per_token(model, config, count_parameters(model), S)
    # Norms are trained, but are no matrices.
    assert found == pytest.approx(6 * matrices + ATTENTION, rel=2e-3)


def test_a_compact_weight_needs_its_compact_part_of_the_gradient() -> None:
    config = LlamaConfig(**SIZES, num_key_value_heads=4, tie_word_embeddings=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    counts = {"total": 0, "dense": 2 * V * H, "compact": L * LAYER // 8, "frozen": L * LAYER}
    found = flops_per_token(model, config, counts, S)
    assert found == pytest.approx(4 * (L * LAYER + V * H) + 2 * (L * LAYER // 8 + V * H) + ATTENTION, rel=1e-12)


def test_of_experts_those_count_that_a_token_goes_through() -> None:
    config = MixtralConfig(**SIZES, num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2)
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    matrices = L * (4 * H * H + 2 * 3 * H * F + 8 * H) + V * H
    found = flops_per_token(model, config, count_parameters(model), S)
    assert found == pytest.approx(6 * matrices + ATTENTION, rel=2e-3)
    sizes: dict[str, Any] = {"num_hidden_layers": L, "num_attention_heads": 4, "hidden_size": H}
    nameless = PretrainedConfig(**sizes)
    assert flops_per_token(model, nameless, count_parameters(model), S) is None


def test_gpus_are_known_by_name() -> None:
    assert known_peak("NVIDIA H100 80GB HBM3") == 989.4e12
    assert known_peak("NVIDIA H100 PCIe") == 756e12
    assert known_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert known_peak("NVIDIA L40S") == 362e12
    assert known_peak("NVIDIA GB200") == 2500e12
    assert known_peak("NVIDIA H200 NVL") == 835.5e12
    assert known_peak("NVIDIA GeForce RTX 4090") == 165.2e12
    for name in (
        "GeForce GTX 1080",
        "A100-SXM4-40GB MIG 3g.20gb",
        "GeForce RTX 4090 Laptop GPU",
        "GeForce RTX 3090 Ti",
    ):
        assert known_peak(f"NVIDIA {name}") is None


def test_a_cpu_is_measured() -> None:
    peak = peak_of(torch.device("cpu"), torch.float32)
    assert 1e8 < peak.flops < 1e14
    assert peak.source.startswith("CPU, ")
    assert peak.source.endswith("TFLOP/s measured with 512 x 512 matrices")
