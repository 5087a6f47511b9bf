"""One JSON describes a run: DeepSpeed's keys plus ``model``, ``data``, ``training`` and ``logging``.

The whole file is checked at once, every key at every depth, before anything is built.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from narrowgauge.offload import OffloadOptions

from ..errors import ConfigError, did_you_mean
from .deepspeed_keys import (
    Count,
    DeepSpeedKeys,
    Flag,
    StrictBlock,
    optimizer_parameters,
    scheduler_parameters,
    scheduler_requirements,
)
from .json_file import apply_overrides, read_json
from .launch_block import LaunchBlock
from .offload_block import ActivationOffloadBlock
from .optimizer_params import OUR_ONLY, OUR_OPTIMIZERS, OptimizerParams
from .redaction import HIDDEN, redact

OWN_BLOCKS = ("model", "data", "training", "logging", "launch", "activation_offload")


class ModelBlock(StrictBlock):
    """What is trained: give one of ``path``, ``preset`` and ``config``; ``config`` may also adjust a preset."""

    path: str | None = None
    """A local Hugging Face folder; training starts from its weights."""
    preset: str | None = None
    """The name of a size shipped with the package, such as ``llama-60m``; starts from random weights."""
    config: dict[str, Any] = {}
    """A Hugging Face model configuration, with ``model_type``; starts from random weights."""
    gradient_checkpointing: Literal["none", "reentrant", "non-reentrant"] = "none"

    @model_validator(mode="after")
    def _one_source(self) -> "ModelBlock":
        if self.path is not None and (self.preset is not None or self.config):
            raise ValueError("'path' stands alone: 'preset' and 'config' start from random weights")
        if self.path is None and self.preset is None and not self.config:
            raise ValueError("one of 'path', 'preset' and 'config' is needed")
        return self


class DataBlock(StrictBlock):
    """What it is trained on."""

    train: Literal["stdlib"] | list[str] = "stdlib"
    """``stdlib``: the source files of the running Python's standard library. Otherwise text files, Megatron
    ``.bin``/``.idx``
    pairs (named by either or by their common prefix), or globs of them."""
    validation: list[str] | None = None
    """As ``train``; without it ``validation_fraction`` of the training documents is held out."""
    validation_fraction: float = Field(0.02, gt=0.0, lt=1.0)
    tokenizer: str | None = None
    """A Hugging Face tokenizer folder or a sentencepiece ``.model``; without it one is trained on the text."""
    vocab_size: Count = 4096
    """Of the tokenizer that is trained."""
    sequence_length: int = Field(512, gt=1)
    """Tokens per sample; documents are packed, with an end token after each."""
    cache_dir: str = "~/.cache/narrowgauge"
    num_workers: int = Field(1, ge=0)


class ScheduleBlock(StrictBlock):
    """The learning rate over the run, from transformers."""

    type: Literal["constant", "cosine", "wsd"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int | None = Field(None, gt=0)
    """Of ``wsd``: steps of the final decay; default a fifth of the run."""
    min_lr_ratio: float = Field(0.0, ge=0.0, le=1.0)
    """The last learning rate relative to the highest."""


class TrainingBlock(StrictBlock):
    """How long, and what happens on the way."""

    steps: Count
    seed: int = 0
    lr_schedule: ScheduleBlock | None = None
    eval_interval: Count | None = None
    """Steps between evaluations; there is always one at the end."""
    eval_sequences: Count = 128
    """Validation samples per evaluation, the same ones each time."""
    checkpoint_interval: Count | None = None
    """Steps between checkpoints; there is always one at the end."""
    keep_checkpoints: Count = 2
    hang_timeout: float | None = Field(1800.0, gt=0.0, allow_inf_nan=False)
    """Seconds in which something must get done, a micro-batch or a whole checkpoint, else all ranks end."""
    sample_prompt: str | None = None
    """Text the trained model continues at the end of the run."""
    sample_tokens: Count = 64


class LoggingBlock(StrictBlock):
    """Where the run leaves its traces."""

    run_dir: str = Field(min_length=1)
    interval: Count = 1
    """Steps between lines of ``metrics.jsonl`` and TensorBoard points."""
    tensorboard: Flag = True


class RunConfig(DeepSpeedKeys):
    """The whole file."""

    activation_offload: ActivationOffloadBlock | None = None
    model: ModelBlock | None = None
    data: DataBlock | None = None
    training: TrainingBlock | None = None
    logging: LoggingBlock | None = None
    launch: LaunchBlock | None = None


@dataclass(frozen=True)
class Batches:
    """Sequences per optimizer step, per forward of one rank, and micro-batches per step."""

    total: int
    micro: int
    accumulation_steps: int


@dataclass(frozen=True)
class Config:
    """A checked configuration.

    Attributes:
        source: what messages call it: the file, or ``config``.
        raw: the JSON as given, with overrides applied.
        parsed: the same, typed.
    """

    source: str
    raw: dict[str, Any]
    parsed: RunConfig

    @property
    def zero_stage(self) -> int:
        zero = self.parsed.zero_optimization
        return int(zero.stage) if zero is not None else 0

    @property
    def bf16(self) -> bool:
        return any(block is not None and block.enabled for block in (self.parsed.bf16, self.parsed.bfloat16))

    @property
    def fp16(self) -> bool:
        return self.parsed.fp16 is not None and bool(self.parsed.fp16.enabled)

    def our_params(self) -> OptimizerParams | None:
        """The parameters of an optimizer of ours; None where it is DeepSpeed's or torch's."""
        block = self.parsed.optimizer
        if block is None or block.type not in OUR_OPTIMIZERS:
            return None
        return OUR_OPTIMIZERS[block.type].model_validate(block.params)

    def offload(self) -> OffloadOptions | None:
        """The options of activation offload; None where it is off."""
        block = self.parsed.activation_offload
        return block.options() if block is not None and block.enabled else None

    def unused_params(self) -> list[str]:
        """The ``optimizer.params`` of our optimizers that another type of optimizer does not take."""
        block = self.parsed.optimizer
        if block is None or block.type in OUR_OPTIMIZERS:
            return []
        return [key for key in block.params if key in OUR_ONLY]

    def deepspeed_dict(self) -> dict[str, Any]:
        """The keys that are DeepSpeed's, as given."""
        settings = {key: value for key, value in self.raw.items() if key not in OWN_BLOCKS}
        unused = self.unused_params()
        if unused:
            block = settings["optimizer"]
            params = {key: value for key, value in block["params"].items() if key not in unused}
            settings["optimizer"] = {**block, "params": params}
        return settings

    def batches(self, world_size: int) -> "Batches":
        """The batch sizes, with what is missing derived as DeepSpeed does.

        Raises:
            ConfigError: they do not fit together on this number of ranks.
        """
        parsed = self.parsed
        total, micro, steps = (
            parsed.train_batch_size,
            parsed.train_micro_batch_size_per_gpu,
            parsed.gradient_accumulation_steps,
        )
        if total is None and micro is None:
            raise self.error("train_batch_size or train_micro_batch_size_per_gpu: one of them is needed")
        if micro is None:
            micro = (total or 0) // (world_size * (steps or 1))
        if steps is None:
            steps = 1 if total is None else total // (micro * world_size) if micro else 0
        if total is None:
            total = micro * steps * world_size
        if micro * steps * world_size != total or not total:
            raise self.error(
                f"train_batch_size: {total} found, which is not train_micro_batch_size_per_gpu ({micro}) x"
                f" gradient_accumulation_steps ({steps}) x process ranks ({world_size})"
            )
        return Batches(total, micro, steps)

    def error(self, *problems: str) -> ConfigError:
        return ConfigError(self.source, list(problems))


