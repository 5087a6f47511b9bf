"""``narrowgauge init``: a first configuration, with the settings that fit a machine."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config.config import load_config
from ..data.corpus import expand
from ..errors import UserError
from ..files import check_new, write_json
from ..forecast.fit import fit
from ..forecast.machine import Machine
from ..forecast.show import show
from .validate import check_for

logger = logging.getLogger(__name__)
# Sequences of a step on each GPU.
_PER_GPU = 32


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a configuration is made from.

    Attributes:
        model: a preset's name, or a Hugging Face folder.
        data: text or token files, or globs of them; ``stdlib`` alone is the Python standard library's.
        tokenizer: a folder; None trains one on the data, or takes the model folder's.
    """

    model: str
    data: Sequence[str]
    tokenizer: str | None
    sequence_length: int
    steps: int


def first_configuration(answers: Answers, world_size: int) -> dict[str, Any]:
    """The JSON of a run with Grass in bf16 under ZeRO-1, before it is fitted to a machine."""
    is_folder = Path(answers.model).is_dir()
    tokenizer = answers.tokenizer or (answers.model if is_folder else None)
    data: dict[str, Any] = {
        "train": "stdlib" if list(answers.data) == ["stdlib"] else list(answers.data),
        "sequence_length": answers.sequence_length,
    }
    warmup = max(1, answers.steps // 20)
    return {
        "model": {"path": answers.model} if is_folder else {"preset": answers.model},
        "data": data if tokenizer is None else {**data, "tokenizer": tokenizer},
        "training": {
            "steps": answers.steps,
            "lr_schedule": {"type": "cosine", "warmup_steps": warmup, "min_lr_ratio": 0.1},
            "eval_interval": max(1, answers.steps // 10),
            "checkpoint_interval": max(1, answers.steps // 10),
        },
        "logging": {"run_dir": f"runs/{Path(answers.model).name}"},
        "train_batch_size": _PER_GPU * world_size,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "optimizer": {
            "type": "Grass",
            "params": {"lr": 0.005, "matrix_lr_scale": 0.2, "density": 0.125, "refresh_interval": 100},
        },
    }


def write_first(answers: Answers, machine: Machine, out: Path, console: Console) -> None:
    """Write a configuration that fits a machine, the fastest that is found.

    Raises:
        UserError: the file is there already, an answer does not hold, or nothing fits.
    """
    check_new(out, "--out")
    _warn_of_files(answers)
    config = load_config(first_configuration(answers, machine.world_size))
    _, described = check_for(config, machine.world_size)
    found = fit(config, described, machine, "fastest")
    write_json(out, found.raw)
    show(found.forecast, console)
    console.print(f"{found.choice.described()} -> {out}", highlight=False)
    console.print(f"next: narrowgauge launch {out}", highlight=False)


def _warn_of_files(answers: Answers) -> None:
    """Of files that are not here; the run may be meant for another machine."""
    for pattern in answers.data if list(answers.data) != ["stdlib"] else ():
        try:
            expand([pattern], "--data")
        except UserError as error:
            logger.warning(f"{error} on this machine")
    if answers.tokenizer is not None and not Path(answers.tokenizer).exists():
        logger.warning(f"--tokenizer: nothing is at {answers.tokenizer} on this machine")
