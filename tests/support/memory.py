"""What a GPU holds in a run, by arithmetic.

Parameters are counted on the model without storage, activations on tensors without contents: one layer, and the head
with the loss, are taken through forward and backward at their full size.
"""

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from narrowgauge.engine.config.config import Config
from narrowgauge.engine.config.optimizer_params import make_optimizer
from narrowgauge.engine.report.parameters import count_parameters
from narrowgauge.engine.run.model import abstract_model, model_config
from narrowgauge.optimizers.layers.selected_weight import SelectedWeight

GIB = 1 << 30


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU; ``offloadable`` is the part of ``activations`` that activation offload can take."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    offloadable: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations

    def row(self) -> list[str]:
        """In GiB, rounded up to a tenth."""
        parts = (self.weights, self.gradients, self.optimizer, self.buffers, self.activations)
        values = (*parts, self.total, self.offloadable)
        return [f"{math.ceil(value / GIB * 10) / 10:.1f}" for value in values]


def converted_model(config: Config, described: PretrainedConfig | None = None) -> Any:
    """The configuration's model in bf16 without storage, with compact layers.

    Args:
        described: what the folder that ``model.path`` names holds.
    """
    parsed, options = config.parsed, config.optimizer_options
    assert parsed.model is not None
    assert parsed.data is not None
    assert parsed.optimizer is not None
    assert options is not None
    length = parsed.data.sequence_length
    described = described or model_config(parsed.model, vocab_size=None, sequence_length=length)
    described.dtype = torch.bfloat16
    model = abstract_model(described)
    make_optimizer(parsed.optimizer.type, model, options)
    return model


def memory_of(config: Config, *, world_size: int, described: PretrainedConfig | None = None) -> Memory:
    """The figures of a configuration with bf16 and Grass; see :func:`converted_model`."""
    model, stage = converted_model(config, described), config.zero_stage
    counts = count_parameters(model)
    trained = counts["dense"] + counts["compact"]
    # Of every compact weight there are two: the frozen matrix and the compact one.
    weights, gradients = 2 * (counts["frozen"] + trained), 2 * trained
    zero: Any = config.parsed.zero_optimization
    buffers = 2 * zero.reduce_bucket_size
    if stage == 3:
        weights /= world_size
        buffers += 2 * min(zero.max_live_parameters, counts["total"])
    if stage >= 2:
        gradients /= world_size
    assert config.parsed.data is not None
    assert config.parsed.model is not None
    micro, length = config.batches(world_size).micro, config.parsed.data.sequence_length
    layer, head = layer_and_head(model, micro, length)
    offload = config.offload()
    recomputed = config.parsed.model.gradient_checkpointing != "none" or (
        offload is not None and offload.granularity == "layer_inputs"
    )
    layer_input = 2 * micro * length * model.config.hidden_size
    kept = model.config.num_hidden_layers * (layer_input if recomputed else layer.saved)
    # While the last layer's backward runs, its part of what is kept is counted already, unless it is recomputed.
    working = max(head.peak, layer.peak if recomputed else layer.peak - layer.saved)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=12 * trained / world_size,
        buffers=buffers,
        activations=kept + working,
        offloadable=kept if offload is not None else 0,
    )


@dataclass(frozen=True)
class Passed:
    """Bytes of a module's forward and backward: kept between the two, and at most at one time."""

    saved: int
    peak: int


def layer_and_head(model: Any, micro: int, length: int) -> tuple[Passed, Passed]:
    """The first layer of a LLaMA in bf16 without storage, and its last norm, head and loss."""
    hidden_size = model.config.hidden_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        inner, head = model.model, model.lm_head
        for module in (inner.layers[0], inner.norm, head):
            _to_fake(module)
        hidden = torch.empty(micro, length, hidden_size, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.zeros(micro, length, dtype=torch.long)
        angles = torch.empty(1, length, hidden_size // model.config.num_attention_heads, dtype=torch.bfloat16)

        def through_layer() -> Tensor:
            found = inner.layers[0](hidden, attention_mask=None, position_embeddings=(angles, angles))
            return found if torch.is_tensor(found) else found[0]

        def through_head() -> Tensor:
            return model.loss_function(
                logits=head(inner.norm(hidden)), labels=labels, vocab_size=model.config.vocab_size
            )

        present = [hidden, labels, angles, *model.parameters()]
        return _measure(through_layer, present), _measure(through_head, present)


def _to_fake(module: nn.Module) -> None:
    module.to_empty(device="cpu")
    for part in module.modules():
        if isinstance(part, SelectedWeight):
            part.index = torch.empty_like(part.index, device="cpu")


def _measure(run: Any, present: list[Tensor]) -> Passed:
    with LiveBytes(present) as live:
        output = run()
        saved = live.now - output.untyped_storage().nbytes()
        output.backward(torch.empty_like(output))
    return Passed(saved, live.peak)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make, as long as they live."""

    def __init__(self, present: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet(t.untyped_storage() for t in present)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, nbytes: int) -> None:
        self.now -= nbytes
