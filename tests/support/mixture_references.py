"""Frugal, Apollo, LAMB and LARS a second time on a mixture: the matrices of its experts each by itself."""

from collections.abc import Callable
from typing import Any

from tests.support.mixture import TinyMixture, Unstacked, is_matrix
from tests.support.references.apollo import PaperApollo
from tests.support.references.frugal import ReferenceFrugal, seed_of
from tests.support.references.layerwise import EquationsOfLamb, EquationsOfLars


def second_statement(model: TinyMixture, kind: str, options: dict[str, Any]) -> Callable[[], None]:
    """A function that takes a step from the gradients of the mixture.

    Args:
        kind: the optimizer's name.
        options: its; the rules and rates of parameters that are no matrices are the default.
    """
    unstacked = Unstacked(model)
    reference: Any
    if kind == "Frugal":
        reference = ReferenceFrugal(
            unstacked,
            is_matrix=is_matrix,
            rule_of=lambda name: "projected" if is_matrix(name) else "full",
            **options,
        )
    elif kind == "Apollo":
        reference = PaperApollo(unstacked, is_matrix=is_matrix, **options)
    else:
        reference = (EquationsOfLamb if kind == "Lamb" else EquationsOfLars)(
            unstacked,
            rate_and_decay=lambda name: (
                options["lr"] * (options["matrix_lr_scale"] if is_matrix(name) else 1.0),
                options["weight_decay"],
            ),
            is_plain=lambda name, parameter: parameter.dim() == 1 or name.endswith("_bias"),
            **options,
        )

    def step() -> None:
        unstacked.take_gradients()
        if kind == "Apollo":
            refresh = reference.t // options["refresh_interval"]
            reference.seeds = {name: seed_of(0, refresh, name) for name, _ in unstacked.named_parameters()}
        reference.step()

    return step
