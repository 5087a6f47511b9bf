"""Whole models trained with and without offload: the same losses and parameters, bit for bit."""

import copy
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from narrowgauge.offload import ActivationOffload
from narrowgauge.offload.backends import choice
from narrowgauge.offload.backends.probe import measure
from narrowgauge.offload.backends.threads import ThreadsBackend, ThreadsLane
from narrowgauge.optimizers import Grass
from narrowgauge.optimizers.layers.selected_linear import SelectedLinear
from narrowgauge.optimizers.layers.selected_weight import Side

from .support import level, rest, settle, wait_until

BLOCK = 4096
VOCAB, WIDTH, ROWS, LENGTH = 64, 64, 4, 16
LAYERS = 2
HIDDEN_BYTES = ROWS * LENGTH * WIDTH * 4
MODELS = ("llama", "gpt2", "t5", "bert")
STEPS, FEW_STEPS = 50, 8

Losses = tuple[Tensor, list[Tensor]]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(choice, "measure", partial(measure, total_bytes=8 << 20))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(kind: str, dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB,
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
            )
        )
    elif kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB,
                n_embd=WIDTH,
                n_layer=layers,
                n_head=4,
                n_positions=64,
                resid_pdrop=0.1,
                embd_pdrop=0.1,
                attn_pdrop=0.1,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    elif kind == "t5":
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCAB,
                d_model=WIDTH,
                d_kv=16,
                d_ff=2 * WIDTH,
                num_layers=layers,
                num_heads=4,
                dropout_rate=0.1,
                decoder_start_token_id=0,  # pyright: ignore[reportCallIssue]
            )
        )
    else:
        model = BertForMaskedLM(
            BertConfig(
                vocab_size=VOCAB,
                hidden_size=WIDTH,
                num_hidden_layers=layers,
                num_attention_heads=4,
                intermediate_size=2 * WIDTH,
                max_position_embeddings=64,
                hidden_dropout_prob=0.1,
                attention_probs_dropout_prob=0.1,
            )
        )
    return model.to(dtype).train()  # pyright: ignore[reportArgumentType, reportCallIssue]


def batch_of(kind: str, number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 + number)
    tokens = torch.randint(3, VOCAB, (ROWS, LENGTH), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, LENGTH - 3 :] = 0
    if kind == "bert":
        hidden = torch.rand(ROWS, LENGTH, generator=generator) < 0.3
        hidden[:, 0] = True
        return {
            "input_ids": tokens.masked_fill(hidden, 1),
            "attention_mask": mask,
            "labels": tokens.masked_fill(~hidden, -100),
        }
    labels = torch.randint(3, VOCAB, (ROWS, LENGTH), generator=generator) if kind == "t5" else tokens
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def train(
    model: Any,
    kind: str,
    offload: ActivationOffload | None,
    *,
    steps: int,
    make_optimizer: MakeOptimizer = adamw,
    accumulation: int = 1,
    backwards_last: bool = False,
    backward_inside: bool = False,
) -> Losses:
    """Losses and final parameters.

    Every second step waits for the writes before backward, so that bytes come from disk whatever its speed; the others
    run as they will, so that backward also meets what is still being written.
    """
    optimizer = make_optimizer(model)
    losses: list[Tensor] = []
    for step in range(steps):
        torch.manual_seed(step)
        waiting: list[Tensor] = []
        for part in range(accumulation):
            with offload if offload is not None else nullcontext():
                loss = cast(Tensor, model(**batch_of(kind, step * accumulation + part)).loss) / accumulation
                losses.append(loss.detach().clone())
                if offload is not None and step % 2:
                    settle(offload)
                if backward_inside:
                    loss.backward()
            if not backward_inside:
                waiting.append(loss)
            if not backwards_last:
                while waiting:
                    waiting.pop().backward()
        while waiting:
            waiting.pop().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses), [parameter.detach().clone() for parameter in model.parameters()]


@cache
def plain(kind: str, steps: int = FEW_STEPS, accumulation: int = 1, backwards_last: bool = False) -> Losses:
    return train(build(kind), kind, None, steps=steps, accumulation=accumulation, backwards_last=backwards_last)


@cache
def recomputed(kind: str, reentrant: bool, steps: int = FEW_STEPS) -> Losses:
    model = build(kind)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return train(model, kind, None, steps=steps)


