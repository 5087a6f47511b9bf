"""The compact layer: its gradients, what it keeps for backward, and that to the outside it stays an ``nn.Linear``."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from narrowgauge.optimizers import CompactLinear, Grass
from narrowgauge.optimizers.layers.selected_linear import SelectedLinear
from tests.support.models import tiny, token_batch

SIDES = ["columns", "rows"]
SELECTIONS = ["uniform", "block"]


def compact_pair(
    m: int = 24, n: int = 40, rank: int = 6, *, bias: bool = True, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[SelectedLinear, nn.Linear, Grass]:
    torch.manual_seed(3)
    dense = nn.Linear(n, m, bias=bias, dtype=dtype)
    model = nn.ModuleDict({"layer": copy.deepcopy(dense)})
    optimizer = Grass(model, rank=rank, target_modules=["layer"], **options)
    layer = model["layer"]
    assert isinstance(layer, SelectedLinear)
    return layer, dense, optimizer


@pytest.mark.cover(2)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("shape", [(40,), (5, 40), (2, 5, 40), (2, 3, 5, 40)])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_the_dense_ones(side: str, selection: str, shape: tuple[int, ...], bias: bool) -> None:
    layer, dense, _ = compact_pair(bias=bias, side=side, selection=selection)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    y, wanted = layer(x), dense(twin)
    assert torch.equal(y, wanted)
    grad = torch.randn_like(y)
    y.backward(grad)
    wanted.backward(grad)
    assert dense.weight.grad is not None
    full = dense.weight.grad
    selected = full[:, layer.index] if side == "columns" else full[layer.index]
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.compact.grad, selected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-13, atol=1e-13)
    if bias:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("side", SIDES)
def test_non_contiguous_input_and_gradient(side: str) -> None:
    layer, dense, _ = compact_pair(side=side)
    x = torch.randn(40, 7, dtype=torch.float64).t().requires_grad_()
    grad = torch.randn(24, 7, dtype=torch.float64).t()
    (got,) = torch.autograd.grad(layer(x), layer.compact, grad)
    (full,) = torch.autograd.grad(dense(x), dense.weight, grad)
    torch.testing.assert_close(got, full[:, layer.index] if side == "columns" else full[layer.index])


@pytest.mark.parametrize("side", SIDES)
def test_autocast_gives_what_autocast_gives_a_linear(side: str) -> None:
    """Output in bf16, gradients of the parameters in fp32, and no bf16 copy of the weight kept for backward."""
    layer, dense, _ = compact_pair(dtype=torch.float32, side=side)
    x = torch.randn(5, 40, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = dense(x)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, wanted)
    assert {t.dtype for t in saved if t.shape == layer.weight.shape} == {torch.float32}
    assert {t.dtype for t in saved if t.is_floating_point() and t.shape != layer.weight.shape} == {torch.bfloat16}
    grads = torch.autograd.grad(y.float().sum(), (x, layer.compact, layer.bias))
    full = torch.autograd.grad(wanted.float().sum(), (x, dense.weight, dense.bias))
    assert [g.dtype for g in grads] == [torch.float32] * 3
    selected = full[1][:, layer.index] if side == "columns" else full[1][layer.index]
    for got, expected in zip(grads, (full[0], selected, full[2]), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_mixed_dtypes_are_refused_as_by_a_linear() -> None:
    layer, *_ = compact_pair(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="one dtype"):
        layer(torch.randn(5, 40, dtype=torch.bfloat16))


def test_second_derivatives_are_refused_instead_of_wrong() -> None:
    layer, *_ = compact_pair()
    x = torch.randn(5, 40, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_columns_keep_a_copy_of_the_selected_inputs_and_let_the_input_go(selection: str) -> None:
    layer, *_ = compact_pair(dtype=torch.float32, selection=selection)
    x = torch.randn(128, 40)
    alive = weakref.ref(x)
    y = layer(x)
    saved = y.grad_fn.saved_tensors
    kept = [t for t in saved if t is not None and t.is_floating_point() and t is not layer.weight]
    assert [tuple(t.shape) for t in kept] == [(128, 6)]
    assert kept[0].untyped_storage().nbytes() == 128 * 6 * 4
    del x, saved, kept
    gc.collect()
    assert alive() is None
    y.sum().backward()


class ShapesOfProducts(TorchDispatchMode):
    """Records the shape of every matrix product's result."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(word in func.name() for word in ("mm", "matmul", "linear", "einsum", "outer")):
            self.shapes += [tuple(t.shape) for t in tree_leaves(result) if isinstance(t, Tensor)]
        return result


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_no_full_weight_gradient_is_ever_formed(side: str, selection: str) -> None:
    """With 17 tokens, no product of the backward has a shape of any of the weights; a dense model's has all of them."""
    model = tiny(width=20, hidden=33)
    matrices = {tuple(p.shape) for n, p in model.named_parameters() if n.startswith("blocks") and p.dim() == 2}

    def shapes(trained: nn.Module) -> set[tuple[int, ...]]:
        loss = trained(token_batch(0, 1, length=17))
        with ShapesOfProducts() as products:
            loss.backward()
        return set(products.shapes)

    assert matrices <= shapes(model)
    Grass(model, density=0.25, side=side, selection=selection)  # type: ignore[arg-type]
    found = shapes(model)
    assert found
    assert not found & matrices
    assert not {(n, m) for m, n in matrices} & found


