"""Which saved tensors a codec gets, what is left of their bytes, and that forward does not notice."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from narrowgauge.offload import ActivationOffload
from narrowgauge.optimizers import GaLore, Grass
from narrowgauge.optimizers.layers.sampled_linear import sample_linears
from narrowgauge.optimizers.layers.sampling import WtaCrs
from tests.offload.support import settle
from tests.support.memory import LiveBytes
from tests.support.models import tiny

VOCAB, WIDTH, ROWS, LENGTH = 64, 64, 4, 32
DRAWS = 4000


def build(kind: str) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=172, max_position_embeddings=LENGTH))
    return BertForMaskedLM(BertConfig(**sizes, intermediate_size=4 * WIDTH, max_position_embeddings=LENGTH))


def loss_of(model: Any, seed: int = 0) -> Tensor:
    tokens = torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=tokens, labels=tokens).loss


def in_memory(model: nn.Module, **options: Any) -> ActivationOffload:
    return ActivationOffload(None, model=model, codec="mesa8", **{"min_tensor_bytes": 0, **options})


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def saved_storages(model: nn.Module, run: Callable[[], Tensor]) -> dict[int, int]:
    """Bytes of each storage that autograd saves, without the model's own: parameters, buffers such as positions."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            found[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return {key: storage.nbytes() for key, storage in found.items()}


def alive_after_forward(model: nn.Module, offload: ActivationOffload | None, **kwargs: Any) -> int:
    """Bytes of all storages that forward made and that live on."""
    with LiveBytes(list(model.parameters())) as live:
        if offload is None:
            loss = loss_of(model)
        else:
            with offload:
                loss = loss_of(model)
        found = live.now - loss.untyped_storage().nbytes()
    loss.backward()
    return found


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_models_saved_bytes_shrink_and_its_forward_stays(kind: str) -> None:
    """Its random numbers too: the paper's code draws from the generator that dropout draws from."""
    model = build(kind).train()
    plain = sum(saved_storages(model, lambda: loss_of(model)).values())
    torch.manual_seed(1)
    expected = loss_of(model)
    expected.backward()
    exact, state = gradients(model), torch.get_rng_state()
    offload = in_memory(model, min_tensor_bytes=4096)
    torch.manual_seed(1)
    with offload:
        loss = loss_of(model)
    stats = offload.stats()
    loss.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert offload.stats().saved == 0
    for name, gradient in gradients(model).items():
        assert (gradient - exact[name]).norm() <= 0.05 * exact[name].norm() + 1e-7, name
    assert stats.saved == plain - stats.encoded_from + stats.encoded_to
    assert stats.encoded_to <= 0.27 * stats.encoded_from
    assert stats.encoded_from > (0.7 if kind == "llama" else 0.6) * plain
    one, other = alive_after_forward(model, None), alive_after_forward(model, offload)
    # Beside what is saved there is what loss and outputs hold.
    assert one - other == pytest.approx(stats.encoded_from - stats.encoded_to, rel=0.02)
    offload.close()


