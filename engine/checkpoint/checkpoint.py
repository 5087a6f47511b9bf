"""Checkpoints: a folder that is either whole and checked, or not there.

``model*.safetensors`` hold the plain weights under the model's own names, as Hugging Face writes them.
``optimizer-R-of-N.safetensors`` hold rank R's masters and moments, cut by parameter and not by rank, so any number of
ranks, in any engine and at any ZeRO stage, reads them. ``state.json`` holds the rest, ``manifest.json`` every file's
size and checksum (safetensors does not notice a flipped byte) and a digest of itself; what it does not list is not
read. Nothing is pickled, and nothing saved that is not finite. Everything is written aside and renamed once all ranks
have succeeded.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..errors import CheckpointError
from ..files import replace_folder, write_json
from ..protocol import TrainingEngine
from ..ranks.together import together
from .contents import VALUES, write_tensors
from .files import Checkpoint, checksum, verify_files, whole_folder, write_manifest
from .optimizer_state import load_optimizer, load_subspace, optimizer_numbers, write_optimizer, write_subspace
from .saved_by_forwards import SAVED_BY_FORWARDS, gather_state, restore_state
from .values import decode, encode, read_tensors
from .weights import WeightFiles, save_weights

logger = logging.getLogger(__name__)


def save_checkpoint(engine: TrainingEngine, folder: Path, client_state: dict[str, Any]) -> None:
    """Write a checkpoint of the engine. Collective; either all ranks return or all raise.

    Args:
        folder: the checkpoint's own; replaced if it exists.
        client_state: the caller's values, returned by :func:`load_checkpoint` as they are; of which types, see
            :func:`.values.encode`.

    Raises:
        CheckpointError: a value is of another type, a rank could not write, or its parameters or moments are not
            finite; what was there before is untouched.
    """
    aside = folder.with_name(folder.name + ".tmp")
    try:
        _write_aside(engine, aside, client_state)
        together("save", lambda: replace_folder(aside, folder) if dist.get_rank() == 0 else None)
    except CheckpointError:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _write_aside(engine: TrainingEngine, aside: Path, client_state: dict[str, Any]) -> None:
    rank, forwards = dist.get_rank(), gather_state(engine)
    tensors: dict[str, Tensor] = {}

    def prepare() -> dict[str, Any]:
        if rank > 0:
            return {}
        encoded = _callers_values(engine, client_state, tensors)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        return encoded

    def write() -> list[str]:
        written = [write_optimizer(engine, aside)]
        if rank == 0:
            written += _write_state(engine, aside, callers, tensors, forwards)
            written += write_subspace(engine, aside)
        return [name for name in written if name is not None]

    callers = together("save", prepare)
    engine.before_save()
    # The weights are gathered by all ranks and written by the first, which takes part to the end even if its disk is
    # full.
    weight_files, failure = save_weights(engine, aside if rank == 0 else None)
    own = weight_files + together("save", write, failure)
    entries = _gather_manifest(together("save", lambda: {name: checksum(aside / name) for name in own}))

    together("save", lambda: write_manifest(aside, entries) if rank == 0 else None)


def load_checkpoint(
    engine: TrainingEngine,
    folder: Path,
    *,
    optimizer_states: bool = True,
    scheduler_state: bool = True,
    counters: bool = True,
) -> dict[str, Any]:
    """Restore an engine from a checkpoint written by any number of ranks in any engine. Collective.

    Args:
        optimizer_states: also moments, their step counts and subspace; without them the masters are taken from the
            weights.
        scheduler_state: also the learning-rate schedule's.
        counters: also how many steps and samples there were, and the place in the data.

    Returns:
        The ``client_state`` it was saved with.

    Raises:
        CheckpointError: it is damaged or belongs to another model; the engine is as it was unless the message says
            otherwise.
    """
    checkpoint = together("load", lambda: _verify(whole_folder(folder), engine))
    state = checkpoint.state
    if optimizer_states:
        together("load", lambda: load_subspace(engine, checkpoint))
    together("load", lambda: _load_weights(engine, checkpoint, rebuild_compact=not optimizer_states))
    if optimizer_states:
        _say_other_rates(engine, checkpoint.folder, state["groups"])
        together("load", lambda: load_optimizer(engine, checkpoint))
        engine.masters_to_model()
    tensors = read_tensors(checkpoint.tensors(VALUES))
    if counters:
        engine.restore_counters({**decode(state["counters"], tensors), "loss_scaler": state["loss_scaler"]})
    if counters and SAVED_BY_FORWARDS in state:
        restore_state(engine, decode(state[SAVED_BY_FORWARDS], tensors))
    if scheduler_state and engine.lr_scheduler is not None and state["lr_scheduler"] is not None:
        schedule = decode(state["lr_scheduler"], tensors)
        engine.lr_scheduler.load_state_dict(schedule)
        # They are the groups' too, which may not have been read; torch's schedules multiply what they find there.
        for group, rate in zip(engine.optimizer.param_groups, schedule.get("_last_lr", ()), strict=False):
            group["lr"] = rate
    engine.after_load()
    return decode(state["client_state"], tensors)


def _callers_values(engine: TrainingEngine, client_state: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What of ``state.json`` the caller has made, encoded."""
    schedule = engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None
    values = {"client_state": client_state, "lr_scheduler": schedule}
    return {key: encode(value, tensors, key) for key, value in values.items()}


