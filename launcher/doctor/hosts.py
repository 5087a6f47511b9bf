"""What ``narrowgauge doctor`` checks on and between the hosts of a hostfile, over ssh."""

import platform
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from narrowgauge.engine.errors import UserError
from narrowgauge.engine.ranks.versions import installed_versions

from ..hosts import Host
from ..peer import Peer, PeerError, ssh_command
from .clock import estimate_skew
from .finding import Finding
from .node import PATIENCE
from .packages import install_packages, pip

# Seconds; the first answer waits for ssh, and for torch to be read from a disk that is perhaps shared.
_START, _ANSWER = 120.0, 30.0
_SKEW_WARNING, _SKEW_ERROR = 1.0, 60.0
_FAST_ENOUGH = 1e9


def check_hosts(hosts: Sequence[Host]) -> list[Finding]:
    """Each host is reached, has the same packages and enough GPUs, knows the time, and is near to the first."""
    try:
        commands = [ssh_command(host.login, "narrowgauge.launcher.doctor.node") for host in hosts]
    except UserError as error:
        return [Finding("error", "ssh", str(error), install_packages("openssh-client"))]
    peers = [Peer(host.name, words) for host, words in zip(hosts, commands, strict=True)]
    try:
        for peer in peers:
            peer.order(do="report")
        reports: dict[str, dict[str, Any]] = {}
        lost: dict[str, Finding] = {}
        for peer in peers:
            try:
                reports[peer.name] = peer.answer(_START)
            except PeerError as error:
                lost[peer.name] = _lost(error)
        found: list[Finding] = []
        for host, peer in zip(hosts, peers, strict=True):
            if host.name in lost:
                found.append(lost[host.name])
                continue
            found += check_report(host, reports[host.name], next(iter(reports.items())))
            found += _check_connection(peer, peers[0] if hosts[0].name in reports else None)
        return found
    finally:
        for peer in peers:
            peer.close()


def _lost(error: PeerError) -> Finding:
    if error.by_ssh:
        cure = f"ssh -o BatchMode=yes {error.host} true   (must work without a password)"
    else:
        cure = f"install narrowgauge on {error.host} as it is here, for {shlex.quote(sys.executable)}"
    return Finding("error", error.host, str(error), cure)


def check_report(host: Host, report: dict[str, Any], first: tuple[str, dict[str, Any]]) -> list[Finding]:
    """Compare a host's versions with this machine's, and its GPUs with its slots and those of the first host.

    Args:
        first: name and report of the first host that was reached.
    """
    here = {"Python": platform.python_version(), **installed_versions()}
    found = []
    for name, expected in here.items():
        there = report["versions"].get(name)
        if there != expected:
            install = pip("install", f"{name}=={expected}")
            same = f"the same environment on all hosts: Python {expected}"
            cure = same if name == "Python" else f"ssh {host.login} {shlex.quote(install)}"
            found.append(Finding("error", f"{host.name}: {name}", f"{there}, {expected} here", cure))
    if not found:
        found.append(Finding("ok", f"{host.name}: versions", "the same as here"))
    if "problem" in report:
        cure = f"ssh {host.login} {shlex.quote(pip('install', '--force-reinstall', 'torch'))}"
        return [*found, Finding("error", f"{host.name}: torch", report["problem"], cure)]
    return [*found, _check_gpus(host, report["num_gpus"], first[0], first[1].get("num_gpus"))]


def _check_gpus(host: Host, count: int, first: str, first_count: int | None) -> Finding:
    subject = f"{host.name}: GPUs"
    has_gpus = count > 0 or bool(first_count)
    if has_gpus and host.slots is not None and count < host.slots:
        cure = f"slots={count} in the hostfile on all lines, or repair the GPUs: ssh {host.login} nvidia-smi"
        return Finding("error", subject, f"{count}, {host.slots} slots in the hostfile", cure)
    if first_count is not None and count != first_count:
        cure = f"ssh {host.login} nvidia-smi; all hosts run the same number of ranks"
        # Slots say how many are used; without them it is the number of GPUs.
        return Finding(
            "error" if host.slots is None else "warning", subject, f"{count}, {first} has {first_count}", cure
        )
    return Finding("ok", subject, str(count) if has_gpus else "none, ranks run on the CPU")


def _check_connection(peer: Peer, first: Peer | None) -> list[Finding]:
    try:
        found = [check_clock(peer)]
        if first is not None and peer is not first:
            found.append(_check_bandwidth(peer, first))
    except PeerError as error:
        return [_lost(error)]
    return found


def check_clock(peer: Peer) -> Finding:
    """Compare a host's clock with this machine's.

    Raises:
        PeerError: it does not answer.
    """
    skew = estimate_skew(lambda: peer.ask(do="time", timeout=_ANSWER)["time"])
    text = f"{skew.seconds:+.3f} s from here, within {skew.bound:.3f} s"
    if skew.at_least <= _SKEW_WARNING:
        return Finding("ok", f"{peer.name}: clock", text)
    status = "error" if skew.at_least > _SKEW_ERROR else "warning"
    return Finding(status, f"{peer.name}: clock", text, f"ssh {peer.name} sudo timedatectl set-ntp true")


def _check_bandwidth(peer: Peer, first: Peer) -> Finding:
    """Let a host send to the first one, which counts."""
    subject = f"{peer.name} to {first.name}"
    port = first.ask(do="receive", timeout=_ANSWER)["port"]
    try:
        sent = peer.ask(do="send", host=first.name, port=port, timeout=2 * _ANSWER)
    finally:
        # Also where the host is lost: it would be taken for the answer to the next question.
        received = first.answer(3 * PATIENCE)
    problem = sent.get("problem") or received.get("problem")
    if problem is not None:
        cure = f"open TCP ports between the hosts in the firewall; ssh {peer.name} getent hosts {first.name}"
        return Finding("error", subject, f"port {port}: {problem}", cure)
    rate = 8 * received["bytes"] / max(received["seconds"], 1e-9)
    text = f"{rate / 1e9:.3g} Gbit/s"
    if rate >= _FAST_ENOUGH:
        return Finding("ok", subject, text)
    cure = "launch.interface: a faster network; ethtool INTERFACE shows a link's speed"
    return Finding("warning", subject, text, cure)
