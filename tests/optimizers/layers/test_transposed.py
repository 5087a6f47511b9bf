"""``Conv1D``, and subclasses of ``nn.Linear``, against ``nn.Linear``."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from narrowgauge.engine import initialize
from narrowgauge.optimizers import CompactLinear, FullNorm, GaLore, Grass
from narrowgauge.optimizers.layers.compact import CompactWeight
from tests.support.models import tiny, token_batch
from tests.support.ranks import RankPool
from tests.support.zero import ds_config, finish, train_step


def transposed(**options: Any) -> nn.Module:
    """``tiny`` with ``Conv1D`` in its blocks."""
    model = tiny(**options)
    for block in model.blocks:
        for name, linear in list(block.named_children()):
            if isinstance(linear, nn.Linear):
                out, width = linear.weight.shape
                conv = Conv1D(out, width).to(linear.weight.dtype)
                with torch.no_grad():
                    conv.weight.copy_(linear.weight.t())
                    if linear.bias is not None:
                        conv.bias.copy_(linear.bias)
                if linear.bias is None:
                    conv.bias.requires_grad_(False)
                setattr(block, name, conv)
    return model


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.t() if name.startswith("blocks.") and value.dim() == 2 and is_transposed(model) else value
        for name, value in model.state_dict().items()
    }


def is_transposed(model: nn.Module) -> bool:
    return isinstance(model.get_submodule("blocks.0.up"), Conv1D)


GALORE = {"rank": 4, "refresh_interval": 2, "projector": "svd"}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "columns": (Grass, {"density": 0.3, "refresh_interval": 2}),
    "rows": (Grass, {"density": 0.3, "refresh_interval": 2, "side": "rows"}),
    "top": (Grass, {"density": 0.3, "refresh_interval": 2, "selection": "top", "statistics": "exact"}),
    "carry": (Grass, {"density": 0.3, "refresh_interval": 2, "moments": "carry", "decay": "all"}),
    "siblings": (Grass, {"density": 0.3, "refresh_interval": 2, "shared_inputs": "siblings", "budget": None}),
    "replacement": (
        Grass,
        {"density": 0.3, "refresh_interval": 2, "selection": "multinomial_replacement", "statistics": "exact"},
    ),
    "galore": (GaLore, GALORE),
    "galore-right": (GaLore, {**GALORE, "side": "right"}),
    "galore-full": (GaLore, {**GALORE, "side": "full"}),
}


@pytest.mark.parametrize("name", METHODS)
def test_conv1d_trains_as_the_linear_with_the_transposed_weight(name: str) -> None:
    cls, options = METHODS[name]
    losses, norms, weights = [], [], []
    for model in (tiny(dtype=torch.float64), transposed(dtype=torch.float64)):
        optimizer = cls(model, lr=1e-2, weight_decay=0.1, **options)
        norm = FullNorm(optimizer, sketch_size=64)
        losses.append([])
        norms.append([])
        for step in range(5):
            loss = model(token_batch(step, 4))
            loss.backward()
            losses[-1].append(float(loss.detach()))
            norms[-1].append(float(norm.norm()))
            optimizer.step()
            optimizer.zero_grad()
        weights.append(plain_weights(model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-11)
    # Directions are orthonormal in fp32.
    assert norms[0] == pytest.approx(norms[1], rel=1e-7)
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=0, atol=1e-11)


@pytest.mark.parametrize("side", ["columns", "rows"])
def test_conv1d_keeps_what_a_linear_keeps_and_comes_back_as_itself(side: Any) -> None:
    model = transposed()
    optimizer = Grass(model, density=0.25, side=side)
    layer: Any = model.get_submodule("blocks.0.up")
    assert isinstance(layer, Conv1D)
    assert isinstance(layer, CompactLinear)
    assert tuple(layer.compact.shape) == ((5, 33) if side == "columns" else (20, 8))
    y = layer(torch.randn(7, 20, requires_grad=True))
    kept = [tuple(t.shape) for t in y.grad_fn.saved_tensors if t is not None and t is not layer.weight and t.dim() == 2]
    assert kept == [(7, 5) if side == "columns" else (7, 20)]
    optimizer.revert()
    assert type(model.get_submodule("blocks.0.up")) is Conv1D


def losses_under_zero(stage: int, name: str) -> list[list[float]]:
    cls, options = METHODS[name]
    found = []
    for model in (tiny(), transposed()):
        config = ds_config(stage)
        config["optimizer"] = {"type": cls.__name__, "params": {"lr": 1e-2, **options}}
        engine, *_ = initialize(model=model, config=config)
        found.append([train_step(engine, step) for step in range(4)])
        finish(engine)
    return found


@pytest.mark.quick("3-columns")
@pytest.mark.parametrize(
    ("stage", "name"),
    [(1, "columns"), (3, "columns"), (3, "galore")],
)
def test_conv1d_under_zero(stage: int, name: str, two_ranks: RankPool) -> None:
    for linear, conv in two_ranks.run(losses_under_zero, stage, name):
        assert conv == pytest.approx(linear, rel=1e-6)


class Named(nn.Linear):
    """Computes what ``nn.Linear`` computes."""

    def describe(self) -> str:
        return f"a {type(self).__name__}"


def test_subclasses_that_compute_the_same_become_compact_and_stay_their_type() -> None:
    """They were left dense without a word."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(Named(8, 8)))
    twin = nn.Sequential(nn.Sequential(nn.Linear(8, 8)))
    twin.load_state_dict(model.state_dict())
    for each in (model, twin):
        optimizer = Grass(each, lr=1e-2, density=0.5)
        each(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
    layer = model.get_submodule("0.0")
    assert isinstance(layer, Named)
    assert isinstance(layer, CompactLinear)
    assert "Named" in layer.describe()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    layer.revert()
    assert type(layer) is Named


class Own(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight, self.bias)


class Calls(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input)


class Multiplies(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.T + self.bias


class Doubles(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Drops(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(input), 0.5, self.training)


class Scales(nn.Linear):
    scale = 1.0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.scale * super().forward(input)


class Casts(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input.to(self.weight.dtype), self.weight, self.bias)


class Normalises(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, nn.functional.normalize(self.weight), self.bias)


@pytest.mark.parametrize("optimizer", [Grass, GaLore])
def test_a_forward_of_its_own_is_tried(optimizer: Any) -> None:
    """Subclasses with one stayed dense, whatever it computed."""
    torch.manual_seed(0)
    same, others = (Own, Calls, Multiplies), (Doubles, Drops, Casts, Normalises, Scales)
    model = nn.Sequential(nn.Sequential(*(cls(8, 8) for cls in (*same, *others))))
    scaled: Any = model.eval().get_submodule("0.7")
    scaled.scale = 1.0
    twin = nn.Sequential(nn.Sequential(*(nn.Linear(8, 8) for _ in same)))
    state = torch.get_rng_state()
    own = optimizer(model, lr=1e-2, density=0.5, min_compact_share=0.0)
    layers = list(model.get_submodule("0").children())
    assert [isinstance(layer, CompactWeight) for layer in layers] == [True] * 3 + [False] * 5
    assert torch.equal(torch.get_rng_state(), state)
    twin.load_state_dict({name: value for name, value in model.state_dict().items() if name[2] in "012"})
    x = torch.randn(4, 8)
    for layer, plain in zip(layers, twin.get_submodule("0").children(), strict=False):
        torch.testing.assert_close(layer(x), plain(x))
    own.revert()
    assert [type(layer) for layer in layers] == [*same, *others]


def test_gpt2_and_falcon_are_compact_throughout() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    gpt2 = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=16, **sizes)
    falcon = AutoConfig.for_model("falcon", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **sizes)
    for config in (gpt2, falcon):
        model: Any = AutoModelForCausalLM.from_config(config)
        dense = AutoModelForCausalLM.from_config(config)
        dense.load_state_dict(model.state_dict())
        optimizer = Grass(model, density=0.25, lr=1e-2, refresh_interval=2)
        assert optimizer.coverage.share == 1.0
        model.eval()
        dense.eval()
        tokens = token_batch(0, 2, vocab=64)
        assert torch.equal(model(tokens).logits, dense(tokens).logits)


@pytest.mark.parametrize("optimizer", [Grass, GaLore])
def test_layers_of_every_class_can_be_copied_and_pickled(optimizer: Any) -> None:
    """The classes that are made for ``Conv1D`` and for subclasses of ``nn.Linear`` stand in no module, where pickle
    looked for them.
    """
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(8, 8), Named(8, 8), nn.Linear(8, 8))
    own = optimizer(model, lr=1e-2, density=0.5, target_modules=["*"])
    x = torch.randn(4, 8)
    model(x).square().sum().backward()
    own.step()
    pickled: nn.Sequential = pickle.loads(pickle.dumps(model))  # noqa: S301
    for copied in (copy.deepcopy(model), pickled):
        assert [type(layer) for layer in copied] == [type(layer) for layer in model]
        assert torch.equal(copied(x), model(x))
        for name, value in model.state_dict().items():
            assert torch.equal(copied.state_dict()[name], value)
            assert copied.state_dict()[name].data_ptr() != value.data_ptr()
        first: Any = copied[0]
        first.revert()
        assert type(first) is Conv1D
