"""Ranks that meet before there is a process group, without a launcher that hosts the rendezvous."""

import socket
import subprocess
import sys

import pytest

from tests.support.command import environment

SCRIPT = """
import os, time, torch
from narrowgauge.engine.ranks.agreement import agree
rank = int(os.environ["RANK"])
assert agree({"a": 1}, choice=f"of {rank}") == "of 0"
time.sleep(float(os.environ["DELAY"]) * rank)
torch.distributed.init_process_group("gloo")
total = torch.ones(1)
torch.distributed.all_reduce(total)
assert total == 3
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("delay", ["0", "0.3"])
def test_a_process_group_can_be_made_right_after(delay: str) -> None:
    """Rank 0 hosts the store here: closing it at the end of the meeting once took the process group's away."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DELAY": delay}
    processes = [
        subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", SCRIPT],
            env=environment(**common, RANK=str(rank)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    results = [(process.communicate(timeout=120)[1], process.returncode) for process in processes]
    assert [code for _, code in results] == [0, 0, 0], results
