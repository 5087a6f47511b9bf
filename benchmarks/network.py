"""A training step over slow networks: dense AdamW at ZeRO-2 against Grass at ZeRO-1, 2 and 3, on emulated hosts.

Each host is a network namespace of this machine with a rate-limited link, so this needs root and iproute2, sshd not.
Methods and rates take turns within one process per host. Each host has ``--cores-per-host`` of this machine's cores, so
that it is as fast among two as among four. ``--report`` only reads what earlier runs have left in ``--out``.

python -m benchmarks.network --hosts 2 4 --rates 100mbit 1gbit 10gbit --out runs/network
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.compare import machine
from benchmarks.network_rank import METHODS, Shape
from benchmarks.network_report import plot, predict, show
from benchmarks.results_file import write_rows
from tests.cluster.network import Network, missing

UNLIMITED = "unlimited"
_PORT = 29400
_CORES = os.sched_getaffinity(0)


class _Ranks:
    """One process rank per host; all of them do what :meth:`ask` says and answer."""

    def __init__(self, network: Network, shape: Shape) -> None:
        self._processes = []
        for number, host in enumerate(network.names):
            env = {
                "RANK": str(number),
                "LOCAL_RANK": "0",
                "WORLD_SIZE": str(len(network.names)),
                "MASTER_ADDR": network.names[0],
                "MASTER_PORT": str(_PORT),
                "GLOO_SOCKET_IFNAME": "eth0",
                "OMP_NUM_THREADS": "1",
            }
            words = network.words(host, sys.executable, "-m", "benchmarks.network_rank", json.dumps(vars(shape)))
            self._processes.append(
                subprocess.Popen(  # noqa: S603
                    words, env={**os.environ, **env}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )

    def ask(self, order: dict[str, Any]) -> list[dict[str, Any]]:
        """Give all ranks an order; returns their answers, in rank order."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        answers = []
        for number, process in enumerate(self._processes):
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"process rank {number} ended with exit code {process.wait()}")
            answers.append(json.loads(line))
        return answers

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def measure(num_hosts: int, rates: list[str], shape: Shape, *, rounds: int, num_cores: int) -> dict[str, Any]:
    """Time every method at every rate, and without a limit.

    Returns:
        By rate and method: ``seconds`` per round (of the slowest rank), ``sent`` and ``counted`` bytes per step of the
        busiest host, by its interface and as the collectives' sizes say.
    """
    all_rates = [UNLIMITED, *rates]
    # The ranks inherit it.
    os.sched_setaffinity(0, sorted(_CORES)[:num_cores])
    with tempfile.TemporaryDirectory() as folder, Network(Path(folder), num_hosts) as network:
        ranks = _Ranks(network, shape)
        try:
            facts = ranks.ask({"do": "build"})[0]
            found = {rate: {name: {"seconds": [], "sent": [], "counted": []} for name in METHODS} for rate in all_rates}
            for number in range(rounds + 1):
                for rate in all_rates:
                    network.limit(None if rate == UNLIMITED else rate)
                    _take_turns(ranks, found[rate] if number else None)
                    print(f"{num_hosts} hosts, {rate}, round {number} of {rounds}", flush=True)
        finally:
            ranks.close()
    return {"hosts": num_hosts, "cores": num_cores, "machine": machine(), "facts": facts, "rates": found}


def _take_turns(ranks: _Ranks, found: dict[str, dict[str, list[float]]] | None) -> None:
    """One step of every method; None warms up."""
    for name in METHODS:
        answers = ranks.ask({"do": "step", "method": name})
        if found is not None:
            for key, values in found[name].items():
                values.append(max(answer[key] for answer in answers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit", "10gbit"], help="in tc's syntax")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--cores-per-host", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("runs/network"))
    parser.add_argument("--report", action="store_true", help="measure nothing, show what is in --out")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="write a PNG here")
    for name, value in vars(Shape()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    arguments = parser.parse_args()
    shape = Shape(**{name: getattr(arguments, name) for name in vars(Shape())})
    if not arguments.report:
        reason = missing()
        if reason is not None:
            sys.exit(f"error: {reason}")
        arguments.out.mkdir(parents=True, exist_ok=True)
        for num_hosts in arguments.hosts:
            num_cores = math.ceil(num_hosts * arguments.cores_per_host)
            if num_cores > len(_CORES):
                sys.exit(f"error: {num_cores} cores are needed for {num_hosts} hosts, {len(_CORES)} are there")
            found = measure(num_hosts, arguments.rates, shape, rounds=arguments.rounds, num_cores=num_cores)
            (arguments.out / f"hosts-{num_hosts}.json").write_text(json.dumps(found, indent=1) + "\n")
    results = [json.loads(path.read_text()) for path in sorted(arguments.out.glob("hosts-*.json"))]
    rows = [row for result in results for row in predict(result, UNLIMITED)]
    show(rows)
    if arguments.csv is not None:
        write_rows(arguments.csv, rows)
    if arguments.plot is not None:
        plot(arguments.plot, rows)


if __name__ == "__main__":
    main()
