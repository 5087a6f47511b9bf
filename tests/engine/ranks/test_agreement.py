"""Ranks that meet before there is a process group, without a launcher that hosts the rendezvous."""

import pytest

from tests.support import forked

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


TWICE = """
import os, time, torch
from datetime import timedelta
from narrowgauge.engine.ranks.agreement import agree, make_process_group
rank = int(os.environ["RANK"])
for run in range(2):
    agree({})
    # The first rank comes long after the others.
    time.sleep(float(os.environ["DELAY"]) * run * (rank == 0))
    make_process_group("gloo", timedelta(seconds=20))
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    assert total == 3
    torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("delay", ["0", "0.3"])
def test_a_process_group_can_be_made_right_after(delay: str) -> None:
    """Rank 0 hosts the store here: closing it at the end of the meeting once took the process group's away."""
    run_on_three_ranks(SCRIPT, delay)


def test_the_group_of_a_second_run_knows_nothing_of_the_first() -> None:
    """A rank that came early read the others' addresses of the first run on the store, and hung."""
    run_on_three_ranks(TWICE, "1")


def run_on_three_ranks(script: str, delay: str) -> None:
    result = forked.python("-c", script, ranks=3, DELAY=delay)
    assert result.returncode == 0, result.stderr
