"""Whether megatron-core is installed, in a version that this engine knows. Light to import."""

import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from packaging.version import Version

OLDEST, BELOW = "0.16.1", "0.17"
_EXTRA = "pip install 'narrowgauge[megatron]'"


def not_usable_because() -> str | None:
    """Why the engine cannot run here; None where it can."""
    expected = f"expected megatron-core >={OLDEST},<{BELOW}"
    try:
        found = version("megatron-core")
    except PackageNotFoundError:
        return f"{expected}, got none: {_EXTRA}"
    if not Version(OLDEST) <= Version(found) < Version(BELOW):
        return f"{expected}, got {found}: {_EXTRA}"
    return None


def show_its_warnings_less() -> None:
    """Megatron warns of every package that it would rather have, in each process."""
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")


def has_transformer_engine() -> bool:
    return find_spec("transformer_engine") is not None


def other_apex() -> Path | None:
    """Where another package lies that goes by the name of NVIDIA's apex, as PyPI's does; nothing of it is run.

    Megatron takes whatever ``import apex`` finds for NVIDIA's.
    """
    spec = find_spec("apex")
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if all(any((folder / part).is_dir() for folder in folders) for part in ("optimizers", "multi_tensor_apply")):
        return None
    return folders[0] if folders else Path(spec.origin or "apex")


def fused_by() -> str | None:
    """Whose kernels take the norm of gradients, copy masters and, on GPUs, step AdamW: the first that is there of
    Transformer Engine and NVIDIA's apex with its extensions; None where it is PyTorch.
    """
    if has_transformer_engine():
        return "Transformer Engine"
    has_apex = find_spec("apex") is not None and other_apex() is None
    return "apex" if has_apex and find_spec("amp_C") is not None else None
