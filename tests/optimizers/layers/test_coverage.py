"""Which layers stay dense, and that the optimizers say so."""

import logging
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from narrowgauge.optimizers import Apollo, GaLore, Grass


class Mixture(nn.Module):
    """A block of a linear and of experts in a form that no optimizer knows."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.attention = nn.Linear(10, 10)
        self.unknown = nn.Parameter(torch.randn(experts, 10, 10))


def in_a_block(*layers: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"blocks": nn.ModuleList([nn.Sequential(*layers)])})


def mixture(experts: int) -> nn.Module:
    return nn.ModuleDict({"blocks": nn.ModuleList(Mixture(experts) for _ in range(2))})


@pytest.mark.parametrize("make", [Grass, GaLore])
def test_mostly_dense_is_an_error_that_names_the_dense_layers(make: Any) -> None:
    """81 to 90 % of mixtures of experts were trained dense without a word."""
    model = mixture(4)
    with pytest.raises(ValueError, match=r"min_compact_share: ") as caught:
        make(model, density=0.5)
    told = str(caught.value)
    assert "min_compact_share: expected at least 0.5, got 0.20" in told
    assert "200 of 1,000 matrix parameters in the blocks are compact (20 %)" in told
    assert "dense: blocks.*.unknown (80 %; matrices stacked in one parameter, as experts are)" in told
    assert all(type(module) is not make and not hasattr(module, "compact") for module in model.modules())
    with pytest.warns(UserWarning, match="20 %"):
        assert make(model, density=0.5, min_compact_share=0.2).coverage.share == 0.2


def test_named_layers_are_the_users_choice() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Grass(mixture(4), density=0.5, target_modules=["*attention"]).coverage.covered == 200


def test_what_is_compact_is_told_and_a_small_share_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "narrowgauge")
    model = in_a_block(nn.Linear(10, 9), nn.LayerNorm(9))
    model.add_module("head", nn.Linear(9, 30))
    Grass(model, density=0.5)
    assert caplog.messages == ["Grass: 90 of 90 matrix parameters in the blocks are compact (100 %)"]
    with pytest.warns(UserWarning, match=r"Apollo: 200 of 1,000 matrix parameters in the blocks are matrices to it"):
        Apollo(mixture(4), rank=2)


class Attention(nn.Module):
    """``read`` is only read, ``both`` is read in one case and called in the other, ``twice`` is both in all cases."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.both, self.kept, self.twice = (nn.Linear(8, 8) for _ in range(4))

    def init_weights(self) -> None:
        nn.init.zeros_(self.kept.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.kept.weight.dtype) @ self.read.weight.t()
        x = self.both(x) if self.training else x @ self.both.weight.t()
        return self.kept(self.twice(x) @ self.twice.weight)


def test_layers_whose_weight_is_read_without_a_call_stay_dense() -> None:
    """WavLM's attention and Mamba's ``dt_proj`` do: their compact layers moved by 0.0 in 30 steps."""
    model = nn.ModuleDict({"blocks": nn.ModuleList([Attention()])})
    optimizer = Grass(model, density=0.5)
    assert [layer.name for layer in optimizer.layers] == ["blocks.0.both", "blocks.0.kept"]
    said = optimizer.coverage.describe()
    assert "blocks.*.read.weight (25 %; its weight is read without calling it)" in said
    assert "blocks.*.twice.weight (25 %; its weight is read besides calling it" in said
    named = Grass(nn.ModuleDict({"blocks": nn.ModuleList([Attention()])}), density=0.5, target_modules=["*"])
    assert len(named.layers) == 4


def test_layers_with_a_forward_of_their_own_stay_dense() -> None:
    """accelerate's hooks keep the linear's ``forward``, which knows nothing of compact values."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = in_a_block(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    add_hook_to_module(model.get_submodule("blocks.0.0"), ModelHook())
    optimizer = Grass(model, density=0.5)
    assert [layer.name for layer in optimizer.layers] == [f"blocks.0.{i}" for i in range(1, 5)]
    assert "its forward was replaced on the instance" in optimizer.coverage.describe()
    optimizer.revert()
    with pytest.raises(ValueError, match=r"target_modules: blocks\.0\.0: its forward was replaced"):
        Grass(model, density=0.5, target_modules=["*"])


def test_adapters_are_left_alone_unless_they_are_named() -> None:
    """``lora_B`` of 8 columns trained one of them."""
    peft = pytest.importorskip("peft")
    model: Any = in_a_block(nn.Linear(32, 32), nn.Linear(32, 32))
    config = peft.LoraConfig(r=8, target_modules=["blocks.0.0"], modules_to_save=["blocks.0.1"])
    adapted = peft.get_peft_model(model, config)
    named = Grass(adapted, density=0.25, target_modules=["*.lora_A.default"])
    assert [layer.name for layer in named.layers] == ["base_model.model.blocks.0.0.lora_A.default"]
    named.revert()
    with pytest.warns(UserWarning, match="an adapter's"):
        optimizer = Grass(adapted, density=0.25)
    assert [layer.name for layer in optimizer.layers] == ["base_model.model.blocks.0.1.modules_to_save.default"]
