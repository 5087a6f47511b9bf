"""What a launcher tells a process about the ranks, in environment variables. Light to import."""

import os
import socket


def process_rank() -> int:
    """This process's rank, as the launcher set it; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of process ranks, as the launcher set it; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ensure_environment() -> None:
    """Make a run without a launcher look like one process rank under ``torchrun``."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for key, value in single.items():
        os.environ.setdefault(key, value)
