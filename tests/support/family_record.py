"""Which causal language models of transformers train here, and how much of each is compact: ``docs/families.json``.

``python -m tests.support.family_record [FAMILY ...]`` makes each at a small size; ``python docs/tables.py`` shows them.
"""

import json
import logging
import sys
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers import logging as transformers_logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from narrowgauge.engine.config.run_blocks import ModelBlock
from narrowgauge.engine.errors import UserError, first_line
from narrowgauge.engine.run.model import abstract_model, model_config
from narrowgauge.optimizers import Grass
from tests.support.command import ROOT
from tests.support.families import sizes_of

_PATH = ROOT / "docs" / "families.json"
# Of what the small sizes do not make small: composites, and sizes that no key of the configuration changes.
_TOO_LARGE = 20_000_000


def recorded() -> dict[str, dict[str, Any]]:
    return json.loads(_PATH.read_text()) if _PATH.is_file() else {}


def describe(family: str) -> dict[str, Any]:
    """``share`` of the matrices in the blocks that Grass makes compact; or why the family is ``refused`` by a run, or
    could not be tried at a small size (``untried``), or trains something else without a word (``wrong``).
    """
    try:
        _config_of(family, {})
    except UserError as error:
        return {"refused": first_line(error)}
    try:
        config = _config_of(family, sizes_of(family))
    except UserError as error:
        return _untried(error)
    try:
        size = sum(p.numel() for p in abstract_model(config).parameters())
    except UserError as error:
        # Where transformers cannot build it, the sizes may be why.
        return _untried(error) if error.__cause__ is not None else {"refused": first_line(error)}
    if size > _TOO_LARGE:
        return {"untried": f"{size:,} parameters at the least"}
    try:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config)
        model.config.use_cache = False
        wrong = _wrong_with(model)
    except Exception as error:
        return _untried(error)
    if wrong is not None:
        return {"wrong": wrong}
    return {"share": _share(model)}


def _wrong_with(model: Any) -> str | None:
    """What keeps a model from learning to predict the next token, after one step's gradients."""
    tokens = torch.arange(64).view(2, 32) + 3
    found = model(input_ids=tokens, labels=tokens)
    found.loss.backward()
    expected = cross_entropy(found.logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
    if abs(float(found.loss - expected)) > 1e-3:
        return f"its loss is {float(found.loss):.3f}, not the next token's {float(expected):.3f}"
    model.eval()
    changed = tokens.clone()
    changed[:, -1] += 5
    with torch.no_grad():
        one, other = (model(input_ids=each).logits[:, :-1] for each in (tokens, changed))
    return None if torch.allclose(one, other, atol=1e-5) else "it sees the tokens that it has to predict"


def _config_of(family: str, sizes: dict[str, Any]) -> PretrainedConfig:
    return model_config(ModelBlock(config={"model_type": family, **sizes}), vocab_size=None, sequence_length=32)


def _untried(error: Exception) -> dict[str, Any]:
    return {"untried": f"at a small size: {first_line(error)}"}


def _share(model: nn.Module) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return round(Grass(model, density=0.25, min_compact_share=0.0).coverage.share, 3)


def main(families: list[str]) -> None:
    transformers_logging.set_verbosity_error()
    logging.getLogger("narrowgauge").setLevel(logging.ERROR)
    found = recorded()
    for family in families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        found[family] = describe(family)
        _PATH.write_text(json.dumps(dict(sorted(found.items())), indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
