"""``narrowgauge plan``: a configuration's memory, traffic, time and cost, without a GPU."""

import json
import re
from pathlib import Path

import pytest

from tests.launcher.conftest import Call

SEVEN = "8gpu/llama-7b-pretrain"


def test_seven_billion_on_eight_gpus(call: Call) -> None:
    """Weights of 6,738 million parameters in bf16, their eighths once more, and activations as in docs/8gpu.md."""
    result = call("plan", SEVEN, "--price", "2", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    (rank,) = found["ranks"]
    kinds = rank["peak"]["by_kind"]
    assert rank["parameters"] == {"total": 6738415616, "dense": 262410240, "compact": 809500672, "frozen": 6476005376}
    assert kinds["weights"] == pytest.approx(2 * 6738415616, rel=1e-6)
    assert kinds["compact"] == 2 * 809500672
    # Masters and moments of what is trained, an eighth on each process rank.
    assert kinds["masters"] == pytest.approx(4 * (262410240 + 809500672) / 8, rel=1e-6)
    assert kinds["moments"] == pytest.approx(8 * (262410240 + 809500672) / 8, rel=1e-6)
    assert kinds["activations"] / 2**30 == pytest.approx(20.8, abs=0.1)
    # Eight micro-batches, each all-reduced; one gather, and one of the compact values at every 200th step.
    trained = 2 * (262410240 + 809500672)
    assert rank["sent"]["reduced"] == pytest.approx(2 * 8 * 7 / 8 * trained, rel=1e-6)
    assert rank["sent"]["gathered"] == pytest.approx(7 / 8 * (trained + 2 * 809500672 / 200), rel=1e-6)
    # Twice 2 x parameters x tokens forward (recomputed), and as much once for the inputs' gradients, at least.
    tokens = 1024 * 2048
    least = 3 * 2 * 6.6e9 * tokens / 8 / (0.6 * 989e12)
    assert least < found["seconds"]["products"] < 1.6 * least
    assert found["fits"]


def test_tables_for_people(call: Call) -> None:
    result = call("plan", SEVEN, "--price", "2", "--nodes", "2", "--link", "100gbit")
    assert result.returncode == 0, result.stderr
    for text in ("a GPU has", "saved for backward", "out of a node", "tokens/s", "GPU-hours", "at 2 an hour"):
        assert text in result.stdout
    assert "stated, not measured: collectives at 80% of 450 GB/s in a node and of 12.5 GB/s between nodes" in " ".join(
        result.stdout.split()
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h100-08"], "--gpu: expected one of b200-180, "),
        (["--gpu", "h100-08"], "got 'h100-08'; did you mean 'h100-80'?"),
        (["--price", "inf"], "--price: expected a finite number of at least 0, got inf"),
        (["--price", "nan"], "--price: expected a finite number of at least 0, got nan"),
        (["--price", "-1"], "--price: expected a finite number of at least 0, got -1.0"),
        (["--link", "9" * 400 + "GB/s"], "--link: expected a speed such as 400gbit"),
        (["--link", "fast"], "--link: expected a speed such as 400gbit or 6GB/s, got 'fast'"),
        (["--gpus", "7"], "train_batch_size: expected train_micro_batch_size_per_gpu (16) x"),
        (["--gpu", "rtx3090-24"], "expected at most 21.0 GiB a process rank on rtx3090-24, got 3"),
        (["--fit", "quickest"], "--fit: expected fastest or largest, got 'quickest'"),
        (["--out", "a.json"], "--out: expected --fit with it"),
        (["--set", "zero_optimisation.stage=1"], "zero_optimisation: unknown key; did you mean 'zero_optimization'?"),
    ],
)
def test_what_cannot_be(call: Call, words: list[str], message: str) -> None:
    result = call("plan", SEVEN, *words)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("error: ") == 1


@pytest.mark.slow
def test_it_writes_what_fits(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "fit.json"
    words = ["plan", SEVEN, "--gpu", "a100-40", "--fit", "fastest", "--out", str(out)]
    result = call(*words)
    assert result.returncode == 0, result.stderr
    again = call("plan", str(out), "--gpu", "a100-40", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["fits"]
    assert "expected a file that is not there yet" in call(*words).stderr


def test_the_life_of_the_drives(call: Call) -> None:
    """Eight micro-batches of each of eight GPUs, all that layers save."""
    block = '{"path": "/tmp", "keep_resident": 0.0, "rated_tbw": 600}'
    result = call("plan", SEVEN, "--set", f"activation_offload={block}")
    assert result.returncode == 0, result.stderr
    words = " ".join(result.stdout.split())
    (on_drive,) = re.findall(r"of it on the drive │ ([\d,.]+)", words)
    ((written, daily, years),) = re.findall(
        r"drives of a node: ([\d,.]+) GB written per step, ([\d,.]+) TB a day; ([\d.]+) years of 600 TB", words
    )
    written, daily, years = (float(text.replace(",", "")) for text in (written, daily, years))
    assert written == pytest.approx(8 * 8 * float(on_drive.replace(",", "")) * 2**20 / 1e9, rel=0.01)
    assert years == pytest.approx(600 / daily / 365.25, abs=0.06)
    seconds = float(re.findall(r"│ all │ ([\d.,]+) │ [\d,]+ tokens/s", words)[0].replace(",", ""))
    assert daily == pytest.approx(written / seconds * 86400 / 1e3, rel=0.02)


def test_a_run_of_less_than_a_day_tells_what_it_writes_in_all(call: Call) -> None:
    """It told of 0.0 GB a step in 0.000 s, and of 240 TB a day."""
    result = call("plan", "quickstart", "--gpus", "2", "--set", "activation_offload.rated_tbw=600")
    assert result.returncode == 0, result.stderr
    words = " ".join(result.stdout.split())
    found = re.search(r"([\d.]+) GB written per step, ([\d.]+) GB in the run, ([\d.]+)% of 600 TB", words)
    assert found is not None, words
    per_step, total, share = map(float, found.groups())
    # Two digits of each.
    assert total == pytest.approx(150 * per_step, rel=0.1)
    assert share == pytest.approx(total / 6000, rel=0.1)
    assert not re.search(r"[ ~]0\.0+ (s|GB|days|GPU-hours)", words)
