"""Hugging Face's ``Trainer``, and TRL's made from it: narrowgauge's optimizers and activation offload by one call."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields
from typing import Any, TypeVar

import torch
from transformers import Trainer, TrainerCallback

from narrowgauge.engine.config.config import Config, load_config
from narrowgauge.engine.config.optimizer_params import make_optimizer
from narrowgauge.engine.config.problems import within
from narrowgauge.engine.errors import ConfigError
from narrowgauge.engine.offload.attach import make_offload_together
from narrowgauge.offload import ActivationOffload
from narrowgauge.optimizers import OPTIMIZERS, EngineOptimizer

from .accelerate import deepspeed_config, prepare_accelerator, ranks_problem

TrainerT = TypeVar("TrainerT", bound=Trainer)
_PLACE = "prepare_trainer"


def prepare_trainer(
    trainer: TrainerT,
    *,
    optimizer: Mapping[str, Any] | None = None,
    activation_offload: Mapping[str, Any] | None = None,
) -> TrainerT:
    """Let a Trainer, or one derived from it such as TRL's ``SFTTrainer``, train with narrowgauge.

    Call it once, before ``trainer.train()``. Works on one process, under DistributedDataParallel and with a DeepSpeed
    file, which may name the optimizer itself (``"optimizer": {"type": "Grass", ...}``) and hold an
    ``activation_offload`` block. ``lr``, ``betas``, ``eps`` and ``weight_decay`` that ``params`` leaves out or calls
    ``"auto"`` are those of the ``TrainingArguments``, and so is ``gradient_clipping`` in the DeepSpeed file.

    Args:
        trainer: made, not yet trained.
        optimizer: ``{"type": name, "params": options}``, one of :mod:`narrowgauge.optimizers`, as in a DeepSpeed file.
            Without it the DeepSpeed file's, or the one passed to the Trainer, is used.
        activation_offload: the options of :class:`narrowgauge.offload.ActivationOffload`, as in a DeepSpeed file.

    Returns:
        The same trainer.

    Raises:
        ConfigError: something that is asked for would not work or not be used; names the setting. What only shows with
            the model and the number of steps raises in ``trainer.train()``, before the first step.
    """
    if hasattr(trainer, "narrowgauge"):
        raise ConfigError(_PLACE, ["expected a Trainer that is not prepared yet, got one that is"])
    blocks = {"optimizer": optimizer, "activation_offload": activation_offload}
    asked = {key: dict(block) for key, block in blocks.items() if block is not None}
    if trainer.is_deepspeed_enabled:
        prepared = _prepare_with_deepspeed(trainer, asked)
    else:
        prepared = _prepare_alone(trainer, asked)
    vars(trainer)["narrowgauge"] = prepared
    trainer.add_callback(prepared)
    return trainer


class _Prepared(TrainerCallback):
    """Checks, once everything is made and nothing is trained, that it is what was asked for.

    Args:
        expected: the name of the optimizer, if it is one of ours.

    Attributes:
        activation_offload: that of the last ``train()``.
    """

    activation_offload: ActivationOffload | None = None

    def __init__(self, trainer: Trainer, expected: str | None) -> None:
        self.trainer, self.expected = trainer, expected

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = self.optimizer()
        if self.expected is not None and getattr(found, "type_name", None) != self.expected:
            raise ConfigError(
                _PLACE,
                [f"optimizer: expected {self.expected} to train, got {type(found).__name__}: was the Trainer changed?"],
            )

        self.activation_offload = getattr(self.trainer.model_wrapped, "activation_offload", None)

    def optimizer(self) -> Any:
        """The optimizer below Accelerate's and DeepSpeed's wrappers."""
        found = getattr(self.trainer.model_wrapped, "own_optimizer", self.trainer.optimizer)
        while (inner := getattr(found, "optimizer", None)) is not None:
            found = inner
        return found


class _Alone(_Prepared):
    """Without DeepSpeed: makes the optimizer, and offloads what the loss saves for backward."""

    def __init__(self, trainer: Trainer, config: Config, expected: str | None) -> None:
        super().__init__(trainer, expected)
        self._config = config
        if config.optimizer_options is not None:
            vars(trainer)["create_optimizer"] = self.create_optimizer
        if config.offload() is not None:
            self._loss_context = trainer.compute_loss_context_manager
            vars(trainer)["compute_loss_context_manager"] = self.compute_loss_context_manager

    def create_optimizer(self, model: Any = None) -> Any:
        """In the place of the Trainer's, which calls it when the model is on its device and not yet wrapped."""
        trainer, config = self.trainer, self._config
        if trainer.optimizer is None:
            block = config.parsed.optimizer
            assert block is not None
            assert config.optimizer_options is not None
            own: Any = trainer.model if model is None else model
            try:
                trainer.optimizer = make_optimizer(block.type, own, config.optimizer_options)
            except ValueError as error:
                raise config.error(within("optimizer.params", str(error))) from error
        return trainer.optimizer

    def compute_loss_context_manager(self) -> ExitStack:
        stack = self._loss_context()
        if self.activation_offload is not None and torch.is_grad_enabled():
            stack.enter_context(self.activation_offload)
        return stack

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        # Of a training that has raised.
        self.on_train_end(args, state, control)
        # DeepSpeed's I/O is for its engine.
        model: Any = self.trainer.model
        self.activation_offload = make_offload_together(self._config, model, auto="threads")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.activation_offload is not None:
            self.activation_offload.close()


