"""Arguments that several commands take."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from narrowgauge.engine.config.spelling import check_spelling
from narrowgauge.engine.ranks.environment import world_size

from ..configurations import find_configuration

ConfigArgument = Annotated[
    Path,
    typer.Argument(
        callback=find_configuration,
        help="A JSON file: DeepSpeed's keys, and model, data, training, logging. Or a packaged one, as quickstart.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a value; may be given several times."),
]


def check_spelling_alone(config: Path, overrides: Sequence[str]) -> None:
    """Tell misspelt keys before anything large is imported; of several process ranks, all have to hear of it later.

    Raises:
        ConfigError: naming them.
    """
    if world_size() == 1:
        check_spelling(config, overrides)
