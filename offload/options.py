"""The options of activation offload, told once: names, types, defaults, limits, meaning.

The keywords of :class:`~.activation_offload.ActivationOffload`, the block in a run's configuration and the table in
``docs/offload.md`` are made from :class:`OffloadOptions`.
"""

import inspect
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn

from .backends import IOBackend, backend_names
from .codecs import CodecName, codec_names

Granularity = Literal["saved_tensors", "layer_inputs"]
Folder = str | os.PathLike[str]
# What has a meaning where ``path`` is None.
_WITHOUT_DISK = ("path", "granularity", "min_tensor_bytes", "codec", "codec_modules")


@dataclass(frozen=True, kw_only=True)
class Option:
    """What is said of an option besides its type and default.

    Attributes:
        meaning: for the reader of the table.
        shown: what the table has instead of the default.
        at_least, above, at_most: limits of a number.
    """

    meaning: str
    shown: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None

    def allows(self, value: float) -> bool:
        """Whether a number is within the limits; never NaN or infinite."""
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
        )

    @property
    def limits(self) -> str:
        """In words."""
        if self.at_most is not None:
            return f"{self.at_least} to {self.at_most}"
        return f"{self.at_least} or more" if self.at_least is not None else f"a number above {self.above}"


@dataclass(frozen=True, kw_only=True)
class OffloadOptions:
    """What is offloaded, how much of it, and where to.

    Raises:
        TypeError, ValueError: an option is of another type, or out of range; names it.
    """

    path: Annotated[
        Folder | Sequence[Folder] | None,
        Option(
            meaning="A folder on the SSD, or a list: one per SSD, used in turn. Nothing is left in it. `null`: no disk,"
            " what a codec has encoded stays in memory."
        ),
    ]
    granularity: Annotated[
        Granularity,
        Option(
            meaning="`saved_tensors`: everything that forward saves. `layer_inputs`: the inputs of transformer layers,"
            " which are recomputed in backward."
        ),
    ] = "saved_tensors"
    keep_resident: Annotated[
        float | Literal["auto"],
        Option(
            meaning="The share of the bytes of the largest forward so far that stays in memory, the last saved ones,"
            ' besides the buffers. 0: offload everything. `"auto"`: as much as backward needs not to wait, planned'
            " after the first backward and again when the disk's speed changes by more than 20 %.",
            at_least=0,
            at_most=1,
        ),
    ] = "auto"
    min_tensor_bytes: Annotated[int, Option(meaning="Smaller storages stay in memory, as they are.", at_least=0)] = (
        256 << 10
    )
    codec: Annotated[
        CodecName,
        Option(
            meaning="How activations are held, in memory and on disk: `none`, bit for bit; `mesa8`, rounded to 8 bits,"
            " right in the mean. Forward stays exact."
        ),
    ] = "none"
    codec_modules: Annotated[
        Sequence[str] | None,
        Option(
            meaning="Globs over the names of modules: whose saved activations are encoded.",
            shown="the modules inside of blocks",
        ),
    ] = None
    backend: Annotated[
        str | IOBackend, Option(meaning="How bytes are moved; `auto` measures and takes the fastest.")
    ] = "auto"
    num_lanes: Annotated[
        int, Option(meaning="Threads, and so transfers at a time; 1 to 64.", at_least=1, at_most=64)
    ] = 2
    buffer_bytes: Annotated[
        int | None,
        Option(
            meaning="Memory for reading ahead and for copies on their way to disk; on CUDA as much pinned, and as much"
            " of the GPU's. By default at least three of a forward's tensors.",
            shown="a tenth of a forward",
            above=0,
        ),
    ] = None
    host_memory_bytes: Annotated[
        int,
        Option(
            meaning="A tier between GPU and SSD: this much stays in (on CUDA pinned) host memory and is not written.",
            at_least=0,
        ),
    ] = 0
    capacity_bytes: Annotated[
        int | None,
        Option(
            meaning="Of the file, reserved at once, per process rank; by default cut down to twice the need after the"
            " first steps.",
            shown="half of the free space",
            above=0,
        ),
    ] = None
    io_timeout: Annotated[
        float, Option(meaning="Seconds without an answer from the disk that are an error.", above=0)
    ] = 300.0
    rated_tbw: Annotated[
        float | None,
        Option(
            meaning="Terabytes that the drives may be written with over their life; gives `drive_life_years`.", above=0
        ),
    ] = None
    drive_bytes: Annotated[
        int | None,
        Option(meaning="Capacity of the drives, for `max_drive_writes_per_day`.", shown="the filesystems'", above=0),
    ] = None
    max_drive_writes_per_day: Annotated[
        float | None,
        Option(
            meaning="Write no more than this many times the drives' capacity a day; the rest stays in memory.", above=0
        ),
    ] = None

    def __post_init__(self) -> None:
        for option in fields(self):
            check_option(option.name, getattr(self, option.name))
        if self.codec_modules is not None and (self.codec == "none" or self.granularity == "layer_inputs"):
            raise ValueError(
                "codec_modules: expected a codec and granularity 'saved_tensors', which it is about, got"
                f" {self.codec!r} and {self.granularity!r}"
            )
        if self.path is None:
            self._check_memory_only()

    def _check_memory_only(self) -> None:
        if self.codec == "none":
            raise ValueError("path: expected a folder without a codec, which would have nothing to do, got None")
        for option in fields(self):
            if option.name not in _WITHOUT_DISK and getattr(self, option.name) != option.default:
                raise ValueError(f"{option.name}: is about the disk: expected a folder as path with it, got None")


