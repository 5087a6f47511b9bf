"""Checkpoints of an engine: exact, for any number of ranks and stage, and never half there."""

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import narrowgauge.engine.checkpoint.contents as contents
from narrowgauge.engine.backends.deepspeed.training import DeepSpeedTraining
from narrowgauge.engine.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from narrowgauge.engine.checkpoint.files import checksum, find_checkpoints, verify_files
from narrowgauge.engine.checkpoint.weights import WeightFiles
from narrowgauge.engine.errors import CheckpointError
from tests.support.ranks import RankPool
from tests.support.zero import ds_config, finish, full_weights, make_engine, train_step

SAVED_AFTER, STEPS = 10, 18


def config_of(stage: int, dtype: str, side: str = "columns", **overrides: Any) -> dict[str, Any]:
    extra = {"bf16": {"enabled": True}} if dtype == "bf16" else {}
    return ds_config(stage, params={"side": side, "decay": "all"}, **extra, **overrides)


def save_and_go_on(stage: int, dtype: str, side: str, folder: str, dense: bool = False) -> list[float]:
    config = config_of(stage, dtype, side, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 15}})
    if dense:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    engine = make_engine(config)
    for step in range(SAVED_AFTER):
        train_step(engine, step)
    if dense:
        save_checkpoint(DeepSpeedTraining(engine), Path(folder) / "tag", {"note": 1})
    else:
        engine.save_checkpoint(folder, tag="tag", client_state={"note": 1})
    losses = [train_step(engine, step) for step in range(SAVED_AFTER, STEPS)]
    finish(engine)
    return losses


def load_and_go_on(stage: int, dtype: str, side: str, folder: str, dense: bool = False) -> list[float]:
    config = config_of(stage, dtype, side, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 15}})
    if dense:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    engine = make_engine(config, seed=7)
    train_step(engine, 99)
    if dense:
        client = load_checkpoint(DeepSpeedTraining(engine), Path(folder) / "tag")
    else:
        path, client = engine.load_checkpoint(folder)
        assert path == str(Path(folder) / "tag")
    assert client == {"note": 1}
    assert engine.global_steps == SAVED_AFTER
    losses = [train_step(engine, step) for step in range(SAVED_AFTER, STEPS)]
    finish(engine)
    return losses


@pytest.mark.quick("0-fp32-columns", "2-bf16-rows", "3-bf16-columns")
@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), *((stage, dtype) for stage in (1, 2, 3) for dtype in ("fp32", "bf16"))]
)
def test_resume_is_bit_equal(two_ranks: RankPool, tmp_path: Path, stage: int, dtype: str, side: str) -> None:
    """Into an engine that has already trained on something else, across a later refresh."""
    expected = two_ranks.run(save_and_go_on, stage, dtype, side, str(tmp_path))[0]
    assert two_ranks.run(load_and_go_on, stage, dtype, side, str(tmp_path))[0] == expected


@pytest.mark.quick("1")
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_resume_of_dense_adamw_is_bit_equal(two_ranks: RankPool, tmp_path: Path, stage: int) -> None:
    expected = two_ranks.run(save_and_go_on, stage, "fp32", "columns", str(tmp_path), dense=True)[0]
    assert two_ranks.run(load_and_go_on, stage, "fp32", "columns", str(tmp_path), dense=True)[0] == expected


@pytest.mark.parametrize("side", ["columns", pytest.param("rows", marks=pytest.mark.slow)])
def test_other_numbers_of_ranks_and_other_stages_continue_alike(
    two_ranks: RankPool, one_rank: RankPool, tmp_path: Path, side: str
) -> None:
    """Written by two ranks at one stage, read by one or two at another: the same run but for the order of fp32 sums."""
    for written, read in ((1, 3), (3, 2), (2, 0)):
        folder = tmp_path / f"{written}-{read}"
        expected = two_ranks.run(save_and_go_on, written, "fp32", side, str(folder))[0]
        for pool in (one_rank, two_ranks):
            found = pool.run(load_and_go_on, read, "fp32", side, str(folder))[0]
            assert found == pytest.approx(expected, abs=2e-6)


def train_with_accumulation(steps: int, first: int, last: int, folder: str, load: bool) -> list[float]:
    engine = make_engine(config_of(1, "fp32", gradient_accumulation_steps=steps))
    if load:
        engine.load_checkpoint(folder)
    losses = [train_step(engine, step) for step in range(first, last)]
    assert engine.own_optimizer.num_steps == last
    if not load:
        engine.save_checkpoint(folder, tag="tag")
    finish(engine)
    return losses


