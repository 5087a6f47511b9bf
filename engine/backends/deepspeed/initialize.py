"""``initialize``: as ``deepspeed.initialize``, with compact optimizers beside DeepSpeed's own."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context
from torch import nn

from narrowgauge.optimizers import EngineOptimizer
from narrowgauge.optimizers.options import Options

from ...config.config import Config, load_config
from ...config.optimizer_params import make_optimizer
from ...offload.attach import make_offload_together
from ...ranks.agreement import make_process_group
from ...ranks.environment import ensure_environment, process_rank
from .call import ConfigLike, args_of, check_trained, config_of, group_by
from .curriculum import check_curriculum, keep_curriculum
from .engine import Engine
from .extensions import ensure_extensions
from .fp32 import warn_of_fp32
from .gradients import mend_updates
from .keys import FORCED
from .leaves import gather_stacks_at_once
from .loading import follow_loads
from .offload import attach_offload
from .privates import configure_python_gc, forget_autocast, keep_autocast, release_destroyed_groups
from .schedules import momentum_note, per_group_rates, take_torch_schedule
from .subspace import GatherOnceBackend
from .supported import check_installed, check_offload_supported, check_supported

# Engine, optimizer, data loader and schedule, as DeepSpeed returns them.
_Made = tuple[Any, Any, Any, Any]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[..., Any] | None = None,
    model_parameters: Any = None,
    training_data: torch.utils.data.Dataset[Any] | None = None,
    lr_scheduler: Any = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: ConfigLike | None = None,
    mesh_param: tuple[int, int] | None = None,
    config_params: ConfigLike | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Make an engine from a model and a DeepSpeed configuration.

    With ``"optimizer": {"type": "Grass", "params": {...}}``, or another of :mod:`narrowgauge.optimizers`, the model is
    trained by it under ZeRO; compact ones convert the model's linear layers in place. With any other optimizer this is
    ``deepspeed.initialize`` behind a check of the whole configuration. Everything that can be checked is checked
    before a process group exists.

    Args:
        args: with ``deepspeed_config``, a JSON file, in the place of ``config``; ``local_rank`` must be the launcher's.
        model: not yet wrapped; may have been built under ``deepspeed.zero.Init``.
        optimizer: a client optimizer instead of the configuration's; may be one of ours made from this model.
        model_parameters: parameters, or groups of them with options of their own. With our optimizers those that are
            left out are frozen, and a warning names them.
        distributed_port: the rendezvous' port where the launcher set no ``MASTER_PORT``.
        config: a JSON file or a dict; blocks of ``narrowgauge train`` in it are ignored.
        mesh_param: DeepSpeed's data-parallel and sequence-parallel sizes; the second is 1 with our optimizers.
        config_params: an older name of ``config``.
        training_data, lr_scheduler, mpu, dist_init_required, collate_fn: as in ``deepspeed.initialize``.

    An ``"activation_offload"`` block keeps what the engine's forwards save for backward on NVMe (see
    :class:`narrowgauge.offload.ActivationOffload`), with any optimizer; the object is ``engine.activation_offload``.

    Returns:
        ``(engine, optimizer, dataloader, lr_scheduler)``.

    Raises:
        ConfigError: the configuration does not hold, or a setting does not work with our optimizers.
        UserError: the process ranks' configurations differ.
        ValueError: the optimizer's options do not fit the model.
    """
    found = config_of(args, config, config_params)
    checked = found if isinstance(found, Config) else load_config(found)
    if not isinstance(model, nn.Module):
        raise checked.error(f"model: expected an nn.Module, got {model!r}")
    check_installed(checked)
    args = args_of(args)
    if lr_scheduler is None and (note := momentum_note(checked.raw)) is not None and process_rank() == 0:
        warnings.warn(note, stacklevel=2)
    if distributed_port is not None:
        os.environ.setdefault("MASTER_PORT", str(distributed_port))
    if training_data is not None:
        check_curriculum(checked)
    ensure_environment()
    client = optimizer if isinstance(optimizer, EngineOptimizer) else None
    ours = client is not None or checked.optimizer_options is not None
    if ours and optimizer is not None and checked.parsed.optimizer is not None:
        raise checked.error("optimizer: an optimizer was passed to initialize, and the configuration names another")
    if client is not None and not _is_made_from(client, model):
        raise checked.error(
            f"optimizer: the {type(client).__name__} that was passed to initialize was made from another model"
        )
    if checked.zero_stage == 3:
        gather_stacks_at_once(model)
    arguments = {
        "args": args,
        "model": model,
        "training_data": training_data,
        "lr_scheduler": lr_scheduler,
        "dist_init_required": dist_init_required,
        "collate_fn": collate_fn,
    }
    if not ours:
        with _offload_for(checked, model) as attach:
            if checked.unused_params() and process_rank() == 0:
                warnings.warn(checked.unused_params_note(), stacklevel=2)
            settings = checked.engine_settings()
            make_schedule = take_torch_schedule(checked, settings)
            arguments["lr_scheduler"] = lr_scheduler or make_schedule
            forget_autocast()
            try:
                made = deepspeed.initialize(
                    config=settings,
                    optimizer=optimizer,
                    model_parameters=model_parameters,
                    mpu=mpu,
                    mesh_param=mesh_param,
                    **arguments,
                )
            except (AssertionError, TypeError) as error:
                raise checked.error(f"refused by DeepSpeed: {error}").shared() from error
            _mend(made[0])
            warn_of_fp32(checked, made[0])
            return attach(made)
    check_supported(checked, model, mpu, client=client)
    if mesh_param is not None and mesh_param[1] != 1:
        raise checked.error(f"mesh_param: expected a sequence-parallel size of 1 with our optimizers, got {mesh_param}")
    options = checked.optimizer_options
    if model_parameters is not None and client is not None:
        check_trained(checked, model, client, model_parameters)
    elif model_parameters is not None and options is not None:
        options = group_by(checked, model, model_parameters, options)
    shutdown_init_context()
    try:
        own = client or _make_optimizer(model, checked, options)
        with _offload_for(checked, model) as attach:
            return attach(_make_engine(checked, own, **arguments))
    finally:
        restore_init_context()


