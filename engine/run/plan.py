"""What a run is about to do, checked on every process rank before there is a process group."""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from ..backends import backend_of
from ..config.config import Batches, Config, load_config
from ..config.redaction import redact
from ..config.run_blocks import DataBlock, LoggingBlock, ModelBlock, TrainingBlock
from ..coreset.coreset import NO_RECORDS, check_coreset, large_batch
from ..data.loader import Samples
from ..data.mixture import Mixture
from ..data.run_data import Prepared, prepare, with_own_tokenizer
from ..errors import UserError
from ..files import local_path
from ..lora.adapters import check_lora
from ..offload.attach import check_offload
from ..quantization.quantize import check_quantization
from ..ranks.agreement import agree
from ..ranks.environment import process_rank, world_size
from ..report.sinks import missing_sinks
from ..run_folder import RunLock, check_same_run, check_shared, check_writable, folder_beside
from ..sampled_backward import check_sampling
from .lengths import Lengths, check_lengths, lengths_of
from .model import abstract_model, check_model, model_config
from .packable import check_packing
from .profile import check_profile
from .rates import Rates, check_rates, rates_of
from .sample import check_prompt
from .schedule import check_schedule
from .trial import try_on

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check that needs no process group."""

    config: Config
    model: ModelBlock
    data: DataBlock
    training: TrainingBlock
    logging: LoggingBlock
    batches: Batches
    prepared: Prepared
    train_data: Samples
    eval_data: Samples
    steps: int
    tokens_per_step: int
    lengths: Lengths
    rates: Rates
    model_config: PretrainedConfig
    run_dir: Path


def plan_together(
    config: str | Path | Mapping[str, Any], overrides: Sequence[str], fresh: bool
) -> tuple[Plan, RunLock | None]:
    """Check everything on every rank, and start only if all agree.

    Returns:
        The plan and, on process rank 0, the lock it holds on the run folder.

    Raises:
        UserError: a rank cannot start or differs; the same on every rank.
    """
    settings: dict[str, Any] = {}
    plan, lock, error = None, None, None
    try:
        checked = load_config(config, overrides)
        plan = _make_plan(checked, fresh)
        if process_rank() == 0:
            plan.run_dir.mkdir(parents=True, exist_ok=True)
            lock = RunLock(plan.run_dir)
        settings = {"config": redact(checked.raw), "data": plan.prepared.fingerprint}
    except (UserError, OSError) as found:
        error = str(found)
    except Exception as found:
        # A fault of ours: this rank shows where it is, the others would wait for it.
        with suppress(UserError):
            agree(settings, error=f"{type(found).__name__}: {found}")
        raise
    chosen = agree(settings, error=error, choice=str(plan.run_dir) if plan is not None else None)
    assert plan is not None
    assert chosen is not None
    plan, error = replace(plan, run_dir=Path(chosen)), None
    try:
        check_shared(plan.run_dir)
    except UserError as found:
        error = str(found)
    agree({}, error=error)
    return plan, lock


def _make_plan(config: Config, fresh: bool) -> Plan:
    config = with_own_tokenizer(config)
    parsed = config.parsed
    missing = [key for key in ("model", "data", "training", "logging", "optimizer") if getattr(parsed, key) is None]
    if missing:
        raise config.error(*(f"{key}: expected this block, got none" for key in missing))
    assert parsed.model is not None
    assert parsed.data is not None
    assert parsed.training is not None
    assert parsed.logging is not None
    if problems := missing_sinks(parsed.logging):
        raise config.error(*problems)
    backend = backend_of(parsed.engine)
    backend.check(config)
    if parsed.training.steps is not None:
        check_schedule(config, parsed.training.steps)
        check_profile(config, parsed.training.steps)
    check_lora(config)
    check_rates(config)
    check_lengths(config)
    check_quantization(config)
    check_sampling(config)
    batches = config.batches(backend.data_parallel_size(config, world_size()))
    check_coreset(config, batches)
    run_dir = local_path(parsed.logging.run_dir, "logging.run_dir")
    if fresh:
        run_dir = folder_beside(run_dir)
        check_writable(run_dir.parent)
    else:
        check_writable(run_dir)
        check_same_run(run_dir, config.raw, batches.total)
    check_model(parsed.model)
    # Once more when the vocabulary is known: data may take hours.
    length = parsed.data.sequence_length
    backend.check_model(config, model_config(parsed.model, vocab_size=None, sequence_length=length), world_size())
    prepared = prepare(parsed.data, logger.info)
    described = model_config(parsed.model, vocab_size=prepared.vocab_size, sequence_length=length)
    backend.check_model(config, described, world_size())
    check_packing(parsed.data, described)
    try_on(config, abstract_model(described))
    check_offload(config)
    if parsed.training.sample_prompt is not None:
        check_prompt(parsed.training.sample_prompt, prepared.tokenizer)
    train_data, eval_data = prepared.samples(parsed.data.sequence_length, described.vocab_size)
    if parsed.coreset is not None and not isinstance(train_data, Mixture):
        raise config.error(NO_RECORDS)
    steps = parsed.training.steps
    if steps is None:
        assert parsed.training.epochs is not None
        steps = math.ceil(parsed.training.epochs * len(train_data) / large_batch(parsed.coreset, batches))
        check_schedule(config, steps)
    tokens_per_step = round(batches.total * train_data.tokens_per_sample)
    lengths = lengths_of(config, train_data, steps)
    rates = rates_of(
        config, described, lengths, batch_size=batches.total, num_steps=steps, tokens_per_step=tokens_per_step
    )
    check_profile(config, steps)
    return Plan(
        config,
        parsed.model,
        parsed.data,
        parsed.training,
        parsed.logging,
        batches,
        prepared,
        train_data,
        eval_data,
        steps,
        tokens_per_step,
        lengths,
        rates,
        described,
        run_dir,
    )
