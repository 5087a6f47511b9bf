"""Options of optimizers, told once: a frozen dataclass per optimizer, with type, default, check and text of each field.

A field is ``name: Annotated[type, check, "text"] = default``. Constructors take the fields as keywords
(:func:`~.engine_optimizer.keywords_of`), configurations are read by
them, and the tables of the documentation are written from them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints


class OptionError(ValueError):
    """Options that do not hold; :attr:`problems` has one line for each, ``option: expected ..., got ...``."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True)
class Check:
    """What the value of an option must be.

    Attributes:
        expected: in words, as in "expected a number of at least 0".
        holds: whether a value is one.
    """

    expected: str
    holds: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether a value is a finite int or float; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> Check:
    """A finite number within bounds."""
    bounds = {"of at least": at_least, "above": above, "below": below, "of at most": at_most}
    words = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
    return Check(
        f"a number {words}".rstrip(),
        lambda value: is_number(value) and at_least <= value <= at_most and above < value < below,
    )


def whole(*, at_least: int) -> Check:
    """An integer."""
    return Check(
        f"an integer of at least {at_least}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= at_least,
    )


def _is_pair_of_betas(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(is_number(b) and 0.0 <= b < 1.0 for b in value)


def _is_list_of_globs(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(glob, str) for glob in value)


COUNT = whole(at_least=1)
SHARE = Check("a number in (0, 1]", lambda value: is_number(value) and 0.0 < value <= 1.0)
BETAS = Check("two numbers in [0, 1)", _is_pair_of_betas)
GLOBS = Check("a list of globs", _is_list_of_globs)
SWITCH = Check("True or False", lambda value: isinstance(value, bool))
_NOT_NEGATIVE = number(at_least=0.0)
_OF_GROUPS = {"lr": _NOT_NEGATIVE, "betas": BETAS, "eps": _NOT_NEGATIVE, "weight_decay": _NOT_NEGATIVE}

LearningRate = Annotated[float, _NOT_NEGATIVE, "learning rate of the dense parameters"]
Betas = Annotated[tuple[float, float], BETAS, "decay rates of Adam's moments"]
Epsilon = Annotated[float, _NOT_NEGATIVE, "Adam's epsilon"]
WeightDecay = Annotated[float, _NOT_NEGATIVE, "decoupled weight decay, as in ``torch.optim.AdamW``"]
RefreshInterval = Annotated[int | None, COUNT, "optimizer steps between changes of subspace; None keeps the first one"]
Seed = Annotated[
    int,
    Check("an integer", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "of all that is random; the same on all process ranks",
]
Foreach = Annotated[bool | None, SWITCH, "update all parameters of a group at once; default on CUDA only"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all optimizers take.

    Raises:
        OptionError: a value is not allowed, or values do not go together; names all of them.
    """

    group_options: ClassVar[tuple[str, ...]] = tuple(_OF_GROUPS)

    lr: LearningRate
    weight_decay: WeightDecay = 1e-2
    matrix_lr_scale: Annotated[
        float,
        number(above=0.0),
        "learning rate of the matrices relative to ``lr``; they usually want a 5 to 10 times lower rate than embeddings"
        " and head",
    ] = 1.0
    target_modules: Annotated[
        Sequence[str] | None,
        GLOBS,
        "globs over names of modules, and of the parameters in which experts are stacked: the matrices; default every"
        " linear and expert inside the transformer blocks. Tied and frozen weights are left alone",
    ] = None
    param_groups: Annotated[
        Sequence[dict[str, Any]],
        Check("a list of groups", lambda value: isinstance(value, list | tuple)),
        '``{"params": [globs over parameter names], **options}`` with options of their own, such as ``lr`` or'
        " ``weight_decay``; the first match wins",
    ] = ()

    def __post_init__(self) -> None:
        problems = [
            f"{option.name}: expected {option.expected}, got {getattr(self, option.name)!r}"
            for option in options_of(type(self))
            if not option.allows(getattr(self, option.name))
        ]
        problems = problems or list(self._conflicts())
        if problems:
            raise OptionError(problems)

    def _conflicts(self) -> Iterator[str]:
        """What is wrong with values that are allowed each by itself."""
        for position, group in enumerate(self.param_groups):
            yield from self._problems_of_group(f"param_groups[{position}]", group)

    def _problems_of_group(self, where: str, group: Any) -> Iterator[str]:
        if not isinstance(group, dict) or "params" not in group or set(group) - {"params", *self.group_options}:
            found = sorted(group) if isinstance(group, dict) else group
            yield f"{where}: expected 'params' and any of {list(self.group_options)}, got {found!r}"
            return
        for key, check in {"params": GLOBS, **_OF_GROUPS}.items():
            if key in group and not check.holds(group[key]):
                yield f"{where}.{key}: expected {check.expected}, got {group[key]!r}"


@dataclass(frozen=True, kw_only=True)
class AdamOptions(Options):
    """What the optimizers take that train with Adam's moments."""

    lr: LearningRate = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8


@dataclass(frozen=True)
class Option:
    """A field of an optimizer's options.

    Attributes:
        default: ``dataclasses.MISSING`` where there is none.
        expected: what a value must be, in words.
        text: what it is.
    """

    name: str
    default: Any
    expected: str
    text: str
    allows: Callable[[Any], bool]


@cache
def options_of(cls: type[Options]) -> tuple[Option, ...]:
    """The fields of a dataclass of options, in order."""
    hints = get_type_hints(cls, include_extras=True)
    return tuple(_option(field.name, field.default, hints[field.name]) for field in fields(cls))


def _option(name: str, default: Any, hint: Any) -> Option:
    plain, *metadata = get_args(hint)
    members = _members(plain)
    (text,) = (item for item in metadata if isinstance(item, str))
    checks = [item for item in metadata if isinstance(item, Check)]
    choices = [choice for member in members if get_origin(member) is Literal for choice in get_args(member)]
    (check,) = checks or [Check(f"one of {choices}", lambda value: any(value is c or value == c for c in choices))]
    optional = NoneType in members
    expected = check.expected + (" or None" if optional else "")
    return Option(name, default, expected, text, lambda value: (optional and value is None) or check.holds(value))


def _members(hint: Any) -> list[Any]:
    return [hint] if get_origin(hint) is Literal or not get_args(hint) else list(get_args(hint))


def is_required(option: Option) -> bool:
    """Whether an option has no default."""
    return option.default is MISSING


def one_given(options: Options, names: Sequence[str]) -> Iterator[str]:
    """A problem unless exactly one of the options is not None."""
    given = {name: getattr(options, name) for name in names}
    if sum(value is not None for value in given.values()) != 1:
        found = ", ".join(f"{name}={value}" for name, value in given.items())
        yield f"give exactly one of {', '.join(names[:-1])} and {names[-1]}, got {found}"
