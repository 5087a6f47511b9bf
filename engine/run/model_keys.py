"""The keys that a model type of transformers takes in its configuration, as released files have them."""

import importlib
import inspect
import re
import sys
from functools import cache

from transformers import GenerationConfig, PretrainedConfig

_READ_FROM_KWARGS = re.compile(r"kwargs\.(?:pop|get)\(\s*[\"'](\w+)[\"']")
_READ_BY_MODEL = re.compile(r"\bconfig\.(\w+)|getattr\((?:self\.)?config, \"(\w+)\"")
# Read only where there are rotary embeddings.
_ROTARY = {"rope_scaling", "rope_theta", "partial_rotary_factor"}
ROPE_KEYS = frozenset(
    {
        *("alpha", "attention_factor", "beta_fast", "beta_slow", "factor", "finetuned", "high_freq_factor"),
        *("long_factor", "low_freq_factor", "mrope_interleaved", "mrope_section", "mscale", "mscale_all_dim"),
        *("original_max_position_embeddings", "partial_rotary_factor", "rope_theta", "rope_type", "short_factor"),
        *("truncate", "type"),
    }
)
# In released files, and read by no version of transformers that is supported: notes, and names of what later ones take
# from elsewhere.
_NOTES = {
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",
    "is_encoder_decoder",
    "model_type",
    "pretraining_tp",
    "task_specific_params",
    "tie_encoder_decoder",
    "torchscript",
    "transformers_version",
    "use_bfloat16",
    "use_cache",
}


@cache
def keys_of(kind: type[PretrainedConfig]) -> frozenset[str]:
    """What ``from_dict`` of this configuration reads, and what its model reads of it."""
    known = kind()
    keys = {*known.to_dict(), *known.attribute_map, *inspect.signature(kind.__init__).parameters, *_NOTES}
    keys |= GenerationConfig().to_dict().keys()
    for base in kind.__mro__[:-1]:
        keys |= set(_READ_FROM_KWARGS.findall(_source(base)))
    if not hasattr(known, "rope_parameters"):
        keys -= _ROTARY - known.to_dict().keys()
    if "n_positions" in keys:
        # The same number under a second name.
        keys.add("n_ctx")
    of_class = set(dir(PretrainedConfig))
    for found in _READ_BY_MODEL.findall(_source(_modeling(kind))):
        keys |= {name for name in found if name and name not in of_class}
    return frozenset(keys - {"self", "args", "kwargs", "kwargs_unused"})


def _modeling(kind: type[PretrainedConfig]) -> object:
    name = kind.__module__.replace(".configuration_", ".modeling_")
    try:
        return importlib.import_module(name)
    except ImportError:
        return sys.modules[kind.__module__]


def _source(part: object) -> str:
    try:
        return inspect.getsource(part)  # pyright: ignore[reportArgumentType]
    except (OSError, TypeError):
        return ""
