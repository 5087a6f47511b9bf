"""Which models can be given several examples in one sequence.

Their masks must follow the positions that are given with the tokens, in every layer: transformers builds them so where
a model hands its positions on, which each of these does (compared with the examples one by one, for each attention).
"""

from transformers import PretrainedConfig

from ..config.run_blocks import DataBlock
from ..errors import UserError

FAMILIES = frozenset(("gemma2", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3"))
# Kernels without a mask see where examples begin only in batches of one.
_ATTENTION = (None, "sdpa", "eager")


def check_packing(block: DataBlock, model: PretrainedConfig) -> None:
    """Refuse ``data.packing`` where the examples of a sample would see each other.

    Raises:
        UserError: naming the model type or the attention.
    """
    if not block.packing:
        return
    if model.model_type not in FAMILIES:
        raise UserError(
            f"data.packing: expected false with a {model.model_type}, got true: its layers would mix the examples of a"
            f" sample; it works with {', '.join(sorted(FAMILIES))}"
        )
    attention = getattr(model, "_attn_implementation", None)
    if attention not in _ATTENTION:
        raise UserError(f"data.packing: expected the attention 'sdpa' or 'eager' with it, got {attention!r}")
