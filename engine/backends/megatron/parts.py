"""Where the tensors of a process lie in the model's weights under Hugging Face's names, as boxes. Plain numbers.

Megatron packs some weights: queries, keys and values by group of heads, a gated unit's two halves by shard. Packed or
not, each of its tensors is a row of boxes, one after the other along its first dimension.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from narrowgauge.optimizers.sharding.box import Box

from .architecture import Architecture
from .kernels import PLAIN, Kernels
from .layout import Layout, Place


@dataclass(frozen=True)
class Part:
    """A box of a weight, and its place in the process's tensor.

    Attributes:
        name: of the weight, Hugging Face's.
        box: in the weight.
        offset: of its first element in the flattened tensor of the process.
    """

    name: str
    box: Box
    offset: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.box.local)

    def of_tensor(self, tensor: Tensor) -> Tensor:
        """The part of the process's tensor, a view of the box's shape."""
        return tensor.view(-1).narrow(0, self.offset, self.numel).view(self.box.local)

    def of_weight(self, weight: Tensor) -> Tensor:
        """The box of the whole weight, a view."""
        slices = zip(self.box.offsets, self.box.local, strict=True)
        return weight[tuple(slice(first, first + size) for first, size in slices)]


@dataclass(frozen=True)
class LocalParameter:
    """A parameter of a chunk of the model.

    Attributes:
        name: Megatron's, within the chunk.
        shape: of the process's tensor.
        parts: in ascending offset; what of the tensor is in none of them is padding of the vocabulary.
        is_expert: of an expert; its copies are on the ``expert_data`` ranks.
        cut: the dimension along which the ``tensor`` (or ``expert_tensor``) ranks share it; None where each holds all.
        is_second: the head of a model whose head is its embedding: a copy.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    is_expert: bool = False
    cut: int | None = None
    is_second: bool = False

    def is_counted_by(self, place: Place) -> bool:
        """Of a stage's tensor-parallel ranks with the same values, one stands for all; replicas are not
        seen.
        """
        across = place.expert_tensor if self.is_expert else place.tensor
        return self.cut is not None or across == 0

    def is_held_first_by(self, place: Place) -> bool:
        """As :meth:`is_counted_by`, of all stages' ranks."""
        return not self.is_second and self.is_counted_by(place)

    def copy_on(self, place: Place) -> int:
        """Number of the copy among the ranks that average gradients."""
        return place.expert_data if self.is_expert else place.replica

    @torch.no_grad()
    def fill(self, tensor: Tensor, name: str, weight: Tensor) -> None:
        """Take the values of the whole weight ``name`` as far as they belong here."""
        for part in self.parts:
            if part.name == name:
                part.of_tensor(tensor).copy_(part.of_weight(weight))


def local_parameters(
    architecture: Architecture, layout: Layout, place: Place, chunk: int, kernels: Kernels = PLAIN
) -> Iterator[LocalParameter]:
    """The parameters of a chunk on a process rank; kernels change names at most."""
    cut = _Cut(architecture, layout, place, kernels)
    if layout.is_first(place, chunk):
        yield cut.vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight")
    for number, layer in enumerate(layout.layers_of(place, chunk, architecture.num_layers)):
        for parameter in cut.layer(f"model.layers.{layer}."):
            yield replace(parameter, name=f"decoder.layers.{number}.{parameter.name}")
    if layout.is_last(place, chunk):
        yield cut.whole("decoder.final_layernorm.weight", "model.norm.weight", (architecture.hidden,))
        if not architecture.tied:
            yield cut.vocabulary("output_layer.weight", "lm_head.weight")
        elif not layout.is_first(place, chunk):
            yield replace(cut.vocabulary("output_layer.weight", "model.embed_tokens.weight"), is_second=True)


