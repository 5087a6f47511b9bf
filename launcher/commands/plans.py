"""``plan``: what a run would take, before there is one."""

import math
from pathlib import Path
from typing import Annotated

import typer

from narrowgauge.engine.errors import UserError, did_you_mean

from ..output import make_console, show_libraries_less
from .arguments import ConfigArgument, SetOption, check_spelling_alone

_OBJECTIVES = ("fastest", "largest")


def plan(
    config: ConfigArgument,
    set_: SetOption = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of each.")] = 8,
    gpu: Annotated[
        str, typer.Option(help="h100-80, a100-40, rtx4090-24 and others; a wrong name lists them.")
    ] = "h100-80",
    link: Annotated[str, typer.Option(help="Between machines.")] = "400gbit",
    disk: Annotated[str, typer.Option(help="A machine's drives, for activation offload.")] = "6GB/s",
    price: Annotated[float | None, typer.Option(help="Of a GPU for an hour.")] = None,
    fit: Annotated[
        str | None,
        typer.Option(metavar="fastest|largest", help="Search stage, density, micro-batch, recompute and offload."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Of --fit: the file to write; default CONFIG-fit.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Tell a run's memory, traffic, time and cost. Needs no GPU, reads no data."""
    check_spelling_alone(config, set_ or [])
    from narrowgauge.engine.forecast.hardware import bytes_per_second, gpu_named
    from narrowgauge.engine.forecast.machine import Machine

    if price is not None and not 0.0 <= price < math.inf:
        raise UserError(f"--price: expected a finite number of at least 0, got {price}")
    machine = Machine(
        nodes=nodes,
        gpus=gpus,
        gpu=gpu_named(gpu),
        link=bytes_per_second(link, "--link"),
        disk=bytes_per_second(disk, "--disk"),
        price=price,
    )
    if out is not None and fit is None:
        raise UserError("--out: expected --fit with it")
    if fit not in (None, *_OBJECTIVES):
        raise UserError(f"--fit: expected fastest or largest, got {fit!r}{did_you_mean(fit, _OBJECTIVES)}")
    show_libraries_less()
    from narrowgauge.engine.run.tell import tell, tell_fitting

    console, overrides = make_console(), set_ or []
    if fit is None:
        tell(config, machine=machine, overrides=overrides, as_json=as_json, console=console)
        return
    tell_fitting(
        config,
        machine=machine,
        objective="largest" if fit == "largest" else "fastest",
        out=out or Path(f"{config.stem}-fit.json"),
        overrides=overrides,
        as_json=as_json,
        console=console,
    )
