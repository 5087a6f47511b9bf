"""``narrowgauge doctor --hostfile`` on hosts with networks of their own."""

import json
import subprocess
import sys

import pytest

from tests.cluster.conftest import MEGABITS
from tests.cluster.network import Network, missing
from tests.support.command import ROOT, environment

# The rate of a link is measured.
pytestmark = [pytest.mark.alone, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

DOWN = "10.255.255.1"


@pytest.fixture(scope="module")
def found(odd_network: Network, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What doctor on the first host says of all of them, by subject, where one more is down."""
    folder = tmp_path_factory.mktemp("doctor")
    hostfile = folder / "hostfile"
    hostfile.write_text("\n".join([*odd_network.names, DOWN, ""]))
    words = ["-m", "narrowgauge.launcher", "doctor", "--json", "--path", str(folder), "--hostfile", str(hostfile)]
    result = subprocess.run(  # noqa: S603
        odd_network.words("h1", sys.executable, *words),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.stdout, result.stderr
    assert result.returncode == 1
    return {finding["subject"]: finding for finding in json.loads(result.stdout)}


def test_a_slow_link(found: dict[str, dict[str, str]]) -> None:
    slow = found["h2 to h1"]
    assert slow["status"] == "warning"
    assert "launch.interface" in slow["cure"]
    assert float(slow["found"].partition(" ")[0]) * 1000 == pytest.approx(MEGABITS, rel=0.3)
    assert "h1 to h1" not in found
    for host in ("h1", "h2"):
        assert found[f"{host}: clock"]["status"] == "ok"


def test_another_version(found: dict[str, dict[str, str]]) -> None:
    assert found["h1: versions"]["status"] == "ok"
    assert "h2: versions" not in found
    other = found["h2: deepspeed"]
    assert other["status"] == "error"
    assert other["found"].startswith("0.0.1, ")
    assert other["cure"].startswith("ssh h2 ")


def test_a_host_that_is_down(found: dict[str, dict[str, str]]) -> None:
    down = found[DOWN]
    assert down["status"] == "error"
    assert "BatchMode" in down["cure"]


def test_a_host_without_the_environment(found: dict[str, dict[str, str]]) -> None:
    assert found["h3"]["status"] == "error"
    assert found["h3"]["cure"].startswith("install narrowgauge on h3")


def test_nothing_is_left_on_the_hosts(odd_network: Network, found: dict[str, dict[str, str]]) -> None:
    assert [line for host in odd_network.names for line in odd_network.processes(host)] == []
