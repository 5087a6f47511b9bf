"""Keeps secrets out of what is printed and saved. Light to import."""

import re
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"

_SECRET_KEY = re.compile(
    r"(.*[_-])?(api[_-]?keys?|access[_-]?keys?|private[_-]?keys?|auth[_-]token|token|secrets?|passwords?|passwd|credentials?)",
    re.IGNORECASE,
)
# To the last @ before the path: a password may hold one.
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/\s\"']+@")
# What begins a parameter, as ``?``, and what ends its name; both also encoded, once or more often: in a URL that is
# another's parameter.
_BEGIN = r"(?:[?&;#]|%(?:25)*(?:3F|26|3B|23))"
_EQUALS = r"(?:=|%(?:25)*3D)"
# ``?token=``, ``&X-Amz-Signature=``, ``&%74oken[]=``, ``%3Ftoken%3D``.
_URL_PARAMETER = re.compile(rf"{_BEGIN}((?:(?!{_BEGIN}|{_EQUALS})[^\s\"'])+)({_EQUALS})", re.IGNORECASE)
_URL_VALUE = re.compile(r"[^&;#\s\"']+")
_ENCODED_VALUE = re.compile(rf"(?:(?!{_BEGIN})[^\s\"'])+", re.IGNORECASE)
_SECRET_PARAMETER = re.compile(
    r"[\w.-]*((api|access|private|secret)[_-]?keys?|token|secrets?|passwords?|passwd|credentials?|signature|AccessKeyId)"
    r"|([\w.-]*[_-])?(key|auth|authorization|bearer|jwt|pwd|sas|sig|code|session|session_?id|sid)",
    re.IGNORECASE,
)
# Its values are environment variables, of which nobody knows what they hold.
_ENVIRONMENT = ("launch", "environment")


def redact(value: Any, path: tuple[str, ...] = ()) -> Any:
    """A copy of a configuration with ``***`` for all environment variables, for the values of keys that are named as
    secrets are (``api_key``, ``hf_token``, ``password``, ...), and for user, password and secret parameters in URLs.
    """
    if isinstance(value, dict):
        return {key: redact(child, (*path, str(key))) for key, child in value.items()}
    if isinstance(value, list):
        return [redact(child, path) for child in value]
    if value is not None and (path[:2] == _ENVIRONMENT or (path and _SECRET_KEY.fullmatch(path[-1]))):
        return HIDDEN
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """The text with ``***`` for user and password in URLs, and for the secrets among their parameters."""
    text = _URL_CREDENTIALS.sub(f"{HIDDEN}@", text)
    parts, done = [], 0
    # Also within the values of others, which may be URLs with parameters of their own.
    for parameter in _URL_PARAMETER.finditer(text):
        names = re.split(r"[\[\]]+", unquote(unquote(unquote(parameter[1]))))
        if parameter.start() < done or not any(map(_SECRET_PARAMETER.fullmatch, names)):
            continue
        pattern = _URL_VALUE if parameter[2] == "=" else _ENCODED_VALUE
        if value := pattern.match(text, parameter.end()):
            parts += [text[done : value.start()], HIDDEN]
            done = value.end()
    return "".join(parts) + text[done:]
