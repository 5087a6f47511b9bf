"""``training.profile``: a trace with our phases by name, the same training, nothing outside of the steps."""

import gzip
import json
from collections import Counter
from pathlib import Path

from tests.launcher.conftest import Call
from tests.launcher.conftest import call as call
from tests.support import forked
from tests.support.command import losses, records, tiny_config

SHORT = {"steps": 6, "lr_schedule": {"type": "constant"}}


def test_a_trace_names_the_phases_of_the_steps_it_is_of(corpus: Path, tmp_path: Path) -> None:
    """Refresh is due after step 5; two micro-batches a step."""
    folders = [tmp_path / name for name in ("profiled", "plain")]
    for folder, block in zip(folders, ({"profile": {"steps": [4, 5]}}, {}), strict=True):
        folder.mkdir()
        config = tiny_config(
            corpus,
            folder,
            engine="ddp",
            zero_optimization={"stage": 0},
            training={**SHORT, **block},
            activation_offload={"path": str(tmp_path), "min_tensor_bytes": 1024, "keep_resident": 0.0},
        )
        done = forked.run("train", str(config), ranks=2)
        assert done.returncode == 0, done.stderr
    assert losses(folders[0] / "run") == losses(folders[1] / "run")
    assert not (folders[1] / "run" / "profile").exists()
    for rank in range(2):
        path = folders[0] / "run" / "profile" / f"trace-rank-{rank}.json.gz"
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names = Counter(
            event["name"].removeprefix("narrowgauge::")
            for event in events
            if "narrowgauge::" in event.get("name", "") and event.get("cat") == "user_annotation"
        )
        assert {name: names[name] for name in ("forward", "backward", "step", "fold", "refresh")} == {
            "forward": 4,
            "backward": 4,
            "step": 2,
            "fold": 2,
            "refresh": 1,
        }
        assert names["training step 4"] == names["training step 5"] == 1
        assert names["reduce"] >= 2
        assert names["offload, save"] >= names["offload, take back"] >= 4
    # What a record says of speed and memory is there as well.
    for record in records(folders[1] / "run"):
        if "loss" in record:
            assert 0.0 < record["mfu"] < 1.5
            assert 0 < record["memory"]["now"] <= record["memory"]["peak"]
    summary = json.loads((folders[1] / "run" / "summary.json").read_text())
    needed = summary["mfu"]["flops_per_token"] * summary["tokens_per_second"] / (2 * summary["mfu"]["peak_flops"])
    assert 0.5 * needed < summary["mfu"]["median"] < 2 * needed
    sizes = summary["bytes"]
    assert sizes["saved_activations_resident_median"] <= sizes["saved_activations_peak_resident"]


def test_steps_that_are_not_of_the_run_are_refused(call: Call, corpus: Path, tmp_path: Path) -> None:
    config = str(tiny_config(corpus, tmp_path, engine="ddp", zero_optimization={"stage": 0}, training=SHORT))
    for steps, message in (
        ("[4, 7]", "training.profile.steps: expected steps of the run, 1 to 6, got [4, 7]"),
        ("[4, 3]", "training.profile.steps: expected the first step and the last, such as [10, 12], got [4, 3]"),
        ("[4]", "training.profile.steps: list should have at least 2 items"),
    ):
        for words in (["train", config], ["train", config, "--validate"]):
            done = call(*words, "--set", f"training.profile.steps={steps}")
            assert (done.returncode, message in done.stderr) == (2, True), done.stderr
