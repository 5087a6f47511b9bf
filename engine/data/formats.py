"""What a record says: a text, a conversation, or a prompt and what completes it. Its columns are checked here."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from .record_files import Record

ROLES = ("system", "developer", "user", "assistant", "tool")
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Text:
    """All of it is learned."""

    text: str


@dataclass(frozen=True)
class Conversation:
    """What the assistant says is learned."""

    messages: Messages
    tools: list[Any] | None


@dataclass(frozen=True)
class Completion:
    """What follows the prompt is learned; both are texts or both messages."""

    prompt: str | Messages
    completion: str | Messages
    tools: list[Any] | None = None


Content = Text | Conversation | Completion


@dataclass(frozen=True)
class Format:
    """A kind of record.

    Attributes:
        columns: that every record has.
        optional: that are read where a record has them.
    """

    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Record], Content]


def format_of(record: Record, name: str | None) -> Format:
    """The format called ``name``, or else the one whose columns the record has.

    Raises:
        DataError: none fits, or several do.
    """
    if name is not None:
        return FORMATS[name]
    found = [one for one in FORMATS.values() if record.values.keys() >= set(one.columns)]
    if len(found) == 1:
        return found[0]
    known = "; ".join(f"{one.name}: {', '.join(one.columns)}" for one in FORMATS.values())
    columns = sorted(record.values)
    if found:
        names = " and ".join(one.name for one in found)
        raise DataError(f"{record.place}: the columns {columns} fit {names}: name one as data.format")
    raise DataError(f"{record.place}: expected the columns of a data.format ({known}), got {columns}")


def content_of(record: Record, kind: Format) -> Content:
    """What a record of this format says.

    Raises:
        DataError: a column is missing or of another type, a role is unknown; naming file and line.
    """
    missing = [name for name in kind.columns if record.values.get(name) is None]
    if missing:
        raise DataError(
            f"{record.place}: expected the columns {', '.join(kind.columns)} of the format {kind.name!r}, got"
            f" {sorted(name for name, value in record.values.items() if value is not None)}"
        )
    return kind.read(record)


def _text(record: Record) -> Text:
    return Text(_string(record, "text"))


def _conversation(record: Record) -> Conversation:
    messages = _messages(record, "messages")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{record.place}: messages: expected one with the role 'assistant' to learn, got none")
    return Conversation(messages, _tools(record))


def _completion(record: Record) -> Completion:
    kinds = {type(record.values[name]) for name in ("prompt", "completion")}
    if kinds == {str}:
        return Completion(_string(record, "prompt"), _string(record, "completion"))
    if str in kinds:
        raise DataError(
            f"{record.place}: expected prompt and completion to be both texts or both messages, got one of each"
        )
    return Completion(_messages(record, "prompt"), _messages(record, "completion"), _tools(record))


def _alpaca(record: Record) -> Completion:
    """Alpaca's columns as messages: ``system``, turns of ``history``, ``instruction`` and ``input``."""
    prompt: Messages = []
    if record.values.get("system"):
        prompt.append({"role": "system", "content": _string(record, "system")})
    for turn in _list(record, "history") if record.values.get("history") else []:
        if not (isinstance(turn, Sequence) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise DataError(f"{record.place}: history: expected pairs of texts, got {_short(turn)}")
        prompt += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn, strict=True)]
    asked = [_string(record, "instruction")]
    if record.values.get("input"):
        asked.append(_string(record, "input"))
    prompt.append({"role": "user", "content": "\n".join(asked)})
    return Completion(prompt, [{"role": "assistant", "content": _string(record, "output")}])


FORMATS = {
    one.name: one
    for one in (
        Format("text", ("text",), (), _text),
        Format("messages", ("messages",), ("tools",), _conversation),
        Format("prompt_completion", ("prompt", "completion"), ("tools",), _completion),
        Format("alpaca", ("instruction", "output"), ("input", "system", "history"), _alpaca),
    )
}


def _string(record: Record, column: str) -> str:
    value = record.values[column]
    if not isinstance(value, str):
        raise DataError(f"{record.place}: {column}: expected a text, got {_short(value)}")
    return value


def _list(record: Record, column: str) -> list[Any]:
    value = record.values[column]
    if not isinstance(value, list):
        raise DataError(f"{record.place}: {column}: expected a list, got {_short(value)}")
    return value


def _messages(record: Record, column: str) -> Messages:
    found = []
    for number, message in enumerate(_list(record, column)):
        where = f"{record.place}: {column}[{number}]"
        if not isinstance(message, Mapping):
            raise DataError(f"{where}: expected an object with role and content, got {_short(message)}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise DataError(f"{where}: expected a role of {list(ROLES)}, got {_short(role)}")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            raise DataError(f"{where}: content: expected a text, got {_short(content)}")
        found.append(_without_nulls(message))
    if not found:
        raise DataError(f"{record.place}: {column}: expected messages, got an empty list")
    return found


def _tools(record: Record) -> list[Any] | None:
    value = record.values.get("tools")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{record.place}: tools: expected a list, or one in JSON, got {_short(value)}") from error
    if value is not None and not isinstance(value, list):
        raise DataError(f"{record.place}: tools: expected a list, or one in JSON, got {_short(value)}")
    return _without_nulls(value) if value else None


def _without_nulls(value: Any) -> Any:
    """Tables have a null for every key that another row has: a record is to say the same in each kind of file."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(child) for key, child in value.items() if child is not None}
    return [_without_nulls(child) for child in value] if isinstance(value, list) else value


def _short(value: Any) -> str:
    return json.dumps(value, default=str)[:60]
