"""Configurations by their path, or by the name of one that comes with the package."""

from importlib.resources import files
from pathlib import Path

from narrowgauge.engine.errors import UserError, did_you_mean


def find_configuration(given: Path) -> Path:
    """The file of a configuration. A path that exists wins; else ``given`` is a name, such as ``quickstart``.

    Raises:
        UserError: neither; it lists the names.
    """
    if given.exists() and not given.is_dir():
        return given
    names = packaged_configurations()
    name = given.as_posix()
    if name not in names:
        near = did_you_mean(name, names)
        raise UserError(
            f"{name}: expected a JSON file or the name of a packaged configuration, got neither{near}; the names are"
            f" {', '.join(names)}"
        )
    return names[name]


def packaged_configurations() -> dict[str, Path]:
    """The files by name: those in ``configs/``, without what only holds a model's sizes."""
    folder = Path(str(files("narrowgauge.configs")))
    found = (path for path in sorted(folder.rglob("*.json")) if path.parent.name != "models")
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}


def packaged_models() -> list[str]:
    """The names of the sizes in ``configs/models/``, which ``model.preset`` takes."""
    folder = Path(str(files("narrowgauge.configs"))) / "models"
    return sorted(path.stem for path in folder.glob("*.json"))
