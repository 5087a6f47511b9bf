"""LAMB and LARS written down a second time, on whole tensors, sharing no code with the package."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

RateAndDecay = Callable[[str], tuple[float, float]]
IsPlain = Callable[[str, Tensor], bool]


class EquationsOfLamb:
    """Algorithm 2 of arXiv 1904.00962 on whole tensors."""

    def __init__(self, model: nn.Module, *, rate_and_decay: RateAndDecay, is_plain: IsPlain, **options: Any) -> None:
        self.rate_and_decay, self.is_plain = rate_and_decay, is_plain
        self.params, self.options, self.t = dict(model.named_parameters()), options, 0
        self.m = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.params.items()}

    @torch.no_grad()
    def step(self) -> None:
        (beta1, beta2), eps = self.options["betas"], self.options["eps"]
        low, high = self.options.get("weight_norm_bounds") or (0.0, float("inf"))
        self.t += 1
        for name, x in self.params.items():
            lr, decay = self.rate_and_decay(name)
            g = x.grad
            assert g is not None
            self.m[name] = beta1 * self.m[name] + (1 - beta1) * g
            self.v[name] = beta2 * self.v[name] + (1 - beta2) * g * g
            r = self.m[name] / (1 - beta1**self.t) / ((self.v[name] / (1 - beta2**self.t)).sqrt() + eps)
            if self.is_plain(name, x):
                x -= lr * r
                continue
            u = r + decay * x
            phi = min(max(float(x.pow(2).sum().sqrt()), low), high)
            ratio = phi / float(u.pow(2).sum().sqrt()) if phi > 0 else 1.0
            x -= lr * ratio * u


class EquationsOfLars:
    """Algorithm 1 of arXiv 1708.03888 on whole tensors, and Nesterov's step."""

    def __init__(self, model: nn.Module, *, rate_and_decay: RateAndDecay, is_plain: IsPlain, **options: Any) -> None:
        self.rate_and_decay, self.is_plain = rate_and_decay, is_plain
        self.params, self.options = dict(model.named_parameters()), options
        self.v = {name: torch.zeros_like(p) for name, p in self.params.items()}

    @torch.no_grad()
    def step(self) -> None:
        momentum, eta = self.options["momentum"], self.options["trust_coefficient"]
        for name, w in self.params.items():
            lr, decay = self.rate_and_decay(name)
            g = w.grad
            assert g is not None
            if self.is_plain(name, w):
                update = lr * g
            else:
                w_norm, g_norm = float(w.pow(2).sum().sqrt()), float(g.pow(2).sum().sqrt())
                ratio = eta * w_norm / (g_norm + decay * w_norm) if w_norm > 0 else 1.0
                update = lr * ratio * (g + decay * w)
            self.v[name] = momentum * self.v[name] + update
            w -= update + momentum * self.v[name] if self.options.get("nesterov") else self.v[name]
