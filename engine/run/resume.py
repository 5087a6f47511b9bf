"""Where a run goes on: its newest checkpoint that holds, and what says that one is missing."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from ..checkpoint.checkpoint import load_checkpoint
from ..checkpoint.files import find_checkpoints, versions_of
from ..errors import CheckpointError, UserError
from ..protocol import TrainingEngine
from ..ranks.environment import process_rank
from ..ranks.together import together
from ..report.metrics import step_records
from ..run_folder import CHECKPOINTS, METRICS
from .model_folder import record_of_folder
from .plan import Plan

logger = logging.getLogger(__name__)


def adapters_record(plan: Plan) -> dict[str, Any] | None:
    """What the adapters of a run belong to, for its checkpoints: they hold no weights of the model below."""
    block, path = plan.config.parsed.lora, plan.model.path
    if block is None or path is None:
        return None
    return {"lora": block.model_dump(), "base": record_of_folder(path)}


def resume(
    engine: TrainingEngine, plan: Plan, adapters: dict[str, Any] | None
) -> tuple[int, Path | None, dict[str, Any]]:
    """Continue from the newest checkpoint that holds. Collective.

    Args:
        adapters: :func:`adapters_record`, on process rank 0.

    Returns:
        The step it was written after, its folder, and the state it was saved with; 0, None and nothing where there is
        none.

    Raises:
        UserError: none of the checkpoints holds, or the run cannot go on from it; the same on every rank.
    """
    checkpoints = find_checkpoints(plan.run_dir / CHECKPOINTS)
    if not checkpoints:
        _say_what_is_lost(plan.run_dir)
        return 0, None, {}
    candidates = [(step, path) for step, folder in reversed(checkpoints) for path in versions_of(folder)]
    for (step, folder), earlier in zip(candidates, [*candidates[1:], None], strict=True):
        try:
            state = load_checkpoint(engine, folder)
            check_step(state, step, folder)
        except CheckpointError as error:
            if earlier is None:
                raise
            if process_rank() == 0:
                logger.warning(f"{error}; trying {earlier[1]}")
            continue
        _check_state(state, step, folder, plan)
        if plan.config.parsed.lora is not None:
            together("load", partial(_check_adapters, state, adapters, folder))
        _follow_schedule(engine.lr_scheduler)
        if process_rank() == 0:
            logger.info(f"resumed after step {step} from {folder}")
        return step, folder, state
    raise AssertionError("the oldest checkpoint's error was raised")


def check_step(client_state: dict[str, Any], step: int, folder: Path) -> None:
    """Whether a checkpoint is the one that its folder is called after.

    Raises:
        CheckpointError: it was copied or renamed.
    """
    if (found := client_state.get("step", step)) != step:
        raise CheckpointError(f"{folder}: expected the checkpoint of step {step}, got that of step {found}")


def _check_state(state: dict[str, Any], step: int, folder: Path, plan: Plan) -> None:
    if state["data_fingerprint"] != plan.prepared.fingerprint:
        raise UserError(
            f"{folder}: the run was trained on other data than data.train names now, or split by another version; use"
            " --fresh or another logging.run_dir"
        ).shared()
    if step > plan.steps:
        raise UserError(
            f"training.steps: expected at least the {step} steps that {plan.run_dir} has been trained for,"
            f" got {plan.steps}; use --fresh or another logging.run_dir"
        ).shared()


def _check_adapters(state: dict[str, Any], adapters: dict[str, Any] | None, folder: Path) -> None:
    saved = state.get("adapters")
    if adapters is None:
        return
    if saved is None or saved["base"]["files"] != adapters["base"]["files"]:
        raise UserError(f"{folder}: its adapters belong to other weights than model.path holds now")
    if saved["lora"] != adapters["lora"]:
        changed = sorted(key for key in adapters["lora"] if adapters["lora"][key] != saved["lora"].get(key))
        raise UserError(
            f"{folder}: lora.{changed[0]}: expected {saved['lora'][changed[0]]!r} as before, got"
            f" {adapters['lora'][changed[0]]!r}"
        )


def _say_what_is_lost(run_dir: Path) -> None:
    """A run that ended before its first checkpoint starts over; so would one whose checkpoints were moved away."""
    if process_rank() == 0 and (lost := len(step_records(run_dir))):
        logger.warning(
            f"{run_dir / CHECKPOINTS}: no checkpoint; the run starts over, and the records of {lost} steps in"
            f" {METRICS} are dropped"
        )


def _follow_schedule(scheduler: Any) -> None:
    """Set the rates of the step the schedule is at: the run may have been given another length since."""
    if isinstance(scheduler, LambdaLR):
        for group, base, factor in zip(
            scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(scheduler.last_epoch)
