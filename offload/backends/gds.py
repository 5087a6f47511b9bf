"""GPUDirect Storage through kvikio: between GPU memory and the disk without a copy in host memory.

Claimed only where both kvikio and cuFile would really do that. cuFile's compatibility mode, which is its default,
copies through host memory behind the caller's back, slower than this package's own pinned buffers.
"""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import Backend
from .registry import register


def _cufile_allows_compatibility_mode() -> bool:
    """cuFile's own setting; on where its file does not turn it off."""
    import hjson

    if os.environ.get("CUFILE_FORCE_COMPAT_MODE", "").lower() in ("true", "1", "on"):
        return True
    path = Path(os.environ.get("CUFILE_ENV_PATH_JSON", "/etc/cufile.json"))
    try:
        # JSON with // comments.
        settings: Any = hjson.loads(path.read_text())
        return bool(settings["properties"].get("allow_compat_mode", True))
    except (OSError, ValueError, KeyError, TypeError):
        return True


@register
class GdsBackend(Backend):
    """Moves GPU memory; host memory, where a tensor lies there, as threads do."""

    name = "gds"
    title = "GPUDirect Storage"
    writes_in_place = True
    moves_device_memory = True

    def __init__(self) -> None:
        """Raises ``OSError`` where GPUDirect Storage is not available."""
        reason = self.unavailable_because()
        if reason is not None:
            raise OSError(f"{self.title}: {reason}")

    @classmethod
    def unavailable_because(cls) -> str | None:
        """Why GPUDirect Storage cannot be used here; None where it can."""
        if not torch.cuda.is_available():
            return "no CUDA device"
        try:
            driver: Any = import_module("kvikio.cufile_driver")
            defaults: Any = import_module("kvikio.defaults")
        except ImportError:
            return "kvikio is not installed (pip install narrowgauge[gds])"
        if not driver.get("is_gds_available"):
            return "cuFile finds no GPUDirect Storage driver (nvidia-fs)"
        if defaults.is_compat_mode_preferred():
            return "kvikio is in compatibility mode"
        if _cufile_allows_compatibility_mode():
            return "cuFile's compatibility mode is on (properties.allow_compat_mode in cufile.json)"
        return None

    def lane(self) -> "GdsLane":
        return GdsLane()


class GdsLane:
    """See :class:`~.base.Lane`; ``buffer`` may also be a tensor on the GPU."""

    def __init__(self) -> None:
        self._files: dict[int, Any] = {}

    def _file(self, fd: int) -> Any:
        if fd not in self._files:
            kvikio: Any = import_module("kvikio")
            self._files[fd] = kvikio.CuFile(f"/proc/self/fd/{fd}", "r+")
        return self._files[fd]

    def write(self, fd: int, offset: int, buffer: Tensor) -> None:
        moved = self._file(fd).write(buffer, file_offset=offset)
        if moved != buffer.nbytes:
            raise OSError(f"cuFile wrote {moved} bytes of {buffer.nbytes}")

    def read(self, fd: int, offset: int, buffer: Tensor) -> None:
        moved = self._file(fd).read(buffer, file_offset=offset)
        if moved != buffer.nbytes:
            raise OSError(f"cuFile read {moved} bytes of {buffer.nbytes}")

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
