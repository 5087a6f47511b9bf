"""Counting what autograd saves."""

from torch import Tensor, nn


class Saved:
    """Bytes of the storages that autograd saves, each once, without those of a model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages: dict[int, int] = {}
        self._kept: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor:
        """For ``saved_tensors_hooks``."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self.storages[storage.data_ptr()] = storage.nbytes()
            # So that no other takes its place in memory, and counts as the same.
            self._kept.append(tensor.detach())
        return tensor

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(self.storages.values())
