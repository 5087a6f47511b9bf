"""``data`` in the configuration: records, or text and token files."""

from collections.abc import Callable

from ..config.run_blocks import DataBlock
from .examples import PreparedExamples, names_records, prepare_examples
from .prepare import PreparedData, prepare_data

Prepared = PreparedData | PreparedExamples


def prepare(block: DataBlock, notify: Callable[[str], None] = lambda text: None) -> Prepared:
    """Find the data, train the tokenizer and tokenize if that has not been done for this content.

    Args:
        block: the configuration's ``data``.
        notify: told what is being built, by the process that builds it.

    Raises:
        DataError: files are missing, empty, damaged or of mixed kinds, a record is not as its format has it, or the
            cache cannot be written.
    """
    return prepare_examples(block, notify) if names_records(block) else prepare_data(block, notify)
