"""BitNet b1.58 against a statement of it with plain autograd; compact, cut over process ranks, resumed and exported."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from narrowgauge.engine.quantization.ternary_file import dense_weights
from narrowgauge.engine.run.export import export_run
from narrowgauge.optimizers import GaLore, Grass
from narrowgauge.optimizers.layers.quantized_linear import QuantizedLinear, quantize_linears
from narrowgauge.optimizers.layers.ternary_quantizer import TernaryQuantizer
from narrowgauge.optimizers.layers.unit import CompactUnit
from narrowgauge.optimizers.numerics.ternary import ScaleName, pack_ternary, ternary, unpack_ternary
from tests.engine.backends.ddp.test_parity import CASES, Model, finish, make_engine, train, weights_of
from tests.support import forked
from tests.support.command import losses, tiny_config
from tests.support.models import tiny, token_batch
from tests.support.ranks import RankPool
from tests.support.zero import worst


def stated(x: Tensor, weight: Tensor, bias: Tensor | None, scale: ScaleName) -> Tensor:
    """By sorting and straight-through expressions that autograd differentiates."""
    magnitudes = weight.detach().abs().flatten().sort().values
    middle = magnitudes[(magnitudes.numel() - 1) // 2] if scale == "median" else magnitudes.sum() / magnitudes.numel()
    rounded = torch.minimum(torch.maximum(torch.round(weight / middle), -torch.ones(())), torch.ones(())) * middle
    steps = x.detach().abs().max(-1, keepdim=True).values / 127
    q = torch.round(x / steps) * steps
    return F.linear(x + (q - x).detach(), weight + (rounded - weight).detach(), bias)


class Stated(nn.Linear):
    scale: ScaleName

    def forward(self, input: Tensor) -> Tensor:
        return stated(input, self.weight, self.bias, self.scale)


@pytest.mark.parametrize("scale", ["mean", "median"])
@pytest.mark.parametrize("kind", ["plain", "Grass-columns", "Grass-rows", "GaLore"])
def test_it_is_the_statement_of_it(scale: ScaleName, kind: str) -> None:
    """Loss, and the gradients of all that is trained, in fp64."""
    model, other = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    names = quantize_linears(model, ["blocks.*"], partial(TernaryQuantizer, scale))
    assert len(names) == 12
    for name in names:
        linear: Any = other.get_submodule(name)
        linear.__class__, linear.scale = Stated, scale
    if kind == "GaLore":
        GaLore(model, rank=4)
    elif kind != "plain":
        Grass(model, density=0.3, side="columns" if kind == "Grass-columns" else "rows")
    loss, expected = model(token_batch(0, 4)), other(token_batch(0, 4))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    loss.backward()
    expected.backward()
    wanted = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None
        if name.endswith(".compact"):
            layer = model.get_submodule(name.removesuffix(".compact"))
            assert isinstance(layer, QuantizedLinear)
            assert isinstance(layer, CompactUnit)
            whole_gradient = wanted[name.replace(".compact", ".weight")].grad
            assert whole_gradient is not None
            gradient = layer.project_gradient(whole_gradient)
        else:
            gradient = wanted[name].grad
        assert gradient is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-12)


def test_packed_weights_come_back() -> None:
    for columns in (8, 9, 11):
        values, scale = ternary(torch.randn(5, columns), "median")
        packed = pack_ternary(values)
        assert packed.dtype == torch.uint8
        assert packed.shape == (5, -(-columns // 4))
        assert torch.equal(unpack_ternary(packed, columns), values.to(torch.int8))
        assert set(values.unique().tolist()) == {-1.0, 0.0, 1.0}
        assert scale.dtype == torch.float32


class MedianModel(Model):
    def __init__(self) -> None:
        super().__init__()
        quantize_linears(self, ["blocks.*"], partial(TernaryQuantizer, "median"))


def quantized_run(engine_name: str, case: str, stage: int) -> tuple[list[float], dict[str, Tensor]]:
    engine = make_engine(engine_name, CASES[case], stage=stage, model=MedianModel)
    found = train(engine, 0, 5), weights_of(engine)
    finish(engine)
    return found


@pytest.mark.quick("AdamW-3", "Grass-columns-3")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("case", ["AdamW", "Grass-columns", "GaLore", "Lamb"])
def test_the_median_is_of_the_whole_weight_however_it_is_cut(
    two_ranks: RankPool, one_rank: RankPool, case: str, stage: int
) -> None:
    expected_losses, expected = one_rank.run(quantized_run, "ddp", case, 0)[0]
    for found, weights in two_ranks.run(quantized_run, "deepspeed", case, stage):
        assert found == pytest.approx(expected_losses, abs=1e-5)
        assert worst(weights, expected) < 1e-4


@pytest.mark.parametrize(("scale", "ranks"), [("median", 1), pytest.param("mean", 2, marks=pytest.mark.slow)])
def test_a_run_goes_on_and_its_export_is_what_it_computed_with(
    corpus: Path, tmp_path: Path, scale: ScaleName, ranks: int
) -> None:
    found = []
    for name, last in (("whole", None), ("cut", 3)):
        (tmp_path / name).mkdir()
        block = {"method": "bitnet", "scale": scale}
        path = tiny_config(corpus, tmp_path / name, quantization=block, zero_optimization={"stage": 3})
        config = json.loads(path.read_text())
        config["training"] |= {"steps": 6, "checkpoint_interval": 3, "lr_schedule": None}
        path.write_text(json.dumps(config))
        for words in [["--set", f"training.steps={last}"], []] if last else [[]]:
            result = forked.run("train", str(path), *words, ranks=ranks)
            assert result.returncode == 0, result.stderr
            said = " ".join((result.stdout + result.stderr).split())
            assert "quantization: 14 of 15 linear layers compute with ternary weights" in said
        found.append(losses(path.parent / "run"))
    assert found[0] == found[1]
    run = tmp_path / "whole" / "run"
    record = json.loads((run / "summary.json").read_text())["quantization"]
    assert len(record["layers"]) == 14
    export_run(run, tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    behind = load_file(run / "checkpoints" / "step-6" / "model.safetensors")
    packed = dense_weights(tmp_path / "exported" / "ternary.safetensors")
    assert {f"{name}.weight" for name in record["layers"]} == packed.keys()
    for name, weight in exported.items():
        if name in packed:
            assert torch.equal(weight, packed[name])
            unit = torch.eye(weight.shape[1])
            whole = stated(unit, behind[name], None, scale).t()
            torch.testing.assert_close(weight, whole, rtol=1e-6, atol=0)
        else:
            assert torch.equal(weight, behind[name])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (['quantization={"method": "bitnet", "target_modules": ["*.query"]}'], "'*.query' matches no nn.Linear"),
        (['quantization={"method": "bitnet", "scale": "max"}'], "quantization.scale: expected 'mean' or 'median'"),
        (['quantization={"method": "bitnet"}', "engine=megatron", "zero_optimization.stage=0"], "got 'megatron'"),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_quantised_is_refused(corpus: Path, tmp_path: Path, words: list[str], message: str) -> None:
    settings = [word for setting in words for word in ("--set", setting)]
    result = forked.run("train", str(tiny_config(corpus, tmp_path)), *settings)
    assert result.returncode == 2, result.stdout
    assert message in " ".join(result.stderr.split())
