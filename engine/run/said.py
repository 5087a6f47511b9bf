"""What transformers says of a model's configuration, in our words and with the key."""

import re

from huggingface_hub.errors import StrictDataclassError

from ..errors import one_line

_TYPES = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}
# Of errors about several keys: what they say, the key, and what it should be.
_KNOWN = (
    (
        r"The hidden size \((\d+)\) is not a multiple of the number of attention heads \((\d+)\)\.?",
        r"num_attention_heads: expected a divisor of hidden_size, \1, got \2",
    ),
    (r"The `(\w+)` entries must be in \((.*)\) but got (.*)", r"\1: expected entries of \2, got \3"),
)


def said_of(error: Exception, where: str) -> str:
    """One line: ``where.key: expected X, got Y``, as far as the error names the key; other errors by their kind."""
    if not isinstance(error, StrictDataclassError) or not isinstance(error.__cause__, Exception):
        return f"{where}: {type(error).__name__}: {one_line(error)}"
    text = one_line(error.__cause__)
    if field := re.match(r"Validation error for field '(\w+)'", str(error)):
        return f"{where}.{field[1]}: {_of_field(text)}"
    for pattern, ours in _KNOWN:
        if found := re.fullmatch(pattern, text):
            return f"{where}.{found.expand(ours)}"
    return f"{where}: {text}"


def _of_field(text: str) -> str:
    if found := re.fullmatch(r"Field '\w+' expected (\w+), got \w+ \(value: (.*)\)", text):
        return f"expected {_TYPES.get(found[1], found[1])}, got {found[2]}"
    if found := re.match(r"Field '\w+' with value (.*) doesn't match any type in \((.*)\)\. Errors:", text):
        kinds = [_TYPES.get(kind, kind) for kind in re.sub(r"<class '([\w.]+)'>", r"\1", found[2]).split(", ")]
        return f"expected {' or '.join(kinds)}, got {found[1]}".replace("NoneType", "null")
    return re.sub(r"^Field '\w+' ", "", text)