def assert_same(found: Losses, expected: Losses) -> None:
    different = (found[0] != expected[0]).nonzero().flatten().tolist()
    assert not different, f"losses differ in the steps {different[:10]}"
    for number, (one, other) in enumerate(zip(found[1], expected[1], strict=True)):
        assert torch.equal(one, other), f"parameter {number} differs by {(one - other).abs().max()}"
    assert torch.isfinite(found[0]).all()


@contextmanager
def offloading(path: Path, **options: Any) -> Iterator[ActivationOffload]:
    defaults: dict[str, Any] = {
        "keep_resident": 0.0,
        "min_tensor_bytes": 1024,
        "backend": "threads",
        "capacity_bytes": 64 << 20,
        "buffer_bytes": 128 << 10,
    }
    offload = ActivationOffload(path, **{**defaults, **options})
    try:
        yield offload
        stats = offload.stats()
        assert stats.failed_writes == stats.full == 0
        wait_until(lambda: level(offload) == (0, 0, 0), "something outlived its backward")
    finally:
        offload.close()
    assert not list(path.iterdir())


class SpyLane(ThreadsLane):
    def __init__(self, spy: "SpyBackend") -> None:
        self._spy = spy

    def write(self, fd: int, offset: int, buffer: Tensor) -> None:
        if self._spy.listening:
            self._spy.written.append(buffer.numpy().tobytes())
        super().write(fd, offset, buffer)


class SpyBackend(ThreadsBackend):
    """Remembers what is written. Everything is copied into a buffer first, so a tensor's bytes begin at byte 0."""

    writes_in_place = False

    def __init__(self) -> None:
        self.listening = False
        self.written: list[bytes] = []

    def lane(self) -> SpyLane:
        return SpyLane(self)

    @contextmanager
    def listen(self) -> Iterator[list[bytes]]:
        self.written, self.listening = [], True
        yield self.written
        self.listening = False


def to_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def blocks_of(nbytes: int) -> int:
    return -(-nbytes // BLOCK) * BLOCK


# What forward saves.


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("llama", STEPS),
        *((kind, FEW_STEPS) for kind in MODELS[1:]),
        *(pytest.param(kind, STEPS, marks=pytest.mark.slow) for kind in MODELS[1:]),
    ],
)
def test_saved_tensors_parity(kind: str, steps: int, tmp_path: Path) -> None:
    with offloading(tmp_path) as offload:
        assert_same(train(build(kind), kind, offload, steps=steps), plain(kind, steps))
        stats = offload.stats()
    # Half of the steps wait for their writes.
    assert stats.written >= 0.8 * stats.saved_peak * steps / 2
    assert stats.read >= 0.8 * stats.saved_peak * steps / 2
    assert stats.read <= stats.written


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_on_top_of_gradient_checkpointing(kind: str, reentrant: bool, tmp_path: Path) -> None:
    model = build(kind)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with offloading(tmp_path) as offload:
        assert_same(train(model, kind, offload, steps=FEW_STEPS), recomputed(kind, reentrant))
        stats = offload.stats()
    assert min(stats.written, stats.read) >= 0.8 * LAYERS * HIDDEN_BYTES * FEW_STEPS / 2
    assert all(layer.training for layer in model.modules())


@pytest.mark.parametrize("backwards_last", [False, True])
@pytest.mark.parametrize("granularity", ["saved_tensors", "layer_inputs"])
def test_gradient_accumulation(granularity: str, backwards_last: bool, tmp_path: Path) -> None:
    model = build("gpt2")
    with offloading(tmp_path, granularity=granularity, model=model) as offload:
        found = train(model, "gpt2", offload, steps=FEW_STEPS, accumulation=2, backwards_last=backwards_last)
        stats = offload.stats()
    assert_same(found, plain("gpt2", accumulation=2, backwards_last=backwards_last))
    assert min(stats.written, stats.read) > 0