@pytest.mark.quick("2")
@pytest.mark.parametrize("steps", [2, 4])
def test_a_run_continues_with_other_accumulation(two_ranks: RankPool, tmp_path: Path, steps: int) -> None:
    """After an odd number of steps the count of micro-batches, once restored as it was, put every later step's end in
    the middle of the next.
    """
    two_ranks.run(train_with_accumulation, 1, 0, 3, str(tmp_path / "a"), load=False)
    found = two_ranks.run(train_with_accumulation, steps, 3, 9, str(tmp_path / "a"), load=True)[0]
    expected = two_ranks.run(train_with_accumulation, 1, 0, 9, str(tmp_path / "b"), load=False)[0][3:]
    assert found == pytest.approx(expected, abs=2e-6)


def load_weights_only(stage: int, folder: str) -> tuple[bool, bool, int]:
    engine = make_engine(config_of(stage, "fp32"), seed=7)
    engine.load_checkpoint(folder, load_module_only=True)
    loaded = full_weights(engine)
    train_step(engine, 0)
    moved = full_weights(engine)
    saved = verify_files(Path(folder) / "tag")
    source = WeightFiles(saved)
    same = all(torch.equal(source.read(name), value) for name, value in loaded.items())
    # Moments start again and the compact masters were taken from the weights: a step moves on from there.
    close = all(float((moved[n] - loaded[n]).abs().max()) < 0.05 for n in loaded)
    steps = engine.own_optimizer.num_steps
    assert saved.state["counters"]["global_steps"] == SAVED_AFTER
    finish(engine)
    return same, close, steps


@pytest.mark.quick("3")
@pytest.mark.parametrize("stage", [1, 3])
def test_weights_alone_can_be_loaded(two_ranks: RankPool, tmp_path: Path, stage: int) -> None:
    two_ranks.run(save_and_go_on, 1, "fp32", "columns", str(tmp_path))
    for same, close, steps in two_ranks.run(load_weights_only, stage, str(tmp_path)):
        assert same
        assert close
        assert steps == 1


def consolidated(stage: int) -> tuple[bool, bool]:
    """DeepSpeed's own consolidation, through the engine, against the weights."""
    engine = make_engine(config_of(stage, "fp32", zero={"stage3_gather_16bit_weights_on_model_save": True}))
    for step in range(3):
        train_step(engine, step)
    state = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else engine.module_state_dict()
    expected = full_weights(engine)
    finish(engine)
    if dist.get_rank() > 0:
        return True, True
    return set(state) == set(expected), all(torch.equal(state[name].cpu(), expected[name]) for name in expected)


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeeds_state_dicts_are_plain_and_folded(two_ranks: RankPool, stage: int) -> None:
    for names, values in two_ranks.run(consolidated, stage):
        assert names
        assert values


def try_to_load(folder: str, stage: int, dtype: str = "fp32", **params: Any) -> str:
    engine = make_engine(ds_config(stage, params=params))
    train_step(engine, 0)
    before = full_weights(engine)
    try:
        engine.load_checkpoint(folder, tag="tag")
        message = "loaded"
    except CheckpointError as error:
        message = str(error)
    after = full_weights(engine)
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    finish(engine)
    return message if unchanged else "CHANGED: " + message