def _write_state(
    engine: TrainingEngine,
    folder: Path,
    callers: dict[str, Any],
    tensors: dict[str, Tensor],
    forwards: list[dict[str, Any]],
) -> list[str]:
    """Write what is not the optimizer's; returns the names of the files.

    Args:
        callers: of :func:`_callers_values`.
        tensors: of ``callers``; more are added.
    """
    state = {**_engine_state(engine), **callers}
    state["counters"] = encode(state["counters"], tensors, "counters")
    if any(forwards):
        state[SAVED_BY_FORWARDS] = encode(forwards, tensors, SAVED_BY_FORWARDS)
    write_json(folder / "state.json", state)
    if not tensors:
        return ["state.json"]
    write_tensors(tensors, folder / VALUES)
    return ["state.json", VALUES]


def _say_other_rates(engine: TrainingEngine, folder: Path, saved: Sequence[Mapping[str, Any]]) -> None:
    """Say so where the optimizer was made with other learning rates than the checkpoint's, which are taken.

    DeepSpeed's schedules keep none of what they start from: theirs are those of different steps.
    """
    if engine.lr_scheduler is not None and any("initial_lr" not in group for group in engine.optimizer.param_groups):
        return
    made, held = (
        [group.get("initial_lr", group["lr"]) for group in groups] for groups in (engine.optimizer.param_groups, saved)
    )
    if made != held and dist.get_rank() == 0:
        logger.warning(f"{folder}: training goes on with its learning rates, {held}, not with those given, {made}")


def _load_weights(engine: TrainingEngine, checkpoint: Checkpoint, *, rebuild_compact: bool) -> None:
    try:
        engine.load_weights(WeightFiles(checkpoint), rebuild_compact=rebuild_compact)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder}: {error}") from error


def _verify(folder: Path, engine: TrainingEngine) -> Checkpoint:
    checkpoint = verify_files(folder, part=dist.get_rank(), parts=dist.get_world_size())
    state = checkpoint.state
    saved, own = state["trainable"], _trainable_shapes(engine)
    if odd := sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name)):
        name = odd[0]
        raise CheckpointError(
            f"{folder}: it holds {name} of shape {saved.get(name)}, this model has {own.get(name)}"
            f" ({len(odd)} parameters differ); was the optimizer or the model changed?"
        )
    num_groups = len(engine.optimizer.param_groups)
    if len(state["groups"]) != num_groups:
        raise CheckpointError(f"{folder}: expected {num_groups} parameter groups, got {len(state['groups'])}")
    return checkpoint


def _trainable_shapes(engine: TrainingEngine) -> dict[str, list[int]]:
    return {name: list(shape) for name, shape in engine.trainable_shapes().items()}


def _engine_state(engine: TrainingEngine) -> dict[str, Any]:
    counters = engine.counters()
    return {
        "world_size": dist.get_world_size(),
        "zero_stage": engine.zero_stage,
        "trainable": _trainable_shapes(engine),
        **optimizer_numbers(engine),
        "loss_scaler": counters.pop("loss_scaler", {}),
        "counters": counters,
    }


def _gather_manifest(own: dict[str, Any]) -> dict[str, Any]:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {name: entry for part in parts for name, entry in part.items()}
