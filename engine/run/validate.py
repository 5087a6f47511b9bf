"""``narrowgauge train --validate``: all that can be known of a run on any number of process ranks, in one process."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig

from ..backends import backend_of
from ..config.config import Batches, Config, load_config
from ..coreset.coreset import check_coreset
from ..data.run_data import with_own_tokenizer
from ..lora.adapters import check_lora
from ..protocol import HeldByRank
from ..quantization.quantize import check_quantization
from ..sampled_backward import check_sampling
from .lengths import check_lengths
from .model import abstract_model, check_model, model_config
from .packable import check_packing
from .profile import check_profile
from .rates import check_rates
from .schedule import check_schedule
from .trial import try_on

_GIB = 1 << 30


def validate(
    config: str | Path | Mapping[str, Any], *, world_size: int, overrides: Sequence[str] = (), console: Console
) -> None:
    """Check a configuration for a number of process ranks, and print what each of them would hold.

    No data is read and no run folder is touched.

    Raises:
        UserError: the run would be refused.
    """
    checked = load_config(config, overrides)
    batches, described = check_for(checked, world_size)
    held = backend_of(checked.parsed.engine).rehearse(checked, described, world_size)
    console.print(
        f"{checked.source}: fits {world_size} process ranks: {batches.total} sequences per step, in"
        f" {batches.accumulation_steps} micro-batches of {batches.micro}",
        highlight=False,
    )
    if held:
        console.print(_table(held))


def check_for(config: Config, world_size: int) -> tuple[Batches, PretrainedConfig]:
    """Check all of a configuration that needs neither data nor a run folder, for a number of process ranks.

    Raises:
        UserError: the run would be refused.
    """
    config = with_own_tokenizer(config)
    parsed = config.parsed
    missing = [key for key in ("model", "data", "training", "logging", "optimizer") if getattr(parsed, key) is None]
    if missing:
        raise config.error(*(f"{key}: expected this block, got none" for key in missing))
    assert parsed.model is not None
    assert parsed.data is not None
    assert parsed.training is not None
    backend = backend_of(parsed.engine)
    backend.check(config)
    if parsed.training.steps is not None:
        check_schedule(config, parsed.training.steps)
    check_lora(config)
    check_rates(config)
    check_lengths(config)
    check_quantization(config)
    check_sampling(config)
    batches = config.batches(backend.data_parallel_size(config, world_size))
    if parsed.training is not None and parsed.training.steps is not None:
        check_profile(config, parsed.training.steps)
    check_coreset(config, batches)
    check_model(parsed.model)
    # The tokenizer's, where it is trained on the data, is not known before.
    vocab_size = parsed.data.vocab_size if parsed.data.tokenizer is None else None
    described = model_config(parsed.model, vocab_size=vocab_size, sequence_length=parsed.data.sequence_length)
    backend.check_model(config, described, world_size)
    check_packing(parsed.data, described)
    try_on(config, abstract_model(described))
    return batches, described


def _table(held: Sequence[HeldByRank]) -> Table:
    """A line for each kind of process rank; activations are not counted."""
    table = Table(title="GiB per process rank, without activations", title_justify="left")
    for heading in ("process ranks", "holds"):
        table.add_column(heading)
    for heading in ("millions", *held[0].bytes, "all"):
        table.add_column(heading, justify="right")
    for rank in held:
        sizes = [*rank.bytes.values(), sum(rank.bytes.values())]
        table.add_row(
            rank.process_ranks, rank.what, f"{rank.parameters / 1e6:,.1f}", *(f"{size / _GIB:.2f}" for size in sizes)
        )
    return table
