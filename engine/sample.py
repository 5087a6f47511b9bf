"""A continuation of a prompt by the trained model."""

from typing import Any

import torch
import torch.distributed as dist

from .data.tokenizer import load_tokenizer


@torch.no_grad()
def sample_text(engine: Any, tokenizer_folder: Any, prompt: str, num_tokens: int, seed: int) -> str | None:
    """Generate with temperature 0.8; returns the text on process rank 0. Collective under ZeRO-3, where every rank
    takes part.
    """
    together = engine.zero_optimization_stage() == 3
    if dist.get_rank() > 0 and not together:
        return None
    tokenizer = load_tokenizer(tokenizer_folder)
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(engine.device)
    torch.manual_seed(seed)
    engine.eval()
    generated = engine.module.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=num_tokens,
        do_sample=True,
        temperature=0.8,
        use_cache=True,
        synced_gpus=together,
        pad_token_id=tokenizer.eos_token_id,
    )
    engine.train()
    return tokenizer.decode(generated[0], skip_special_tokens=True) if dist.get_rank() == 0 else None
