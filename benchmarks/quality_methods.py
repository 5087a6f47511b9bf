"""The compared methods. Each is one entry of ``METHODS``; a new one needs nothing else.

All train the same parameters at the same two rates, ``lr`` (embeddings, head, norms) and ``lr * matrix_lr_scale``
(the linear layers inside the blocks), without weight decay and with epsilon 1e-8, but LoRA: its blocks' linears stay
as they were initialised and adapters are trained in their place; embeddings, head and norms are trained as elsewhere.

Formulas count bytes of optimizer state in fp32. The dense parameters take AdamW's two moments in every method. What
the papers give per matrix of ``m x n``, ``m <= n``, in elements:

- GaLore (Zhao et al. 2024, arXiv 2403.03507, table 1): ``mr + 2nr``; LoRA there: ``2mr + 2nr``.
- Grass (Muhamed et al. 2024, arXiv 2406.17660): two moments of the ``r`` selected rows or columns, and their indices.
- FRUGAL (Zmushko et al. 2024, arXiv 2411.07837): two moments of the state-full share.
- APOLLO (Zhu et al. 2024, arXiv 2412.05270, table 1): ``2nr + 2``; APOLLO-Mini: ``2n + 2``.
- 8-bit AdamW (Dettmers et al. 2021, arXiv 2110.02861): a byte per element and moment, a scale per block (here of 256
  elements), and fp32 below 4,096 elements.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.quality_anchors import Both, NormalisedColumns, SketchedResidual, beside_adamw, frozen, muon
from narrowgauge.optimizers.layers.targets import find_targets, rank_of

_FP32, _INDEX = 4, 8
_NEVER = 1_000_000  # steps: no run is as long.


@dataclass(frozen=True)
class Shapes:
    """The dense model's parameters.

    Attributes:
        matrices: ``(m, n)`` of each linear inside the blocks.
        dense: number of elements of each other parameter.
        hidden: the hidden size, of which ranks are shares.
    """

    matrices: list[tuple[int, int]]
    dense: list[int]
    hidden: int

    @staticmethod
    def of(model: nn.Module) -> "Shapes":
        found = find_targets(model, None).values()
        targets = {id(linear.weight): linear for linear in found if isinstance(linear, nn.Linear)}
        dense = [p.numel() for p in model.parameters() if id(p) not in targets]
        matrices = [(linear.out_features, linear.in_features) for linear in targets.values()]
        return Shapes(matrices, dense, _hidden(model))


Make = Callable[..., torch.optim.Optimizer]
Formula = Callable[..., float]


def _no_traffic(shapes: Shapes, **options: Any) -> float:
    return 0.0


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train.

    Attributes:
        make: ``(model, *, lr, matrix_lr_scale, betas, interval, **options) -> optimizer``; may convert the model's
            layers in place. ``interval`` is that between changes of subspace.
        state: ``(shapes, **options) -> bytes`` of optimizer state by the method's formula.
        traffic: ``(shapes, **options) -> bytes`` reduced between process ranks at a change of subspace, beside the
            gradients.
        options: given to the three above; part of a result's key.
        start: the first matrix rate tried, relative to AdamW's best one.
        trains_matrices: else there is no rate of theirs to try.
    """

    make: Make
    state: Formula
    traffic: Formula = _no_traffic
    options: Mapping[str, Any] = field(default_factory=dict)
    start: float = 1.0
    trains_matrices: bool = True


def _hidden(model: Any) -> int:
    return model.config.hidden_size


