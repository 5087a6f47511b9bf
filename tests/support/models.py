"""Small models whose arithmetic stays in one dtype throughout, so that fp64 parity is meaningful."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Block(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        # A key's bias has no gradient but rounding noise, which Adam would blow up: it would spoil the comparison.
        self.q, self.k, self.v = (nn.Linear(width, width, bias=bias and name != "k") for name in "qkv")
        self.out = nn.Linear(width, width, bias=bias)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        q, k, v = self.q(normed), self.k(normed), self.v(normed)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out(weights @ v)
        return x + self.down(F.silu(self.up(self.norm2(x))))


class TinyTransformer(nn.Module):
    """Next-token loss of a two-block transformer. Sizes are chosen so that nothing divides evenly by 2 or 4 ranks."""

    def __init__(
        self, *, vocab: int = 37, width: int = 20, hidden: int = 33, blocks: int = 2, bias: bool = True
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, hidden, bias) for _ in range(blocks))
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int | bool) -> TinyTransformer:
    torch.manual_seed(seed)
    return TinyTransformer(**sizes).to(dtype)  # type: ignore[arg-type]


def is_matrix(name: str) -> bool:
    """Whether a parameter of ``TinyTransformer`` is one of the weights that are made compact by default."""
    return name.startswith("blocks.") and "norm" not in name and name.endswith(".weight")


def token_batch(step: int, size: int, length: int = 11, vocab: int = 37) -> Tensor:
    """The global batch of a step, ``(size, length)``; ranks and micro-batches take their rows of it."""
    return torch.randint(vocab, (size, length), generator=torch.Generator().manual_seed(1000 + step))


def train_steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    """Train on the batches ``first`` to ``last - 1``, four sequences each; returns the losses."""
    losses = []
    for step in range(first, last):
        loss = model(token_batch(step, 4))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
