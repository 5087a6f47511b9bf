"""``training.profile``: a trace of some steps, and on CUDA how its memory was used, for each process rank."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..config.config import Config
from ..config.run_blocks import ProfileBlock
from ..errors import UserError
from ..ranks.environment import process_rank
from ..report.phases import named
from ..run_folder import PROFILE

logger = logging.getLogger(__name__)
_MOST_EVENTS = 1_000_000


def check_profile(config: Config, steps: int) -> None:
    """Whether the steps that are profiled are a run's.

    Raises:
        ConfigError: they are not.
    """
    training = config.parsed.training
    found = training.profile if training is not None else None
    if found is not None and found.steps[1] > steps:
        raise config.error(f"training.profile.steps: expected steps of the run, 1 to {steps}, got {found.steps}")


class StepProfile:
    """Profiles the steps of a block; nothing without one.

    Attributes:
        steps: that are profiled.
    """

    def __init__(self, block: ProfileBlock | None, run_dir: Path, *, first_step: int) -> None:
        """
        Args:
            first_step: after which the run goes on.
        """
        self.steps = range(0) if block is None else range(block.steps[0], block.steps[1] + 1)
        self._folder, self._profiler = run_dir / PROFILE, None
        if self.steps and first_step >= self.steps[-1] and process_rank() == 0:
            logger.warning(f"training.profile: steps {self.steps[0]} to {self.steps[-1]} are done: nothing is profiled")

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around each step.

        Raises:
            UserError: the trace cannot be written.
        """
        if number not in self.steps:
            yield
            return
        if self._profiler is None:
            self._start()
        with named(f"training step {number}"):
            yield
        if number == self.steps[-1]:
            self.close()

    def _start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            _memory()._record_memory_history(max_entries=_MOST_EVENTS)
        self._profiler = profile(activities=activities)
        self._profiler.start()

    def close(self) -> None:
        """Write what has been profiled, also of steps that a run did not get to the end of.

        Raises:
            UserError: it cannot be written.
        """
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.stop()
        path = self._folder / f"trace-rank-{process_rank()}.json.gz"
        try:
            profiler.export_chrome_trace(str(path))
            if torch.cuda.is_available():
                _memory()._dump_snapshot(str(self._folder / f"memory-rank-{process_rank()}.pickle"))
                _memory()._record_memory_history(enabled=None)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: cannot be written: {error}") from error
        if process_rank() == 0:
            logger.info(f"training.profile: {path}, for ui.perfetto.dev or chrome://tracing")


def _memory() -> Any:
    return torch.cuda.memory
