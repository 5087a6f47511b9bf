"""From sources of records to samples, through a cache keyed by what they hold, their format and the tokenizer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ..config.run_blocks import DataBlock, SourceBlock
from ..errors import DataError
from ..files import local_path
from .cache import build_once, cache_key
from .corpus import content_hash, expand
from .encode import Encoder
from .example_file import ExampleFile, write_examples
from .formats import Text, content_of, format_of
from .layout import Layout, NothingLearned, Rules, holdout_bound, write_layout
from .mixture import Mixture, SourceSamples
from .prepare import made_cache, own_tokenizer, trained_tokenizer
from .record_files import Record, files_below, holds_records, is_saved_dataset, read_records
from .tokenizer import load_tokenizer, tokenizer_hash

# Of what is written; another one makes caches of before useless.
_VERSION = 1
_ALL = 1 << 64


@dataclass(frozen=True)
class Source:
    """One source of records.

    Attributes:
        paths: files, and folders of ``datasets``.
        content: a hash of what they hold.
        format_name: as configured, or inferred from the first record.
    """

    name: str
    key: str
    paths: list[Path]
    weight: float | None
    content: str = ""
    format_name: str = ""

    def records(self) -> Iterator[Record]:
        return read_records(self.paths)


@dataclass(frozen=True)
class PreparedExamples:
    """Samples for training and validation.

    Attributes:
        tokenizer: its folder.
        vocab_size: of the tokenizer.
        fingerprint: changes when the samples do.
    """

    train: Mixture
    validation: Mixture
    tokenizer: Path
    vocab_size: int
    fingerprint: str

    def samples(self, sequence_length: int, vocab_size: int) -> tuple[Mixture, Mixture]:
        """For training and validation."""
        return self.train, self.validation

    def counts(self) -> dict[str, Any]:
        """By source: how many examples and tokens it has, how many are learned, and what was cut off."""
        return {source.name: asdict(source.layout.counts) for source in self.train.sources}


def names_records(block: DataBlock) -> bool:
    """Whether any of ``data``'s sources is one of records.

    Raises:
        DataError: a path names nothing.
    """
    if block.train == "stdlib":
        return False
    sides = {"data.train": block.train, "data.validation": block.validation or []}
    return any(holds_records(path) for key, side in sides.items() for source in side for path in _paths(source, key))


def prepare_examples(block: DataBlock, notify: Callable[[str], None] = lambda text: None) -> PreparedExamples:
    """Read the records, encode them and lay out samples, if that has not been done for this content.

    Args:
        block: the configuration's ``data``.
        notify: told what is being built, by the process that builds it.

    Raises:
        DataError: naming the file, and the line or row where one is at fault.
    """
    cache = made_cache(block)
    assert block.train != "stdlib"
    train = _sources(block.train, "data.train", block, cache)
    named = _sources(block.validation or [], "data.validation", block, cache)
    folder, tokenizer = _tokenizer(block, cache, [*train, *named], notify)
    build = partial(_examples, block, cache, tokenizer, notify)
    sides: tuple[list[SourceSamples], list[SourceSamples]] = ([], [])
    keys: list[Any] = []
    for source in train:
        key, examples = build(source)
        bound = 0 if named else holdout_bound(examples, block.validation_fraction)
        for side, chosen in zip(sides, ((bound, _ALL), (0, bound)), strict=True):
            if chosen[0] < chosen[1]:
                layout_key, samples = _samples(block, cache, source, key, examples, chosen)
                keys.append(layout_key)
                side.append(samples)
    for source in named:
        key, examples = build(source)
        layout_key, samples = _samples(block, cache, source, key, examples, (0, _ALL))
        keys.append(layout_key)
        sides[1].append(samples)
    _check_sides(block, sides)
    weights = [source.weight for source in train if source.weight is not None]
    make = partial(
        Mixture,
        packing=block.packing,
        padding_token=_padding_token(tokenizer),
        limit=block.sequence_length,
    )
    return PreparedExamples(
        make(sides[0], weights=weights or None),
        make([samples for samples in sides[1] if len(samples)], weights=None),
        folder,
        len(tokenizer),
        cache_key("samples", keys, len(named), weights, version=_VERSION),
    )


def _sources(blocks: Sequence[SourceBlock], key: str, block: DataBlock, cache: Path) -> list[Source]:
    found = [
        Source(one.name or one.path, f"{key}.{number}", _paths(one, key), one.weight)
        for number, one in enumerate(blocks)
    ]
    for source in found:
        for path in source.paths:
            if not holds_records(path):
                raise DataError(
                    f"{source.key}: {path}: expected records (.jsonl, .json, .parquet, folders of datasets), as other"
                    " sources have, got another kind of file"
                )
    weighted = [source for source in found if source.weight is not None]
    if key == "data.validation" and weighted:
        raise DataError(f"{weighted[0].key}.weight: only sources of data.train have one; validation takes all examples")
    if weighted and len(weighted) < len(found):
        lacking = next(source for source in found if source.weight is None)
        raise DataError(f"{lacking.key}.weight: expected one, as other sources have, got none")
    names = [source.name for source in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{key}: expected sources with different names, got two called {twice!r}")
    return [_looked_into(source, block, cache) for source in found]


def _looked_into(source: Source, block: DataBlock, cache: Path) -> Source:
    first = next(source.records(), None)
    if first is None:
        raise DataError(f"{source.key}: {source.name}: expected records, got none: it is empty")
    content = content_hash([file for path in source.paths for file in files_below(path)], cache)
    return replace(source, content=content, format_name=format_of(first, block.format).name)


def _paths(source: SourceBlock, key: str) -> list[Path]:
    path = local_path(source.path, key)
    return [path] if is_saved_dataset(path) else expand([source.path], key)


def _tokenizer(
    block: DataBlock, cache: Path, sources: Sequence[Source], notify: Callable[[str], None]
) -> tuple[Path, Any]:
    """The tokenizer's folder and the tokenizer, with the template of ``data.chat_template``."""
    other = next((source for source in sources if source.format_name != "text"), None)
    if block.chat_template is not None and other is None:
        raise DataError("data.chat_template: expected records with messages to use it for, got texts alone")
    if block.tokenizer is not None:
        folder, tokenizer = own_tokenizer(block, cache)
    elif other is not None:
        raise DataError(
            f"data.tokenizer: expected the tokenizer of the model that is tuned, got none: {other.name} is of the"
            f" format {other.format_name!r}, and one is trained only on texts"
        )
    else:

        def texts() -> Iterator[str]:
            for source in sources:
                for record in source.records():
                    content = content_of(record, format_of(record, source.format_name))
                    assert isinstance(content, Text)
                    yield content.text

        content = cache_key("records", [source.content for source in sources])
        said = partial(notify, f"training a tokenizer of {block.vocab_size} pieces on {len(sources)} sources")
        folder, tokenizer = trained_tokenizer(block, cache, content, texts, said)
    if block.chat_template is None:
        return folder, tokenizer
    path = local_path(block.chat_template, "data.chat_template")
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template: {path} cannot be read: {error}") from error
    tokenizer.chat_template = template
    key = cache_key("with template", tokenizer_hash(tokenizer), template, version=_VERSION)
    folder = build_once(cache / "tokenizers" / key, lambda target: tokenizer.save_pretrained(str(target)))
    return folder, load_tokenizer(folder)


