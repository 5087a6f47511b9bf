"""Hosts on one machine: network namespaces on a bridge, each with a host name, PID namespace and sshd of its own."""

import functools
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NEEDED = ("ip", "tc", "unshare", "sshd", "ssh-keygen")
_SSH_PORT = 2222
_OWN_NAMESPACES = ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
_numbers = itertools.count()


@functools.cache
def missing() -> str | None:
    """Why there can be no hosts here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [name for name in NEEDED if find(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    # In namespaces of its own, so that nothing is left.
    words = [*_OWN_NAMESPACES, "--net", find("ip") or "ip", "link", "add", "probe", "type", "bridge"]
    tried = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603
    return None if tried.returncode == 0 else f"namespaces or bridges are not allowed here: {tried.stderr.strip()}"


def find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def call(*words: str) -> None:
    subprocess.run([find(words[0]) or words[0], *words[1:]], check=True, capture_output=True, text=True)  # noqa: S603


class Network:
    """``num_hosts`` hosts named h1, h2, ... that reach each other by name, over links of ``rate`` (tc's syntax).

    Attributes:
        names: of the hosts.
    """

    def __init__(
        self,
        folder: Path,
        num_hosts: int,
        *,
        rate: str | None = None,
        hide: dict[str, Path] | None = None,
        environment: dict[str, dict[str, str]] | None = None,
    ) -> None:
        """
        Args:
            folder: for keys and logs.
            hide: by host, a folder that is empty there.
            environment: by host, what its sshd sets; no spaces.
        """
        self.folder, self.rate, self._hide, self._environment = folder, rate, hide or {}, environment or {}
        self.names = [f"h{number + 1}" for number in range(num_hosts)]
        number = next(_numbers)
        # Interface names have at most 15 characters.
        self._tag = f"ng{os.getpid() % 100000}n{number}"
        self._bridge = f"{self._tag}b"
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._subnet = f"10.{77 + number % 100}.{os.getpid() % 250}"

    def namespace(self, host: str) -> str:
        return f"{self._tag}{host}"

    def address(self, host: str) -> str:
        return f"{self._subnet}.{host.removeprefix('h')}"

    def link(self, host: str) -> str:
        """The end of a host's link at the switch."""
        return f"{self._tag}{host}"

    def __enter__(self) -> "Network":
        try:
            self._up()
        except BaseException:
            self._down()
            raise
        return self

    def __exit__(self, *details: Any) -> None:
        self._down()

    def _up(self) -> None:
        call("ip", "link", "add", self._bridge, "type", "bridge")
        call("ip", "link", "set", self._bridge, "up")
        for name in ("host_key", "key"):
            call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        for host in self.names:
            self._add(host)
        if self.rate is not None:
            self.limit(self.rate)
        self._write_client()
        for host in self.names:
            self._start_sshd(host)
        for host in self.names:
            self._wait_for_sshd(host)

    def _add(self, host: str) -> None:
        namespace, link = self.namespace(host), self.link(host)
        call("ip", "netns", "add", namespace)
        call("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        call("ip", "link", "set", link, "master", self._bridge, "up")
        call("ip", "-n", namespace, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        call("ip", "-n", namespace, "link", "set", "eth0", "up")
        call("ip", "-n", namespace, "link", "set", "lo", "up")
        hosts = Path("/etc/netns") / namespace / "hosts"
        hosts.parent.mkdir(parents=True, exist_ok=True)
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{self.address(name)} {name}\n" for name in self.names))

    def _write_client(self) -> None:
        config = self.folder / "ssh_config"
        config.write_text(
            f"Host *\n Port {_SSH_PORT}\n User root\n IdentityFile {self.folder}/key\n IdentitiesOnly yes\n"
            " StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
        )
        wrapper = self.folder / "bin" / "ssh"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {find("ssh")} -F {shlex.quote(str(config))} "$@"\n')
        wrapper.chmod(0o755)

    def _start_sshd(self, host: str) -> None:
        config = self.folder / f"sshd-{host}.conf"
        lines = [
            f"Port {_SSH_PORT}",
            f"ListenAddress {self.address(host)}",
            f"HostKey {self.folder}/host_key",
            f"AuthorizedKeysFile {self.folder}/key.pub",
            "StrictModes no",
            "PermitRootLogin prohibit-password",
            "PasswordAuthentication no",
            "UsePAM no",
            f"PidFile {self.folder}/sshd-{host}.pid",
        ]
        kept = {key: os.environ[key] for key in ("PYTHONPATH", "TORCH_EXTENSIONS_DIR") if key in os.environ}
        kept |= self._environment.get(host, {})
        lines += [f"SetEnv {' '.join(f'{key}={value}' for key, value in kept.items())}"] if kept else []
        config.write_text("\n".join(lines) + "\n")
        Path("/run/sshd").mkdir(exist_ok=True)
        hide = f"mount -t tmpfs none {shlex.quote(str(self._hide[host]))} && " if host in self._hide else ""
        log = shlex.quote(str(self.folder / f"sshd-{host}.log"))
        inner = f"{hide}hostname {host} && exec {find('sshd')} -D -f {shlex.quote(str(config))} -E {log}"
        words = ["ip", "netns", "exec", self.namespace(host), *_OWN_NAMESPACES, "sh", "-c", inner]
        self._daemons.append(subprocess.Popen([find(words[0]) or "ip", *words[1:]]))  # noqa: S603

    def _wait_for_sshd(self, host: str) -> None:
        deadline = time.monotonic() + 20
        while self.run(host, str(self.folder / "bin" / "ssh"), host, "true").returncode != 0:
            assert time.monotonic() < deadline, (self.folder / f"sshd-{host}.log").read_text()
            time.sleep(0.1)

    def _down(self) -> None:
        for daemon in self._daemons:
            daemon.send_signal(signal.SIGKILL)
            daemon.wait()
        for host in self.names:
            namespace = self.namespace(host)
            subprocess.run([find("ip") or "ip", "netns", "del", namespace], capture_output=True, check=False)  # noqa: S603
            shutil.rmtree(Path("/etc/netns") / namespace, ignore_errors=True)
        subprocess.run([find("ip") or "ip", "link", "del", self._bridge], capture_output=True, check=False)  # noqa: S603

    def words(self, host: str, *command: str) -> list[str]:
        """The words that run a command on a host, with the hosts' ssh first on PATH."""
        path = f"PATH={self.folder}/bin:{os.environ['PATH']}"
        inner = f"hostname {host} && exec env {shlex.quote(path)} {shlex.join(command)}"
        return [find("ip") or "ip", "netns", "exec", self.namespace(host), "unshare", "--uts", "sh", "-c", inner]

    def run(self, host: str, *command: str, timeout: float = 240.0) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(  # noqa: S603
            self.words(host, *command), capture_output=True, text=True, timeout=timeout, check=False
        )

    def limit(self, rate: str | None) -> None:
        """Limit all links, both ways, to a rate in tc's syntax, or not at all."""
        shape = ["tbf", "rate", rate, "burst", "1mb", "latency", "50ms"] if rate is not None else ["noqueue"]
        for host in self.names:
            inside = ["ip", "netns", "exec", self.namespace(host), find("tc") or "tc"]
            call("tc", "qdisc", "replace", "dev", self.link(host), "root", *shape)
            call(*inside, "qdisc", "replace", "dev", "eth0", "root", *shape)

    def cut(self, host: str) -> None:
        """Cut a host off."""
        call("ip", "link", "set", self.link(host), "down")

    def restore(self, host: str) -> None:
        call("ip", "link", "set", self.link(host), "up")

    def processes(self, host: str, patterns: Sequence[str] = ("narrowgauge",)) -> list[str]:
        """The command lines of the processes in a host's network namespace that hold one of ``patterns``."""
        listed = subprocess.run(  # noqa: S603
            [find("ip") or "ip", "netns", "pids", self.namespace(host)], capture_output=True, text=True, check=True
        )
        found = []
        for pid in listed.stdout.split():
            path = Path("/proc") / pid / "cmdline"
            line = path.read_bytes().replace(b"\0", b" ").decode() if path.exists() else ""
            # What made the host names folders, and a clone's may be called as anything.
            if not line.startswith("unshare ") and any(pattern in line for pattern in patterns):
                found.append(line)
        return found
