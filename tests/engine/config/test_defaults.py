"""What a run's ``config.json`` says of keys that the file leaves out is what DeepSpeed does without them."""

from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig

from narrowgauge.engine.backends.deepspeed.keys import DeepSpeedKeys

BLOCKS = ("activation_checkpointing", "flops_profiler", "aio", "pipeline", "data_types", "torch_autocast", "checkpoint")


def settings_of(block: Any) -> dict[str, Any]:
    return block if isinstance(block, dict) else vars(block)


def test_defaults_are_deepspeeds() -> None:
    """``gradient_clipping`` was recorded as 0 where DeepSpeed clips at 1, ``keep_in_fp32_modules`` as null."""
    theirs: Any = DeepSpeedConfig({"train_batch_size": 1})
    ours: Any = DeepSpeedKeys.model_validate({block: {} for block in BLOCKS})
    assert vars(ours.activation_checkpointing) == settings_of(theirs.activation_checkpointing_config)
    assert vars(ours.flops_profiler) == settings_of(theirs.flops_profiler_config)
    assert vars(ours.aio) == settings_of(theirs.aio_config)
    assert {k: v for k, v in vars(ours.pipeline).items() if k != "use_reentrant"} == settings_of(theirs.pipeline)
    assert vars(ours.data_types) == {name: getattr(theirs, name) for name in vars(ours.data_types)}
    assert ours.torch_autocast.enabled == theirs.torch_autocast_enabled
    assert ours.torch_autocast.lower_precision_safe_modules == theirs.torch_autocast_lower_precision_safe_modules
    assert ours.checkpoint.load_universal == theirs.load_universal_checkpoint
    assert ours.checkpoint.use_node_local_storage == theirs.use_node_local_storage
    assert (ours.checkpoint.tag_validation == "Warn") == theirs.checkpoint_tag_validation_enabled
    assert not theirs.checkpoint_tag_validation_fail


def test_every_single_key_has_deepspeeds_default() -> None:
    theirs = vars(DeepSpeedConfig({"train_batch_size": 1}))
    fields = DeepSpeedKeys.model_fields
    shared = {name: fields[name].default for name in theirs.keys() & fields.keys() if name not in BLOCKS}
    derived = {  # None says nothing: DeepSpeed or initialize derives the value
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "seq_parallel_communication_data_type",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "hybrid_engine",
    }
    assert len(shared) > 15
    assert {name: theirs[name] for name in shared if name not in derived} == {
        name: value for name, value in shared.items() if name not in derived
    }