def _prepare_alone(trainer: Trainer, asked: dict[str, dict[str, Any]]) -> _Prepared:
    passed = trainer.optimizer
    if not asked and not isinstance(passed, EngineOptimizer):
        raise ConfigError(_PLACE, ["expected optimizer, activation_offload or a DeepSpeed file, got none"])
    problems = _problems(trainer, is_ours="optimizer" in asked or isinstance(passed, EngineOptimizer), asked=asked)
    if "optimizer" in asked:
        problems += _named(asked["optimizer"])
        if passed is not None:
            problems.append(f"optimizer: expected it here or in the Trainer's optimizers, got both ({_name(passed)})")
    if problems:
        raise ConfigError(_PLACE, problems)
    if "optimizer" in asked:
        asked["optimizer"] = _filled(asked["optimizer"], trainer.args)
    config = load_config({"engine": "ddp", **asked})
    expected = config.parsed.optimizer.type if config.parsed.optimizer is not None else None
    if isinstance(passed, EngineOptimizer):
        expected = passed.type_name
    return _Alone(trainer, config, expected)


def _prepare_with_deepspeed(trainer: Trainer, asked: dict[str, dict[str, Any]]) -> _Prepared:
    settings = deepspeed_config(trainer.accelerator)
    problems = [
        f"{key}: expected it here or in the DeepSpeed file, got both" for key in asked if settings.get(key) is not None
    ]
    for key, found in {"optimizer": trainer.optimizer, "lr_scheduler": trainer.lr_scheduler}.items():
        if found is not None:
            problems.append(
                f"{key}: expected none in the Trainer's optimizers with a DeepSpeed file, got {_name(found)}, which the"
                f" Trainer drops: name it in the file, or in {_PLACE}"
            )
    if "optimizer" in asked:
        problems += _named(asked["optimizer"])
    block = settings.get("optimizer") or asked.get("optimizer")
    is_ours = block is not None and block.get("type") in OPTIMIZERS
    problems += _problems(trainer, is_ours=is_ours, asked={**settings, **asked})
    if problems:
        raise ConfigError(_PLACE, problems)
    settings.update(asked)
    if block is not None and is_ours:
        settings["optimizer"] = _filled(block, trainer.args)
    settings.setdefault("gradient_clipping", trainer.args.max_grad_norm)
    prepare_accelerator(trainer.accelerator)
    return _Prepared(trainer, block["type"] if block is not None and is_ours else None)


