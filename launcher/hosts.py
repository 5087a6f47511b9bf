"""Hosts: read from DeepSpeed's hostfile or SLURM's environment, and checked before anything is started on them."""

import re
import socket
from dataclasses import dataclass
from pathlib import Path

from narrowgauge.engine.errors import UserError

_LINE = re.compile(
    r"(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]*)@)?(?P<name>[A-Za-z0-9_.:-]+)(?:\s+slots=(?P<slots>\d{1,6}))?"
)


@dataclass(frozen=True)
class Host:
    """A machine, the process ranks it takes and who logs in there; None where the hostfile does not say."""

    name: str
    slots: int | None
    user: str | None = None

    @property
    def login(self) -> str:
        """What ssh is told."""
        return self.name if self.user is None else f"{self.user}@{self.name}"


def read_hostfile(path: Path) -> list[Host]:
    """Read ``NAME slots=N`` and ``USER@NAME slots=N`` lines, as DeepSpeed's, without blank lines and comments (``#``).

    Raises:
        UserError: the file cannot be read, a line is not of this form, a host is given twice, there is none, or the
            slots differ.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {path}: cannot be read: {error}") from error
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise UserError(f"{path}, line {number}: expected 'NAME slots=N' or 'USER@NAME slots=N', got {text!r}")
        slots = int(match["slots"]) if match["slots"] is not None else None
        if slots == 0:
            raise UserError(f"{path}, line {number}: {match['name']}: expected at least 1 slot, got 0")
        if any(host.name == match["name"] for host in hosts):
            raise UserError(f"{path}, line {number}: {match['name']} is given twice")
        hosts.append(Host(match["name"], slots, match["user"]))
    if not hosts:
        raise UserError(f"{path}: expected at least one host, got none")
    first = hosts[0]
    for host in hosts:
        if host.slots != first.slots:
            raise UserError(
                f"{path}: expected the same slots on all hosts, got {first.slots} on {first.name} and {host.slots} on"
                f" {host.name}"
            )
    return hosts


def check_resolve(hosts: list[Host]) -> None:
    """Check that every name leads to an address.

    Raises:
        UserError: naming the hosts that do not.
    """
    unknown = []
    for host in hosts:
        try:
            socket.getaddrinfo(host.name, None)
        except OSError:
            unknown.append(host.name)
    if unknown:
        raise UserError(f"{', '.join(unknown)}: no address found for {'this host' if len(unknown) == 1 else 'these'}")
