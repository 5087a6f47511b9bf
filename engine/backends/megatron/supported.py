"""What the ``megatron`` engine refuses before anything starts."""

from collections.abc import Iterator

import torch
from transformers import PretrainedConfig

from ...config.config import Config
from ...config.problems import within
from ...config.without_deepspeed import adam_arguments
from ...data.examples import names_records
from .architecture import Architecture, architecture_of
from .compact.supported import unsupported, unsupported_model
from .fits import problems_of_layout
from .globs import problems_of_globs
from .installed import has_transformer_engine, not_usable_because, other_apex, show_its_warnings_less
from .kernels import can_use_transformer_engine
from .keys import layout_of, megatron_block
from .layout import Layout
from .zero import supported as zero


def check(config: Config) -> None:
    """See :meth:`narrowgauge.engine.protocol.Backend.check`."""
    if (reason := not_usable_because()) is not None:
        raise config.error(f"engine: megatron: {reason}")
    if (place := other_apex()) is not None:
        raise config.error(
            f"engine: megatron: expected NVIDIA's apex or none, got another package of that name in {place}, which"
            " Megatron takes for it: uninstall it (narrowgauge doctor says how)"
        )
    show_its_warnings_less()
    if problems := [*_settings(config), *zero.unsupported_settings(config), *_optimizer(config)]:
        raise config.error(*problems)


def _settings(config: Config) -> Iterator[str]:
    block, parsed = megatron_block(config), config.parsed
    if block.fp8:
        yield (
            "megatron.fp8: expected false, got true: it needs linear layers of Transformer Engine's, and this engine's"
            " are Megatron's own, which compact parameters and checkpoints of any layout can be made of"
        )
    if block.grouped_experts and not (block.transformer_engine and can_use_transformer_engine()):
        off = "megatron.transformer_engine" if can_use_transformer_engine() else "a GPU"
        missing = off if has_transformer_engine() else "Transformer Engine, which is not installed"
        yield (
            "megatron.grouped_experts: expected false, got true: one product of all experts of a layer needs"
            f" {missing}; without it they run one after the other"
        )
    if block.overlap_param_gather and not (block.distributed_optimizer and block.overlap_grad_reduce):
        yield (
            "megatron.overlap_param_gather: expected distributed_optimizer and overlap_grad_reduce with it, got one of"
            " them off"
        )
    if block.virtual_pipeline > 1 and block.pipeline_parallel == 1:
        yield (
            f"megatron.virtual_pipeline: expected 1 without pipeline_parallel, got {block.virtual_pipeline}: there are"
            " no stages to interleave"
        )
    if block.sequence_parallel and block.tensor_parallel == 1:
        yield "megatron.sequence_parallel: expected tensor_parallel > 1 with it, got 1: nothing shares the sequence"
    given = config.raw.get("megatron", {})
    for key, kind in (("recompute_layers", "full"), ("recompute_modules", "selective")):
        if key in given and block.recompute != kind:
            yield f"megatron.{key}: expected recompute {kind!r} with it, got {block.recompute!r}"
    if block.recompute == "selective" and not block.recompute_modules:
        yield "megatron.recompute_modules: expected one at least with recompute 'selective', got []"
    if parsed.model is not None and parsed.model.gradient_checkpointing != "none":
        yield (
            "model.gradient_checkpointing: expected 'none' with the megatron engine, got"
            f" {parsed.model.gradient_checkpointing!r}; use megatron.recompute"
        )
    options = config.offload()
    if options is not None and options.granularity != "saved_tensors":
        yield (
            f"activation_offload.granularity: expected 'saved_tensors' with the megatron engine, got"
            f" {options.granularity!r}; under megatron.recompute 'full' the layers' inputs are what is saved"
        )
    if options is not None and options.codec != "none":
        yield (
            f"activation_offload.codec: expected 'none' with the megatron engine, got {options.codec!r}: what its"
            " parallel layers save is known by no module's name"
        )
    if options is not None and options.backend == "aio":
        yield (
            "activation_offload.backend: expected auto, threads or gds with the megatron engine, got aio: it is"
            " DeepSpeed's"
        )


def _optimizer(config: Config) -> Iterator[str]:
    if config.optimizer_options is not None:
        yield from unsupported(config)
    elif config.parsed.optimizer is not None:
        arguments = config.engine_settings()["optimizer"].get("params", {})
        try:
            torch.optim.AdamW([torch.empty(0, requires_grad=True)], **adam_arguments(arguments))
        except (ValueError, TypeError) as error:
            yield within("optimizer.params", str(error))


def check_model(config: Config, model_config: PretrainedConfig, world_size: int) -> None:
    """See :meth:`narrowgauge.engine.protocol.Backend.check_model`."""
    layout, data = layout_of(config, world_size), config.parsed.data
    sequence_length = data.sequence_length if data is not None else None
    try:
        architecture = architecture_of(model_config, sequence_length)
    except ValueError as error:
        raise config.error(*(f"model: {line}" for line in str(error).splitlines())) from error
    batches = config.batches(layout.data)
    problems = problems_of_layout(
        architecture, layout, sequence_length=sequence_length, accumulation_steps=batches.accumulation_steps
    )
    if problems:
        raise config.error(*(f"megatron.{problem}" for problem in problems))
    found = [
        *_of_experts(config, architecture),
        *_of_recompute(config, architecture, layout),
        *zero.unsupported_model(config, architecture),
    ]
    if config.optimizer_options is not None:
        found += unsupported_model(config, architecture, layout)
        problems = problems_of_globs(config.optimizer_options, architecture, layout)
        found += [f"optimizer.params.{problem}" for problem in problems]
    if found:
        raise config.error(*found)


def _of_recompute(config: Config, architecture: Architecture, layout: Layout) -> Iterator[str]:
    block = megatron_block(config)
    size = architecture.num_layers // (layout.pipeline * layout.chunks)
    if block.recompute == "full" and size % block.recompute_layers:
        where = "each stage has" if layout.chunks == 1 else "each piece of a stage has"
        yield (
            f"megatron.recompute_layers: expected a divisor of the {size} layers that {where}, got"
            f" {block.recompute_layers}"
        )
    if block.recompute == "selective" and "moe" in block.recompute_modules and not architecture.num_experts:
        yield "megatron.recompute_modules: expected no 'moe' for a model without experts"
    if block.recompute == "selective" and "mlp" in block.recompute_modules and architecture.num_experts:
        yield "megatron.recompute_modules: expected 'moe' for a model with experts, got 'mlp', which it has none of"


def _of_experts(config: Config, architecture: Architecture) -> Iterator[str]:
    """Settings that the model has nothing for, or that would see padding."""
    block, data = megatron_block(config), config.parsed.data
    if data is not None and names_records(data):
        for key, expected in (("balance_loss", "none"), ("expert_capacity_factor", None)):
            if (found := getattr(block, key)) != expected:
                yield (
                    f"megatron.{key}: expected {expected!r} with records, got {found!r}: experts take what pads samples"
                    " to one length, too, and that would count"
                )
    if not architecture.num_experts:
        for key in ("balance_loss", "expert_dispatcher", "expert_capacity_factor", "grouped_experts"):
            found, default = getattr(block, key), type(block).model_fields[key].default
            if found != default:
                yield f"megatron.{key}: expected {default!r} for a model without experts, got {found!r}"
    elif block.balance_loss != "none" and not architecture.balance_coefficient > 0.0:
        yield (
            "megatron.balance_loss: expected a model whose router_aux_loss_coef is above 0 with"
            f" {block.balance_loss!r}, got {architecture.balance_coefficient}"
        )
