"""``narrowgauge doctor`` on machines that are not well: each trouble is found, and the cure named."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from narrowgauge.engine.backends.deepspeed.extensions import uncompiled_extensions
from narrowgauge.engine.ranks.versions import installed_versions
from narrowgauge.launcher.doctor.clock import Skew, estimate_skew
from narrowgauge.launcher.doctor.hosts import check_clock, check_report
from narrowgauge.launcher.hosts import Host
from narrowgauge.launcher.peer import Peer, PeerError
from narrowgauge.offload.backends import aio
from narrowgauge.offload.backends.deepspeed_build import build_folder
from tests.support import command, forked
from tests.support.command import ROOT, environment

NODE = [sys.executable, "-m", "narrowgauge.launcher.doctor.node"]


def ask(*words: str, run: Callable[..., Any] = forked.run, **extra: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit code and the findings."""
    result = run("doctor", "--json", *words, **extra)
    assert result.stdout, result.stderr
    return result.returncode, json.loads(result.stdout)


def of(findings: list[dict[str, Any]], subject: str) -> list[dict[str, Any]]:
    return [finding for finding in findings if finding["subject"] == subject]


def before(folder: Path) -> str:
    """A PYTHONPATH that has a folder first."""
    return ":".join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


def test_this_machine(tmp_path: Path) -> None:
    begin = time.monotonic()
    code, findings = ask("--path", str(tmp_path), run=command.run)
    assert time.monotonic() - begin < 30
    assert code == int(any(finding["status"] == "error" for finding in findings))
    assert all((finding["status"] == "ok") == (finding["cure"] is None) for finding in findings)
    for subject in (
        "Python",
        "torch",
        "deepspeed",
        "transformers",
        "GPUs",
        "GPUDirect Storage",
        "C++ compiler",
        "ninja",
    ):
        assert of(findings, subject)
    for subject in (
        "asynchronous I/O",
        "threads",
        "apex",
        "free space",
        "/dev/shm",  # noqa: S108
        "open files",
        "locked memory",
        "AIO requests",
    ):
        assert of(findings, subject)
    (disk,) = of(findings, "disk")
    write, read = (float(part.split()[-3]) for part in disk["found"].split(";")[0].split(", "))
    # Rounded, so the limit itself may be either.
    assert min(write, read) >= 1 if disk["status"] == "ok" else min(write, read) <= 1
    assert not list(tmp_path.iterdir())


def test_the_table_names_what_to_type(tmp_path: Path) -> None:
    missing = tmp_path / "it is not there"
    result = forked.run("doctor", "--path", str(missing))
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert any(line.split()[:2] == ["error", "disk"] for line in lines)
    # One line whatever the width, to be copied.
    assert f"disk: mkdir -p '{missing}'" in lines


def test_a_folder_that_cannot_be_written_to() -> None:
    code, findings = ask("--path", "/proc")
    assert code == 1
    (disk,) = of(findings, "disk")
    assert disk["status"] == "error"


