"""What the server of :mod:`tests.support.forked` imports and loads before it forks; nothing here starts a thread."""

import gc
import warnings

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (every engine's start imports it)
import lightning.pytorch  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
import trl.trainer.sft_trainer  # noqa: F401

import narrowgauge.engine.backends.ddp.training
import narrowgauge.engine.backends.deepspeed.build
import narrowgauge.engine.backends.deepspeed.construct
import narrowgauge.engine.run.export
import narrowgauge.engine.run.train
import narrowgauge.launcher.main
from narrowgauge.engine.backends.deepspeed.extensions import ensure_extensions

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import narrowgauge.engine.backends.megatron.build
    import narrowgauge.engine.backends.megatron.construct  # noqa: F401

# Else each fork would, and DeepSpeed without our lock: it waits forever where a rank that did was killed.
ensure_extensions()

# What stays anyway is not looked through again by each collection in each fork, 0.3 s every time.
gc.collect()
gc.freeze()