@pytest.fixture(scope="module")
def saved(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    two_ranks.run(save_and_go_on, 1, "fp32", "columns", str(folder))
    return folder


def damage(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.safetensors", "flip", "model.safetensors: damaged"),
        ("optimizer-00001-of-00002.safetensors", "flip", "optimizer-00001-of-00002.safetensors: damaged"),
        ("optimizer-00000-of-00002.safetensors", "cut", "damaged"),
        ("subspace.safetensors", "remove", "subspace.safetensors"),
        ("state.json", "flip", "state.json"),
        ("manifest.json", "remove", "not a whole checkpoint"),
    ],
)
def test_damage_is_named_and_nothing_is_loaded(
    two_ranks: RankPool, saved: Path, tmp_path: Path, name: str, change: str, message: str
) -> None:
    """safetensors would load a flipped byte silently; with two ranks each checks its share, and both refuse."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tag" / name
    if change == "flip":
        damage(path, path.stat().st_size - 3)
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    for found in two_ranks.run(try_to_load, str(tmp_path), 1, density=0.3, decay="all"):
        assert message in found
        assert not found.startswith("CHANGED")


def test_another_configuration_is_named_and_nothing_is_loaded(two_ranks: RankPool, saved: Path) -> None:
    for params, message in (
        ({"density": 0.5}, "it holds blocks.0.down.compact of shape"),
        ({"target_modules": ["*.q"]}, "parameters differ"),
        ({"side": "rows"}, "compact of shape"),
        ({"param_groups": []}, "expected 2 parameter groups, got 3"),
    ):
        for found in two_ranks.run(try_to_load, str(saved), 1, **params):
            assert message in found
            assert not found.startswith("CHANGED")


def save_on_a_full_disk(folder: str, full_on: int) -> tuple[str, list[str], list[float]]:
    """The disk of one rank runs full while it writes: all ranks get the same error and the checkpoint before is
    untouched.
    """
    engine = make_engine(config_of(1, "fp32"))
    train_step(engine, 0)
    engine.save_checkpoint(folder, tag="first")
    original = contents.save_file

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    # The weights are written first, by rank 0.
    if dist.get_rank() == full_on:
        contents.save_file = full
    try:
        engine.save_checkpoint(folder, tag="second")
        message = "saved"
    except CheckpointError as error:
        message = str(error)
    finally:
        contents.save_file = original
    dist.barrier()
    names = sorted(path.name for path in Path(folder).iterdir())
    losses = [train_step(engine, step) for step in range(1, 3)]
    engine.save_checkpoint(folder, tag="third")
    finish(engine)
    return message, names, losses


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_fails_all_and_leaves_no_checkpoint(
    two_ranks: RankPool, tmp_path: Path, rank: int
) -> None:
    for message, names, _ in two_ranks.run(save_on_a_full_disk, str(tmp_path), rank):
        name = "part-0" if rank == 0 else "optimizer-00001-of-00002.safetensors"
        path = tmp_path / "second.tmp" / name
        assert f"process rank {rank}: {path}: cannot be written: [Errno 28] No space left on device" in message
        assert names == ["first", "latest"]
    assert (tmp_path / "latest").read_text() == "third"
    verify_files(tmp_path / "first")
    verify_files(tmp_path / "third")


def test_damaged_checkpoints_are_found_too(tmp_path: Path) -> None:
    """A run none of whose checkpoints had a manifest any more once started over without a word. ``.old`` counts where a
    machine stopped between the two renames of a checkpoint that was replaced.
    """
    for name in ("step-3", "step-20", "step-7.tmp", "step-9", "xstep-4", "step-5x", "step-9.old", "step-8.old"):
        (tmp_path / name).mkdir()
    found = [(step, path.name) for step, path in find_checkpoints(tmp_path)]
    assert found == [(3, "step-3"), (8, "step-8.old"), (9, "step-9"), (20, "step-20")]
    assert find_checkpoints(tmp_path / "missing") == []


def as_before_digests(folder: Path) -> dict[str, Any]:
    """Turn a checkpoint into one of format 1, as they were written first; returns its manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    older = {"format": 1, "files": manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(older))
    return older


def test_a_checkpoint_of_the_first_format_still_loads(two_ranks: RankPool, tmp_path: Path) -> None:
    expected = two_ranks.run(save_and_go_on, 1, "fp32", "columns", str(tmp_path))[0]
    as_before_digests(tmp_path / "tag")
    assert two_ranks.run(load_and_go_on, 1, "fp32", "columns", str(tmp_path))[0] == expected


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "name", ["optimizer-00001-of-00002.safetensors", "model.safetensors", "subspace.safetensors", "state.json"]
)
def test_a_manifest_that_lacks_a_file_is_damaged(saved: Path, tmp_path: Path, version: int, name: str) -> None:
    """Without its entry, a file's flipped byte was loaded: what the manifest did not list was read unchecked."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "tag"
    manifest = as_before_digests(folder) if version == 1 else json.loads((folder / "manifest.json").read_text())
    verify_files(folder)
    del manifest["files"][name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=rf"damaged: it lacks {name}" if version == 1 else "its digest is not"):
        verify_files(folder)


def test_files_that_the_manifest_does_not_list_are_not_read(two_ranks: RankPool, tmp_path: Path) -> None:
    """All ``optimizer-*`` and ``model*`` in the folder were: another run's masters took the place of its own."""
    expected = two_ranks.run(save_and_go_on, 1, "fp32", "columns", str(tmp_path))[0]
    for name in ("optimizer-00007-of-00008.safetensors", "model-00001-of-00002.safetensors"):
        (tmp_path / "tag" / name).write_bytes(b"not safetensors")
    assert two_ranks.run(load_and_go_on, 1, "fp32", "columns", str(tmp_path))[0] == expected


