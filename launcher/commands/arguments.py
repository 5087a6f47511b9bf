"""Arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

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