def test_a_lock_of_a_killed_build(tmp_path: Path) -> None:
    """The next build would wait for it forever. A lock that a build has open is left alone."""
    stale, live = tmp_path / "cpu_adam" / "lock", tmp_path / "fused_adam" / "lock"
    for lock in (stale, live):
        lock.parent.mkdir()
        lock.touch()
    with live.open():
        code, findings = ask(TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert code == 1
    (locked,) = [finding for finding in of(findings, "extensions") if finding["status"] == "error"]
    assert locked["found"].startswith("cpu_adam: locked by a build that was killed")
    assert locked["cure"] == f"rm {stale}"
    # The folder has nothing compiled.
    assert any(finding["cure"] == "narrowgauge build" for finding in of(findings, "extensions"))


def test_a_folder_of_extensions_that_cannot_be_made() -> None:
    code, findings = ask(TORCH_EXTENSIONS_DIR="/proc/extensions")
    assert code == 1
    assert "TORCH_EXTENSIONS_DIR" in of(findings, "extensions")[0]["cure"]


def test_an_extension_compiled_before_torch_was_installed(tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "cpu_adam"
    folder.mkdir()
    (folder / "build.ninja").write_text(f"cflags = -isystem {Path(torch.__file__).parent}/include\n")
    library = folder / "cpu_adam.so"
    library.touch()
    os.utime(library, (1e9, 1e9))
    _, findings = ask(TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert f"rm -r {folder}" in [finding["cure"] for finding in of(findings, "extensions")]


def test_build_removes_the_lock_and_compiles(tmp_path: Path) -> None:
    """On a copy of what is compiled already, where it is: building again takes minutes."""
    if not aio.is_built() or uncompiled_extensions():
        pytest.skip("not all is compiled for this environment")
    shutil.copytree(build_folder("async_io").parent, tmp_path, dirs_exist_ok=True)
    locks = [tmp_path / name / "lock" for name in ("async_io", "cpu_adam")]
    for lock in locks:
        lock.parent.mkdir(exist_ok=True)
        lock.touch()
    code, findings = ask("--build", run=command.run, TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert not any(lock.exists() for lock in locks)
    assert code == 0
    assert [finding["status"] for finding in of(findings, "extensions") + of(findings, "asynchronous I/O")] == [
        "ok",
        "ok",
    ]


def test_another_package_named_apex(tmp_path: Path) -> None:
    """PyPI's ``apex`` is a toolkit for web applications; DeepSpeed and Megatron take it for NVIDIA's."""
    (tmp_path / "apex" / "optimizers").mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").write_text("")
    _, findings = ask(PYTHONPATH=before(tmp_path))
    (apex,) = of(findings, "apex")
    assert apex["status"] == "warning"
    assert apex["cure"] == f"rm -r {tmp_path}/apex"
    (megatron,) = of(findings, "megatron")
    assert megatron["found"] == "PyTorch's kernels alone"


def test_a_version_out_of_range_and_packages_that_do_not_import(tmp_path: Path) -> None:
    for name, version in (("transformers", "4.2.0"), ("apex", "0.9.10.dev0")):
        metadata = tmp_path / f"{name}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for name in ("torch", "transformer_engine", "apex"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise OSError('libcudart.so.99: cannot open shared object')\n")
    code, findings = ask(run=command.run, PYTHONPATH=before(tmp_path))
    assert code == 1
    (transformers, *_) = of(findings, "transformers")
    assert transformers["found"].startswith("4.2.0, ")
    assert transformers["cure"].endswith("-m pip install 'transformers>=5.0'")
    assert "libcudart.so.99" in of(findings, "torch")[1]["found"]
    assert (
        of(findings, "Transformer Engine")[0]["status"] == "error"
        or "libcudart" in of(findings, "Transformer Engine")[0]["found"]
    )
    assert of(findings, "apex")[0]["cure"].endswith("-m pip uninstall apex")
    # What does not need torch is still looked at.
    assert of(findings, "open files")


def test_a_driver_that_lists_gpus_and_a_torch_for_the_cpu(tmp_path: Path) -> None:
    import torch

    if torch.backends.cuda.is_built():
        pytest.skip("this torch is built for CUDA")
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '550.54.15, NVIDIA H100 80GB HBM3'\necho '550.54.15, NVIDIA H100 80GB HBM3'\n")
    program.chmod(0o755)
    code, findings = ask(PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert code == 1
    (gpus,) = of(findings, "GPUs")
    assert gpus["found"].startswith("2 x NVIDIA H100 80GB HBM3, but torch ")
    assert "pip install --force-reinstall" in gpus["cure"]

    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    _, findings = ask(PATH=f"{tmp_path}:{os.environ['PATH']}")
    (gpus,) = of(findings, "GPUs")
    assert gpus["status"] == "warning"
    assert "version mismatch" in gpus["found"]


def test_no_compiler(tmp_path: Path) -> None:
    code, findings = ask(CXX="/nowhere/c++", TORCH_EXTENSIONS_DIR=str(tmp_path))
    (compiler,) = of(findings, "C++ compiler")
    assert "g++" in compiler["cure"]
    assert code == int(compiler["status"] == "error")


SYSTEM = """
import dataclasses, json
from narrowgauge.launcher.doctor.system import check_limits, check_shared_memory
print(json.dumps([dataclasses.asdict(finding) for finding in [*check_shared_memory(), *check_limits()]]))
"""


def ask_in(words: list[str], script: str) -> list[dict[str, Any]]:
    """What is found of the system where a shell, itself started by ``words``, has prepared something."""
    words = [*words, "bash", "-c", f'{script} && exec "$@"', "bash", sys.executable, "-c", SYSTEM]
    result = subprocess.run(  # noqa: S603
        words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert result.stdout, result.stderr
    return json.loads(result.stdout)


def test_small_limits() -> None:
    findings = ask_in([], "ulimit -S -n 200 && ulimit -S -u 3000")
    (files,) = of(findings, "open files")
    assert files["status"] == "warning"
    assert files["found"].startswith("200, ")
    assert files["cure"].startswith("ulimit -n ") or "limits.conf" in files["cure"]
    (processes,) = of(findings, "processes")
    assert processes["status"] == "warning"


def test_memory_that_may_not_be_locked() -> None:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv")
    drop = ["setpriv", "--bounding-set", "-ipc_lock", "--inh-caps", "-ipc_lock"]
    findings = ask_in(drop, "ulimit -l 64 && ulimit -n 200")
    (locked,) = of(findings, "locked memory")
    assert locked["status"] == "warning"
    assert locked["found"].startswith("65,536 bytes")
    assert "memlock unlimited" in locked["cure"]
    # Nor can the shell raise this one, whose hard limit is as low.
    assert "nofile 65536" in of(findings, "open files")[0]["cure"]


def test_little_shared_memory() -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare")
    findings = ask_in(["unshare", "--mount"], "mount -t tmpfs -o size=64m none /dev/shm")
    (shared,) = of(findings, "/dev/shm")  # noqa: S108
    assert shared["status"] == "warning"
    assert "--shm-size" in shared["cure"]


def test_a_hostfile_that_does_not_hold(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("h1 slots=0\n")
    result = forked.run("doctor", "--hostfile", str(path))
    assert result.returncode == 2
    assert "h1: expected at least 1 slot, got 0" in result.stderr


SHIFTED = """
import sys, time
real = time.time
time.time = lambda: real() + {shift}
from narrowgauge.launcher.doctor.node import main
sys.exit(main())
"""


@pytest.mark.parametrize(("shift", "status"), [(0, "ok"), (-5, "warning"), (90, "error")])
def test_a_clock_that_is_off(shift: int, status: str) -> None:
    """The host's side with another clock, in a process of its own."""
    with closing(Peer("h2", [sys.executable, "-c", SHIFTED.format(shift=shift)])) as peer:
        finding = check_clock(peer)
    assert finding.status == status
    assert float(finding.found.split()[0]) == pytest.approx(shift, abs=0.5)


def test_the_quickest_answer_counts() -> None:
    """A slow answer says little: its time may be from the beginning or the end of the wait."""
    delays = iter([0.3, 0.2, 0.0, 0.2, 0.1])

    def answer() -> float:
        told = time.time() + 30
        time.sleep(next(delays))
        return told

    skew = estimate_skew(answer)
    assert skew.seconds == pytest.approx(30, abs=0.05)
    assert skew.bound < 0.05
    assert Skew(0.4, 0.5).at_least == 0
    assert Skew(-3.0, 0.5).at_least == 2.5


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    made = [Peer(name, NODE) for name in ("h1", "h2")]
    yield made
    for peer in made:
        peer.close()


def test_a_transfer_ends_in_time(peers: list[Peer]) -> None:
    first, second = peers
    port = first.ask(do="receive", timeout=60)["port"]
    begin = time.monotonic()
    assert second.ask(do="send", host="127.0.0.1", port=port, timeout=60) == {}
    received = first.answer(60)
    assert time.monotonic() - begin < 10
    assert 0 < received["bytes"] <= 66 << 20
    assert 0 < received["seconds"] < 3
    # The connection is still of use.
    assert "time" in second.ask(do="time", timeout=60)


def test_a_port_that_nobody_listens_on(peers: list[Peer]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        answer = peers[0].ask(do="send", host="127.0.0.1", port=probe.getsockname()[1], timeout=60)
    assert "refused" in answer["problem"]


def test_a_host_that_does_not_answer() -> None:
    with closing(Peer("h2", ["sleep", "60"])) as silent, pytest.raises(PeerError, match="no answer within 1 s"):
        silent.ask(do="time", timeout=1)
    refused = ["sh", "-c", "echo Permission denied >&2; exit 255"]
    with closing(Peer("h2", refused)) as peer, pytest.raises(PeerError, match="Permission denied") as caught:
        peer.ask(do="time", timeout=60)
    assert caught.value.by_ssh


@pytest.mark.parametrize(
    ("count", "first", "slots", "status"),
    [
        (8, 8, 8, "ok"),
        (0, 0, 2, "ok"),
        (7, 8, 8, "error"),
        (7, 8, 4, "warning"),
        (7, 8, None, "error"),
        (0, 8, 1, "error"),
    ],
)
def test_numbers_of_gpus(count: int, first: int, slots: int | None, status: str) -> None:
    versions = {"Python": platform.python_version(), **installed_versions()}
    report, first_report = ({"versions": versions, "num_gpus": number} for number in (count, first))
    same, found = check_report(Host("h2", slots), report, ("h1", first_report))
    assert (same.status, found.status) == ("ok", status)
