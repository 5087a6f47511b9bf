"""A small mixture of experts around transformers' own experts modules, in one dtype throughout."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GptOssConfig, Llama4TextConfig, MixtralConfig, NemotronHConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from .models import RMSNorm, token_batch

WIDTH, HIDDEN, EXPERTS, CHOICES, VOCAB = 18, 11, 5, 2, 37
TRANSPOSED = ("gpt_oss", "llama4")


def experts_module(kind: str, width: int = WIDTH, hidden: int = HIDDEN) -> nn.Module:
    """Experts as transformers has them: plain, with biases and transposed, transposed and batched, without gates."""
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": hidden, "num_local_experts": EXPERTS}
    module: Any
    if kind == "mixtral":
        module = MixtralExperts(MixtralConfig(**sizes))
    elif kind == "gpt_oss":
        module = GptOssExperts(GptOssConfig(**sizes))
    elif kind == "llama4":
        module = Llama4TextExperts(Llama4TextConfig(**sizes))
    else:
        named = {"n_routed_experts": EXPERTS, "moe_intermediate_size": hidden, "moe_latent_size": None}
        module = NemotronHExperts(NemotronHConfig(hidden_size=width, **named))
    if hasattr(module, "config"):
        module.config._experts_implementation = "eager"
    return module


class Block(nn.Module):
    def __init__(self, kind: str, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(WIDTH), RMSNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.router = nn.ParameterDict({"weight": torch.empty(EXPERTS, WIDTH)})
        self.experts = experts_module(kind, hidden=hidden)
        self.kind = kind

    def forward(self, x: Tensor, idle: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x).cumsum(1))
        normed = self.norm2(x).flatten(0, 1)
        logits = (normed @ self.router["weight"].t()).masked_fill(idle, -torch.inf)
        weights, chosen = logits.softmax(-1).topk(CHOICES, dim=-1)
        if self.kind == "llama4":
            scores = torch.zeros_like(logits).scatter(1, chosen, weights).t()
            routed = self.experts((normed * scores[..., None]).flatten(0, 1)).view(EXPERTS, *normed.shape).sum(0)
        else:
            routed = self.experts(normed, chosen, weights)
        return x + routed.view(x.shape)


class TinyMixture(nn.Module):
    """Next-token loss; the first token of a sequence says which expert its tokens must not go to."""

    def __init__(self, kind: str, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block(kind, hidden) for _ in range(2))
        self.norm = RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        idle = F.one_hot(tokens[:, :1].expand(tokens.shape).flatten() % (EXPERTS + 1), EXPERTS + 1)[:, :EXPERTS].bool()
        for block in self.blocks:
            x = block(x, idle)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def mixture(
    kind: str = "mixtral", seed: int = 0, dtype: torch.dtype = torch.float32, hidden: int = HIDDEN
) -> TinyMixture:
    torch.manual_seed(seed)
    model = TinyMixture(kind, hidden)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.4)
    return model.to(dtype)


def mixture_batch(step: int, size: int = 8) -> Tensor:
    """The global batch of a step: no token of it goes to expert 1 in every third step, and none of the second half of
    each micro-batch of four, which is the second process rank's, to expert 2 in the step after.
    """
    tokens = token_batch(step, size, vocab=VOCAB)
    tokens[:, 0] = EXPERTS
    if step % 3 == 0:
        tokens[:, 0] = 1
    elif step % 3 == 1:
        tokens.view(-1, 4, tokens.shape[1])[:, 2:, 0] = 2
    return tokens


def is_compact(name: str) -> bool:
    """Whether a parameter of ``TinyMixture`` is one of the weights that are made compact by default."""
    return name.endswith(("_proj", "mix.weight"))


class Unstacked(nn.Module):
    """The parameters of a mixture, but of each expert its own, outputs times inputs, as views of the stacks: what is
    done to these is done to the mixture.
    """

    def __init__(self, model: TinyMixture) -> None:
        super().__init__()
        self._views: list[tuple[str, nn.Parameter, nn.Parameter, int | None]] = []
        for name, parameter in model.named_parameters():
            if not name.endswith("_proj"):
                self._views.append((name, parameter, parameter, None))
                continue
            for expert in range(EXPERTS):
                own = parameter.data[expert]
                view = nn.Parameter(own.t() if is_transposed(model, name) else own)
                self._views.append((f"{name}[{expert}]", view, parameter, expert))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, view) for name, view, _, _ in self._views)

    def take_gradients(self) -> None:
        """Those of the stacks, which have just had a backward."""
        for _, view, parameter, expert in self._views:
            if expert is not None:
                assert parameter.grad is not None
                own = parameter.grad[expert]
                view.grad = own if own.shape == view.shape and view.is_contiguous() else own.t()


def is_transposed(model: TinyMixture, name: str) -> bool:
    """Whether a stack's matrices are inputs times outputs."""
    return name.endswith("_proj") and model.get_submodule("blocks.0").kind in TRANSPOSED


def is_matrix(name: str) -> bool:
    """As :func:`is_compact`, of ``Unstacked``."""
    return name.endswith(("_proj", "]", "mix.weight"))