def groups_of(
    model: nn.Module, lr: float, matrix_lr_scale: float, **matrix_options: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameter groups of the matrices and of the other parameters."""
    matrices = [linear.weight for linear in find_targets(model, None).values()]
    ids = {id(p) for p in matrices}
    dense = [p for p in model.parameters() if id(p) not in ids]
    return {"params": matrices, "lr": lr * matrix_lr_scale, **matrix_options}, {"params": dense, "lr": lr}


def _make_adamw(
    model: nn.Module, *, lr: float, matrix_lr_scale: float, betas: tuple[float, float], interval: int
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups_of(model, lr, matrix_lr_scale), betas=betas, weight_decay=0.0)


def _make_adamw8bit(
    model: nn.Module, *, lr: float, matrix_lr_scale: float, betas: tuple[float, float], interval: int
) -> torch.optim.Optimizer:
    from bitsandbytes.optim.adamw import AdamW8bit

    groups: Any = groups_of(model, lr, matrix_lr_scale)
    return AdamW8bit(groups, lr=lr, betas=betas, weight_decay=0.0)


def _make_galore_torch(
    model: nn.Module,
    *,
    lr: float,
    matrix_lr_scale: float,
    betas: tuple[float, float],
    interval: int,
    share: float,
    scale: float,
) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    galore = {"rank": round(share * _hidden(model)), "update_proj_gap": interval, "scale": scale, "proj_type": "std"}
    groups: Any = groups_of(model, lr, matrix_lr_scale, **galore)
    return GaLoreAdamW(groups, lr=lr, betas=betas, eps=1e-8, weight_decay=0.0, no_deprecation_warning=True)


def _make_lora(
    model: nn.Module,
    *,
    lr: float,
    matrix_lr_scale: float,
    betas: tuple[float, float],
    interval: int,
    share: float,
) -> torch.optim.Optimizer:
    from peft import LoraConfig, inject_adapter_in_model

    matrices, dense = groups_of(model, lr, matrix_lr_scale)
    rank = round(share * _hidden(model))
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(find_targets(model, None)))
    inject_adapter_in_model(config, model)
    for p in dense["params"]:
        p.requires_grad_(True)
    adapters = {**matrices, "params": [p for name, p in model.named_parameters() if ".lora_" in name]}
    return torch.optim.AdamW([adapters, dense], betas=betas, weight_decay=0.0)


def _own(name: str) -> Make:
    """One of this project's optimizers; an option ``share`` is a rank as a share of the hidden size, ``own_interval``
    and ``own_beta2`` stand in for the task's and the rates'.
    """

    def make(
        model: nn.Module,
        *,
        lr: float,
        matrix_lr_scale: float,
        betas: tuple[float, float],
        interval: int,
        share: float | None = None,
        own_interval: int | None = None,
        own_beta2: float | None = None,
        **options: Any,
    ) -> torch.optim.Optimizer:
        import narrowgauge.optimizers as optimizers

        cls = getattr(optimizers, name, None)
        if cls is None:
            raise ValueError(f"narrowgauge.optimizers has no {name}")
        if share is not None:
            options["rank"] = round(share * _hidden(model))
        return cls(
            model,
            lr=lr,
            matrix_lr_scale=matrix_lr_scale,
            betas=(betas[0], own_beta2 or betas[1]),
            weight_decay=0.0,
            refresh_interval=own_interval or interval,
            **options,
        )

    return make


def _anchor(make: Callable[..., torch.optim.Optimizer], per_element: int, **kwargs: Any) -> Method:
    """Trains the matrices with ``per_element`` numbers of state for each of their elements."""

    def made(
        model: nn.Module, *, lr: float, matrix_lr_scale: float, betas: tuple[float, float], interval: int
    ) -> torch.optim.Optimizer:
        return make(groups_of(model, lr, matrix_lr_scale), betas)

    def state(shapes: Shapes) -> float:
        return _moments(sum(shapes.dense)) + _FP32 * per_element * sum(m * n for m, n in shapes.matrices)

    return Method(make=made, state=state, **kwargs)


def _sketched(density: float, share: float, scale: float) -> Method:
    def make(
        model: nn.Module,
        *,
        lr: float,
        matrix_lr_scale: float,
        betas: tuple[float, float],
        interval: int,
        **options: Any,
    ) -> torch.optim.Optimizer:
        matrices, others = groups_of(model, lr, matrix_lr_scale)
        residual = SketchedResidual(matrices["params"], matrices["lr"], interval=interval, betas=betas, **options)
        return Both(residual, torch.optim.AdamW([others], betas=betas, weight_decay=0.0))

    def state(shapes: Shapes, **options: Any) -> float:
        return _grass_state(shapes, density=density, side="columns")

    return Method(
        make=make, state=state, options={"density": density, "share": share, "scale": scale}, start=1 / density
    )


def _moments(elements: float) -> float:
    return 2 * _FP32 * elements


def _adamw_state(shapes: Shapes) -> float:
    return _moments(sum(m * n for m, n in shapes.matrices) + sum(shapes.dense))


def _adamw8bit_state(shapes: Shapes) -> float:
    sizes = [m * n for m, n in shapes.matrices] + shapes.dense
    return sum(2 * (size + _FP32 * -(-size // 256)) if size >= 4096 else _moments(size) for size in sizes)


def _of_matrices(elements: float, outputs: float, base: str) -> float:
    """Bytes of the state of compact matrices with these outputs."""
    if base not in ("Muon", "NorMuon"):
        return _moments(elements)
    return _FP32 * (elements + (outputs if base == "NorMuon" else 0))


def _grass_state(shapes: Shapes, *, density: float, side: str, base: str = "AdamW", **options: Any) -> float:
    total = _moments(sum(shapes.dense))
    for m, n in shapes.matrices:
        chosen, kept = (n, m) if side == "columns" else (m, n)
        rank = rank_of(chosen, rank=None, density=density)
        total += _of_matrices(rank * kept, kept if side == "columns" else rank, base) + _INDEX * rank
    return total


def _galore_state(shapes: Shapes, *, share: float, scale: float, base: str = "AdamW", **options: Any) -> float:
    rank, total = round(share * shapes.hidden), _moments(sum(shapes.dense))
    for m, n in shapes.matrices:
        total += _of_matrices(rank * max(m, n), m if m >= n else rank, base) + _FP32 * rank * min(m, n)
    return total


def _galore_traffic(shapes: Shapes, *, share: float, scale: float, **options: Any) -> float:
    """A sketch of the gradient from which all process ranks find the same projector: ``m (r + p)`` numbers, p = 16."""
    return sum(_FP32 * (round(share * shapes.hidden) + 16) * min(shape) for shape in shapes.matrices)


def _frugal_state(shapes: Shapes, *, density: float) -> float:
    return _moments(density * sum(m * n for m, n in shapes.matrices) + sum(shapes.dense))


def _apollo_state(shapes: Shapes, *, share: float | None = None, rank: int | None = None, **options: Any) -> float:
    chosen = rank if rank is not None else round((share or 0.0) * shapes.hidden)
    return sum(_moments(chosen * max(shape)) + 2 * _FP32 for shape in shapes.matrices) + _moments(sum(shapes.dense))


def _lora_state(shapes: Shapes, *, share: float) -> float:
    rank = round(share * shapes.hidden)
    return _moments(sum(rank * (m + n) for m, n in shapes.matrices) + sum(shapes.dense))


def _grass(side: str, density: float, **options: Any) -> Method:
    # Each entry is trained for a share of the steps, and wants to move as far as in AdamW.
    return Method(
        make=_own("Grass"), state=_grass_state, options={"density": density, "side": side, **options}, start=1 / density
    )


def _galore(share: float, **more: Any) -> Method:
    options = {"share": share, "scale": 0.25, **more}
    return Method(make=_own("GaLore"), state=_galore_state, traffic=_galore_traffic, options=options, start=16.0)


def _galore_torch(share: float) -> Method:
    options = {"share": share, "scale": 0.25}
    return Method(make=_make_galore_torch, state=_galore_state, options=options, start=16.0)


METHODS: dict[str, Method] = {
    "adamw": Method(make=_make_adamw, state=_adamw_state),
    "frozen": _anchor(frozen, 0, trains_matrices=False),
    "muon": _anchor(beside_adamw(muon), 1),
    "normalised-columns": _anchor(beside_adamw(NormalisedColumns), 0),
    "grass-columns-1/8": _grass("columns", 1 / 8),
    "grass-columns-1/4": _grass("columns", 1 / 4),
    "grass-columns-1/16": _grass("columns", 1 / 16),
    "grass-columns-1/8-muon": _grass("columns", 1 / 8, base="Muon"),
    "grass-columns-1/8-muon-200": _grass("columns", 1 / 8, base="Muon", own_interval=200),
    "grass-columns-1/8-normuon": _grass("columns", 1 / 8, base="NorMuon"),
    "grass-columns-1/8-normuon-200": _grass("columns", 1 / 8, base="NorMuon", own_interval=200),
    "grass-columns-1/8-100": _grass("columns", 1 / 8, own_interval=100),
    "grass-columns-1/8-200": _grass("columns", 1 / 8, own_interval=200),
    "grass-columns-1/8-500": _grass("columns", 1 / 8, own_interval=500),
    "grass-columns-1/8-whole-run": _grass("columns", 1 / 8, own_interval=_NEVER),
    "grass-columns-1/8-carry": _grass("columns", 1 / 8, moments="carry"),
    "grass-columns-1/8-beta2-0.99": _grass("columns", 1 / 8, own_beta2=0.99),
    "grass-columns-1/8-beta2-0.95": _grass("columns", 1 / 8, own_beta2=0.95),
    "grass-columns-1/8-top": _grass("columns", 1 / 8, selection="top"),
    "grass-columns-1/16-sketch-1/8": _sketched(1 / 16, 1 / 16, 1 / 8),
    "grass-columns-1/16-sketch-1/32": _sketched(1 / 16, 1 / 16, 1 / 32),
    "grass-columns-1/16-sketch-1/128": _sketched(1 / 16, 1 / 16, 1 / 128),
    "grass-columns-1/8-siblings": _grass("columns", 1 / 8, shared_inputs="siblings"),
    "grass-rows-1/8": _grass("rows", 1 / 8),
    "adamw8bit": Method(make=_make_adamw8bit, state=_adamw8bit_state),
    "lora-1/8": Method(make=_make_lora, state=_lora_state, options={"share": 1 / 8}, start=2.0),
    "galore-torch-1/8": _galore_torch(1 / 8),
    "galore-torch-1/4": _galore_torch(1 / 4),
    "galore-1/8": _galore(1 / 8),
    "galore-1/8-muon": _galore(1 / 8, base="Muon"),
    "galore-1/8-normuon": _galore(1 / 8, base="NorMuon"),
    "galore-1/4": _galore(1 / 4),
    "frugal-1/4": Method(make=_own("Frugal"), state=_frugal_state, options={"density": 1 / 4}),
    "frugal-0": Method(make=_own("Frugal"), state=_frugal_state, options={"density": 0.0}),
    "apollo-1/4": Method(make=_own("Apollo"), state=_apollo_state, options={"share": 1 / 4}, start=2.0),
    "apollo-mini": Method(make=_own("Apollo"), state=_apollo_state, options={"rank": 1, "scale_type": "tensor"}),
    "grass-rows-1/4": _grass("rows", 1 / 4),
    "grass-rows-1/16": _grass("rows", 1 / 16),
}