class Rounding:
    """An offload in memory that is closed at the end."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.offload = in_memory(model, **options)

    def __enter__(self) -> ActivationOffload:
        return self.offload

    def __exit__(self, *_: object) -> None:
        self.offload.close()


def test_a_gradient_is_right_in_the_mean() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    x, weights = torch.randn(12, 6), torch.randn(12, 5)
    (model(x) * weights).sum().backward()
    exact = gradients(model)
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in exact.items()}
    squares = copy.deepcopy(total)
    with Rounding(model) as offload:
        for _ in range(DRAWS):
            # An activation, not data.
            activation = x.clone().requires_grad_() * 1.0
            with offload:
                y = model(activation)
            (y * weights).sum().backward()
            for name, value in gradients(model).items():
                total[name] += value
                squares[name] += value.double().square()
    spreads: dict[str, Tensor] = {}
    for name, value in exact.items():
        mean = total[name] / DRAWS
        spreads[name] = ((squares[name] / DRAWS - mean.square()).clamp(min=0) / DRAWS).sqrt()
        assert ((mean - value).abs() <= 4 * spreads[name] + 1e-6).all(), name
    assert spreads["0.bias"].max() < 1e-6  # it has no draw


def test_on_disk_the_same_codes_take_as_few_bytes(tmp_path: Path) -> None:
    model = build("llama")
    with Rounding(model, min_tensor_bytes=4096) as offload:
        with offload:
            loss = loss_of(model)
        loss.backward()
        expected, to = gradients(model), offload.stats().encoded_to
    disk = {"keep_resident": 0.0, "capacity_bytes": 64 << 20, "backend": "threads", "min_tensor_bytes": 4096}
    offload = ActivationOffload(tmp_path, model=model, codec="mesa8", **disk)  # type: ignore[arg-type]
    with offload:
        loss = loss_of(model)
    settle(offload)
    written = offload.stats().written
    loss.backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name])
    assert written > 0.8 * to
    assert offload.stats().encoded_to == to
    offload.close()


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_sampled_columns_are_encoded_and_written(kind: str, tmp_path: Path) -> None:
    """Of a compact layer's input an eighth of the columns and 0.3 of the tokens, in 8 bits, on disk."""
    model = build(kind)
    sample_linears(model, None, lambda: WtaCrs(0.3))
    Grass(model, lr=1e-3, density=0.125, selection="uniform")
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "compact")}
    disk: dict[str, Any] = {"keep_resident": 0.0, "capacity_bytes": 64 << 20, "backend": "threads"}
    offload = ActivationOffload(
        tmp_path, model=model, codec="mesa8", codec_modules=list(layers), min_tensor_bytes=0, **disk
    )
    with offload:
        loss = loss_of(model)
    settle(offload)
    kept = round(0.3 * ROWS * LENGTH) * sum(module.get_parameter("compact").shape[1] for module in layers.values())
    assert offload.stats().encoded_from == 4 * kept
    # A byte for each, and two numbers for each group of 64 columns.
    assert offload.stats().encoded_to == kept + 8 * sum(
        -(-module.get_parameter("compact").shape[1] // 64) for module in layers.values()
    )
    # What is left are the ranges, and what is a few bytes.
    assert offload.stats().resident < 0.01 * offload.stats().written
    loss.backward()
    assert all(bool(g.isfinite().all()) for g in gradients(model).values())
    offload.close()


def test_only_activations_are_encoded_and_each_once() -> None:
    """Not masks, angles, attention's logarithms and norms' statistics; what q, k and v share is encoded once."""
    model = build("llama")
    hidden, wide = ROWS * LENGTH * WIDTH * 4, ROWS * LENGTH * 172 * 4
    with Rounding(model) as offload:
        with offload:
            loss = loss_of(model)
        # Two norms: input, normed, scaled. Attention: q, k, v, output. The MLP: four.
        assert offload.stats().encoded_from == 2 * (2 * 3 * hidden + 4 * hidden + 4 * wide)
        loss.backward()
    with Rounding(model, codec_modules=["*.mlp", "*.act_fn"]) as offload:
        with offload:
            loss = loss_of(model)
        assert offload.stats().encoded_from == 2 * 3 * wide
        loss.backward()


def test_autocasts_copies_of_weights_are_not_encoded() -> None:
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    x = torch.randn(8, 16, requires_grad=True)
    with Rounding(model) as offload:
        with offload, torch.autocast("cpu", torch.bfloat16):
            y = model(x * 1.0)
        assert offload.stats().encoded_from == 2 * 8 * 16 * 2
        y.float().sum().backward()
    found, x.grad = x.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x * 1.0)
    y.float().sum().backward()
    assert found is not None
    assert x.grad is not None
    assert torch.equal(found, x.grad)


@pytest.mark.parametrize("optimizer", ["Grass", "GaLore"])
def test_compact_inputs_are_encoded_and_bases_are_not(optimizer: str) -> None:
    """``X[:, index]`` and ``X P`` have no gradient of their own; neither have indices, bases and sketches."""
    model = tiny(width=32, hidden=64)
    if optimizer == "Grass":
        Grass(model, lr=1e-3, density=0.125, selection="uniform")
    else:
        GaLore(model, lr=1e-3, rank=4)
    tokens = torch.randint(37, (4, 11), generator=torch.Generator().manual_seed(0))
    model(tokens).backward()
    exact = gradients(model)
    names = [name for name, module in model.named_modules() if hasattr(module, "compact")]
    with Rounding(model, codec_modules=names) as offload:
        with offload:
            loss = model(tokens)
        # Of each layer its four selected columns, or the four directions of its inputs or all of them.
        columns = [module.get_parameter("compact").shape[1] for module in model.modules() if hasattr(module, "compact")]
        assert offload.stats().encoded_from == 4 * 4 * 11 * sum(columns)
        loss.backward()
    for name, gradient in gradients(model).items():
        assert (gradient - exact[name]).norm() <= 0.03 * exact[name].norm() + 1e-7, name