def check_option(name: str, value: Any) -> None:
    """Whether an option may have a value; ``path`` is checked where it is used.

    Raises:
        TypeError, ValueError: with its name, what is expected, and what was given.
    """
    if name == "path":
        return
    if name == "granularity":
        _check_one_of(name, value, get_args(Granularity))
    elif name == "codec":
        _check_one_of(name, value, codec_names())
    elif name == "codec_modules":
        _check_globs(name, value)
    elif name == "backend":
        if isinstance(value, str):
            _check_one_of(name, value, backend_names(), " or an IOBackend")
        elif not hasattr(value, "lane"):
            raise TypeError(f"{name}: expected a name or an IOBackend, got {value!r}")
    elif name == "keep_resident":
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value != "auto" and not (is_number and 0 <= value <= 1):
            raise ValueError(f"{name}: expected 'auto' or a number from 0 to 1, got {value!r}")
    else:
        _check_number(name, value)


def _check_globs(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(glob, str) for glob in value):
        raise TypeError(f"{name}: expected a list of globs, got {value!r}")
    if not value:
        raise ValueError(f"{name}: expected at least one glob, got none")


def _check_one_of(name: str, value: Any, allowed: Sequence[str], more: str = "") -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}{more}, got {value!r}")


def _check_number(name: str, value: Any) -> None:
    kinds, option = kinds_of(name), option_of(name)
    if value is None and type(None) in kinds:
        return
    is_whole = float not in kinds
    if not isinstance(value, int if is_whole else int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {'an int' if is_whole else 'a number'}, got {value!r}")
    if not option.allows(value):
        raise ValueError(f"{name}: expected {option.limits}, got {value}")


@cache
def hints_of() -> dict[str, Any]:
    """The options' types by name, without what is said of them."""
    return get_type_hints(OffloadOptions)


def kinds_of(name: str) -> tuple[Any, ...]:
    """The types that an option's annotation names."""
    hint = hints_of()[name]
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


@cache
def option_of(name: str) -> Option:
    """What is said of an option."""
    return get_type_hints(OffloadOptions, include_extras=True)[name].__metadata__[0]


def check_model(granularity: Granularity, codec: CodecName, model: Any, layers: Any) -> None:
    """What is made to recompute, and what a codec follows.

    Raises:
        TypeError, ValueError: it does not fit the granularity, or is no model.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got a {type(model).__name__}")
    if codec != "none" and model is None:
        raise ValueError(f"codec: {codec!r} needs model=, by the names of whose modules it knows what is saved where")
    if granularity == "layer_inputs" and model is None:
        raise ValueError("granularity: 'layer_inputs' needs model=, whose layers it makes recompute")
    if layers is None:
        return
    if granularity != "layer_inputs" or model is None:
        raise ValueError("layers: only granularity 'layer_inputs' recomputes layers")
    if not isinstance(layers, Sequence | nn.ModuleList):
        raise TypeError(f"layers: expected a list of modules, got a {type(layers).__name__}")
    if not layers:
        raise ValueError("layers: expected at least one, got none")
    known = set(model.modules())
    for place, layer in enumerate(layers):
        if layer not in known:
            raise ValueError(f"layers[{place}]: expected a module of model, got another {type(layer).__name__}")


def keywords() -> inspect.Signature:
    """The signature of a function that takes the options, and a model with its layers, by keyword."""
    kind = inspect.Parameter.KEYWORD_ONLY
    hints = hints_of()
    parameters = [inspect.Parameter("path", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=hints["path"])]
    parameters += [
        inspect.Parameter(option.name, kind, default=option.default, annotation=hints[option.name])
        for option in fields(OffloadOptions)
        if option.name != "path"
    ]
    parameters.append(inspect.Parameter("model", kind, default=None, annotation=nn.Module | None))
    parameters.append(inspect.Parameter("layers", kind, default=None, annotation=Sequence[nn.Module] | None))
    return inspect.Signature(parameters)
