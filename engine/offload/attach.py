"""Activation offload in an engine: made from the configuration, on all ranks or on none."""

from collections.abc import Callable
from contextlib import suppress

from torch import nn

from narrowgauge.offload import ActivationOffload, OffloadError
from narrowgauge.offload.activation_offload import check_room
from narrowgauge.offload.backends import BACKENDS
from narrowgauge.offload.backends.registry import AUTO
from narrowgauge.offload.saving.places import served_modules

from ..config.config import Config
from ..config.redaction import redact
from ..errors import ConfigError, UserError
from ..ranks.agreement import agree


def check_offload(config: Config) -> None:
    """What can be known before there is a model: the folders can be written to and have room.

    Raises:
        ConfigError: naming the folder, what is expected and what was found.
    """
    options = config.offload()
    if options is None:
        return
    backend = BACKENDS.get(str(options.backend))
    reason = backend.unbuildable_because() if backend is not None else None
    if reason is not None:
        raise config.error(f"activation_offload.backend: {options.backend}: {reason}")
    if options.path is None:
        return
    try:
        check_room(options.path, options.capacity_bytes)
    except OffloadError as error:
        raise config.error(f"activation_offload.path: {error}") from error


def check_codec(config: Config, model: nn.Module) -> None:
    """What can be known of a codec from the model, which may be without storage.

    Raises:
        ConfigError: naming the key, what is expected and what was found.
    """
    options, block = config.offload(), config.parsed.model
    if options is None or options.codec == "none":
        return
    if config.parsed.quantization is not None:
        raise config.error(
            f"activation_offload.codec: expected 'none' with quantization, got {options.codec!r}: quantised"
            " weights would be encoded as activations"
        )
    if options.granularity == "layer_inputs":
        return
    if options.codec_modules is None and block is not None and block.gradient_checkpointing != "none":
        raise config.error(
            f"activation_offload.codec: expected granularity 'layer_inputs', or codec_modules, with"
            f" model.gradient_checkpointing, got {options.codec!r} alone: only the layers' inputs are saved"
        )
    try:
        served_modules(model, options.codec_modules)
    except ValueError as error:
        raise config.error(f"activation_offload.{error}") from error


def make_offload(config: Config, model: nn.Module, *, auto: str = AUTO) -> ActivationOffload | None:
    """The offload that the configuration asks for.

    Args:
        auto: the I/O backend that is taken for ``auto``.

    Raises:
        ConfigError: it cannot be made.
    """
    options = config.offload()
    if options is None:
        return None
    if type(model).__name__ == "PipelineModule":
        raise config.error("activation_offload: pipeline parallelism is not supported yet")
    check_offload(config)
    chosen = auto if options.backend == AUTO and options.path is not None else options.backend
    try:
        return ActivationOffload(**{**vars(options), "backend": chosen}, model=model)
    except (OffloadError, ValueError) as error:
        raise config.error(f"activation_offload: {error}") from error


def make_offload_together(
    config: Config, model: nn.Module, *, auto: str = AUTO, first: Callable[[], object] = lambda: None
) -> ActivationOffload | None:
    """This rank's :func:`make_offload`, once all ranks have theirs and agree on the configuration. Collective.

    Args:
        first: what is done before it, and may fail as it may.

    Raises:
        UserError: some rank could not make it, or the ranks' configurations differ; the same on every rank.
    """
    offload, problem = None, None
    try:
        first()
        offload = make_offload(config, model, auto=auto)
    except ConfigError as error:
        problem = str(error)
    except Exception as fault:
        # A fault of ours: this rank shows where it is, the others would wait for it.
        with suppress(UserError):
            agree(redact(config.raw), error=f"{type(fault).__name__}: {fault}")
        raise
    try:
        agree(redact(config.raw), error=problem)
    except BaseException:
        if offload is not None:
            offload.close()
        raise
    return offload
