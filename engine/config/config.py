"""One JSON describes a run: the keys of its engine plus ``model``, ``data``, ``training`` and ``logging``.

The whole file is checked at once, every key at every depth, before anything is built.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError, create_model

from narrowgauge.offload import OffloadOptions
from narrowgauge.optimizers import OPTIMIZERS
from narrowgauge.optimizers.options import Options

from ..backends import DEFAULT_ENGINE, backend_of
from ..errors import ConfigError
from .engine_keys import EngineKeys
from .json_file import apply_overrides, copied, read_json, without_comments
from .optimizer_params import our_only, problems_of_adam, read_options
from .problems import autos, not_finite, problems_of, strings_for_other_types, within
from .run_blocks import OWN_BLOCKS, RunBlocks


class RunConfig(EngineKeys, RunBlocks):
    """The whole file, as far as it is the same for all engines."""


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
        optimizer_options: of one of :mod:`narrowgauge.optimizers`; None where the optimizer is DeepSpeed's or torch's.
        matrix_factor: of the rates of matrices, where the optimizer is not ours.
    """

    source: str
    raw: dict[str, Any]
    parsed: RunConfig
    optimizer_options: Options | None
    matrix_factor: float = 1.0

    @property
    def zero_stage(self) -> int:
        """0 where nothing is sharded as ZeRO does."""
        zero = self.parsed.zero_optimization
        return int(zero.stage) if zero is not None else 0

    @property
    def bf16(self) -> bool:
        # DeepSpeed has two names for it.
        blocks = (self.parsed.bf16, getattr(self.parsed, "bfloat16", None))
        return any(block is not None and block.enabled for block in blocks)

    def offload(self) -> OffloadOptions | None:
        """The options of activation offload; None where it is off."""
        block = self.parsed.activation_offload
        return block.options() if block is not None and block.enabled else None

    def unused_params(self) -> list[str]:
        """The ``optimizer.params`` of our optimizers that another type of optimizer does not take."""
        block = self.parsed.optimizer
        if block is None or block.type in OPTIMIZERS:
            return []
        ours = our_only()
        return [key for key in block.params if key in ours]

    def unused_params_note(self) -> str:
        """What to warn of where there are :meth:`unused_params`."""
        unused, name = ", ".join(self.unused_params()), self.raw["optimizer"]["type"]
        return f"optimizer.params: {unused} are not used by {name}, which trains every parameter at lr"

    def engine_settings(self) -> dict[str, Any]:
        """The keys that are the engine's, as given, without the optimizer's that it does not take."""
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
            raise self.error("train_batch_size: expected it or train_micro_batch_size_per_gpu, got neither")
        if micro is None:
            micro = (total or 0) // (world_size * (steps or 1))
        if steps is None:
            steps = 1 if total is None else total // (micro * world_size) if micro else 0
        if total is None:
            total = micro * steps * world_size
        if not micro or not steps:
            # As the one of them that was derived.
            micro, steps = micro or 1, steps or 1
            raise self.error(
                f"train_batch_size: expected at least {micro * steps * world_size}, a sequence"
                f" for each of {world_size} data-parallel ranks"
                f" with train_micro_batch_size_per_gpu {micro} and gradient_accumulation_steps {steps}, got {total}"
            )
        if micro * steps * world_size != total or not total:
            raise self.error(
                f"train_batch_size: expected train_micro_batch_size_per_gpu ({micro}) x gradient_accumulation_steps"
                f" ({steps}) x data-parallel ranks ({world_size}), got {total}"
            )
        return Batches(total, micro, steps)

    def error(self, *problems: str) -> ConfigError:
        return ConfigError(self.source, list(problems))

    @contextmanager
    def blames(self, block: str) -> Iterator[None]:
        """A ValueError within it is a problem of the block, or of the key of the block that it names."""
        try:
            yield
        except ValueError as error:
            raise self.error(within(block, str(error))) from error


def load_config(config: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration.

    Args:
        config: a JSON file, or its contents.
        overrides: ``a.b=value`` each, the value in JSON or a bare string.

    Raises:
        ConfigError: the file cannot be read, or any key or value in it is wrong; lists everything found.
    """
    source = "config" if isinstance(config, Mapping) else str(config)
    raw = without_comments(copied(config) if isinstance(config, Mapping) else read_json(Path(config)))
    apply_overrides(raw, overrides)
    try:
        schema = _schema_of(raw.get("engine", DEFAULT_ENGINE))
    except ValueError as error:
        raise ConfigError(source, [f"engine: {error}"]) from error
    problems = [*autos(raw), *not_finite(raw)]
    parsed = None
    try:
        parsed = schema.model_validate(raw)
    except ValidationError as error:
        problems += [problem.lstrip(".") for problem in problems_of(error, schema)]
    if parsed is not None:
        problems += strings_for_other_types(raw, parsed)
    options, problems_of_options = _read_options(raw.get("optimizer"))
    problems += problems_of_options + schema.problems_in(raw)
    if problems or parsed is None:
        raise ConfigError(source, problems)
    return Config(source, raw, parsed, options)


@cache
def _schema_of(engine: str) -> type[RunConfig]:
    """The whole file, for an engine."""
    return cast("type[RunConfig]", create_model("RunConfig", __base__=(backend_of(engine).keys, RunConfig)))


def _read_options(optimizer: Any) -> tuple[Options | None, list[str]]:
    """The options of an optimizer of ours, and what is wrong with them; of another one only what is wrong."""
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("type"), str):
        return None, []
    if optimizer.get("type") not in OPTIMIZERS:
        return None, problems_of_adam(optimizer)
    options, problems = read_options(optimizer["type"], optimizer.get("params", {}))
    return options, [within("optimizer.params", problem) for problem in problems]
