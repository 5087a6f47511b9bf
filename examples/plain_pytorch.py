"""A loop in plain PyTorch: Grass trains 1/8 of each matrix's columns, what forward saves goes to an SSD.

The run is saved in the middle and resumed in a new model and optimizer; both ends have the same losses.

    python examples/plain_pytorch.py [FOLDER ON THE SSD]
"""

import sys
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from narrowgauge.offload import ActivationOffload
from narrowgauge.optimizers import Grass

STEPS, SAVED_AFTER = 12, 6
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build() -> tuple[LlamaForCausalLM, Grass]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4
    )
    with device:
        model = LlamaForCausalLM(config)
    # Embeddings and head learn at lr, the matrices of the blocks at a fifth of it.
    return model, Grass(model, lr=5e-3, matrix_lr_scale=0.2, density=0.125, refresh_interval=4)


def batch(step: int) -> torch.Tensor:
    """Sequences that count upwards, so that there is something to learn; ``(8, 64)`` tokens."""
    start = torch.randint(256, (8, 1), generator=torch.Generator().manual_seed(step))
    return ((start + torch.arange(64)) % 256).to(device)


def train(model: LlamaForCausalLM, optimizer: Grass, steps: range, offload: ActivationOffload) -> list[float]:
    losses = []
    for step in steps:
        tokens = batch(step)
        with offload:
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.gettempdir()
with_offload = ActivationOffload(folder, keep_resident=0.0, min_tensor_bytes=16384)
model, optimizer = build()
losses = train(model, optimizer, range(SAVED_AFTER), with_offload)
with tempfile.TemporaryDirectory() as saved:
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{saved}/state.pt")
    losses += train(model, optimizer, range(SAVED_AFTER, STEPS), with_offload)

    model, optimizer = build()
    # The optimizer's state holds which columns are trained, their values and moments.
    state = torch.load(f"{saved}/state.pt", weights_only=True)
model.load_state_dict(state["model"])
optimizer.load_state_dict(state["optimizer"])
resumed = train(model, optimizer, range(SAVED_AFTER, STEPS), with_offload)

stats = with_offload.stats()
with_offload.close()
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, resumed {resumed[-1]:.3f}")
share = stats.resident_peak / stats.saved_peak
print(f"{stats.written:,} bytes written, {share:.0%} of the saved ones in memory at the peak")
assert resumed == losses[SAVED_AFTER:]
assert losses[-1] < losses[0]
