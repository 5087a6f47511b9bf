"""``narrowgauge doctor --hostfile`` on hosts with networks of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.network import Network, missing
from tests.support.command import ROOT, environment

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

MEGABITS = 100


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """Two hosts on a slow link, the second with another version of DeepSpeed."""
    other = tmp_path_factory.mktemp("other")
    metadata = other / "deepspeed-0.0.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.0.1\n")
    path = ":".join(filter(None, (str(other), os.environ.get("PYTHONPATH"))))
    folder = tmp_path_factory.mktemp("network")
    with Network(folder, 2, rate=f"{MEGABITS}mbit", environment={"h2": {"PYTHONPATH": path}}) as made:
        yield made


def ask(network: Network, folder: Path, hosts: str) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit code, and the findings by subject."""
    hostfile = folder / "hostfile"
    hostfile.write_text(hosts)
    words = ["-m", "narrowgauge.launcher", "doctor", "--json", "--path", str(folder), "--hostfile", str(hostfile)]
    result = subprocess.run(  # noqa: S603
        network.words("h1", sys.executable, *words),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.stdout, result.stderr
    return result.returncode, {finding["subject"]: finding for finding in json.loads(result.stdout)}


def test_a_slow_link_another_version_and_a_host_that_is_down(network: Network, tmp_path: Path) -> None:
    code, found = ask(network, tmp_path, "h1\nh2\n10.255.255.1\n")
    assert code == 1

    slow = found["h2 to h1"]
    assert slow["status"] == "warning"
    assert "launch.interface" in slow["cure"]
    assert float(slow["found"].partition(" ")[0]) * 1000 == pytest.approx(MEGABITS, rel=0.3)
    assert "h1 to h1" not in found

    assert found["h1: versions"]["status"] == "ok"
    assert "h2: versions" not in found
    other = found["h2: deepspeed"]
    assert other["status"] == "error"
    assert other["found"].startswith("0.0.1, ")
    assert other["cure"].startswith("ssh h2 ")

    down = found["10.255.255.1"]
    assert down["status"] == "error"
    assert "BatchMode" in down["cure"]

    for host in network.names:
        assert found[f"{host}: clock"]["status"] == "ok"
    assert [line for host in network.names for line in network.processes(host)] == []


def test_a_host_without_the_environment(tmp_path: Path) -> None:
    with Network(tmp_path, 1, hide={"h1": Path(sys.prefix).resolve()}) as bare:
        code, found = ask(bare, tmp_path, "h1 slots=2\n")
    assert code == 1
    assert found["h1"]["status"] == "error"
    assert found["h1"]["cure"].startswith("install narrowgauge on h1")
