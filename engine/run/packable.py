"""Which models can be given several examples in one sequence.

Their masks must follow the positions that are given with the tokens, in every layer: transformers builds them so where
a model hands its positions on, which each of these does (compared with the examples one by one, for each attention).
"""

from transformers import PretrainedConfig

from ..config.run_blocks import DataBlock
from ..errors import UserError

_NAMES = (
    "apertus arcee bitnet cohere cohere2 cwm deepseek_v2 deepseek_v3 ernie4_5 ernie4_5_moe exaone4 flex_olmo "
    "gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox gptj granite granitemoe "
    "granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe llama minimax_m2 ministral ministral3 mistral "
    "mixtral nemotron olmo olmo2 olmo3 olmoe persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe "
    "seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma"
)
FAMILIES = frozenset(_NAMES.split())
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
            f" sample; it works with llama, qwen3, mistral, gemma2, gpt2 and {len(FAMILIES) - 5} others (docs/data.md)"
        )
    attention = getattr(model, "_attn_implementation", None)
    if attention not in _ATTENTION:
        raise UserError(f"data.packing: expected the attention 'sdpa' or 'eager' with it, got {attention!r}")
