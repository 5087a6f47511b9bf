"""Weights that are loaded into the engine's module, past the engine: ZeRO's masters would bring the old ones back."""

from functools import wraps
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from .privates import Update, wrap_update


def follow_loads(engine: DeepSpeedEngine) -> None:
    """Let the masters follow ``engine.module.load_state_dict``, or that of a part of it.

    At stage 1 and 2 they follow the whole module's at once, a part's before the next step. At stage 3, where parameters
    are loaded while they are gathered, they follow before the next step; with one of our optimizers, whose compact
    values would not, loading is refused there.
    """
    own: Any = engine
    stage = engine.zero_optimization_stage()
    if stage == 0 or not hasattr(own.optimizer, "refresh_fp32_params"):
        return
    is_behind = False

    def note(module: nn.Module, incompatible: Any) -> None:
        nonlocal is_behind
        is_behind = True
        if stage < 3 and module is own.module:
            catch_up()

    def catch_up() -> None:
        nonlocal is_behind
        if is_behind:
            own.optimizer.refresh_fp32_params()
        is_behind = False

    def wrap(update: Update) -> Update:
        @wraps(update)
        def caught_up(lr_kwargs: Any) -> None:
            catch_up()
            update(lr_kwargs)

        return caught_up

    for module in own.module.modules():
        if stage == 3 and hasattr(engine, "own_optimizer"):
            module.register_load_state_dict_pre_hook(_refuse)
        else:
            module.register_load_state_dict_post_hook(note)
    wrap_update(engine, wrap)


def _refuse(module: nn.Module, *load: Any) -> None:
    raise ValueError(
        f"{type(module).__name__}.load_state_dict: expected no load past the engine at ZeRO stage 3, got one: use"
        ' engine.load_module_state_dict({"module": state}), which compact values and masters follow'
    )
