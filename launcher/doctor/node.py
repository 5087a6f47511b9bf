"""One host's side of ``narrowgauge doctor --hostfile``: obeys orders, JSON lines on standard input, until it is closed.

Every order is answered with one JSON line; ``receive`` with two, the first of which says where it listens.
"""

import json
import platform
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from narrowgauge.engine.ranks.versions import installed_versions

from ..peer import reply

# A transfer ends when either is reached.
MOST_BYTES, MOST_SECONDS = 64 << 20, 1.0
# Seconds to connect and for each piece of a transfer.
PATIENCE = 10.0
_CHUNK = 1 << 20


def main() -> int:
    """Answer orders; returns the exit code."""
    for line in sys.stdin:
        order = json.loads(line)
        _ORDERS[order["do"]](order)
    return 0


def _report(order: dict[str, Any]) -> None:
    versions = {"Python": platform.python_version(), **installed_versions()}
    try:
        import torch

        reply(versions=versions, num_gpus=torch.cuda.device_count())
    except Exception as error:
        # Whatever a package that is half installed raises.
        reply(versions=versions, problem=f"torch cannot be imported: {error}")


def _tell_time(order: dict[str, Any]) -> None:
    reply(time=time.time())


def _receive(order: dict[str, Any]) -> None:
    """Take one connection and count what comes."""
    with socket.create_server(("", 0)) as server:
        server.settimeout(2 * PATIENCE)
        reply(port=server.getsockname()[1])
        try:
            connection, _ = server.accept()
            with connection:
                reply(**_count(connection))
        except OSError as error:
            reply(problem=str(error))


def _count(connection: socket.socket) -> dict[str, float]:
    """The clock starts with the first piece, which is not counted."""
    connection.settimeout(PATIENCE)
    buffer = bytearray(_CHUNK)
    more = connection.recv_into(buffer)
    nbytes, begin = 0, time.monotonic()
    seconds = 0.0
    while more and nbytes < MOST_BYTES and seconds < MOST_SECONDS:
        more = connection.recv_into(buffer)
        nbytes += more
        seconds = time.monotonic() - begin
    return {"bytes": nbytes, "seconds": seconds}


def _send(order: dict[str, Any]) -> None:
    """Send to a receiver until it has had enough."""
    chunk = bytes(_CHUNK)
    try:
        connection = socket.create_connection((order["host"], order["port"]), timeout=PATIENCE)
    except OSError as error:
        reply(problem=str(error))
        return
    with connection:
        try:
            for _ in range(MOST_BYTES // _CHUNK + 2):
                connection.sendall(chunk)
        except (ConnectionResetError, BrokenPipeError):
            # The receiver's time was up.
            pass
        except OSError as error:
            reply(problem=str(error))
            return
    reply()


_ORDERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "report": _report,
    "time": _tell_time,
    "receive": _receive,
    "send": _send,
}


if __name__ == "__main__":
    sys.exit(main())