@pytest.mark.parametrize("mode", ["saved_tensors", "layer_inputs", "reentrant"])
def test_backward_inside_the_context(mode: str, tmp_path: Path) -> None:
    model = build("gpt2")
    if mode == "reentrant":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    granularity = "saved_tensors" if mode == "reentrant" else mode
    with offloading(tmp_path, granularity=granularity, model=model) as offload:
        found = train(model, "gpt2", offload, steps=FEW_STEPS, backward_inside=True)
        assert offload.stats().read > 0
    assert_same(found, recomputed("gpt2", True) if mode == "reentrant" else plain("gpt2"))


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("keep_resident", [0.5, "auto"])
def test_partly_resident_parity(kind: str, keep_resident: float | str, tmp_path: Path) -> None:
    with offloading(tmp_path, keep_resident=keep_resident) as offload:
        assert_same(train(build(kind), kind, offload, steps=FEW_STEPS), plain(kind))
        stats = offload.stats()
    assert stats.written > 0
    assert stats.offload_budget is not None
    if keep_resident == 0.5:
        # Of what the largest forward saved, little of which is too small to be offloaded.
        assert 0.4 * stats.saved_peak <= stats.offload_budget <= 0.5 * stats.saved_peak


def test_share_that_stays_resident(tmp_path: Path) -> None:
    model, batch = build("llama"), batch_of("llama", 0)
    with offloading(tmp_path, keep_resident=0.5) as offload:
        per_step = [written_by_step(model, batch, offload) for _ in range(4)]
    assert all(0.35 * per_step[0] <= later <= 0.65 * per_step[0] for later in per_step[1:])


def test_fully_resident_writes_nothing(tmp_path: Path) -> None:
    model, batch = build("llama"), batch_of("llama", 0)
    with offloading(tmp_path, keep_resident=1.0) as offload:
        assert [written_by_step(model, batch, offload) for _ in range(3)] == [0, 0, 0]
        assert offload.stats().resident_peak == offload.stats().saved_peak > 0


@pytest.mark.parametrize(("kind", "granularity"), [("llama", "saved_tensors"), ("gpt2", "layer_inputs")])
def test_bf16_parity(kind: str, granularity: str, tmp_path: Path) -> None:
    expected = train(build(kind, torch.bfloat16), kind, None, steps=FEW_STEPS)
    model = build(kind, torch.bfloat16)
    with offloading(tmp_path, granularity=granularity, model=model) as offload:
        found = train(model, kind, offload, steps=FEW_STEPS)
        assert min(offload.stats().written, offload.stats().read) > 0
    assert found[1][0].dtype is torch.bfloat16
    assert_same(found, expected)


def test_autocast_parity(tmp_path: Path) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        expected = train(build("gpt2"), "gpt2", None, steps=FEW_STEPS)
        with offloading(tmp_path) as offload:
            assert_same(train(build("gpt2"), "gpt2", offload, steps=FEW_STEPS), expected)
            assert offload.stats().read > 0


def written_by_step(model: Any, batch: dict[str, Tensor], offload: ActivationOffload) -> int:
    before = offload.stats().written
    with offload:
        loss = model(**batch).loss
    settle(offload)
    loss.backward()
    model.zero_grad()
    return offload.stats().written - before


# Compact gradients.


def grass(side: Side) -> MakeOptimizer:
    return partial(Grass, lr=3e-3, density=1 / 8, side=side, refresh_interval=7)


@pytest.mark.parametrize("granularity", ["saved_tensors", "layer_inputs"])
@pytest.mark.parametrize("side", ["columns", "rows"])
def test_grass_parity(side: Side, granularity: str, tmp_path: Path) -> None:
    steps = STEPS if (side, granularity) == ("columns", "saved_tensors") else 16
    expected = train(build("llama"), "llama", None, steps=steps, make_optimizer=grass(side))
    model = build("llama")
    with offloading(tmp_path, granularity=granularity, model=model) as offload:
        found = train(model, "llama", offload, steps=steps, make_optimizer=grass(side))
        stats = offload.stats()
    assert_same(found, expected)
    assert min(stats.written, stats.read) >= 0.8 * LAYERS * HIDDEN_BYTES * steps / 2