@pytest.mark.parametrize("reentrant", [True, False])
def test_inputs_of_recomputed_layers_are_encoded_where_they_are_named(reentrant: bool) -> None:
    model = build("llama").train()
    loss_of(model).backward()
    exact = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with Rounding(model, codec_modules=["model.embed_tokens"]) as offload:
        with offload:
            loss = loss_of(model)
        assert offload.stats().encoded_from == 0
        loss.backward()
        for name, gradient in gradients(model).items():
            assert torch.allclose(gradient, exact[name], atol=1e-6), name
        with pytest.warns(UserWarning, match="encoded nothing in the first forward"), offload:
            loss = loss_of(model)
        loss.backward()
        gradients(model)
    # Some versions of transformers call the checkpoint in the model's forward, others in the layer's.
    with Rounding(model, codec_modules=["model", "model.layers.*"]) as offload:
        with offload:
            loss = loss_of(model)
        assert offload.stats().encoded_from == 2 * ROWS * LENGTH * WIDTH * 4
        loss.backward()
    for name, gradient in gradients(model).items():
        assert (gradient - exact[name]).norm() <= 0.05 * exact[name].norm() + 1e-7, name


def test_layer_inputs_are_encoded_as_they_are_marked() -> None:
    model = build("llama").train()
    loss_of(model).backward()
    exact = gradients(model)
    with Rounding(model, granularity="layer_inputs") as offload:
        with offload:
            loss = loss_of(model)
        assert offload.stats().encoded_from == 2 * ROWS * LENGTH * WIDTH * 4
        loss.backward()
    for name, gradient in gradients(model).items():
        assert (gradient - exact[name]).norm() <= 0.05 * exact[name].norm() + 1e-7, name


def test_two_forwards_before_a_backward_and_a_restart_draw_as_before() -> None:
    """Every forward has its own random numbers; a restart goes on with the next ones."""
    model = build("llama")
    with Rounding(model) as offload:
        with offload:
            first = loss_of(model, 0)
        with offload:
            second = loss_of(model, 1)
        second.backward()
        first.backward()
        found = [gradients(model)]
        state = copy.deepcopy(offload.state_dict())
        with offload:
            loss = loss_of(model, 2)
        loss.backward()
        found.append(gradients(model))
    with Rounding(model) as offload:
        offload.load_state_dict(state)
        with offload:
            loss = loss_of(model, 2)
        loss.backward()
        for name, gradient in gradients(model).items():
            assert torch.equal(gradient, found[-1][name])
        with offload:
            loss = loss_of(model, 2)
        loss.backward()
        name = "model.layers.0.mlp.down_proj.weight"
        assert not torch.equal(gradients(model)[name], found[-1][name])


def test_a_change_in_place_after_saving_raises() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    x = torch.randn(4, 8, requires_grad=True) * 1.0
    with Rounding(model) as offload:
        with offload:
            y = model(x)
        with torch.no_grad():
            x.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_what_an_exact_module_saves_stays_exact() -> None:
    """The same tensor is saved by a module whose tensors are encoded and by one whose are not."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rounded, self.exact = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.rounded(x).sum() + self.exact(x).square().sum()

    model = Two()
    x = torch.randn(16, 8)
    model(x.requires_grad_() * 1.0).backward()
    expected = gradients(model)
    with Rounding(model, codec_modules=["rounded"]) as offload:
        with offload:
            loss = model(x * 1.0)
        loss.backward()
    found = gradients(model)
    assert torch.equal(found["exact.weight"], expected["exact.weight"])
    assert not torch.equal(found["rounded.weight"], expected["rounded.weight"])


def test_checkpoint_of_a_function_inside_of_a_module_keeps_its_gradients() -> None:
    class Recomputing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8)])

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda h: F.gelu(self.layers[0](h)), x, use_reentrant=False).sum()

    model, x = Recomputing(), torch.randn(16, 8, requires_grad=True)
    model(x * 1.0).backward()
    exact = gradients(model)
    with Rounding(model) as offload:
        with offload:
            loss = model(x * 1.0)
        loss.backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, exact[name])


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        (None, {"codec": "none"}, "path: expected a folder without a codec"),
        (None, {"codec": "mesa4"}, "codec: expected one of 'none', 'mesa8', got 'mesa4'"),
        (None, {"codec": "mesa8", "keep_resident": 0.5}, "keep_resident: is about the disk"),
        (None, {"codec": "mesa8", "rated_tbw": 600}, "rated_tbw: is about the disk"),
        (".", {"codec_modules": ["*"]}, "codec_modules: expected a codec and granularity 'saved_tensors'"),
        (None, {"codec": "mesa8", "codec_modules": []}, "codec_modules: expected at least one glob"),
        (None, {"codec": "mesa8", "codec_modules": "mlp"}, "codec_modules: expected a list of globs, got 'mlp'"),
        (None, {"codec": "mesa8", "codec_modules": ["*.nowhere"]}, "'*.nowhere' matches no module; the model has"),
        (None, {"codec": "mesa8", "model": None}, "codec: 'mesa8' needs model="),
        (None, {"codec": "mesa8", "model": nn.Linear(2, 2)}, "Linear has no nn.ModuleList or nn.Sequential"),
    ],
)
def test_what_does_not_fit_is_named(path: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        ActivationOffload(path, **{"model": tiny(), **options})
    assert message in str(caught.value)
