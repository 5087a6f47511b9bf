"""The weights that training starts from: drawn as every engine draws them, or a Hugging Face folder's."""

import logging

import torch
from torch import Tensor

from ...config.config import Config
from ...config.run_blocks import ModelBlock
from ...files import local_path
from ...ranks.environment import process_rank
from ..first_weights import from_one_stream
from ..model import from_folder
from .draw import draw_into, shapes_of
from .folder import FolderWeights
from .model import StagedModel
from .parts import LocalParameter

_log = logging.getLogger(__name__)


@torch.no_grad()
def fill_with_first_values(model: StagedModel, block: ModelBlock, config: Config) -> None:
    """Give a model its first weights; the same for every layout."""
    targets: dict[str, list[tuple[LocalParameter, Tensor]]] = {}
    for held, tensor in model.local_parameters():
        tensor.zero_()  # the padding of the vocabulary stays so
        for name in dict.fromkeys(part.name for part in held.parts):
            targets.setdefault(name, []).append((held, tensor))

    def sink(name: str, weight: Tensor) -> None:
        for held, tensor in targets.get(name, ()):
            held.fill(tensor, name, weight)

    if block.path is not None:
        folder = FolderWeights(local_path(block.path, "model.path"), model.architecture.model_type)
        if folder.holds(shapes_of(model.config)):
            for held, tensor in model.local_parameters():
                folder.fill(held, tensor)
            _log.info("%s: %d bytes of the weights read", block.path, folder.bytes_read)
            return
        # Of another form, which transformers may know, or say what is wrong with it.
        if process_rank() == 0:
            _log.warning(
                f"model.path: {block.path}: the weights are not safetensors under the model's own names, so that every"
                " process rank reads all of them; a folder that save_pretrained wrote is read in parts"
            )
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        for name, weight in from_folder(block.path, model.config, dtype).named_parameters():
            sink(name, weight)
        return
    seed = config.parsed.training.seed if config.parsed.training is not None else 0
    if block.initial_weights == "transformers":
        for name, weight in from_one_stream(model.config, seed).items():
            sink(name, weight)
        return
    draw_into(model.config, torch.bfloat16 if config.bf16 else torch.float32, seed, targets.keys(), sink)
