"""Records as tokens, and which of them are learned, by the tokenizer and its chat template."""

import logging
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import DataError, one_line
from .formats import Completion, Content, Conversation, Messages, Text
from .record_files import Record

logger = logging.getLogger(__name__)

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BATCH_RECORDS = 64
# Long ones are cut here, later: the tokenizer has nothing to warn of.
_QUIET = {"verbose": False}


class Example(NamedTuple):
    """Tokens of one record, and for each whether it is learned."""

    tokens: npt.NDArray[np.int64]
    learned: npt.NDArray[np.bool_]


class Encoder:
    """Encodes the records of one source."""

    def __init__(self, tokenizer: Any) -> None:
        """
        Args:
            tokenizer: of transformers, with an end-of-sequence token.
        """
        self._tokenizer = tokenizer
        self._warned = set[type[Content]]()

    def encode(self, contents: Iterable[tuple[Record, Content]]) -> Iterator[Example]:
        """The examples in order.

        A text, and a completion that is one, gets what the tokenizer puts around every text, and an end-of-sequence
        token where that has none. Of messages the chat template writes everything.

        Raises:
            DataError: the tokenizer has no chat template or none with generation marks, the template refuses a
                record, or there is no token to learn in one; naming file and line.
        """
        contents = iter(contents)
        while batch := list(islice(contents, _BATCH_RECORDS)):
            texts = [content.text for _, content in batch if isinstance(content, Text)]
            encoded = iter(self._tokens_of(texts) if texts else [])
            for record, content in batch:
                if isinstance(content, Text):
                    tokens = self._ended(next(encoded))
                    learned = [True] * len(tokens)
                elif isinstance(content, Conversation):
                    tokens, learned = self._conversation(record, content)
                else:
                    tokens, learned = self._completion(record, content)
                if not any(learned[1:]):
                    raise DataError(f"{record.place}: expected tokens to learn, got none{_why_none(content, tokens)}")
                yield Example(np.asarray(tokens, np.int64), np.asarray(learned, np.bool_))

    def _tokens_of(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, **_QUIET)["input_ids"]

    def _ended(self, tokens: list[int]) -> list[int]:
        end = self._tokenizer.eos_token_id
        return tokens if tokens and tokens[-1] == end else [*tokens, end]

    def _conversation(self, record: Record, content: Conversation) -> tuple[list[int], list[bool]]:
        template = self._template(record)
        if not _MARKS.search(template):
            raise DataError(
                f"{record.place}: data.tokenizer: its chat template has no generation marks, which say what the"
                " assistant's words are: put {% generation %} and {% endgeneration %} around them in a copy, and name"
                " it as data.chat_template; or give the records as prompt and completion, which need no marks"
            )
        if not self._tokenizer.is_fast:
            raise DataError(
                f"{record.place}: data.tokenizer: expected a fast tokenizer, which knows where its tokens lie in the"
                f" text, got {type(self._tokenizer).__name__}; give the records as prompt and completion"
            )
        found = self._applied(record, content.messages, content.tools, return_assistant_tokens_mask=True)
        learned = [bool(mark) for mark in found["assistant_masks"]]
        turns = _runs([message["role"] == "assistant" for message in content.messages])
        if 0 < (marked := _runs(learned)) < turns:
            self._warn_once(
                Conversation,
                record,
                f"the chat template marks {marked} of the assistant's {turns} turns; only these are learned",
            )
        return found["input_ids"], learned

    def _completion(self, record: Record, content: Completion) -> tuple[list[int], list[bool]]:
        if isinstance(content.prompt, str) and isinstance(content.completion, str):
            prompt, whole = self._tokens_of([content.prompt, content.prompt + content.completion])
            whole = self._ended(whole)
        else:
            assert isinstance(content.prompt, list)
            assert isinstance(content.completion, list)
            self._template(record)
            asked = self._applied(record, content.prompt, content.tools, add_generation_prompt=True)
            prompt = asked["input_ids"]
            whole = self._applied(record, [*content.prompt, *content.completion], content.tools)["input_ids"]
        begin = _common_prefix(prompt, whole)
        if begin < len(prompt):
            self._warn_once(
                Completion,
                record,
                f"the last {len(prompt) - begin} tokens of the prompt are others where the completion follows; what is"
                " learned begins with them",
            )
        return whole, [position >= begin for position in range(len(whole))]

    def _template(self, record: Record) -> str:
        try:
            return self._tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                f"{record.place}: data.tokenizer: expected a tokenizer with a chat template for messages, got none:"
                " name a template as data.chat_template"
            ) from error

    def _applied(self, record: Record, messages: Messages, tools: list[Any] | None, **options: bool) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=True, return_dict=True, tokenizer_kwargs=_QUIET, **options
            )
        except Exception as error:
            # A template is a program of its own, and raises what comes.
            raise DataError(f"{record.place}: the chat template refuses it: {one_line(error)}") from error

    def _warn_once(self, kind: type[Content], record: Record, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(f"{record.place}: {text}; said once, though it may be so in others")


def _why_none(content: Content, tokens: list[int]) -> str:
    if isinstance(content, Text):
        return f" in {len(tokens)}: the first is predicted by nothing"
    if isinstance(content, Conversation):
        return f" in {len(tokens)}: the chat template's generation marks enclose nothing of it"
    return f" in {len(tokens)}: the completion is empty"


def _runs(flags: list[bool]) -> int:
    """How many groups of neighbours are true."""
    return sum(flag and not before for before, flag in zip([False, *flags], flags, strict=False))


def _common_prefix(first: list[int], second: list[int]) -> int:
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length