def _examples(
    block: DataBlock, cache: Path, tokenizer: Any, notify: Callable[[str], None], source: Source
) -> tuple[str, ExampleFile]:
    """The source's examples, and the key of their place in the cache."""
    template = tokenizer.chat_template
    key = cache_key(
        "examples", source.content, source.format_name, tokenizer_hash(tokenizer), template, version=_VERSION
    )

    def write(target: Path) -> None:
        notify(f"tokenizing {source.name}, of the format {source.format_name!r}")
        kind = format_of(next(source.records()), source.format_name)
        contents = ((record, content_of(record, kind)) for record in source.records())
        encoded = Encoder(tokenizer).encode(contents)
        write_examples(target, encoded, vocab_size=len(tokenizer), format_name=source.format_name)

    return key, ExampleFile(build_once(cache / "examples" / key, write))


def _samples(
    block: DataBlock, cache: Path, source: Source, key: str, examples: ExampleFile, chosen: tuple[int, int]
) -> tuple[str, SourceSamples]:
    """The samples of one side, and the key of their layout in the cache."""
    cut = source.format_name == "text" and block.too_long == "truncate"
    rules = Rules(block.sequence_length, packing=block.packing, cut=cut, drop=block.too_long == "drop")
    layout_key = cache_key("layout", key, chosen, asdict(rules), version=_VERSION)
    try:
        folder = build_once(
            cache / "layouts" / layout_key, lambda target: write_layout(target, examples, chosen, rules)
        )
    except NothingLearned as error:
        number, length = error.args
        place = next(islice(source.records(), number, None)).place
        raise DataError(
            f"{place}: expected tokens to learn among the first {block.sequence_length} of data.sequence_length, got"
            f" none: it has {length}; raise that, or leave such records out with data.too_long: 'drop'"
        ) from error
    return layout_key, SourceSamples(source.name, examples, Layout(folder))


def _check_sides(block: DataBlock, sides: tuple[list[SourceSamples], list[SourceSamples]]) -> None:
    for samples in sides[0]:
        counts = samples.layout.counts
        if len(samples) == 0:
            why = (
                f"all its {counts.examples} examples are longer than data.sequence_length, {block.sequence_length}"
                if counts.examples
                else "all its examples are held out; name data.validation"
            )
            raise DataError(f"data.train: {samples.name}: expected examples to train on, got none: {why}")
    if not any(map(len, sides[1])):
        raise DataError("data.validation: expected examples, got none: all are longer than data.sequence_length")


def _padding_token(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
