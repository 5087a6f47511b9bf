"""A finished or running run's checkpoint as a Hugging Face folder."""

import json
import logging
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..checkpoint.files import Checkpoint, checksum, find_checkpoints, verify_files, versions_of
from ..checkpoint.values import decode
from ..checkpoint.weights import INDEX_NAME
from ..config.lora_block import LoraBlock
from ..errors import CheckpointError, UserError
from ..files import read_json
from ..quantization.ternary_file import TERNARY, make_ternary
from ..run_folder import CHECKPOINTS, CONFIG, TOKENIZER
from .export_adapters import write_adapter, write_merged
from .model import abstract_model
from .model_folder import check_record, config_of_folder
from .resume import check_step

logger = logging.getLogger(__name__)


def export_run(run_dir: Path, folder: Path, *, step: int | None = None, merge: bool = False) -> Path:
    """Write the model of a checkpoint, its configuration and its tokenizer to ``folder``; of a run with ``lora`` the
    adapter.

    Args:
        step: which checkpoint; the newest by default.
        merge: of a run with ``lora``, the whole model with the adapter merged into it.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: there is no such run or checkpoint, or ``folder`` already holds something else.
        CheckpointError: the checkpoint is damaged.
    """
    checkpoints = dict(find_checkpoints(run_dir / CHECKPOINTS))
    if not checkpoints:
        raise UserError(f"{run_dir}: expected a run with a finished checkpoint, got none")
    if step is not None and step not in checkpoints:
        raise UserError(f"{run_dir}: no checkpoint of step {step}; there are {sorted(checkpoints)}")
    step = step if step is not None else max(checkpoints)
    source, checkpoint = _whole(run_dir / CHECKPOINTS / f"step-{step}", step)
    adapters = decode(checkpoint.state["client_state"].get("adapters"), {})
    if merge and adapters is None:
        raise UserError(f"{run_dir}: expected a run with lora to merge, got one that trained its whole model")
    model = _model_block(checkpoint, run_dir / CONFIG)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already exists and is not an empty folder")
    folder = folder.resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}") from error
    try:
        aside.chmod(0o755)
        _copy_tokenizer(run_dir, aside)
        if adapters is None:
            _copy_model(checkpoint, model, aside)
            _round_weights(checkpoint, aside)
        else:
            _write_adapters(checkpoint, adapters, aside, merge=merge)
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)
    except UserError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    except (OSError, ValueError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"{folder}: cannot be written: {error}") from error
    return source


def _whole(folder: Path, step: int) -> tuple[Path, Checkpoint]:
    """The checkpoint, or the one that it was to replace, where only that is whole.

    Raises:
        CheckpointError: neither is; of the first.
    """
    found: list[CheckpointError] = []
    for version in versions_of(folder):
        try:
            checkpoint = verify_files(version)
            check_step(checkpoint.state["client_state"], step, version)
        except CheckpointError as error:
            found.append(error)
            continue
        for error in found:
            logger.warning(f"{error}; exporting {version}")
        return version, checkpoint
    raise found[0]


def _copy_tokenizer(run_dir: Path, folder: Path) -> None:
    """Copy the tokenizer, whose files are as the run has written them; one of an older version is not checked.

    Raises:
        UserError: a file is gone or has changed.
    """
    source = run_dir / TOKENIZER
    try:
        recorded = read_json(run_dir / CONFIG).get("tokenizer")
    except (OSError, ValueError, AttributeError):
        recorded = None
    for name, expected in recorded.items() if isinstance(recorded, dict) else ():
        found = checksum(source / name) if (source / name).is_file() else None
        if found != expected:
            raise UserError(
                f"{source / name}: expected the file that the run has written, {expected}, got {found}; the run"
                " writes it again when it goes on"
            )
    if source.is_dir():
        shutil.copytree(source, folder, dirs_exist_ok=True)


def _copy_model(checkpoint: Checkpoint, model: dict[str, Any], folder: Path) -> None:
    index = [checkpoint.folder / INDEX_NAME] if INDEX_NAME in checkpoint.names else []
    for path in [*checkpoint.tensors("model"), *index]:
        shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(model, indent=2) + "\n")


def _round_weights(checkpoint: Checkpoint, folder: Path) -> None:
    """Of a run that computed with fewer bits than it trained: what it computed with, where that is another weight."""
    record = decode(checkpoint.state["client_state"].get("quantization"), {})
    if record is None:
        return
    if record["method"] == "bitnet":
        make_ternary(folder, record["layers"], record["scale"])
        logger.info(
            f"weights of {len(record['layers'])} layers are ternary, and packed in {TERNARY}; transformers does not"
            " round their inputs"
        )
    else:
        logger.info("the weights are those that were trained, before they were rounded to FP8")


def _write_adapters(checkpoint: Checkpoint, adapters: dict[str, Any], folder: Path, *, merge: bool) -> None:
    block, base = LoraBlock(**adapters["lora"]), adapters["base"]
    if merge:
        check_record(base, str(checkpoint.folder))
    with tempfile.TemporaryDirectory(prefix=".adapter-", dir=folder) if merge else nullcontext(folder) as own:
        write_adapter(checkpoint, block, abstract_model(config_of_folder(base["path"])), base["path"], Path(own))
        if merge:
            write_merged(Path(own), base["path"], folder)


def _model_block(checkpoint: Checkpoint, config: Path) -> dict[str, Any]:
    """The model's configuration: the checkpoint's own, whose checksum holds; a changed one would give other logits.

    Raises:
        UserError: neither the checkpoint nor the run folder has one.
    """
    recorded = decode(checkpoint.state["client_state"].get("model"), {})
    try:
        beside = read_json(config)["model"]
        if not isinstance(beside, dict):
            raise TypeError(f"expected an object as model, got {type(beside).__name__}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if recorded is None:
            raise CheckpointError(f"{config}: cannot be read: {error}") from error
        logger.warning(f"{config}: cannot be read: {error}; the model is the checkpoint's")
        return recorded
    if recorded is None:
        logger.warning(f"{checkpoint.folder}: it does not record its model; taken, unchecked, from {config}")
        return beside
    changed = sorted(
        key
        for key in recorded.keys() | beside.keys()
        if recorded.get(key) != beside.get(key) and key != "transformers_version"
    )
    if changed:
        logger.warning(f"{config}: not the model that was trained ({', '.join(changed)}); the checkpoint's is exported")
    return recorded
