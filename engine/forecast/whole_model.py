"""The passes of engines that run transformers' model as it is."""

import copy
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from narrowgauge.offload.saving.graph import read_ahead
from narrowgauge.offload.saving.recompute import RecomputedLayers, transformer_layers
from narrowgauge.optimizers.layers.compact import compact_units

from ..config.config import Config
from ..errors import UserError, first_line
from ..offload.attach import check_codec
from .encoded import Encoder
from .passes import NUM_TRACED, Passes, are_alike, shorten, trace, without_contents
from .subject import Subject, subject_of

_FEW = 2


class Traces:
    """Subjects and passes of transformers' models, each found once.

    Args:
        of_many: many sizes of the micro-batch will be asked for; those of more than three sequences follow from two and
            three then.
    """

    def __init__(self, *, of_many: bool = False) -> None:
        self._of_many = of_many
        self._subjects: dict[str, Subject] = {}
        self._passes: dict[str, Passes] = {}

    def subject(self, config: Config, model_config: PretrainedConfig) -> Subject:
        """See :func:`~.subject.subject_of`; its model stays as it is."""
        key = _key(config, "optimizer", "bf16", "lora")
        if key not in self._subjects:
            self._subjects[key] = subject_of(config, model_config)
        return self._subjects[key]

    def passes(self, config: Config, model_config: PretrainedConfig, micro: int) -> Passes:
        """A micro-batch's passes.

        Raises:
            UserError: the model cannot be run without contents, as where routing decides the shapes.
        """
        if micro <= _FEW + 1 or not self._of_many:
            return self._traced(config, model_config, micro)
        few, more = (self._traced(config, model_config, number) for number in (_FEW, _FEW + 1))
        if len(few.offloadable) != len(more.offloadable):
            # More of the storages are large enough.
            return self._traced(config, model_config, micro)
        return few.towards(more, micro - _FEW)

    def of_rank(
        self, config: Config, model_config: PretrainedConfig, world_size: int
    ) -> tuple[Subject, Passes, tuple[int, int]]:
        """What each of so many data-parallel ranks trains, a micro-batch's passes, and :func:`offloaded_of` them."""
        subject = self.subject(config, model_config)
        passes = self.passes(config, model_config, config.batches(world_size).micro)
        return subject, passes, offloaded_of(config, passes)

    def _traced(self, config: Config, model_config: PretrainedConfig, micro: int) -> Passes:
        key = f"{micro} {_key(config, 'optimizer', 'bf16', 'lora', 'model', 'activation_offload')}"
        if key not in self._passes:
            layers = stack_of(self.subject(config, model_config).model)
            self._passes[key] = _passes_of(config, _shortened(model_config, layers), len(layers or ()), micro)
        return self._passes[key]


def _key(config: Config, *blocks: str) -> str:
    return json.dumps({block: config.raw.get(block) for block in blocks}, sort_keys=True)


def _shortened(model_config: PretrainedConfig, layers: nn.ModuleList | None) -> PretrainedConfig:
    """The configuration of a model of a few layers, where all are alike."""
    if layers is None or len(layers) <= NUM_TRACED or not are_alike(layers):
        return model_config
    short: Any = copy.deepcopy(model_config)
    short.num_hidden_layers = NUM_TRACED
    if getattr(short, "layer_types", None):
        short.layer_types = short.layer_types[:NUM_TRACED]
    return short


def _passes_of(config: Config, model_config: PretrainedConfig, num_layers: int, micro: int) -> Passes:
    assert config.parsed.model is not None
    assert config.parsed.data is not None
    length, offload = config.parsed.data.sequence_length, config.offload()
    model = subject_of(config, model_config).model
    check_codec(config, model)
    layers = stack_of(model)
    shorten(layers)
    recomputed = encoder = None
    if config.parsed.model.gradient_checkpointing != "none":
        enable: Callable[..., Any] = model.gradient_checkpointing_enable
        enable({"use_reentrant": config.parsed.model.gradient_checkpointing == "reentrant"})
    if offload is not None and offload.granularity == "layer_inputs":
        recomputed = RecomputedLayers(model, None)
    if offload is not None and offload.codec != "none":
        encoder = Encoder(model, offload)
    model.train()
    units = list(compact_units(model))
    try:
        with without_contents(model, units):
            tokens = torch.zeros(micro, length, dtype=torch.long)

            def run() -> Tensor:
                return model(input_ids=tokens, labels=tokens).loss

            return trace(
                model,
                layers,
                run,
                [tokens],
                units=units,
                num_layers=num_layers,
                min_offloaded=offload.min_tensor_bytes if offload is not None else None,
                only_layer_inputs=recomputed is not None,
                encoder=encoder,
            )
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, ValueError) as error:
        kind = type(error).__name__
        raise UserError(f"model: its passes cannot be told ahead: {kind}: {first_line(error)}") from error
    finally:
        if encoder is not None:
            encoder.close()
        if recomputed is not None:
            recomputed.restore()


def stack_of(model: nn.Module) -> nn.ModuleList | None:
    """The model's list of layers, where it has exactly one."""
    with suppress(ValueError):
        found = set(map(id, transformer_layers(model)))
        stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and {id(layer) for layer in m} == found]
        return stacks[0] if stacks else None
    return None


def offloaded_of(config: Config, passes: Passes) -> tuple[int, int]:
    """Bytes of a micro-batch that go to the drive where it is fast enough, and those of the buffers for reading."""
    options = config.offload()
    if options is None or options.path is None:
        return 0, 0
    sizes, total = passes.offloadable, sum(passes.offloadable)
    keep = 0.0 if options.keep_resident == "auto" else float(options.keep_resident)
    buffers = options.buffer_bytes if options.buffer_bytes is not None else read_ahead(sizes, total)
    moved = max(0, round((1.0 - keep) * total) - options.host_memory_bytes)
    return moved, min(buffers, moved)
