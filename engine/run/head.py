"""What the first process rank writes of a run's start, how and with what, and of its being asked to end."""

import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

from ..checkpoint.files import checksum
from ..config.redaction import redact
from ..data.layout import describe
from ..data.tokenizer import load_tokenizer
from ..errors import UserError
from ..files import naming, write_json
from ..protocol import TrainingEngine
from ..quantization.quantize import describe as describe_quantization
from ..ranks.environment import world_size
from ..run_folder import CONFIG, ENDS, STARTS, TOKENIZER
from ..sampled_backward import describe as describe_sampling
from .plan import Plan

logger = logging.getLogger(__name__)


def model_block(engine: TrainingEngine) -> dict[str, Any]:
    """The model's Hugging Face configuration, as an export needs it."""
    model: Any = engine.module
    # As it comes back from a file: some keys are numbers.
    return json.loads(json.dumps({**model.config.to_dict(), "use_cache": True}))


def write_head(engine: TrainingEngine, plan: Plan, first_step: int, tokens_per_step: int) -> None:
    """Write a line of ``starts.jsonl``, ``config.json`` and the tokenizer, and say what is trained.

    Raises:
        OSError, UserError: naming what cannot be written.
    """
    start = {
        "time": time.time(),
        "host": socket.gethostname(),
        "world_size": world_size(),
        "after_step": first_step,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
    path = plan.run_dir / STARTS
    with naming(path), path.open("a") as file:
        file.write(json.dumps(start) + "\n")
    resolved = {
        "config": redact(plan.config.raw),
        "world_size": world_size(),
        "train_batch_size": plan.batches.total,
        "train_micro_batch_size_per_gpu": plan.batches.micro,
        "gradient_accumulation_steps": plan.batches.accumulation_steps,
        "steps": plan.steps,
        **({"rates": plan.rates.applied} if plan.rates.applied else {}),
        "resolved": redact(plan.config.parsed.model_dump(mode="json", exclude_unset=False, exclude_none=True)),
        "model": model_block(engine),
        "data_fingerprint": plan.prepared.fingerprint,
        **({"tokenizer": _write_tokenizer(plan)} if plan.prepared.tokenizer is not None else {}),
    }
    write_json(plan.run_dir / CONFIG, resolved)
    parameters, ranks = engine.parameter_counts()["total"], world_size()
    logger.info(
        f"{parameters:,} parameters, {plan.config.raw['optimizer']['type']} at {engine.description} on"
        f" {ranks} rank{'s' if ranks > 1 else ''}, {tokens_per_step:,} tokens per step; {plan.run_dir}"
    )
    for describe_layers in (describe_quantization, describe_sampling):
        if (line := describe_layers(engine.module, plan.config)) is not None:
            logger.info(line)
    for line in plan.rates.describe():
        logger.info(line)
    for name, counts in plan.prepared.counts().items():
        logger.info(f"{name}: {describe(counts)}")


def write_end(run_dir: Path, step: int) -> None:
    """Write a line of ``ends.jsonl``: the run was asked to end, and has saved.

    Raises:
        OSError: naming what cannot be written.
    """
    path = run_dir / ENDS
    with naming(path), path.open("a") as file:
        file.write(json.dumps({"time": time.time(), "after_step": step}) + "\n")


def _write_tokenizer(plan: Plan) -> dict[str, Any]:
    """Write the tokenizer; returns the size and checksum of each of its files."""
    folder = plan.run_dir / TOKENIZER
    assert plan.prepared.tokenizer is not None
    try:
        # Not a copy of the folder: the user's may be a whole model.
        load_tokenizer(plan.prepared.tokenizer).save_pretrained(str(folder))
    except Exception as error:
        # tokenizers raises a plain Exception.
        raise UserError(f"{folder}: cannot be written: {error}") from error
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): checksum(path) for path in files}
