"""Globs of optimizers' options where a stage of the pipeline holds only some of the layers. Plain numbers."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from narrowgauge.optimizers.options import Options

from .architecture import Architecture
from .layout import Layout, Place
from .parts import local_parameters

_FIRST_NAMES = 4


def options_of_stage(options: Options, architecture: Architecture, layout: Layout, place: Place) -> Options:
    """The options without those globs of ``exclude``, ``target_modules`` and ``shared_inputs`` that match nothing of
    this stage but something of another: an optimizer refuses what matches nothing of the model it is made for. What
    matches nothing anywhere stays.

    Raises:
        ValueError: ``target_modules`` or a group of ``param_groups`` has nothing on this stage, but on another.
    """
    if layout.pipeline == 1:
        return options
    parameters, targets = _names(architecture, layout, place)
    all_parameters, all_targets = _all_names(architecture)
    changes: dict[str, Any] = {}
    exclude: Sequence[str] | None = getattr(options, "exclude", None)
    if exclude is not None:
        changes["exclude"] = [glob for glob in exclude if not _is_elsewhere([glob], parameters, all_parameters)]
    if options.target_modules is not None:
        own = [glob for glob in options.target_modules if not _is_elsewhere([glob], targets, all_targets)]
        if not own and options.target_modules:
            raise ValueError(f"target_modules: {_expected(options.target_modules, 'layers', targets)}")
        changes["target_modules"] = own
    shared = getattr(options, "shared_inputs", None)
    if isinstance(shared, list | tuple):
        changes["shared_inputs"] = [globs for globs in shared if not _is_elsewhere(globs, targets, all_targets)]
    for position, group in enumerate(options.param_groups):
        if _is_elsewhere(group["params"], parameters, all_parameters):
            raise ValueError(f"param_groups[{position}]: {_expected(group['params'], 'parameters', parameters)}")
    return replace(options, **changes)


def problems_of_globs(options: Options, architecture: Architecture, layout: Layout) -> list[str]:
    """What is wrong with the globs, ``option: why`` each: those that match nothing of the model, and what every stage
    needs something of.
    """
    parameters, targets = _all_names(architecture)
    exclude: Sequence[str] | None = getattr(options, "exclude", None)
    named = {"exclude": (exclude, parameters), "target_modules": (options.target_modules, targets)}
    problems = [
        f"{key}: {glob!r} matches nothing of the model, which has {_first(names)}"
        for key, (globs, names) in named.items()
        for glob in globs or ()
        if not _any_match([glob], names)
    ]
    problems += [
        f"param_groups[{position}]: {[*group['params']]} matches nothing of the model, which has {_first(parameters)}"
        for position, group in enumerate(options.param_groups)
        if not _any_match(group["params"], parameters)
    ]
    # A stage's tensor-parallel ranks hold parts of the same weights.
    places = [place for place in layout.places() if place.tensor == place.replica == 0]
    for place in places if not problems else ():
        try:
            options_of_stage(options, architecture, layout, place)
        except ValueError as error:
            return [str(error)]
    return problems


Names = dict[str, None]


def _all_names(architecture: Architecture) -> tuple[Names, Names]:
    """As :func:`_names`, of all stages."""
    return _names(architecture, Layout(), Layout().place_of(0))


def _names(architecture: Architecture, layout: Layout, place: Place) -> tuple[Names, Names]:
    """What a stage holds: all weights, and what ``target_modules`` may name (stacked experts by their weights)."""
    parameters: Names = {}
    targets: Names = {}
    for chunk in range(layout.chunks):
        for held in local_parameters(architecture, layout, place, chunk):
            names = [part.name for part in held.parts]
            parameters |= dict.fromkeys(names)
            if held.is_expert:
                targets |= dict.fromkeys(names)
            elif ".linear_" in held.name and held.name.endswith(".weight"):
                targets |= dict.fromkeys(name.removesuffix(".weight") for name in names)
    return parameters, targets


def _is_elsewhere(globs: Sequence[str], own: Iterable[str], every: Iterable[str]) -> bool:
    """Whether none of the names here, but one of all, matches."""
    return not _any_match(globs, own) and _any_match(globs, every)


def _any_match(globs: Sequence[str], names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def _expected(globs: Sequence[str], what: str, own: Iterable[str]) -> str:
    return (
        f"expected {what} of every stage of the pipeline, got {[*globs]}, which match none of a stage that has"
        f" {_first(own)}"
    )


def _first(names: Iterable[str]) -> str:
    return ", ".join([*[*names][:_FIRST_NAMES], "..."])
