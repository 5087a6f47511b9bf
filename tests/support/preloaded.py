"""What the server of :mod:`tests.support.forked` imports and loads before it forks; nothing here starts a thread."""

import gc
import warnings

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (every engine's start imports it)
import lightning.pytorch  # noqa: F401
import torch
import transformers.models.mixtral.modeling_mixtral  # noqa: F401
import trl.trainer.sft_trainer  # noqa: F401
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

import narrowgauge.engine.backends.ddp.training
import narrowgauge.engine.backends.deepspeed.build
import narrowgauge.engine.backends.deepspeed.construct
import narrowgauge.engine.run.export
import narrowgauge.engine.run.train
import narrowgauge.launcher.main
from narrowgauge.engine.backends.deepspeed.extensions import ensure_extensions
from narrowgauge.engine.run.model_keys import keys_of
from narrowgauge.optimizers.layers.unfit import unfit_layers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import narrowgauge.engine.backends.megatron.build
    import narrowgauge.engine.backends.megatron.construct
    import narrowgauge.engine.backends.megatron.zero.build  # noqa: F401

# Else each fork would, and DeepSpeed without our lock: it waits forever where a rank that did was killed.
ensure_extensions()

# What is read from the sources of a model type once in a process.
keys_of(LlamaConfig)
with torch.device("meta"):
    model = LlamaModel(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
unfit_layers(model, dict(model.named_modules()))
del model

# What stays anyway is not looked through again by each collection in each fork, 0.3 s every time.
gc.collect()
gc.freeze()
