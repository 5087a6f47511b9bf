"""``narrowgauge launch --hostfile`` over ssh, on hosts with networks of their own."""

import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.cluster.network import Network, missing
from tests.support.command import BIN, ROOT, environment, losses, tiny_config, wait_for_step
from tests.support.forked import run

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

MORE = ["--set", "launch.interface=eth0", "--set", "launch.threads_per_process=1"]
LAUNCH = [sys.executable, "-m", "narrowgauge.launcher", "launch"]


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hostfile"
    path.write_text("# two hosts\nh1 slots=1\nh2 slots=1\n")
    return path


def launch(network: Network, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(  # noqa: S603
        network.words("h1", *LAUNCH, *words),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def start(network: Network, *words: str, stderr: Path) -> "subprocess.Popen[str]":
    with stderr.open("w") as file:
        return subprocess.Popen(  # noqa: S603
            network.words("h1", *LAUNCH, *words),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=file,
            text=True,
        )


def torchrun(network: Network, host: str, num_processes: int, config: str) -> "subprocess.Popen[str]":
    """Start torchrun on one host, as a user would on each."""
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "h1:29700", "--rdzv-id", "run"]
    words = [
        str(BIN / "torchrun"),
        *meet,
        "--nnodes",
        str(len(network.names)),
        "--local-addr",
        host,
        "--nproc-per-node",
        str(num_processes),
    ]
    return subprocess.Popen(  # noqa: S603
        network.words(host, *words, "-m", "narrowgauge.launcher", "train", config),
        cwd=ROOT,
        env=environment(GLOO_SOCKET_IFNAME="eth0"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_all(processes: "list[subprocess.Popen[str]]") -> None:
    for process in processes:
        _, stderr = process.communicate(timeout=180)
        assert process.returncode == 0, stderr


def left_over(network: Network) -> list[str]:
    return [line for host in network.names for line in network.processes(host)]


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the same run on two ranks of one machine."""
    folder = tmp_path_factory.mktemp("alone")
    assert run("train", str(tiny_config(corpus, folder)), ranks=2).returncode == 0
    return losses(folder / "run")


def test_two_hosts_train_as_two_ranks_of_one_do(
    network: Network, hostfile: Path, corpus: Path, tmp_path: Path, alone: dict[int, float]
) -> None:
    config = str(tiny_config(corpus, tmp_path))
    result = launch(network, config, *MORE, "--hostfile", str(hostfile))
    assert result.returncode == 0, result.stderr
    assert "--rdzv-endpoint h1:29500" in result.stdout
    assert losses(tmp_path / "run") == alone
    assert left_over(network) == []


@pytest.mark.slow
def test_four_hosts_train_as_four_ranks_of_one_do(corpus: Path, tmp_path: Path) -> None:
    config = str(tiny_config(corpus, tmp_path))
    hostfile, keys, here = tmp_path / "hostfile", tmp_path / "keys", tmp_path / "here"
    keys.mkdir()
    with Network(keys, 4) as network:
        hostfile.write_text("".join(f"{host} slots=1\n" for host in network.names))
        result = launch(network, config, *MORE, "--hostfile", str(hostfile))
        assert result.returncode == 0, result.stderr
        assert left_over(network) == []
        by_torchrun = tmp_path / "torchrun"
        by_torchrun.mkdir()
        wait_for_all([torchrun(network, host, 1, str(tiny_config(corpus, by_torchrun))) for host in network.names])
    assert run("train", config, "--set", f"logging.run_dir={here}", ranks=4).returncode == 0
    assert losses(tmp_path / "run") == losses(here)
    assert losses(by_torchrun / "run") == losses(here)


@pytest.mark.slow
def test_torchrun_on_each_host_gives_the_same_run(
    network: Network, corpus: Path, tmp_path: Path, alone: dict[int, float]
) -> None:
    config = str(tiny_config(corpus, tmp_path))
    wait_for_all([torchrun(network, host, 1, config) for host in network.names])
    assert losses(tmp_path / "run") == alone


@pytest.mark.slow
def test_hosts_with_different_numbers_of_ranks(network: Network, corpus: Path, tmp_path: Path) -> None:
    config = str(tiny_config(corpus, tmp_path, train_batch_size=6))
    processes = [torchrun(network, host, number, config) for host, number in (("h1", 1), ("h2", 2))]
    text = "".join(process.communicate(timeout=180)[1] for process in processes)
    assert all(process.returncode for process in processes)
    message = (
        "error: process ranks on this host: process rank 0 on h1 has 1, rank 1 on h2 has 2; all ranks need the same"
    )
    assert text.count("error: ") == 1
    assert message in text
    assert left_over(network) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdsh") is None, reason="not installed: pdsh")
def test_deepspeeds_own_launcher_gives_the_same_run(
    network: Network, hostfile: Path, corpus: Path, tmp_path: Path, alone: dict[int, float]
) -> None:
    variables = tmp_path / "deepspeed_env"
    variables.write_text("GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\n")
    # Its runner ends what is left with `pkill -f` over ssh: the hosts' processes are in namespaces of their own.
    words = [str(BIN / "deepspeed"), "--hostfile", str(hostfile), "--master_addr", network.address("h1")]
    words += ["--master_port", "29600", "--module", "narrowgauge.launcher", "train", str(tiny_config(corpus, tmp_path))]
    result = subprocess.run(  # noqa: S603
        network.words("h1", *words),
        cwd=ROOT,
        env=environment(DS_ENV_FILE=str(variables)),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run") == alone


@pytest.mark.slow
def test_asked_to_end_it_saves_and_goes_on_later(
    network: Network, hostfile: Path, corpus: Path, tmp_path: Path
) -> None:
    config, run_dir = str(tiny_config(corpus, tmp_path)), tmp_path / "run"
    more = [*MORE, "--set", "training.steps=60", "--hostfile", str(hostfile)]
    process = start(network, config, *more, stderr=tmp_path / "stderr")
    wait_for_step(run_dir, 6, process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(90) == 75, (tmp_path / "stderr").read_text()
    assert left_over(network) == []
    reached = max(losses(run_dir))
    assert reached < 60
    assert (run_dir / "checkpoints" / f"step-{reached}").is_dir()
    result = launch(network, config, *more)
    assert result.returncode == 0, result.stderr
    assert f"resumed after step {reached}" in result.stdout + result.stderr
    assert sorted(losses(run_dir)) == list(range(1, 61))


@pytest.mark.slow
def test_a_cut_link_ends_all_processes_and_a_restart_resumes(
    network: Network, hostfile: Path, corpus: Path, tmp_path: Path
) -> None:
    config, run_dir = str(tiny_config(corpus, tmp_path)), tmp_path / "run"
    limit = 20
    more = [*MORE, "--set", f"training.hang_timeout={limit}", "--hostfile", str(hostfile)]
    process = start(network, config, *more, "--set", "training.steps=2000", stderr=tmp_path / "stderr")
    wait_for_step(run_dir, 10, process)
    begin = time.monotonic()
    network.cut("h2")
    try:
        while left_over(network) and time.monotonic() - begin < limit + 15:
            time.sleep(0.1)
        assert left_over(network) == []
        assert process.wait(1) == 1
    finally:
        network.restore("h2")
    text = (tmp_path / "stderr").read_text()
    assert "error: h2: the connection is lost" in text
    assert f"error: process rank 0 on h1: no progress for {limit} s at " in text
    for name in ("rank-0-h1", "rank-1-h2"):
        (stacks,) = (run_dir / "stacks").glob(f"{name}-*.txt")
        assert "engine/run/train.py" in stacks.read_text()
    reached = max(losses(run_dir))
    result = launch(network, config, *more, "--set", f"training.steps={reached + 4}")
    assert result.returncode == 0, result.stderr
    assert "resumed after step" in result.stdout + result.stderr


def test_a_configuration_that_one_host_lacks(odd_network: Network, hostfile: Path, corpus: Path, unseen: Path) -> None:
    config = tiny_config(corpus, unseen)
    result = launch(odd_network, str(config), *MORE, "--hostfile", str(hostfile))
    assert result.returncode == 2
    assert result.stderr.splitlines() == [f"error: h2: {config}: No such file or directory"]
    assert left_over(odd_network) == []


def test_another_version_on_one_host(odd_network: Network, hostfile: Path, corpus: Path, tmp_path: Path) -> None:
    result = launch(odd_network, str(tiny_config(corpus, tmp_path)), *MORE, "--hostfile", str(hostfile))
    assert result.returncode == 2
    here = version("deepspeed")
    assert result.stderr.splitlines() == [f"error: h2: deepspeed 0.0.1 is installed, the launching host has {here}"]
    assert left_over(odd_network) == []


def test_a_port_in_use(network: Network, hostfile: Path, corpus: Path, tmp_path: Path) -> None:
    config = str(tiny_config(corpus, tmp_path))
    listen = "import socket, time; s = socket.create_server(('', 29500)); print(flush=True); time.sleep(100)"
    taken = subprocess.Popen(network.words("h1", sys.executable, "-c", listen), stdout=subprocess.PIPE)  # noqa: S603
    try:
        assert taken.stdout is not None
        taken.stdout.readline()
        result = launch(network, config, *MORE, "--hostfile", str(hostfile))
    finally:
        taken.kill()
        taken.wait()
    assert result.returncode == 2
    assert result.stderr.splitlines() == ["error: h1: port 29500 is in use; set launch.port"]
