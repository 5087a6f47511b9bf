"""A SLURM of this machine: controller and node daemons without systemd, taken down afterwards."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.network import call, find

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "srun", "scancel", "sinfo")
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def missing() -> str | None:
    """Why there can be no SLURM here, or None."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    absent = [name for name in NEEDED if find(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def free_ports(count: int) -> int:
    """The first of ``count`` neighbouring ports that are free."""
    for first in range(17000 + os.getpid() % 1000, 60000, count):
        probes = []
        try:
            for port in range(first, first + count):
                probe = socket.socket()
                probes.append(probe)
                probe.bind(("", port))
            return first
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
    raise AssertionError("no free ports")


class Slurm:
    """Nodes n1, n2, ... of ``cpus`` cores each, all on this machine."""

    def __init__(self, folder: Path, num_nodes: int, *, cpus: int = 2) -> None:
        self.folder, self.cpus = folder, cpus
        self.nodes = [f"n{number + 1}" for number in range(num_nodes)]
        self.conf = folder / "slurm.conf"

    def __enter__(self) -> "Slurm":
        try:
            self._up()
        except BaseException:
            self._down()
            raise
        return self

    def __exit__(self, *details: Any) -> None:
        self._down()

    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.conf), "OMP_NUM_THREADS": "1"}

    def _up(self) -> None:
        for name in ("state", "spool", "log", "munge", "done", "cgroup"):
            (self.folder / name).mkdir()
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        munge = self.folder / "munge"
        call(
            "munged",
            "--force",
            *(f"--{name}={munge / name}" for name in ("pid-file", "log-file", "seed-file")),
            f"--key-file={key}",
            f"--socket={munge / 'socket'}",
        )
        self._write_configuration()
        os.environ["SLURM_CONF"] = str(self.conf)
        call("slurmctld", "-f", str(self.conf))
        for node in self.nodes:
            (self.folder / "spool" / node).mkdir()
            self.start_node(node)
        deadline = time.monotonic() + 30
        while self.run("sinfo", "-h", "-N", "-o", "%T").stdout.split() != ["idle"] * len(self.nodes):
            assert time.monotonic() < deadline, (self.folder / "log" / "slurmctld").read_text()[-2000:]
            time.sleep(0.1)

    def _write_configuration(self) -> None:
        host, folder, port = socket.gethostname().partition(".")[0], self.folder, free_ports(1 + len(self.nodes))
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={host}(127.0.0.1)",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            # Without this a requeued job waits for its old credential to expire.
            f"AuthInfo=socket={folder}/munge/socket,cred_expire=5",
            f"SlurmctldPort={port}",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            f"SlurmctldLogFile={folder}/log/slurmctld",
            f"SlurmdPidFile={folder}/slurmd.%n.pid",
            f"SlurmdLogFile={folder}/log/slurmd.%n",
            f"SlurmdSpoolDir={folder}/spool/%n",
            f"StateSaveLocation={folder}/state",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2",
            "SlurmdParameters=config_overrides",
            "SlurmdTimeout=10",
            "ReturnToService=2",
            "MpiDefault=none",
            "KillWait=10",
            "MinJobAge=300",
            "JobAcctGatherType=jobacct_gather/linux",
            "JobCompType=jobcomp/filetxt",
            f"JobCompLoc={folder}/done/jobs",
            "AccountingStorageType=accounting_storage/none",
        ]
        shape = f"CPUs={self.cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={self.cpus} ThreadsPerCore=1"
        for number, node in enumerate(self.nodes, start=1):
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + number} {shape} RealMemory=2000"
                " State=UNKNOWN"
            )
        lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP OverSubscribe=NO")
        self.conf.write_text("\n".join(lines) + "\n")
        (folder / "cgroup.conf").write_text(
            f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={folder}/cgroup\nCgroupAutomount=no\n"
        )

    def _down(self) -> None:
        for node in self.nodes:
            # A job that is still there belongs to a test that has failed.
            self._end_processes(node)
        os.environ.pop("SLURM_CONF", None)
        for path in [
            *self.folder.glob("slurmd.*.pid"),
            self.folder / "slurmctld.pid",
            self.folder / "munge" / "pid-file",
        ]:
            if path.is_file() and path.read_text().strip():
                try:
                    os.kill(int(path.read_text()), signal.SIGTERM)
                except ProcessLookupError:
                    continue

    def start_node(self, node: str) -> None:
        call("slurmd", "-f", str(self.conf), "-N", node)

    def kill_node(self, node: str) -> None:
        """As if its power had failed: SIGKILL to its daemon and to all processes of its jobs."""
        daemon = psutil.Process(int((self.folder / f"slurmd.{node}.pid").read_text()))
        with contextlib.suppress(psutil.NoSuchProcess):
            daemon.kill()
        self._end_processes(node)

    def _end_processes(self, node: str) -> None:
        of_jobs = [process for process in psutil.process_iter() if self._node_of(process) == node]
        steps = [parent for process in of_jobs if (parent := process.parent()) and parent.name() == "slurmstepd"]
        for victim in {*of_jobs, *steps}:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()

    def _node_of(self, process: psutil.Process) -> str | None:
        """The node that a process of this SLURM's jobs runs on."""
        try:
            environment = process.environ()
        except psutil.Error:
            return None
        return environment.get("SLURMD_NODENAME") if environment.get("SLURM_CONF") == str(self.conf) else None

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(  # noqa: S603
            [find(words[0]) or words[0], *words[1:]],
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        text = self.run("scontrol", "show", "job", "-o", number).stdout
        return dict(pair for pair in re.findall(r"(\w+)=(\S*)", text))

    def wait(self, number: str, *, timeout: float = 240.0) -> dict[str, str]:
        """Wait for a job to end; returns what is known of it."""
        deadline = time.monotonic() + timeout
        while (found := self.job(number)).get("JobState") not in _ENDED:
            assert time.monotonic() < deadline, found
            time.sleep(0.2)
        return found
