"""``narrowgauge plan``: what a run would hold, send, take and cost, before there is one."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..config.config import load_config
from ..errors import UserError
from ..files import check_new, write_json
from ..forecast.fit import Objective, fit
from ..forecast.forecast import Forecast, forecast
from ..forecast.hardware import GIB
from ..forecast.machine import Machine
from ..forecast.show import show
from .validate import check_for


def tell(
    config: Path, *, machine: Machine, overrides: Sequence[str] = (), as_json: bool = False, console: Console
) -> None:
    """Print a configuration's forecast on a machine. No data is read and no run folder is touched.

    Raises:
        UserError: the run would be refused, cannot be told ahead, or does not fit the GPUs.
    """
    checked = load_config(config, overrides)
    _, described = check_for(checked, machine.world_size)
    found = forecast(checked, described, world_size=machine.world_size, machine=machine)
    if as_json:
        console.print_json(json.dumps(found.as_dict()))
    else:
        show(found, console)
    if not found.fits:
        raise UserError(f"{checked.source}: {too_large(found)}")


def tell_fitting(
    config: Path,
    *,
    machine: Machine,
    objective: Objective,
    out: Path,
    overrides: Sequence[str] = (),
    as_json: bool = False,
    console: Console,
) -> None:
    """Search for the settings that fit a machine, print their forecast, and write the configuration with them.

    Raises:
        UserError: nothing fits, or the file is there already.
    """
    check_new(out, "--out")
    checked = load_config(config, overrides)
    _, described = check_for(checked, machine.world_size)
    found = fit(checked, described, machine, objective)
    if as_json:
        console.print_json(json.dumps(found.forecast.as_dict()))
    else:
        show(found.forecast, console)
    write_json(out, found.raw)
    if not as_json:
        console.print(f"{found.choice.described()} -> {out}", highlight=False)


def too_large(found: Forecast) -> str:
    """What a run that does not fit needs, and has."""
    peak, machine = found.peak, found.machine
    assert machine is not None
    most = max(peak.bytes, key=lambda kind: peak.bytes[kind])
    return (
        f"expected at most {machine.gpu.usable / GIB:.1f} GiB a process rank on {machine.gpu.name}, got"
        f" {peak.total / GIB:.1f} ({peak.when}), of which {most} are {peak.bytes[most] / GIB:.1f}"
    )