@pytest.mark.parametrize(("shared_inputs", "writes"), [(None, 6), ("siblings", 3)])
def test_compact_columns_write_only_the_selected_columns(
    tmp_path: Path, shared_inputs: Literal["siblings"] | None, writes: int
) -> None:
    batch = batch_of("llama", 0)
    spy = SpyBackend()
    model = build("llama")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            # With ones, the input of a projection would equal what the norm saves.
            nn.init.uniform_(parameter, 0.5, 1.5)
    with offloading(tmp_path, backend=spy, min_tensor_bytes=512) as offload:
        dense_bytes = written_by_step(model, batch, offload)
        optimizer = Grass(model, density=1 / 8, side="columns", shared_inputs=shared_inputs, refresh_interval=7)
        inputs: dict[str, Tensor] = {}

        def keep(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name] = args[0].detach().reshape(-1, args[0].shape[-1]).clone()

        layers = {layer.name: layer.module for layer in optimizer.layers}
        for name, layer in layers.items():
            assert isinstance(layer, nn.Module)
            layer.register_forward_pre_hook(partial(keep, name))
        with spy.listen() as written:
            compact_bytes = written_by_step(model, batch, offload)

    assert len(layers) == 7 * LAYERS
    for name, layer in layers.items():
        assert isinstance(layer, SelectedLinear)
        selected = to_bytes(inputs[name][:, layer.index])
        assert len(selected) == ROWS * LENGTH * layer.index.numel() * 4
        found = [piece for piece in written if piece.startswith(selected)]
        assert len(found) == 1, f"{name}: the selected columns were written {len(found)} times"
        assert len(found[0]) == blocks_of(len(selected))
        if name.endswith(("q_proj", "gate_proj", "down_proj")):
            assert not any(piece.startswith(to_bytes(inputs[name])) for piece in written), f"{name}: X was written"
    # Dense: q, k and v share one input, gate and up another; that of down is its own; o's is saved by attention too.
    dense = LAYERS * (2 * blocks_of(HIDDEN_BYTES) + blocks_of(2 * HIDDEN_BYTES))
    compact = LAYERS * (writes * blocks_of(HIDDEN_BYTES // 8) + blocks_of(2 * HIDDEN_BYTES // 8))
    assert dense_bytes - compact_bytes == dense - compact


# The inputs of layers.


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.slow
def test_layer_inputs_parity(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    with offloading(tmp_path, granularity="layer_inputs", model=model) as offload:
        found = train(model, kind, offload, steps=STEPS)
        stats = offload.stats()
    assert_same(found, recomputed(kind, False, STEPS))
    assert_same(found, plain(kind, STEPS))
    assert min(stats.written, stats.read) >= 0.8 * LAYERS * HIDDEN_BYTES * STEPS / 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_layer_inputs_of_a_model_that_recomputes_already(reentrant: bool, tmp_path: Path) -> None:
    model = build("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    spy = SpyBackend()
    with offloading(tmp_path, granularity="layer_inputs", model=model, backend=spy) as offload:
        assert_same(train(model, "llama", offload, steps=FEW_STEPS), recomputed("llama", reentrant))
        with spy.listen() as written:
            written_by_step(model, batch_of("llama", 0), offload)
    assert len(written) == LAYERS
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_one_write_per_layer(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    layers = stack_of(kind, model)
    spy = SpyBackend()
    with offloading(tmp_path, granularity="layer_inputs", model=model, backend=spy) as offload:
        inputs = expected_inputs(layers, model, batch_of(kind, 0))
        torch.manual_seed(0)
        with spy.listen() as written:
            total = written_by_step(model, batch_of(kind, 0), offload)
    assert sorted(written) == sorted(inputs)
    assert total == LAYERS * blocks_of(HIDDEN_BYTES)


def test_encoder_output_is_written_once(tmp_path: Path) -> None:
    model = build("t5")
    encoded: list[bytes] = []
    model.encoder.register_forward_hook(lambda *call: encoded.append(to_bytes(call[-1][0])))
    layers = [*model.encoder.block, *model.decoder.block]
    spy = SpyBackend()
    with offloading(tmp_path, granularity="layer_inputs", model=model, backend=spy) as offload:
        inputs = expected_inputs(layers, model, batch_of("t5", 0))
        torch.manual_seed(0)
        with spy.listen() as written:
            written_by_step(model, batch_of("t5", 0), offload)
    for piece in {*inputs, encoded[-1]}:
        assert written.count(piece) == 1
    # Besides: what all layers of a stack share, the relative positions and the masks.
    assert len(written) - 2 * LAYERS - 1 <= 3


def test_layer_inputs_written_in_place(tmp_path: Path) -> None:
    """Without a copy, a tensor's first and last page may be shared with others: at most one block more each."""
    model = build("llama")
    with offloading(tmp_path, granularity="layer_inputs", model=model) as offload:
        for _ in range(3):
            written = written_by_step(model, batch_of("llama", 0), offload)
            assert LAYERS * HIDDEN_BYTES <= written <= LAYERS * (blocks_of(HIDDEN_BYTES) + BLOCK)


def stack_of(kind: str, model: Any) -> list[nn.Module]:
    stacks = {"llama": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer"}
    return list(model.get_submodule(stacks[kind]))


def expected_inputs(layers: Sequence[nn.Module], model: Any, batch: dict[str, Tensor]) -> list[bytes]:
    """The bytes of what each layer gets in a forward with seed 0."""
    found: list[bytes] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(to_bytes(args[0] if args else kwargs["x"]))

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    torch.manual_seed(0)
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.1, self.training)


class Result:
    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


class OwnModel(nn.Module):
    """A stack of layers, called in one of several ways."""

    def __init__(self, how: str = "positional", layers: Sequence[nn.Module] | None = None) -> None:
        super().__init__()
        self.how = how
        self.embed = nn.Embedding(VOCAB, WIDTH)
        if how == "encoder":
            layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        elif how == "sequential":
            self.stack = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        else:
            self.stack = nn.ModuleList(layers if layers is not None else [Layer() for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Result:
        x = self.embed(input_ids)
        if self.how == "encoder":
            x = self.encoder(x, mask=nn.Transformer.generate_square_subsequent_mask(LENGTH))
        elif self.how == "sequential":
            x = self.stack(x)
        else:
            for layer in self.stack:
                x = layer(x=x, scale=0.5) if self.how == "keywords" else layer(x, scale=0.5)
        return Result(F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten()))


def own(how: str = "positional") -> OwnModel:
    torch.manual_seed(0)
    return OwnModel(how)


def own_layers(model: OwnModel) -> list[Any]:
    return list(model.encoder.layers if model.how == "encoder" else model.stack)


@pytest.mark.parametrize("how", ["positional", "keywords", "encoder"])
def test_layer_inputs_of_own_models(how: str, tmp_path: Path) -> None:
    expected = train(own(how), "llama", None, steps=FEW_STEPS)
    model, spy = own(how), SpyBackend()
    with offloading(tmp_path, granularity="layer_inputs", model=model, backend=spy) as offload:
        assert_same(train(model, "llama", offload, steps=FEW_STEPS), expected)
        inputs = expected_inputs(own_layers(model), model, batch_of("llama", 0))
        torch.manual_seed(0)
        with spy.listen() as written:
            total = written_by_step(model, batch_of("llama", 0), offload)
    assert sorted(written) == sorted(inputs)
    assert total == LAYERS * blocks_of(HIDDEN_BYTES)


@pytest.mark.parametrize("how", ["positional", "sequential"])
def test_given_layers(how: str, tmp_path: Path) -> None:
    expected = train(own(how), "llama", None, steps=FEW_STEPS)
    model, spy = own(how), SpyBackend()
    layers = own_layers(model)
    options = {"granularity": "layer_inputs", "model": model, "layers": layers[1:], "backend": spy}
    with offloading(tmp_path, **options) as offload:
        assert_same(train(model, "llama", offload, steps=FEW_STEPS), expected)
        inputs = expected_inputs(layers[1:], model, batch_of("llama", 0))
        torch.manual_seed(0)
        with spy.listen() as written:
            written_by_step(model, batch_of("llama", 0), offload)
        assert "forward" not in vars(layers[0])
    assert sorted(written) == sorted(inputs)
    assert_restored(layers)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_given_layers_of_a_hugging_face_model(kind: str, tmp_path: Path) -> None:
    """Their key-value cache, on by default, must not be filled once more by the recomputation."""
    model = build(kind)
    layers = [*model.encoder.block, *model.decoder.block] if kind == "t5" else stack_of(kind, model)
    options = {"granularity": "layer_inputs", "model": model, "layers": layers}
    with offloading(tmp_path, **options) as offload:
        assert_same(train(model, kind, offload, steps=FEW_STEPS), plain(kind))
    assert_restored(layers)


def test_wrapped_hugging_face_model(tmp_path: Path) -> None:
    """A wrapper such as DDP's does not offer the methods of the model inside."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **batch: Tensor) -> Any:
            return self.module(**batch)

    model = Wrapper(build("llama"))
    with offloading(tmp_path, granularity="layer_inputs", model=model) as offload:
        assert_same(train(model, "llama", offload, steps=FEW_STEPS), plain("llama"))


class OlderLayer(Layer):
    """Recomputes as the layers of Hugging Face's first 5.x releases did: outside of the module's hooks."""

    gradient_checkpointing = False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        forward = super().__call__
        if self.gradient_checkpointing and self.training:
            recompute = cast(Callable[..., Tensor], self._gradient_checkpointing_func)
            return recompute(partial(forward, **kwargs), *args)
        return forward(*args, **kwargs)


class OlderModel(OwnModel):
    supports_gradient_checkpointing = True
    is_gradient_checkpointing = False

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        self.is_gradient_checkpointing = True
        for layer in own_layers(self):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, **gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.is_gradient_checkpointing = False
        for layer in own_layers(self):
            layer.gradient_checkpointing = False


@pytest.mark.parametrize("already", [False, True])
def test_layers_that_recompute_outside_of_hooks(already: bool, tmp_path: Path) -> None:
    def build_older() -> OlderModel:
        torch.manual_seed(0)
        return OlderModel(layers=[OlderLayer() for _ in range(LAYERS)])

    expected = train(build_older(), "llama", None, steps=FEW_STEPS)
    model, spy = build_older(), SpyBackend()
    if already:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with offloading(tmp_path, granularity="layer_inputs", model=model, backend=spy) as offload:
        assert_same(train(model, "llama", offload, steps=FEW_STEPS), expected)
        with spy.listen() as written:
            written_by_step(model, batch_of("llama", 0), offload)
    assert len(written) == LAYERS


def test_shared_layer(tmp_path: Path) -> None:
    """One layer used several times, as ALBERT does, is wrapped and restored once."""

    def build_shared() -> OwnModel:
        torch.manual_seed(0)
        return OwnModel(layers=[Layer()] * LAYERS)

    expected = train(build_shared(), "llama", None, steps=FEW_STEPS)
    model, spy = build_shared(), SpyBackend()
    with offloading(tmp_path, granularity="layer_inputs", model=model, backend=spy) as offload:
        assert_same(train(model, "llama", offload, steps=FEW_STEPS), expected)
        with spy.listen() as written:
            written_by_step(model, batch_of("llama", 0), offload)
    assert len(written) == LAYERS
    assert_restored(own_layers(model))


def assert_restored(layers: Sequence[nn.Module]) -> None:
    for layer in layers:
        assert not layer._forward_pre_hooks
        assert not layer._forward_hooks
        assert "forward" not in vars(layer)
        assert not getattr(layer, "gradient_checkpointing", False)


@pytest.mark.parametrize("kind", [*MODELS, "positional", "encoder"])
def test_close_restores_the_model(kind: str, tmp_path: Path) -> None:
    hugging_face = kind in MODELS
    model: Any = build(kind) if hugging_face else own(kind)
    data = kind if hugging_face else "llama"
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with offloading(tmp_path, granularity="layer_inputs", model=model) as offload:
        train(model, data, offload, steps=1)
    assert_restored(list(model.modules()))
    for name, module in model.named_modules():
        # Hugging Face leaves the function it was given, without the flag that makes it take effect.
        assert set(vars(module)) - before[name] <= {"_gradient_checkpointing_func", "gradient_checkpointing"}
    if hugging_face:
        assert not model.is_gradient_checkpointing
    fresh: Any = build(kind) if hugging_face else own(kind)
    fresh.load_state_dict(model.state_dict())
    assert_same(train(model, data, None, steps=2), train(fresh, data, None, steps=2))


def test_close_keeps_a_replaced_forward(tmp_path: Path) -> None:
    """Other libraries set ``forward`` on a module too; theirs stays."""
    model = own()
    layers = own_layers(model)
    calls: list[int] = []

    def counted(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return forward(*args, **kwargs)

    replaced = [partial(counted, layer.forward) for layer in layers]
    for layer, forward in zip(layers, replaced, strict=True):
        layer.forward = forward
    with offloading(tmp_path, granularity="layer_inputs", model=model) as offload:
        train(model, "llama", offload, steps=1)
    assert len(calls) == 2 * LAYERS
    for layer, forward in zip(layers, replaced, strict=True):
        assert layer.forward is forward


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.ModuleDict({"list": nn.ModuleList([nn.Linear(2, 2)])})],
)
def test_model_without_a_stack_of_layers(model: nn.Module, tmp_path: Path) -> None:
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="of equal layers; pass layers="):
        ActivationOffload(tmp_path, granularity="layer_inputs", model=model, backend="threads", capacity_bytes=16 << 20)
    assert threading.active_count() == threads, "the lanes were left running"
    assert len(os.listdir("/proc/self/fd")) == descriptors, "the slab was left open"


# Peaks.


def peak_of(path: Path, **options: Any) -> int:
    model = build("llama", layers=12)
    with offloading(path, granularity="layer_inputs", model=model, **options) as offload:
        written_by_step(model, batch_of("llama", 0), offload)
        offload.reset_peaks()
        for number in range(4):
            written_by_step(model, batch_of("llama", number), offload)
        return offload.stats().resident_peak


def test_layer_inputs_lower_the_peak_of_recomputation(tmp_path: Path) -> None:
    without = peak_of(tmp_path, keep_resident=1.0)
    assert without >= 12 * HIDDEN_BYTES
    assert peak_of(tmp_path, buffer_bytes=2 * HIDDEN_BYTES) <= without - 4 * HIDDEN_BYTES


def test_saved_tensors_lower_the_peak(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=256,
    )
    model, tokens = LlamaForCausalLM(config), torch.randint(VOCAB, (1, 256))
    with offloading(tmp_path, capacity_bytes=256 << 20, buffer_bytes=8 << 20) as offload:
        for _ in range(2):
            offload.reset_peaks()
            with offload:
                loss = cast(Tensor, model(input_ids=tokens, labels=tokens).loss)
            loss.backward()
        stats = offload.stats()
    assert stats.saved_peak >= 32 << 20
    assert stats.resident_peak <= 0.5 * stats.saved_peak


# Evaluation and generation.


@pytest.mark.parametrize("granularity", ["saved_tensors", "layer_inputs"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_generate(kind: str, granularity: str, tmp_path: Path) -> None:
    model, prompt = build(kind).eval(), batch_of(kind, 0)["input_ids"][:2, :5]
    generate = partial(model.generate, prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected = generate()
    with offloading(tmp_path, granularity=granularity, model=model) as offload:
        train(copy.deepcopy(model).train(), kind, offload, steps=1)
        rest(offload)
        written = offload.stats().written
        assert torch.equal(generate(), expected)
        with offload:
            assert torch.equal(generate(), expected)
        assert offload.stats().written == written


@pytest.mark.parametrize("kind", [*MODELS, "positional", "encoder"])
def test_evaluation(kind: str, tmp_path: Path) -> None:
    """Forwards without gradients save nothing, in training mode or not, inside the context or not."""
    model: Any = build(kind) if kind in MODELS else own(kind)
    batch = batch_of(kind if kind in MODELS else "llama", 0)

    def losses() -> Tensor:
        torch.manual_seed(0)
        found = []
        with torch.no_grad():
            for training in (False, True):
                found.append(model.train(training)(**batch).loss)
        return torch.stack(found)

    expected = losses()
    with offloading(tmp_path, granularity="layer_inputs", model=model) as offload:
        assert torch.equal(losses(), expected)
        with offload:
            assert torch.equal(losses(), expected)
        assert offload.stats().written == offload.stats().saved_peak == 0


@pytest.mark.parametrize("granularity", ["saved_tensors", "layer_inputs"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_key_value_cache_in_training(kind: str, granularity: str, tmp_path: Path) -> None:
    """Asked for by hand, it does not change the gradients; recomputation goes without it."""

    def run(model: Any, offload: ActivationOffload | None) -> bool:
        torch.manual_seed(0)
        with offload if offload is not None else nullcontext():
            outputs = model(**batch_of(kind, 0), use_cache=True)
        outputs.loss.backward()
        return outputs.past_key_values is not None and outputs.past_key_values.get_seq_length() > 0

    expected, model = build(kind), build(kind)
    assert run(expected, None)
    with offloading(tmp_path, granularity=granularity, model=model) as offload:
        assert run(model, offload) == (granularity == "saved_tensors")
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or (other.grad is not None and torch.equal(one.grad, other.grad))
