"""Activation offload in Megatron's schedules."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from narrowgauge.offload import ActivationOffload, MicroBatch
from narrowgauge.offload.saving.graph import keep_in_memory

from ...config.config import Config
from ...offload.attach import make_offload_together
from .keys import megatron_block
from .model import StagedModel
from .passes import schedule_of


class ScheduledOffload:
    """The offload around the forwards of a rank's schedule; does nothing where there is none.

    Attributes:
        activation_offload: None where everything stays in memory.
    """

    def __init__(self, offload: ActivationOffload | None, model: StagedModel, num_micro_batches: int) -> None:
        self.activation_offload = offload
        self._schedule = schedule_of(model.layout, model.place, num_micro_batches)

    def begin_step(self) -> None:
        if self.activation_offload is not None:
            self.activation_offload.begin_step(self._schedule)

    def forward(self, number: int, chunk: int) -> AbstractContextManager[Any]:
        """Around the forward of a micro-batch in a chunk."""
        if self.activation_offload is None:
            return nullcontext()
        return self.activation_offload.forward(MicroBatch(number, chunk))

    def close(self) -> None:
        if self.activation_offload is not None:
            self.activation_offload.close()


def make_scheduled(config: Config, model: StagedModel, num_micro_batches: int) -> ScheduledOffload:
    """The offload that the configuration asks for, on all ranks or on none. Collective.

    The model is wrapped before: its parameters then lie where they stay.
    """
    # What ``auto`` would try beside threads and GPUDirect is DeepSpeed's.
    offload = make_offload_together(config, model, auto="threads")
    block = megatron_block(config)
    if offload is not None and block.recompute == "selective" and "layernorm" in block.recompute_modules:
        for chunk in model.chunks:
            decoder: Any = chunk.decoder
            for layer in decoder.layers:
                for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
                    norm.register_forward_hook(_keep)
    return ScheduledOffload(offload, model, num_micro_batches)


def _keep(norm: nn.Module, inputs: Any, output: Tensor) -> None:
    """Megatron frees what the norm gave as soon as it was used: a thread must not be writing it meanwhile."""
    keep_in_memory(output)
