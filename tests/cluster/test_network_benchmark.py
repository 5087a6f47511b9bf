"""The network benchmark at small size: its bytes, its prediction and its files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.network_report import bits_per_second, predict
from benchmarks.results_file import Row
from tests.cluster.network import missing
from tests.support.command import ROOT, environment


def counted(row: Row) -> float:
    """Bytes that the collectives of a step amount to."""
    return 1e6 * row["sent_mb"] / (1 + row["above_sizes_percent"] / 100)


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_bytes_are_those_of_the_collectives_and_the_rate_shows(tmp_path: Path) -> None:
    size = {"hidden": 128, "intermediate": 344, "layers": 2, "vocab": 2048, "length": 64}
    words = [word for key, value in size.items() for word in (f"--{key}", str(value))]
    plot = tmp_path / "plot.png"
    words += ["--hosts", "2", "--rates", "20mbit", "--rounds", "2", "--cores-per-host", "0.5"]
    words += ["--out", str(tmp_path), "--plot", str(plot)]
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "benchmarks.network", *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert plot.stat().st_size > 5000
    rows = predict(json.loads((tmp_path / "hosts-2.json").read_text()), "unlimited")
    limited = {row["method"]: row for row in rows if row["rate"] == "20mbit"}
    for row in limited.values():
        assert 0.0 <= row["above_sizes_percent"] < 5.0
        # Less than the bytes over the rate is not possible, but for what the bucket lets through at once.
        assert row["seconds"] > 0.8 * (8 * counted(row) - 8e6) / bits_per_second("20mbit")
    dense, grass = limited["dense AdamW, ZeRO-2"], limited["Grass, ZeRO-1"]
    assert counted(grass) < 0.6 * counted(dense)
    assert grass["ratio"] < 0.9


@pytest.mark.parametrize(("rate", "bits"), [("100mbit", 1e8), ("1gbit", 1e9), ("2.5gbit", 2.5e9), ("64kbit", 64e3)])
def test_rates(rate: str, bits: float) -> None:
    assert bits_per_second(rate) == bits


def test_a_rate_that_is_none() -> None:
    with pytest.raises(ValueError, match="expected a rate such as 100mbit or 10gbit, got 'fast'"):
        bits_per_second("fast")
