"""The folder of a run: what is in it, whether the run can go on, and where its traces are written. Light to import."""

import errno
import fcntl
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

from .config.json_file import digest, flatten
from .config.redaction import redact
from .errors import UserError
from .files import read_json

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
STARTS, ENDS = "starts.jsonl", "ends.jsonl"
CHECKPOINTS, TOKENIZER, TENSORBOARD, PROFILE = "checkpoints", "tokenizer", "tensorboard", "profile"
_LOCK = ".lock"

# Seconds; a killed run's process ranks may take as long to be gone.
_LOCK_PATIENCE = 5.0
# Seconds; a network file system shows other nodes' files late.
_SHARED_PATIENCE = 30.0

# What may change between the parts of one run: how far it goes, how it is watched, where its bytes lie, and how it is
# spread over ranks.
_MAY_CHANGE = re.compile(
    r"training\.(steps|epochs|eval_interval|eval_sequences|checkpoint_interval|keep_checkpoints|hang_timeout|sample_prompt|sample_tokens|profile)"
    r"|training\.profile\..*"
    r"|logging\..*|launch(\..*)?|data\.(cache_dir|num_workers)|zero_optimization(\..*)?|train_micro_batch_size_per_gpu"
    r"|train_batch_size|gradient_accumulation_steps|model\.gradient_checkpointing|activation_offload(\..*)?"
    r"|engine|megatron(\..*)?|steps_per_print|wall_clock_breakdown|comms_logger\..*"
)


def finished_summary(run_dir: Path, raw: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of a run that has been trained to the end with just this configuration, or None."""
    try:
        summary = read_json(run_dir / SUMMARY)
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) and summary.get("config_sha256") == digest(raw) else None


def check_writable(run_dir: Path) -> None:
    """Try whether the folder, or the nearest one above it that exists, can be written to; nothing is left there.

    Raises:
        UserError: it cannot.
    """
    nearest = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    try:
        # Other process ranks try at the same time.
        probe = nearest / f".write-test-{socket.gethostname()}-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"logging.run_dir: {run_dir} cannot be written: {error}") from error


class RunLock:
    """Keeps other runs out of a run folder for as long as the process lives."""

    def __init__(self, run_dir: Path) -> None:
        """Take the lock, waiting a little for a run that is just ending.

        Raises:
            UserError: another run holds it.
        """
        self._run_dir = run_dir
        self._file = (run_dir / _LOCK).open("a+")
        deadline = time.monotonic() + _LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    self._file.seek(0)
                    holder = self._file.read().strip()
                    raise UserError(f"logging.run_dir: {run_dir} is in use by another run: {holder}") from error
                time.sleep(0.2)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def is_there(self) -> bool:
        """Whether the folder is still the one that was locked: nothing tells a process that writes to a deleted one."""
        try:
            found = os.stat(self._run_dir / _LOCK)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            # A network's file system that does not answer is no deleted folder; the next write meets what lasts.
            return error.errno != errno.ELOOP
        return os.path.samestat(found, os.fstat(self._file.fileno()))

    def is_gone_within(self, seconds: float) -> bool:
        """Whether the folder is not there, or is not after a while: what deletes it may be at other files yet."""
        deadline = time.monotonic() + seconds
        while self.is_there():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def release(self) -> None:
        self._file.close()


def folder_beside(run_dir: Path) -> Path:
    """The first of ``run_dir``, ``run_dir-2``, ``run_dir-3``, ... that does not exist."""
    number, candidate = 1, run_dir
    while candidate.exists():
        number += 1
        candidate = run_dir.with_name(f"{run_dir.name}-{number}")
    return candidate


def check_shared(run_dir: Path) -> None:
    """Check that this process sees the folder that process rank 0 has locked.

    Raises:
        UserError: it does not, as on a node with a disk of its own.
    """
    deadline = time.monotonic() + _SHARED_PATIENCE
    while not (run_dir / _LOCK).exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"logging.run_dir: what process rank 0 writes to {run_dir} is not seen on {socket.gethostname()};"
                " all nodes need the same folder"
            )
        time.sleep(0.2)


def check_same_run(run_dir: Path, raw: dict[str, Any], train_batch_size: int) -> None:
    """Refuse to continue a run under a configuration that would not be followed.

    Args:
        train_batch_size: as it follows from the configuration and the number of ranks; the place in the data is
            counted in it.

    Raises:
        UserError: naming the keys that differ from the folder's ``config.json``, or what of it no run leaves so.
    """
    checkpoints = run_dir / CHECKPOINTS
    if checkpoints.exists() and not checkpoints.is_dir():
        raise UserError(f"{checkpoints}: expected a folder, got a file; use --fresh or another logging.run_dir")
    path = run_dir / CONFIG
    if not path.is_file():
        if traces := [name for name in (METRICS, CHECKPOINTS) if (run_dir / name).exists()]:
            raise UserError(
                f"{path}: expected the configuration of the run whose {' and '.join(traces)} are there, got none;"
                " restore it, or use --fresh or another logging.run_dir"
            )
        return
    try:
        resolved = read_json(path)
        saved, saved_batch_size = flatten(redact(resolved["config"])), resolved["train_batch_size"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}; use --fresh or another logging.run_dir") from error
    now = flatten(redact(raw))
    changed = [
        f"{key} (was {saved.get(key, 'not given')}, now {now.get(key, 'not given')})"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key) and not _MAY_CHANGE.fullmatch(key)
    ]
    if saved_batch_size != train_batch_size:
        changed.append(f"train_batch_size (was {saved_batch_size}, now {train_batch_size})")
    if changed:
        raise UserError(
            f"{run_dir} holds a run of another configuration: {', '.join(changed)}."
            " Restore the values, or use --fresh or another logging.run_dir"
        )
