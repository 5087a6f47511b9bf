"""The packages whose versions must be the same wherever a run has process ranks. Light to import."""

from importlib.metadata import PackageNotFoundError, version

VERSIONED = ("narrowgauge", "torch", "deepspeed", "transformers")


def installed_versions() -> dict[str, str]:
    """The version of each, or ``not installed``."""
    return {name: _version(name) for name in VERSIONED}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