def test_a_checkpoint_that_was_being_replaced_is_loaded(two_ranks: RankPool, tmp_path: Path) -> None:
    """The machine stopped between the renames: only ``tag.old`` was left of the tag that ``latest`` names."""
    expected = two_ranks.run(save_and_go_on, 1, "fp32", "columns", str(tmp_path))[0]
    (tmp_path / "tag").rename(tmp_path / "tag.old")
    found = two_ranks.run(load_and_go_on, 1, "fp32", "columns", str(tmp_path))[0]
    assert found == expected


def save_what_is_not_finite(folder: str, where: str) -> str:
    """A master, a moment or a frozen weight of rank 1's share becomes NaN or infinite before the second save."""
    engine = make_engine(config_of(1, "fp32"))
    train_step(engine, 0)
    engine.save_checkpoint(folder, tag="first")
    shard = DeepSpeedTraining(engine).shards()[0]
    if where == "master" and dist.get_rank() == 1:
        shard.flat.data[-1] = float("nan")
    elif where == "moment" and dist.get_rank() == 1:
        engine.own_optimizer.dense_state(shard.flat)["exp_avg"][-1] = float("inf")
    elif where == "weight":
        engine.module.blocks[0].q.weight.data[0, 0] = float("nan")
    try:
        engine.save_checkpoint(folder, tag="second")
        message = "saved"
    except CheckpointError as error:
        message = str(error)
    finish(engine)
    return message


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("master", r"process rank 1: \S+ \(master\): expected finite numbers, got 1 of"),
        ("moment", r"process rank 1: \S+ \(exp_avg\): expected finite numbers, got 1 of"),
        ("weight", r"process rank 0: blocks\.0\.q\.weight: expected finite numbers, got 1 of"),
    ],
)
def test_what_is_not_finite_is_not_saved(two_ranks: RankPool, tmp_path: Path, where: str, message: str) -> None:
    """A step whose loss was finite and whose update was not was saved, and took the place of the last good one."""
    for found in two_ranks.run(save_what_is_not_finite, str(tmp_path), where):
        assert re.search(message, found), found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "latest"]


def save_what_has_no_form(folder: str) -> str:
    engine = make_engine(config_of(1, "fp32"))
    with pytest.raises(CheckpointError) as caught:
        engine.save_checkpoint(folder, tag="first", client_state={"mask": {"of 3": torch.eye(3).to_sparse()}})
    finish(engine)
    return str(caught.value)


def test_a_value_that_cannot_be_stored_is_named_before_anything_is_written(one_rank: RankPool, tmp_path: Path) -> None:
    """A sparse tensor was an error of torch's after all weights had been written, which named no key. Here no folder
    could be made.
    """
    file = tmp_path / "file"
    file.touch()
    assert one_rank.run(save_what_has_no_form, str(file)) == [
        "checkpoint save failed; process rank 0: client_state.mask.of 3: expected a dense tensor of numbers, got one of"
        " the layout torch.sparse_coo"
    ]


def test_what_was_saved_not_finite_is_not_loaded(saved: Path, tmp_path: Path) -> None:
    """Checkpoints of the first format may hold NaN; the run would go on from them into NaN."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    folder, name = tmp_path / "tag", "optimizer-00001-of-00002.safetensors"
    tensors = load_file(folder / name)
    key = next(key for key in tensors if key.endswith("|master"))
    tensors[key][0] = float("nan")
    save_file(tensors, folder / name)
    manifest = as_before_digests(folder)
    manifest["files"][name] = checksum(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="expected finite numbers, got 1 of"):
        verify_files(folder)


def test_all_files_of_a_checkpoint_have_the_mode_of_new_files(saved: Path) -> None:
    """safetensors made its files readable to their owner only, JSON beside them was readable to the group."""
    modes = {path.name: oct(path.stat().st_mode) for path in (saved / "tag").iterdir()}
    assert len(modes) == 6
    assert set(modes.values()) == {oct((saved / "latest").stat().st_mode)}


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "3", "{}", '{"format": 2, "files": 3}', '{"format": 1, "files": []}']
)
def test_an_odd_manifest_is_damaged(tmp_path: Path, content: str) -> None:
    """Deep nesting ended with a traceback."""
    (tmp_path / "manifest.json").write_text(content)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"damaged|not a whole checkpoint|expected format"):
        verify_files(tmp_path)
