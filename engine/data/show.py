"""``narrowgauge data``: what a run would be trained on, before it is."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config.config import load_config
from ..errors import UserError
from ..micro_batch import NOT_LEARNED
from .loader import Samples
from .mixture import Mixture
from .run_data import prepare, with_own_tokenizer
from .tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

_SAMPLES = 10
# Of a sample; what is between its beginning and its end is left out.
_TOKENS = 400
_LEARNED, _GIVEN, _PARTED = "green", "dim", "bold magenta"
_PERCENTILES = (50, 95)
# Of which the lengths are looked at; those of large sources are drawn evenly.
_LENGTHS = 100_000
# Tokens and labels.
Example = tuple[list[int], list[int]]


def show_data(config: str | Path | Mapping[str, Any], *, overrides: Sequence[str] = (), console: Console) -> None:
    """Prepare the data of a configuration as a run does, and print its first samples and what its sources hold.

    What is learned is coloured; on a console without colours it stands between ``[`` and ``]``.

    Raises:
        UserError: the configuration or the data does not hold.
    """
    checked = with_own_tokenizer(load_config(config, overrides))
    block, training = checked.parsed.data, checked.parsed.training
    if block is None:
        raise checked.error("data: expected this block, got none")
    prepared = prepare(block, logger.info)
    if prepared.vocab_size is None:
        raise UserError("data.tokenizer: token files carry none to show their text with; name one")
    samples, held_out = prepared.samples(block.sequence_length, prepared.vocab_size)
    assert prepared.tokenizer is not None
    tokenizer = load_tokenizer(prepared.tokenizer)
    seed = training.seed if training is not None else 0
    for place, sample in enumerate(samples.order(np.arange(min(_SAMPLES, len(samples))), seed).tolist()):
        examples = [*_examples(sample, samples)]
        name = f" of {samples.source_of(sample)[0].name}" if isinstance(samples, Mixture) else ""
        console.print(Text(f"sample {place + 1}{name}: {_counted(examples)}", style="bold"))
        console.print(_text(examples, tokenizer, in_colour=console.color_system is not None))
    console.print(_table("training", samples))
    console.print(_table("validation", held_out))


def _counted(examples: Sequence[Example]) -> str:
    tokens = sum(len(tokens) for tokens, _ in examples)
    learned = sum(label != NOT_LEARNED for _, labels in examples for label in labels)
    return f"{tokens} tokens, {learned} learned"


def _text(examples: Sequence[Example], tokenizer: Any, *, in_colour: bool) -> Text:
    """A sample's tokens as text, those that are learned in another colour; its examples are parted."""
    shown = Text()
    for number, (tokens, labels) in enumerate(examples):
        if number:
            shown.append("\n--- another example ---\n", style=_PARTED)
        for text, learned in _runs(tokens, labels, tokenizer):
            shown.append(f"[{text}]" if learned and not in_colour else text, style=_LEARNED if learned else _GIVEN)
    return shown


def _examples(sample: int, samples: Samples) -> Iterator[Example]:
    """Tokens and labels of each example."""
    if isinstance(samples, Mixture):
        source, number = samples.source_of(sample)
        for tokens, learned in source.spans(number):
            labels = np.where(learned, tokens, NOT_LEARNED)
            # Nothing predicts the first.
            labels[0] = NOT_LEARNED
            yield tokens.tolist(), labels.tolist()
    else:
        tokens = samples[sample].tolist()
        yield tokens, [NOT_LEARNED, *tokens[1:]]


def _runs(tokens: Sequence[int], labels: Sequence[int], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Stretches of the text that are learned or not; the middle of a long one is left out."""
    begin = 0
    for end in range(1, len(tokens) + 1):
        learned = labels[begin] != NOT_LEARNED
        if end < len(tokens) and (labels[end] != NOT_LEARNED) == learned:
            continue
        left_out, half = end - begin - _TOKENS, _TOKENS // 2
        if left_out > 0:
            yield _decoded(tokens, begin, begin + half, tokenizer), learned
            yield f" ... {left_out} tokens ... ", False
            begin = end - half
        yield _decoded(tokens, begin, end, tokenizer), learned
        begin = end


def _decoded(tokens: Sequence[int], begin: int, end: int, tokenizer: Any) -> str:
    """A part of the text: alone it might begin without its space."""
    before, whole = (tokenizer.decode(tokens[:position]) for position in (begin, end))
    return whole.removeprefix(before) if begin and whole.startswith(before) else tokenizer.decode(tokens[begin:end])


def _table(side: str, samples: Samples) -> Table:
    table = Table(title=side, title_justify="left")
    table.add_column("source")
    for heading in ("examples", "samples", "tokens", "learned", "median length", "95 %", "longest", "too long"):
        table.add_column(heading, justify="right")
    if not isinstance(samples, Mixture):
        length = int(samples.tokens_per_sample)
        tokens = len(samples) * length
        cells = [f"{len(samples):,}", f"{tokens:,}", "all", *[f"{length:,}"] * 3, ""]
        table.add_row("documents", "", *cells)
        return table
    for source in samples.sources:
        lengths, counts = source.lengths(_LENGTHS), asdict(source.layout.counts)
        table.add_row(
            source.name,
            *(f"{counts[key]:,}" for key in ("examples", "samples", "tokens")),
            f"{counts['learned'] / counts['tokens']:.1%}",
            *(f"{np.percentile(lengths, p):,.0f}" for p in _PERCENTILES),
            f"{counts['longest']:,}",
            _too_long(counts),
        )
    return table


def _too_long(counts: Mapping[str, int]) -> str:
    done = {"truncated": "truncated", "dropped": "left out", "cut": "cut"}
    return ", ".join(f"{counts[k] / counts['examples']:.1%} {word}" for k, word in done.items() if counts[k]) or "none"