class PeakOfNewTensors(TorchDispatchMode):
    """The most bytes that tensors made inside have held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in inputs | self._known:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def forget() -> None:
            self._known.discard(key)
            self.now -= size

        weakref.finalize(storage, forget)


@pytest.mark.parametrize("side", SIDES)
def test_peak_memory_of_backward_has_no_room_for_the_full_gradient(side: str) -> None:
    m = n = 512
    tokens, rank = 16, 32
    layer, dense, _ = compact_pair(m, n, rank, bias=False, dtype=torch.float32, side=side)

    def peak(trained: nn.Module) -> int:
        x = torch.randn(tokens, n, requires_grad=True)
        y = trained(x)
        grad = torch.ones_like(y)
        with PeakOfNewTensors() as memory:
            y.backward(grad)
        return memory.peak

    full = 4 * m * n
    assert peak(dense) >= full
    # grad of X, of compact (and its transpose's copy), and for rows the selected gradients of Y
    assert peak(layer) <= 4 * (tokens * n + 2 * rank * n + tokens * rank)


@pytest.mark.quick("uniform-columns")
@pytest.mark.cover(1)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_compiled_model_trains_alike_and_a_refresh_compiles_nothing(side: str, selection: str) -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model, twin = tiny(blocks=1), tiny(blocks=1)
    options: dict[str, Any] = {"density": 0.3, "side": side, "selection": selection, "refresh_interval": 2, "lr": 1e-3}
    optimizer, expected = Grass(model, **options), Grass(twin, **options)
    compiled = torch.compile(model)
    compilations = []
    for step in range(9):
        for trained in (compiled, twin):
            loss = trained(token_batch(step, 4))
            loss.backward()
        optimizer.step()
        expected.step()
        optimizer.zero_grad()
        expected.zero_grad()
        compilations.append(counters["stats"]["unique_graphs"])
    assert optimizer.num_refreshes == 4
    assert compilations == [1] * 9
    assert sum(counters["graph_break"].values()) == 0
    wanted = twin.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_of_hugging_face_changes_nothing(side: str, reentrant: bool) -> None:
    def losses(checkpointing: bool) -> list[float]:
        model = llama()
        optimizer = Grass(model, density=0.25, side=side, refresh_interval=2, lr=1e-2)  # type: ignore[arg-type]
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        found = []
        for step in range(5):
            tokens = token_batch(step, 3, vocab=64)
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            assert all(layer.module.compact.grad is not None for layer in optimizer.layers)
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
        return found

    assert losses(True) == losses(False)


def llama(tie: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=tie,
        )
    )


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        tokens = token_batch(step, 3, vocab=64)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("side", SIDES)
def test_a_hugging_face_model_saves_loads_evaluates_and_generates_as_itself(side: str, tmp_path: Any) -> None:
    """The folder it saves holds plain weights: a fresh, dense model loads it and gives the same logits and text."""
    from transformers import AutoModelForCausalLM

    model = llama()
    names = set(model.state_dict())
    optimizer = Grass(model, density=0.25, side=side, refresh_interval=2, lr=1e-2)  # type: ignore[arg-type]
    train(model, optimizer)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(m, CompactLinear) for m in plain.modules())
    model.eval()
    plain.eval()
    tokens = token_batch(9, 2, vocab=64)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
    generated = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, plain.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("side", SIDES)
def test_loading_plain_weights_strictly_rebuilds_the_compact_values(side: str) -> None:
    model, source = tiny(seed=0), tiny(seed=1)
    optimizer = Grass(model, density=0.3, side=side)  # type: ignore[arg-type]
    model.load_state_dict(source.state_dict(), strict=True)
    for layer in optimizer.layers:
        module = layer.module
        full = source.get_parameter(f"{layer.name}.weight")
        assert torch.equal(module.compact, full[:, module.selected()] if side == "columns" else full[module.selected()])
        assert torch.equal(module.weight, full)
        assert not module.weight.requires_grad
    missing = {k: v for k, v in source.state_dict().items() if k != "blocks.0.q.weight"}
    with pytest.raises(RuntimeError, match=r"blocks\.0\.q\.weight"):
        model.load_state_dict(missing, strict=True)


def test_tied_weights_are_left_alone() -> None:
    model = llama(tie=True)
    optimizer = Grass(model, density=0.25, target_modules=["*"], lr=1e-2)
    assert "lm_head" not in [layer.name for layer in optimizer.layers]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = model.lm_head.weight.detach().clone()
    train(model, optimizer, 1)
    assert not torch.equal(model.lm_head.weight, before)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
            self.blocks[2].weight = self.blocks[0].weight

    shared = Shared()
    assert [layer.name for layer in Grass(shared, rank=2, target_modules=["blocks.*"]).layers] == ["blocks.1"]


def test_frozen_linears_are_left_alone() -> None:
    model = tiny()
    model.get_submodule("blocks.0").requires_grad_(False)
    optimizer = Grass(model, density=0.3)
    assert all(layer.name.startswith("blocks.1") for layer in optimizer.layers)


def test_multihead_attention_is_left_alone() -> None:
    """Its output projection is read behind the module's back: a compact one would never get a gradient."""
    model = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)])
    names = [layer.name for layer in Grass(model, rank=4).layers]
    assert names == ["0.linear1", "0.linear2"]


def test_moving_and_copying_a_model_keeps_its_layers_whole() -> None:
    model = tiny()
    optimizer = Grass(model, density=0.3)
    copied = copy.deepcopy(model).double()
    layer = copied.get_submodule(optimizer.layers[0].name)
    assert isinstance(layer, SelectedLinear)
    assert layer.compact.dtype is torch.float64
    assert layer.index.dtype is torch.int64
    copied_from = optimizer.layers[0].module
    assert isinstance(copied_from, SelectedLinear)
    layer.set_subspace({"index": layer.index.flip(0)})
    assert not torch.equal(layer.index, copied_from.index)


def test_under_no_grad_nothing_is_kept() -> None:
    layer, dense, _ = compact_pair(dtype=torch.float32)
    x = torch.randn(5, 40)
    with torch.no_grad():
        y = layer(x)
    assert y.grad_fn is None
    assert torch.equal(y, F.linear(x, dense.weight, dense.bias))
