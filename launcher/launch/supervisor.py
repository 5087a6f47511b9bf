"""One host's side of a launch over ssh: starts torchrun, and ends it when the launching host asks or falls silent.

It reads lines from its standard input: first the order, a JSON object, then a line every second, empty or with the name
of a signal for the ranks. So no process is left on a host that is cut off, and nothing of the environment appears in a
command line. It answers on standard output: first a JSON line, whether the host is fit for the run.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from narrowgauge.engine.ranks.exit_codes import EXIT_BAD_INPUT
from narrowgauge.engine.ranks.versions import installed_versions

from ..peer import reply
from .process_tree import adopt_orphans, end_children

_POLL = 0.1
_NVIDIA = Path("/proc/driver/nvidia")


def main() -> int:
    """Obey the launching host; returns torchrun's exit code."""
    order = json.loads(sys.stdin.readline())
    problem = _problem(order)
    reply(problem=problem)
    if problem is not None or not sys.stdin.readline():
        return EXIT_BAD_INPUT
    return _Supervisor(order).run()


def _problem(order: dict[str, Any]) -> str | None:
    """Why this host cannot take part, or None."""
    folder = Path(order["folder"])
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    for name, expected in order["files"].items():
        path = folder / name
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            return f"{path}: {error.strerror}"
        if found != expected:
            return f"{path}: its contents differ from those on the launching host"
    for name, found in installed_versions().items():
        if found != order["versions"][name]:
            return f"{name} {found} is installed, the launching host has {order['versions'][name]}"
    if _NVIDIA.exists():
        import torch

        if 0 < torch.cuda.device_count() < order["processes"]:
            return f"expected a GPU for each of {order['processes']} process ranks, got {torch.cuda.device_count()}"
    if order["listen"] is not None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", order["listen"]))
            except OSError:
                return f"port {order['listen']} is in use; set launch.port"
    return None


class _Supervisor:
    """Runs the command of an order.

    The order's ``silence`` is the time in seconds without a line after which the launching host counts as lost.
    """

    def __init__(self, order: dict[str, Any]) -> None:
        self._order = order
        self._heard = time.monotonic()
        self._asked: list[signal.Signals] = []
        self._closed = False

    def run(self) -> int:
        adopt_orphans()
        process = subprocess.Popen(  # noqa: S603
            self._order["command"],
            cwd=self._order["folder"],
            env={**os.environ, **self._order["environment"]},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            return self._watch(process)
        finally:
            end_children()

    def _listen(self) -> None:
        for line in sys.stdin:
            self._heard = time.monotonic()
            if line.strip():
                self._asked.append(signal.Signals[line.strip()])
        self._closed = True

    def _watch(self, process: "subprocess.Popen[bytes]") -> int:
        while (code := process.poll()) is None:
            while self._asked:
                process.send_signal(self._asked.pop(0))
            silent = time.monotonic() - self._heard
            if self._closed or silent > self._order["silence"]:
                reason = "is gone" if self._closed else f"was not heard of for {silent:.0f} s"
                # Printing blocks where nobody reads any more.
                end_children()
                print(f"{socket.gethostname()}: the launching host {reason}; ended", file=sys.stderr)  # noqa: T201
                return 1
            time.sleep(_POLL)
        return code


if __name__ == "__main__":
    sys.exit(main())