def _problems(trainer: Trainer, *, is_ours: bool, asked: Mapping[str, Any]) -> list[str]:
    """What does not work together, ``setting: why`` each."""
    args: Any = trainer.args
    optim = str(getattr(args.optim, "value", args.optim))
    found = {
        "activation_offloading": getattr(args, "activation_offloading", False) and "activation_offload" in asked,
        "fsdp": trainer.is_fsdp_enabled and bool(asked),
        "loss_type": "activation_offload" in asked
        and getattr(args, "loss_type", None) in ("nll", "chunked_nll")
        and trainer.is_deepspeed_enabled
        and deepspeed_config(trainer.accelerator)["zero_optimization"]["stage"] == 3,
    }
    reasons = {
        "activation_offloading": "it is TRL's, beside narrowgauge's activation_offload: one is allowed",
        "loss_type": f"at ZeRO-3 TRL's {getattr(args, 'loss_type', None)} looks for the head's parameter where"
        " activation_offload keeps a tensor: one of both is allowed",
        "fsdp": "not supported: use DistributedDataParallel or DeepSpeed",
        "fp16": "not supported with our optimizers: use bf16",
        "auto_find_batch_size": "not supported with our optimizers: the model would be converted again",
        "optim": f"{optim} is another optimizer; leave the default",
        "optimizer_cls_and_kwargs": "it is another optimizer",
        "create_optimizer": f"{type(trainer).__name__} has one of its own, which would not be called",
        "n_gpu": f"expected one GPU per process, got {args.n_gpu}: start the script with torchrun",
        "distributed_config": "the model was cut while it was loaded",
        "parallelism_config": "tensor, context and sequence parallelism are not supported",
    }
    if is_ours:
        parallelism = getattr(trainer.accelerator, "parallelism_config", None)
        found |= {
            "fp16": bool(args.fp16),
            "auto_find_batch_size": bool(args.auto_find_batch_size),
            "optim": optim not in ("adamw_torch", "adamw_torch_fused"),
            "optimizer_cls_and_kwargs": trainer.optimizer_cls_and_kwargs is not None,
            "create_optimizer": type(trainer).create_optimizer is not Trainer.create_optimizer,
            "n_gpu": args.n_gpu > 1 and not trainer.is_deepspeed_enabled,
            "distributed_config": trainer.is_distributed_loading_by_transformers,
            "parallelism_config": parallelism is not None and parallelism.total_size > parallelism.data_parallel_size,
        }
    ranks = ranks_problem(args.world_size)
    return [f"{key}: {reasons[key]}" for key, is_found in found.items() if is_found] + ([ranks] if ranks else [])


def _named(block: Mapping[str, Any]) -> list[str]:
    name = block.get("type")
    return [] if name in OPTIMIZERS else [f"optimizer.type: expected one of {', '.join(OPTIMIZERS)}, got {name!r}"]


def _filled(block: Mapping[str, Any], args: Any) -> dict[str, Any]:
    """The optimizer's block with what the ``TrainingArguments`` say.

    Raises:
        ConfigError: both say something else.
    """
    options = {field.name for field in fields(OPTIMIZERS[block["type"]].options_type)}
    said = {
        "lr": args.learning_rate,
        "betas": [args.adam_beta1, args.adam_beta2],
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }
    params = dict(block.get("params", {}))
    problems = []
    for key, value in said.items():
        if key not in options:
            continue
        found = params.get(key, "auto")
        if found == "auto":
            params[key] = value
        elif (list(found) if key == "betas" else found) != value:
            problems.append(f"optimizer.params.{key}: expected what the TrainingArguments say, {value}, got {found}")
    if problems:
        raise ConfigError(_PLACE, problems)
    return {**block, "params": params}


def _name(value: Any) -> str:
    return getattr(value, "type_name", type(value).__name__)