def _is_made_from(optimizer: EngineOptimizer, model: nn.Module) -> bool:
    parameters = set(map(id, model.parameters()))
    return all(id(p) in parameters for group in optimizer.param_groups for p in group["params"])


@contextmanager
def _offload_for(config: Config, model: nn.Module) -> Iterator[Callable[[_Made], _Made]]:
    """Build what is loaded, make this rank's activation offload, and meet the other ranks; gives what attaches it."""

    def build_and_check() -> None:
        ensure_extensions(config)
        check_offload_supported(config)

    offload = make_offload_together(config, model, first=build_and_check)

    def attach(made: _Made) -> _Made:
        if offload is not None:
            attach_offload(made[0], offload)
        return made

    try:
        yield attach
    except BaseException:
        if offload is not None:
            offload.close()
        raise


def init_distributed(dist_init_required: bool | None = None) -> None:
    """Make DeepSpeed's process group, if there is none, without its notice of an extension that was built ahead."""
    release_destroyed_groups()
    backend = get_accelerator().communication_backend_name()  # pyright: ignore[reportOptionalMemberAccess]
    make_process_group(str(backend), default_pg_timeout)
    with redirect_stdout(StringIO()):
        deepspeed.init_distributed(dist_backend=backend, dist_init_required=dist_init_required, verbose=False)


def _make_optimizer(model: nn.Module, config: Config, options: Options | None) -> EngineOptimizer:
    block = config.parsed.optimizer
    assert options is not None
    assert block is not None
    under_zero_init = any(hasattr(p, "ds_id") for p in model.parameters())
    with config.blames("optimizer.params"):
        return make_optimizer(block.type, model, options, GatherOnceBackend() if under_zero_init else None)


def _make_engine(
    config: Config, optimizer: EngineOptimizer, *, dist_init_required: bool | None, **arguments: Any
) -> _Made:
    settings = {key: value for key, value in config.engine_settings().items() if key != "optimizer"}
    settings |= FORCED
    if settings.get("scheduler"):
        settings["scheduler"] = per_group_rates(config, settings["scheduler"], optimizer)
    make_schedule = take_torch_schedule(config, settings)
    arguments["lr_scheduler"] = arguments["lr_scheduler"] or make_schedule
    init_distributed(dist_init_required)
    forget_autocast()
    engine = Engine(
        optimizer=optimizer,
        config=settings,
        config_class=DeepSpeedConfig(settings),
        dist_init_required=dist_init_required,
        **arguments,
    )
    configure_python_gc(engine)
    _mend(engine)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _mend(engine: DeepSpeedEngine) -> None:
    """What DeepSpeed does otherwise than it says, whoever's the optimizer is."""
    keep_autocast(engine)
    mend_updates(engine)
    follow_loads(engine)
    keep_curriculum(engine)
