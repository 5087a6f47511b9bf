"""Running one of this package's modules on another host."""

import shlex
import shutil
import sys

from narrowgauge.engine.errors import UserError


def ssh_command(host: str, module: str) -> list[str]:
    """The words that run ``module`` on a host over ssh, with this interpreter's path there.

    Raises:
        UserError: there is no ssh.
    """
    ssh = shutil.which("ssh")
    if ssh is None:
        raise UserError("a hostfile needs ssh, and there is none on PATH")
    inner = f"cd / && exec {shlex.quote(sys.executable)} -m {module}"
    return [ssh, "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5", host, inner]