def load_config(config: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration.

    Args:
        config: a JSON file, or its contents.
        overrides: ``a.b=value`` each, the value in JSON or a bare string.

    Raises:
        ConfigError: the file cannot be read, or any key or value in it is wrong; lists everything found.
    """
    source = "config" if isinstance(config, Mapping) else str(config)
    raw = json.loads(json.dumps(config)) if isinstance(config, Mapping) else read_json(Path(config))
    apply_overrides(raw, overrides)
    problems = list(_autos(raw))
    parsed = None
    try:
        parsed = RunConfig.model_validate(raw)
    except ValidationError as error:
        problems += [_describe(item, RunConfig).lstrip(".") for item in error.errors()]
    if parsed is not None:
        problems += _strings_for_other_types(raw, parsed)
    problems += _check_optimizer_and_scheduler(raw)
    if problems or parsed is None:
        raise ConfigError(source, problems)
    return Config(source, raw, parsed)


def _autos(value: Any, path: str = "") -> Iterable[str]:
    """Hugging Face's Trainer replaces "auto"; here nobody would, and DeepSpeed would silently take its default."""
    if isinstance(value, dict):
        for key, child in value.items():
            if path or key not in OWN_BLOCKS:
                yield from _autos(child, f"{path}.{key}" if path else key)
    elif value == "auto" and path not in ("data_types.keep_in_fp32_modules", "pipeline.stages"):
        yield f"{path}: 'auto' found; it is filled in by Hugging Face's Trainer only, a value is needed here"


def _strings_for_other_types(raw: Any, parsed: Any, path: str = "") -> Iterable[str]:
    """DeepSpeed's own blocks take "False" for false and "3" for 3, other readers of the same file do not."""
    if isinstance(raw, dict) and isinstance(parsed, BaseModel):
        for key, value in raw.items():
            yield from _strings_for_other_types(value, getattr(parsed, key, None), f"{path}.{key}" if path else key)
    elif isinstance(raw, str) and isinstance(parsed, bool | int | float):
        yield f"{path}: the string {json.dumps(raw)} found; {json.dumps(parsed)} is needed"


def _check_optimizer_and_scheduler(raw: dict[str, Any]) -> list[str]:
    problems = []
    optimizer, scheduler = raw.get("optimizer"), raw.get("scheduler")
    if isinstance(optimizer, dict) and isinstance(optimizer.get("type"), str):
        name, params = optimizer["type"], optimizer.get("params", {})
        if name in OUR_OPTIMIZERS:
            schema = OUR_OPTIMIZERS[name]
            try:
                schema.model_validate(params)
            except ValidationError as error:
                problems += [within("optimizer.params", _describe(item, schema)) for item in error.errors()]
        else:
            own = {key: value for key, value in params.items() if key not in OUR_ONLY} if params else {}
            problems += _check_names("optimizer", name, own, optimizer_parameters, lambda _: ())
    if isinstance(scheduler, dict) and isinstance(scheduler.get("type"), str):
        problems += _check_names(
            "scheduler", scheduler["type"], scheduler.get("params", {}), scheduler_parameters, scheduler_requirements
        )
    if isinstance(raw.get("training"), dict) and raw["training"].get("lr_schedule") and scheduler:
        problems.append("training.lr_schedule and scheduler are two learning-rate schedules; one is allowed")
    return problems


def within(block: str, problem: str) -> str:
    """``key: problem``, as optimizers say it of their options, or ``.path: problem``, with the block before it."""
    text = problem.removeprefix(": ")
    is_of_key = text.startswith(".") or re.match(r"\w+: ", text)
    return f"{block}{'' if text.startswith('.') else '.' if is_of_key else ': '}{text}"


def _check_names(block: str, name: str, params: Any, allowed_of: Any, required_of: Any) -> list[str]:
    try:
        allowed = allowed_of(name)
    except ValueError as error:
        return [f"{block}.type: {error}"]
    if allowed is None or not isinstance(params, dict):
        return []
    unknown = [
        f"{block}.params.{key}: unknown key for {name}{did_you_mean(key, allowed)}"
        for key in params
        if key not in allowed
    ]
    needed = [f"{block}.params.{key}: this key is needed for {name}" for key in required_of(name) if key not in params]
    return unknown + needed


def _describe(item: Any, schema: type[BaseModel]) -> str:
    """One of pydantic's errors as ``.path: what was found; what is allowed``."""
    # A union's members add their own names to the path; only keys that are in the file are the user's.
    keys = [key for key in item["loc"] if not (isinstance(key, str) and _is_type_name(key))]
    path = "".join(f".{key}" for key in keys)
    if item["type"] == "extra_forbidden":
        return f"{path}: unknown key{did_you_mean(str(keys[-1]), _names_at(schema, keys[:-1]))}"
    if item["type"] == "missing":
        return f"{path}: this key is needed"
    message = item["msg"].removeprefix("Value error, ")
    found = item["input"]
    is_secret = HIDDEN in str(redact(found, tuple(map(str, keys))))
    is_told = message.startswith("expected ")
    shown = (
        ""
        if is_told or is_secret or isinstance(found, dict | BaseModel)
        else f" {json.dumps(found, default=str)[:60]} found;"
    )
    return f"{path}:{shown} {message[0].lower()}{message[1:]}"


def _is_type_name(key: str) -> bool:
    return key.startswith(("list[", "literal[", "function-")) or key in ("str", "int", "float", "bool")


def _names_at(schema: type[BaseModel], path: Sequence[Any]) -> set[str]:
    """The keys allowed in the object at ``path``."""
    for key in path:
        field = next((f for name, f in schema.model_fields.items() if key in (name, f.alias)), None)
        inner = _model_in(field.annotation) if field is not None else None
        if inner is None:
            return set()
        schema = inner
    return {alias for name, field in schema.model_fields.items() for alias in (name, field.alias) if alias}


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


__all__ = ["Config", "RunConfig", "load_config"]
