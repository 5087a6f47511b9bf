"""``data`` in the configuration: records, or text and token files."""

import logging
from collections.abc import Callable
from dataclasses import replace

from ..config.config import Config
from ..config.run_blocks import DataBlock
from ..files import local_path
from ..ranks.environment import process_rank
from .examples import PreparedExamples, names_records, prepare_examples
from .prepare import PreparedData, prepare_data
from .tokenizer import holds_tokenizer

logger = logging.getLogger(__name__)

Prepared = PreparedData | PreparedExamples


def with_own_tokenizer(config: Config) -> Config:
    """The configuration, whose ``data.tokenizer``, where it names none, is that in the folder of ``model.path``.

    The first process rank says which tokenizer a model from a folder is trained with.
    """
    parsed, say = config.parsed, process_rank() == 0
    path = parsed.model.path if parsed.model is not None else None
    if parsed.data is None or path is None or parsed.data.tokenizer is not None:
        return config
    folder = local_path(path, "model.path")
    if not holds_tokenizer(folder):
        if say and folder.is_dir():
            logger.warning(
                f"model.path: {folder} holds no tokenizer, and data.tokenizer names none: texts get one of their own"
            )
        return config
    if say:
        unused = "; data.vocab_size is not used" if "vocab_size" in parsed.data.model_fields_set else ""
        logger.info(f"data.tokenizer: that of the model, {folder}{unused}")
    data = parsed.data.model_copy(update={"tokenizer": path})
    return replace(config, parsed=parsed.model_copy(update={"data": data}))


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
