"""``narrowgauge launch --hostfile`` before it reaches a host; with hosts: ``tests/cluster``."""

from pathlib import Path

import pytest

from narrowgauge.launcher.hosts import Host, read_hostfile
from tests.launcher.conftest import Call
from tests.support.command import tiny_config

MORE = ["--set", "launch.interface=eth0", "--set", "launch.threads_per_process=1"]


def test_a_dry_run_prints_and_starts_nothing(call: Call, corpus: Path, tmp_path: Path) -> None:
    config, hostfile = str(tiny_config(corpus, tmp_path)), tmp_path / "hostfile"
    hostfile.write_text("# two names of this machine\nlocalhost slots=1\n127.0.0.1 slots=1\n")
    result = call("launch", config, *MORE, "--hostfile", str(hostfile), "--dry-run")
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first.startswith("localhost: OMP_NUM_THREADS=1 NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0 ")
    moved = first.replace("localhost: ", "127.0.0.1: ").replace("--local-addr localhost", "--local-addr 127.0.0.1")
    assert moved == second
    assert "--nproc-per-node 1 --max-restarts 0" in first
    assert first.endswith(f"-m narrowgauge.launcher train {config}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected at least one host, got none"),
        ("h1 slots=1\nh1 slots=1\n", "line 2: h1 is given twice"),
        ("h1 slots=1\nh2 slots=2\n", "expected the same slots on all hosts, got 1 on h1 and 2 on h2"),
        ("h1 slots=one\n", "line 1: expected 'NAME slots=N' or 'USER@NAME slots=N', got 'h1 slots=one'"),
        (f"h1 slots={'1' * 4301}\n", "line 1: expected 'NAME slots=N' or 'USER@NAME slots=N', got 'h1 slots=111"),
        ("h1 slots=0\n", "line 1: h1: expected at least 1 slot, got 0"),
        ("localhost slots=1\nnowhere.invalid slots=1\n", "nowhere.invalid: no address found for this host"),
    ],
)
def test_hostfiles_that_do_not_hold(call: Call, corpus: Path, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hostfile"
    path.write_text(text)
    result = call("launch", str(tiny_config(corpus, tmp_path)), *MORE, "--hostfile", str(path))
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr


def test_who_logs_in_is_read_from_deepspeeds_form(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("alice@h1 slots=2\nh2 slots=2\n")
    hosts = read_hostfile(path)
    assert hosts == [Host("h1", 2, "alice"), Host("h2", 2)]
    assert [host.login for host in hosts] == ["alice@h1", "h2"]
