"""A finished or running run's checkpoint as a Hugging Face folder."""

import json
import shutil
import tempfile
from pathlib import Path

from ..checkpoint.files import find_checkpoints, verify_files
from ..checkpoint.weights import INDEX_NAME
from ..errors import UserError
from ..run_folder import CHECKPOINTS, CONFIG, TOKENIZER


def export_run(run_dir: Path, folder: Path, *, step: int | None = None) -> Path:
    """Write the model of a checkpoint, its configuration and its tokenizer to ``folder``.

    Args:
        step: which checkpoint; the newest by default.

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
    source = checkpoints[step if step is not None else max(checkpoints)]
    verify_files(source)
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
        if (run_dir / TOKENIZER).is_dir():
            shutil.copytree(run_dir / TOKENIZER, aside, dirs_exist_ok=True)
        for path in [*source.glob("model*.safetensors"), *source.glob(INDEX_NAME)]:
            shutil.copyfile(path, aside / path.name)
        model = json.loads((run_dir / CONFIG).read_text())["model"]
        (aside / "config.json").write_text(json.dumps(model, indent=2) + "\n")
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"{folder}: cannot be written: {error}") from error
    return source
