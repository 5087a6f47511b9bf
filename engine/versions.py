"""The packages whose versions must be the same on all process ranks. Light to import."""

from importlib.metadata import version

VERSIONED = ("narrowgauge", "torch", "deepspeed", "transformers")


def installed_versions() -> dict[str, str]:
    """By package, the version installed here."""
    return {name: version(name) for name in VERSIONED}
