"""The arguments of ``initialize`` as scripts for DeepSpeed pass them."""

import copy
import glob
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from narrowgauge.optimizers import EngineOptimizer
from narrowgauge.optimizers.layers.targets import shortened
from narrowgauge.optimizers.options import OptionError, Options

from ...config.config import Config
from ...errors import ConfigError
from ...ranks.environment import process_rank

ConfigLike = str | Path | Mapping[str, Any] | Config


def config_of(args: Any, config: ConfigLike | None, config_params: ConfigLike | None) -> ConfigLike:
    """The one configuration of ``config``, ``config_params``, ``args.deepspeed_config`` and the older
    ``args.deepscale_config``.

    Raises:
        ConfigError: there is none, or more than one.
    """
    places = {
        "config": config,
        "config_params": config_params,
        "args.deepspeed_config": getattr(args, "deepspeed_config", None),
        "args.deepscale_config": getattr(args, "deepscale_config", None),
    }
    given = [place for place, value in places.items() if value is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise ConfigError("initialize", [f"expected one configuration in one of {', '.join(places)}, got {found}"])
    return places[given[0]]


def args_of(args: Any) -> Any:
    """``args`` for an engine whose configuration is passed beside it.

    Raises:
        ConfigError: ``args.local_rank`` is not that of the launcher.
    """
    local_rank, expected = getattr(args, "local_rank", None), os.environ.get("LOCAL_RANK", "0")
    if local_rank is not None and local_rank != -1 and str(local_rank) != expected:
        raise ConfigError(
            "initialize", [f"args.local_rank: expected LOCAL_RANK ({expected}) or -1, got {local_rank!r}"]
        )
    if args is None:
        return None
    args = copy.copy(args)
    for key in ("deepspeed_config", "deepscale_config"):
        if hasattr(args, key):
            setattr(args, key, None)
    return args


def group_by(config: Config, model: nn.Module, model_parameters: Any, options: Options) -> Options:
    """Options with the groups of ``model_parameters``: parameters, or groups ``{"params": parameters, **options}``.

    Trainable parameters of the model that are left out are frozen, which a warning says.

    Raises:
        ConfigError: it holds what is no parameter of the model, or one twice; a group has options that a group cannot
            have; or the configuration has groups too.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    specs: list[dict[str, Any]] = []
    places: list[str] = []
    taken: set[int] = set()
    for position, (parameters, own) in enumerate(_groups(config, model_parameters)):
        where, globs = f"model_parameters[{position}]", []
        for parameter in parameters:
            if id(parameter) not in names:
                raise config.error(f"{where}: expected parameters of the model, got {_described(parameter)}")
            if id(parameter) in taken:
                raise config.error(f"{where}: {names[id(parameter)]} is there twice")
            taken.add(id(parameter))
            if parameter.requires_grad:
                globs.append(glob.escape(names[id(parameter)]))
        if globs:
            places.append(where)
            specs.append({"params": globs, **{key: value for key, value in own.items() if key != "name"}})
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in taken]
    if not taken:
        raise config.error("model_parameters: expected parameters of the model, got none")
    if left_out:
        for name in left_out:
            model.get_parameter(name).requires_grad_(False)
        if process_rank() == 0:
            warnings.warn(f"model_parameters leaves out, so these are frozen: {shortened(left_out)}", stacklevel=3)
    if all(spec.keys() == {"params"} for spec in specs):
        return options
    if options.param_groups:
        raise config.error("optimizer.params.param_groups: expected none beside groups in model_parameters")
    try:
        return replace(options, param_groups=specs)
    except OptionError as error:
        problems = error.problems
        for position, where in reversed(list(enumerate(places))):
            problems = [problem.replace(f"param_groups[{position}]", where) for problem in problems]
        raise config.error(*problems) from error


def check_trained(config: Config, model: nn.Module, optimizer: EngineOptimizer, model_parameters: Any) -> None:
    """Refuse ``model_parameters`` beside an optimizer of ours that trains others.

    Raises:
        ConfigError: the optimizer trains a parameter that is not among them.
    """
    given = {id(p) for parameters, _ in _groups(config, model_parameters) for p in parameters}
    weights = {layer.compact_name: layer.weight_name for layer in getattr(optimizer, "layers", ())}
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        weight = model.get_parameter(weights[name]) if name in weights else parameter
        if id(parameter) in own and not {id(parameter), id(weight)} & given:
            raise config.error(
                f"model_parameters: expected all that the optimizer trains, {weights.get(name, name)} is not there"
            )


def _groups(config: Config, model_parameters: Any) -> Iterator[tuple[list[Tensor], dict[str, Any]]]:
    """The groups with their options; plain parameters, or pairs with their names, are one group."""
    if isinstance(model_parameters, nn.Module):
        model_parameters = model_parameters.parameters()
    if isinstance(model_parameters, Tensor | Mapping):
        model_parameters = [model_parameters]
    if not isinstance(model_parameters, Iterable):
        raise config.error(f"model_parameters: expected parameters or groups of them, got {model_parameters!r}")
    given = list(model_parameters)
    plain = [item for item in given if not isinstance(item, Mapping)]
    if plain and len(plain) < len(given):
        raise config.error("model_parameters: expected parameters or groups, got both")
    if plain:
        yield [_tensor(item) for item in plain], {}
    for group in given[len(plain) :]:
        if "params" not in group:
            raise config.error(f"model_parameters: expected groups with 'params', got one with {sorted(group)}")
        members = group["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        yield [_tensor(item) for item in members], {key: value for key, value in group.items() if key != "params"}


def _tensor(item: Any) -> Any:
    """The parameter of ``(name, parameter)``, as ``named_parameters()`` gives it, or of itself."""
    return item[1] if isinstance(item, tuple) and len(item) == 2 else item


def _described(item: Any) -> str:
    return f"a tensor of shape {tuple(item.shape)}" if isinstance(item, Tensor) else f"{type(item).__name__}"
