"""Whether megatron-core is installed, in a version that this engine knows. Light to import."""

import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

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
