"""Where in a model a tensor is saved: in the ``forward`` of which module, and which of its tensors."""

import threading
import weakref
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn


class Places:
    """Follows which modules' forwards are running, on each thread.

    Attributes:
        served: the names of the modules whose tensors are encoded.
    """

    def __init__(self, model: nn.Module, patterns: Sequence[str] | None) -> None:
        """
        Args:
            patterns: globs over module names; None takes the modules inside of blocks, the elements of an
                ``nn.ModuleList`` or ``nn.Sequential``.

        Raises:
            ValueError: a pattern, or the default, matches nothing.
        """
        self.served = frozenset(served_modules(model, patterns))
        self._local = threading.local()
        own: weakref.ref[Places] = weakref.ref(self)
        self._hooks: list[Any] = []
        for name, module in model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(_Enter(own, name), prepend=True))
            self._hooks.append(module.register_forward_hook(_Leave(own), always_call=True))

    @property
    def _stack(self) -> list[list[Any]]:
        return self._local.__dict__.setdefault("stack", [])

    def enter(self, name: str) -> None:
        self._stack.append([name, 0])

    def leave(self) -> None:
        if self._stack:
            self._stack.pop()

    def begin_forward(self) -> None:
        """Forget what an exception may have left behind."""
        self._stack.clear()

    def is_served(self) -> bool:
        """Whether the innermost module's tensors are encoded."""
        return bool(self._stack) and self._stack[-1][0] in self.served

    def next_place(self) -> str:
        """A name for the next tensor that the innermost module saves, the same in each forward."""
        if not self._stack:
            return ":0"
        top = self._stack[-1]
        top[1] += 1
        return f"{top[0]}:{top[1] - 1}"

    def remove(self) -> None:
        """Take the hooks off the model."""
        while self._hooks:
            self._hooks.pop().remove()


class _Enter:
    def __init__(self, places: "weakref.ref[Places]", name: str) -> None:
        self._places, self._name = places, name

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        places = self._places()
        if places is not None and not torch.compiler.is_compiling():
            places.enter(self._name)

    def __deepcopy__(self, memo: Any) -> "_Enter":
        return self

    def __reduce__(self) -> Any:
        return _Enter, (_gone, "")


class _Leave:
    def __init__(self, places: "weakref.ref[Places]") -> None:
        self._places = places

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        places = self._places()
        if places is not None and not torch.compiler.is_compiling():
            places.leave()

    def __deepcopy__(self, memo: Any) -> "_Leave":
        return self

    def __reduce__(self) -> Any:
        return _Leave, (_gone,)


def _gone() -> None:
    """In place of a reference, for copies of the model."""
    return


def served_modules(model: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    """The names of the modules that globs over names match; without any, of those inside of blocks.

    Raises:
        ValueError: naming the pattern that matches nothing.
    """
    names = [name for name, _ in model.named_modules()]
    if patterns is None:
        starts = tuple(
            f"{name}.{key}" if name else key
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList | nn.Sequential)
            for key in module._modules
        )
        found = [name for name in names if any(name == start or name.startswith(f"{start}.") for start in starts)]
        if not found:
            raise ValueError(
                f"codec_modules: {type(model).__name__} has no nn.ModuleList or nn.Sequential, inside of which tensors"
                " are encoded by default; give globs over module names"
            )
        return found
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(filter(None, names[:8]))
            raise ValueError(
                f"codec_modules: {pattern!r} matches no module; the model has {shown}{', ...' * (len(names) > 8)}"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
