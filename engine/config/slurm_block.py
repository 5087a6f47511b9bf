"""The ``launch.slurm`` block: options of ``sbatch``, and what a job does before and around ``narrowgauge launch``."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from ..errors import did_you_mean
from .blocks import StrictBlock

# Long options of sbatch 20 to 24, and those of pyxis.
_KNOWN = frozenset(
    re.findall(
        r"\S+",
        """
        account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint container
        container-id container-image container-mount-home container-mounts container-name container-workdir contiguous
        core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution error
        exclude exclusive export export-file extra extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node
        gpus-per-socket gpus-per-task gres gres-flags hint hold ignore-pbs input job-name kill-on-invalid-dep licenses
        mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill no-requeue
        nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output
        overcommit oversubscribe parsable partition power prefer priority profile propagate qos quiet reboot requeue
        reservation resv-ports segment signal sockets-per-node spread-job stepmgr switches test-only thread-spec
        threads-per-core time time-min tmp tres-bind tres-per-task uid usage use-min-nodes verbose wait wait-all-nodes
        wckey
        """,
    )
)
# Of the batch scripts.
_SIGNAL = "B:USR1@300"
_LINE = r"[^\x00-\x1f\x7f]+"


class ContainerBlock(StrictBlock):
    """The container that the ranks run in, on every node; ``narrowgauge launch`` itself runs outside."""

    runtime: Literal["pyxis", "apptainer"]
    image: str = Field(min_length=1, pattern=f"^{_LINE}$")
    mounts: list[str] = []
    """``OUTSIDE:INSIDE`` each; the folder that the job runs in is always there."""
    python: str = Field("python3", min_length=1, pattern=f"^{_LINE}$")
    """The interpreter inside that has narrowgauge."""


class SweepBlock(StrictBlock):
    """Of ``--script sweep``: a job of the array for each value, in a run folder of its own."""

    key: str = Field("optimizer.params.lr", pattern=r"^[\w.-]+$")
    values: list[int | float | str] = Field(min_length=1)
    at_once: int | None = Field(default=None, gt=0)
    """Jobs that run at the same time; default all."""


class SlurmBlock(StrictBlock):
    """All other keys are options of ``sbatch`` without their dashes, such as ``{"nodes": 4, "exclusive": true}``: true
    for one without a value; null and false leave one of the script's out.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    setup: list[str] = []
    """Lines of shell that the batch script begins with: ``module load``, the activation of an environment."""
    container: ContainerBlock | None = None
    sweep: SweepBlock | None = None

    @property
    def options(self) -> dict[str, str | int | bool | None]:
        """Of ``sbatch``."""
        return self.model_extra or {}

    @model_validator(mode="after")
    def _check_options(self) -> "SlurmBlock":
        for key, value in self.options.items():
            _check_option(key, value)
        _check_notice(self.options)
        for line in self.setup:
            if not re.fullmatch(_LINE, line):
                raise ValueError(f"setup: expected lines of shell, one each, got {line!r}")
        for mount in self.container.mounts if self.container is not None else ():
            if not re.fullmatch(r"[^\x00-\x1f,:]+:[^\x00-\x1f,:]+(:[a-z]+)?", mount):
                raise ValueError(f"container.mounts: expected OUTSIDE:INSIDE, got {mount!r}")
        if self.sweep is not None:
            _check_sweep(self.sweep, self.options)
        return self


def _check_sweep(sweep: SweepBlock, options: dict[str, Any]) -> None:
    if sweep.key == "logging.run_dir":
        raise ValueError(
            "sweep.key: expected another than logging.run_dir, which the script sets for each job: all jobs would train"
            " the same configuration"
        )
    if sweep.key.startswith("launch.slurm"):
        raise ValueError(
            f"sweep.key: expected none of launch.slurm, which is read before the jobs begin, got {sweep.key}: all jobs"
            " would train the same configuration"
        )
    words = [str(value) for value in sweep.values]
    for value, word in zip(sweep.values, words, strict=True):
        if not re.fullmatch(r"[\w.+-]+", word):
            raise ValueError(f"sweep.values: expected numbers or words, got {value!r}")
        if words.count(word) > 1:
            raise ValueError(
                f"sweep.values: expected each value once, got {value!r} twice: they would share a run folder"
            )
    if options.get("array") is not None:
        raise ValueError(f"array: expected none beside sweep, which has a job for each value, got {options['array']!r}")


def _check_option(key: str, value: Any) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
        raise ValueError(f"expected an option of sbatch without its dashes, got {key!r}{_near(key)}")
    # What is like none may be of a site's plugin; sbatch refuses what it does not know.
    if key not in _KNOWN and (near := _near(key)):
        raise ValueError(f"{key}: unknown option of sbatch{near}")
    if value is not None and not isinstance(value, str | int):
        raise ValueError(f"{key}: expected text, a whole number, true, false or null, got {value!r}")
    if isinstance(value, str) and not re.fullmatch(r"(?! )[^\x00-\x1f#'\"`$\\]+(?<! )", value):
        raise ValueError(f"{key}: expected text in one line without quotes, #, $ and \\, got {value!r}")
    is_left_out = value is None or value is False
    if key == "signal" and not is_left_out and not re.fullmatch(r"(?i)B:((SIG)?USR1|10)(@0*[1-9]\d{0,4})?", str(value)):
        raise ValueError(
            f"signal: expected B:USR1@SECONDS, got {value!r}: the batch script (B:) hears USR1, lets the ranks save"
            " and goes back into the queue; other signals end it, and without B: it hears none"
        )


def _check_notice(options: Mapping[str, Any]) -> None:
    """A job that is asked to end before it has begun would go back into the queue again and again."""
    signal, limit = options.get("signal", _SIGNAL), _seconds(options.get("time"))
    if limit is None or signal in (None, False):
        return
    notice = int(str(signal).partition("@")[2] or 60)
    if limit <= notice + 60:
        raise ValueError(
            f"time: expected more than {notice + 60} seconds with the signal {signal!r}, which SLURM may send 60 early,"
            f" got {options['time']!r}: the job would be asked to end before it has begun"
        )


def _seconds(time: Any) -> int | None:
    """Of a time limit as ``sbatch`` takes it; None where there is none, or it is not one."""
    match = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", str(time))
    if match is None or not any(map(int, filter(None, match.groups()))):
        return None
    days, *rest = (int(part) if part else 0 for part in match.groups())
    if match[1] is not None or match[4] is not None:
        hours, minutes, seconds = rest
    else:
        hours, minutes, seconds = 0, rest[0], rest[1]
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _near(key: str) -> str:
    return did_you_mean(key.replace("_", "-"), {*_KNOWN, *SlurmBlock.model_fields})