class _Cut:
    """The cuts of one model on one process rank."""

    def __init__(self, architecture: Architecture, layout: Layout, place: Place, kernels: Kernels) -> None:
        self.model, self.layout, self.place, self.kernels = architecture, layout, place, kernels

    def layer(self, prefix: str) -> Iterator[LocalParameter]:
        model = self.model
        yield self.whole("input_layernorm.weight", f"{prefix}input_layernorm.weight", (model.hidden,))
        yield self.qkv("self_attention.linear_qkv.weight", f"{prefix}self_attn.", ".weight", (model.hidden,))
        if model.qkv_bias:
            yield self.qkv("self_attention.linear_qkv.bias", f"{prefix}self_attn.", ".bias", ())
        if model.qk_norm:
            for letter in "qk":
                shape = (model.head_dim,)
                yield self.whole(
                    f"self_attention.{letter}_layernorm.weight", f"{prefix}self_attn.{letter}_norm.weight", shape
                )
        attended = (model.hidden, model.heads * model.head_dim)
        yield self.columns("self_attention.linear_proj.weight", f"{prefix}self_attn.o_proj.weight", attended)
        yield self.whole("pre_mlp_layernorm.weight", f"{prefix}post_attention_layernorm.weight", (model.hidden,))
        if model.num_experts:
            yield from self.experts(f"{prefix}mlp.")
        else:
            yield from self.gated("mlp.", f"{prefix}mlp.", model.width)

    def whole(self, name: str, hf_name: str, shape: tuple[int, ...]) -> LocalParameter:
        return LocalParameter(name, shape, (Part(hf_name, Box.whole(shape)),))

    def columns(self, name: str, hf_name: str, shape: tuple[int, int]) -> LocalParameter:
        """Row-parallel: cut along the inputs."""
        rows, size = shape[0], shape[1] // self.layout.tensor
        box = Box(shape, (0, self.place.tensor * size), (rows, size))
        return LocalParameter(name, box.local, (Part(hf_name, box),), cut=1)

    def vocabulary(self, name: str, hf_name: str) -> LocalParameter:
        vocab, hidden = self.model.vocab, self.model.hidden
        size = self.model.padded_vocab(self.layout.tensor) // self.layout.tensor
        first = self.place.tensor * size
        num_real = max(0, min(size, vocab - first))
        box = Box((vocab, hidden), (min(first, vocab), 0), (num_real, hidden))
        return LocalParameter(name, (size, hidden), (Part(hf_name, box),) if num_real else (), cut=0)

    def qkv(self, name: str, hf_prefix: str, hf_suffix: str, inputs: tuple[int, ...]) -> LocalParameter:
        """Group after group of heads: its queries, its key, its value."""
        model, groups = self.model, self.model.kv_heads // self.layout.tensor
        queries = model.heads // model.kv_heads * model.head_dim
        boxes: list[tuple[str, Box]] = []
        for group in range(self.place.tensor * groups, (self.place.tensor + 1) * groups):
            for letter, rows in (("q", queries), ("k", model.head_dim), ("v", model.head_dim)):
                whole = (model.kv_heads * rows, *inputs)
                box = Box(whole, (group * rows, *(0 for _ in inputs)), (rows, *inputs))
                boxes.append((f"{hf_prefix}{letter}_proj{hf_suffix}", box))
        parts = _in_a_row(boxes)
        return LocalParameter(name, (sum(box.local[0] for _, box in boxes), *inputs), parts, cut=0)

    def gated(self, prefix: str, hf_prefix: str, width: int) -> Iterator[LocalParameter]:
        """A dense layer's two matrices; gate and up lie one after the other in each shard."""
        hidden, size = self.model.hidden, width // self.layout.tensor
        boxes = [
            (
                f"{hf_prefix}{name}_proj.weight",
                Box((width, hidden), (self.place.tensor * size, 0), (size, hidden)),
            )
            for name in ("gate", "up")
        ]
        yield LocalParameter(f"{prefix}linear_fc1.weight", (2 * size, hidden), _in_a_row(boxes), cut=0)
        yield self.columns(f"{prefix}linear_fc2.weight", f"{hf_prefix}down_proj.weight", (hidden, width))

    def _names_of_expert(self, number: int) -> tuple[str, str]:
        if self.kernels.grouped:
            return f"mlp.experts.linear_fc1.weight{number}", f"mlp.experts.linear_fc2.weight{number}"
        prefix = f"mlp.experts.local_experts.{number}."
        return f"{prefix}linear_fc1.weight", f"{prefix}linear_fc2.weight"

    def experts(self, hf_prefix: str) -> Iterator[LocalParameter]:
        """The router, this process's experts, and the one that every token takes."""
        model, layout, place = self.model, self.layout, self.place
        yield self.whole("mlp.router.weight", f"{hf_prefix}gate.weight", (model.num_experts, model.hidden))
        count, size = model.num_experts // layout.expert, model.expert_width // layout.expert_tensor
        first = place.expert_tensor * size
        up = (model.num_experts, 2 * model.expert_width, model.hidden)
        down = (model.num_experts, model.hidden, model.expert_width)
        for number in range(count):
            expert, up_name, down_name = place.expert * count + number, *self._names_of_expert(number)
            boxes = [
                (
                    f"{hf_prefix}experts.gate_up_proj",
                    Box(up, (expert, half * model.expert_width + first, 0), (1, size, model.hidden)),
                )
                for half in range(2)
            ]
            yield LocalParameter(up_name, (2 * size, model.hidden), _in_a_row(boxes), is_expert=True, cut=0)
            box = Box(down, (expert, 0, first), (1, model.hidden, size))
            yield LocalParameter(
                down_name,
                (model.hidden, size),
                (Part(f"{hf_prefix}experts.down_proj", box),),
                is_expert=True,
                cut=1,
            )
        if model.shared_width:
            yield from self.gated("mlp.shared_experts.", f"{hf_prefix}shared_expert.", model.shared_width)
            yield self.whole(
                "mlp.shared_experts.gate_weight", f"{hf_prefix}shared_expert_gate.weight", (1, model.hidden)
            )


def _in_a_row(boxes: Sequence[tuple[str, Box]]) -> tuple[Part, ...]:
    parts, offset = [], 0
    for name, box in boxes:
        parts.append(Part(name, box, offset))
        offset += math.prod(box.local)
    return tuple(parts)
