"""Where a run's numbers go beside ``metrics.jsonl``: TensorBoard, wandb, trackio. On process rank 0."""

import hashlib
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ..config.run_blocks import LoggingBlock, TrackioBlock, WandbBlock
from ..errors import UserError, one_line
from ..run_folder import TENSORBOARD
from .tags import LAYOUT, tagged

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes the records."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """
        Raises:
            UserError: naming what cannot be written.
        """
        ...

    def close(self) -> None: ...


def missing_sinks(block: LoggingBlock) -> list[str]:
    """A problem for each sink whose package is not installed."""
    return [
        f"logging.{name}: expected the package {name}, got none: pip install 'narrowgauge[{name}]'"
        for name in ("wandb", "trackio")
        if getattr(block, name) is not None and find_spec(name) is None
    ]


def open_sinks(block: LoggingBlock, run_dir: Path, config: dict[str, Any], *, first_step: int) -> list[Sink]:
    """The sinks that the configuration asks for.

    Args:
        config: shown beside the curves; without secrets.

    Raises:
        UserError: a service cannot be reached, or refuses.
    """
    found: list[Sink] = [TensorBoard(run_dir / TENSORBOARD, first_step=first_step)] if block.tensorboard else []
    if block.wandb is not None:
        found.append(_Service("wandb", block.wandb, run_dir, config))
    if block.trackio is not None:
        found.append(_Service("trackio", block.trackio, run_dir, config))
    return found


class TensorBoard:
    """Scalars by tag, and a page of custom scalars with the losses first."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._folder = folder
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        self._writer.add_custom_scalars(LAYOUT)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        try:
            for tag, value in tagged(values).items():
                self._writer.add_scalar(tag, value, step)
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        try:
            self._writer.close()
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self._folder}: cannot be written: {error}")


class _Service:
    """wandb, or trackio, whose interface is the same. What fails after the start is a warning: a run does not end for
    it, and ``metrics.jsonl`` has everything.
    """

    def __init__(self, name: str, block: WandbBlock | TrackioBlock, run_dir: Path, config: dict[str, Any]) -> None:
        self._name, self._lost = name, False
        settings: dict[str, Any] = {"project": block.project, "name": block.name or run_dir.name, "config": config}
        try:
            if isinstance(block, WandbBlock):
                import wandb  # pyright: ignore[reportMissingImports]

                self._package: Any = wandb
                # The same run goes on after an interruption.
                own = hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:16]
                settings |= {"id": own, "resume": "allow", "dir": str(run_dir)}
                settings |= {"mode": block.mode, "entity": block.entity}
            else:
                import trackio  # pyright: ignore[reportMissingImports]

                self._package = trackio
                settings |= {"resume": "allow", "space_id": block.space, "embed": False}
            self._package.init(**settings)
            if name == "wandb":
                self._package.define_metric("*", step_metric="step")
        except Exception as error:
            raise UserError(f"logging.{name}: {type(error).__name__}: {one_line(error)}") from error

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._attempt(lambda: self._log(step, tagged(values)))

    def close(self) -> None:
        self._attempt(lambda: self._package.finish())

    def _log(self, step: int, values: dict[str, float]) -> None:
        if self._name == "wandb":
            # As a number among others: wandb drops steps before its last one, which a resumed run repeats.
            self._package.log({"step": step, **values})
        else:
            self._package.log(values, step=step)

    def _attempt(self, action: Any) -> None:
        if self._lost:
            return
        try:
            action()
        except Exception as error:
            self._lost = True
            logger.warning(f"logging.{self._name}: {type(error).__name__}: {one_line(error)}; it gets nothing more")
