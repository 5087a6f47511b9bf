"""The block ``activation_offload``: the options of :mod:`narrowgauge.offload`, and a switch."""

from dataclasses import MISSING, fields
from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator, create_model, model_validator

from narrowgauge.offload import OffloadOptions
from narrowgauge.offload.options import check_option, hints_of

from .blocks import Flag, StrictBlock

# What JSON has where Python may have objects.
_JSON_TYPES: dict[str, Any] = {"path": str | list[str] | None, "backend": str, "codec_modules": list[str] | None}


def _checked(name: str, value: Any) -> Any:
    if name == "path":
        if value is None:
            return value
        parts = value if isinstance(value, list) else [value]
        if not parts or not all(isinstance(part, str) and part for part in parts):
            raise ValueError(f"expected a folder, or a list of folders, got {value!r}")
        return value
    try:
        check_option(name, value)
    except (TypeError, ValueError) as error:
        raise ValueError(str(error).removeprefix(f"{name}: ")) from error
    return value


def _fields() -> dict[str, Any]:
    hints = hints_of()
    return {
        option.name: (
            Annotated[
                _JSON_TYPES.get(option.name, hints[option.name]), BeforeValidator(partial(_checked, option.name))
            ],
            ... if option.default is MISSING else option.default,
        )
        for option in fields(OffloadOptions)
    }


class ActivationOffloadBlock(create_model("OffloadOptionsBlock", __base__=StrictBlock, **_fields())):
    """The options, and a switch."""

    enabled: Flag = True

    @model_validator(mode="after")
    def _fit_together(self) -> "ActivationOffloadBlock":
        self.options()
        return self

    def options(self) -> OffloadOptions:
        """As the offload takes them."""
        return OffloadOptions(**self.model_dump(exclude={"enabled"}))
