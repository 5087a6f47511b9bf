"""FP8 products against torchao's own layer, bit for bit, and compact ones against the rounding stated by hand."""

import importlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchao")
# A machine for the tests marked gpu need not have it.
pytest.importorskip("pydantic")

from narrowgauge.optimizers import GaLore, Grass
from narrowgauge.optimizers.layers.compact import compact_units
from narrowgauge.optimizers.layers.float8_quantizer import Float8Quantizer, Recipe
from narrowgauge.optimizers.layers.quantized_linear import QuantizedLinear, quantize_linears
from tests.engine.backends.ddp.test_parity import CASES, Model, finish, make_engine, train, weights_of
from tests.support import forked
from tests.support.command import losses, tiny_config
from tests.support.models import tiny, token_batch
from tests.support.ranks import RankPool
from tests.support.zero import worst


def cast(x: Tensor, dtype: torch.dtype, axis: int | None = None) -> Tensor:
    """The values of ``x`` in FP8, with a scale for all of it, or along an axis."""
    largest = x.abs().max() if axis is None else x.abs().amax(axis, keepdim=True)
    scale = (torch.finfo(dtype).max / largest.double().clamp_min(1e-12)).float()
    limit = torch.finfo(dtype).max
    return (x * scale).clamp(-limit, limit).to(dtype).to(x.dtype) / scale


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_plain_layer_is_torchaos(recipe: Recipe) -> None:
    """Output and all gradients, bit for bit."""
    float8 = importlib.import_module("torchao.float8")
    config = replace(float8.Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 16))
        if ours:
            quantize_linears(model, ["*"], partial(Float8Quantizer, recipe, emulate=True))
        else:
            model = float8.convert_to_float8_training(model, config=config)
        x = torch.randn(4, 6, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("side", ["columns", "rows", "GaLore"])
def test_a_compact_layer_multiplies_by_the_rounded_weight(side: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 32, bias=False))
    quantize_linears(model, ["*"], partial(Float8Quantizer, emulate=True))
    common: dict[str, Any] = {"target_modules": ["*"], "refresh_interval": 2}
    optimizer = GaLore(model, rank=8, **common) if side == "GaLore" else Grass(model, rank=8, side=side, **common)
    assert isinstance(model[0], QuantizedLinear)
    layer: Any = model.get_submodule("0")
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    for step in range(5):
        x = torch.randn(10, 48, generator=torch.Generator().manual_seed(step)).requires_grad_()
        # Two micro-batches: the weight is rounded once.
        model(x).square().sum().backward()
        made = layer.quantizer._kept[0][1]
        y = model(x)
        y.square().sum().backward()
        assert layer.quantizer._kept[0][1] is made
        grad_y = 2 * y.detach()
        rounded = cast(layer.weight, e4m3)
        torch.testing.assert_close(y, cast(x, e4m3) @ rounded.t(), rtol=1e-5, atol=1e-6)
        assert x.grad is not None
        torch.testing.assert_close(x.grad / 2, cast(grad_y, e5m2) @ rounded, rtol=1e-5, atol=1e-5)
        gradient = layer.project_gradient(grad_y.t() @ x.detach())
        torch.testing.assert_close(layer.compact.grad / 2, gradient, rtol=1e-5, atol=1e-5)
        optimizer.step()
        optimizer.zero_grad()
        model(x)
        assert layer.quantizer._kept[0][1] is not made
    assert sum(1 for _ in compact_units(model)) == 1


def test_the_rounding_is_within_a_sixteenth() -> None:
    """e4m3 has three bits of mantissa: a product of one element is off by 2 ** -4 of it at most, for each factor."""
    torch.manual_seed(0)
    quantizer = Float8Quantizer(emulate=True)
    weight = torch.rand(64, 1) + 0.5
    x = torch.rand(32, 1) + 0.5
    found = quantizer.product(x, weight, keeps=False)
    bound = (1 + 2**-4) ** 2 - 1
    assert float(((found - x @ weight.t()) / (x @ weight.t())).abs().max()) <= bound
    assert float(((found - x @ weight.t()) / (x @ weight.t())).abs().max()) > 0.01


class Float8Model(Model):
    def __init__(self) -> None:
        super().__init__()
        quantize_linears(self, ["blocks.*"], partial(Float8Quantizer, emulate=True))


def quantized_run(engine_name: str, case: str, stage: int) -> tuple[list[float], dict[str, Tensor]]:
    engine = make_engine(engine_name, CASES[case], stage=stage, model=Float8Model)
    found = train(engine, 0, 5), weights_of(engine)
    finish(engine)
    return found


@pytest.mark.quick("GaLore-3")
@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("case", ["AdamW", "Grass-columns", "GaLore"])
def test_engines_agree(one_rank: RankPool, case: str, stage: int) -> None:
    """On one process rank: a scale is of the inputs of a micro-batch, and there are others on two."""
    expected_losses, expected = one_rank.run(quantized_run, "ddp", case, 0)[0]
    found, weights = one_rank.run(quantized_run, "deepspeed", case, stage)[0]
    assert found == pytest.approx(expected_losses, abs=1e-4)
    assert worst(weights, expected) < 1e-3


def test_it_trains() -> None:
    """The loss of the first step is near that without rounding, and falls."""
    model, plain = tiny(), tiny()
    quantize_linears(model, ["blocks.*"], partial(Float8Quantizer, emulate=True))
    optimizer = Grass(model, lr=1e-2, density=0.3, refresh_interval=4)
    first = model(token_batch(0, 8))
    assert first.item() == pytest.approx(plain(token_batch(0, 8)).item(), abs=0.02)
    for _ in range(20):
        model(token_batch(0, 8)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(token_batch(0, 8)).item() < first.item() - 0.5


@pytest.mark.slow
def test_a_run_goes_on(corpus: Path, tmp_path: Path) -> None:
    found = []
    for name, last in (("whole", None), ("cut", 3)):
        (tmp_path / name).mkdir()
        block = {"method": "fp8", "emulate": True}
        path = tiny_config(corpus, tmp_path / name, quantization=block)
        config = json.loads(path.read_text())
        config["training"] |= {"steps": 6, "checkpoint_interval": 3, "lr_schedule": None}
        path.write_text(json.dumps(config))
        for words in [["--set", f"training.steps={last}"], []] if last else [[]]:
            result = forked.run("train", str(path), *words, ranks=2)
            assert result.returncode == 0, result.stderr
            said = " ".join((result.stdout + result.stderr).split())
            assert "quantization: 14 of 15 linear layers compute with FP8, tensorwise scales, emulated" in said
        found.append(losses(path.parent / "run"))
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_gpu_computes_what_is_emulated(recipe: Recipe) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(256, 128, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    fast, slow = Float8Quantizer(recipe), Float8Quantizer(recipe, emulate=True)
    for keeps in (False, True, True):
        expected = slow.product(x, weight, keeps=keeps)
        torch.testing.assert_close(fast.product(x, weight, keeps=keeps), expected, rtol=2e-2, atol=0.2)
        expected = slow.input_gradient(grad, weight, keeps=keeps)
        torch.testing.assert_close(fast.input_gradient(grad, weight, keeps=keeps), expected, rtol=2e-2, atol=0.2)
    torch.testing.assert_close(fast.weight_gradient(grad, x), slow.weight_gradient(grad, x), rtol=2e-2, atol=0.2)
