"""Values of the caller's in a checkpoint come back as they were."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from narrowgauge.engine.checkpoint.values import decode, encode, read_tensors


def there_and_back(value: Any, folder: Path) -> Any:
    tensors: dict[str, Tensor] = {}
    text = json.dumps(encode(value, tensors, "client_state"), allow_nan=False)
    save_file(tensors, folder / "values.safetensors")
    return decode(json.loads(text), read_tensors([folder / "values.safetensors"]))


def test_types_are_kept(tmp_path: Path) -> None:
    """Integer keys became strings (a schedule's milestones were never met again), tuples lists, and tensors and NumPy's
    numbers a TypeError.
    """
    value = {
        "plain": {"a": [1, 2.5, "x", None, True]},
        "pairs": {3: (1, (2, 3)), "3": {1, 2}},
        "milestones": Counter({2: 1, 5: 2}),
        "numpy": [np.float32(0.1), np.int64(7), np.bool_(True), np.float64("inf")],
        "__type__": "a word of our own",
        "": 0,
    }
    found = there_and_back(value, tmp_path)
    assert found == value
    assert list(map(type, found["numpy"])) == [np.float32, np.int64, np.bool_, np.float64]
    assert type(found["milestones"]) is Counter
    found = there_and_back({"x": [-math.inf, math.nan]}, tmp_path)["x"]
    assert found[0] == -math.inf
    assert math.isnan(found[1])


def test_tensors_and_arrays_are_kept(tmp_path: Path) -> None:
    tensor = torch.randn(3, 4, dtype=torch.bfloat16).t()
    found = there_and_back({"t": tensor, "a": [np.arange(6.0).reshape(2, 3), np.array(2)], 7: tensor[0]}, tmp_path)
    assert found["t"].dtype is torch.bfloat16
    assert torch.equal(found["t"], tensor)
    assert torch.equal(found[7], tensor[0])
    assert np.array_equal(found["a"][0], np.arange(6.0).reshape(2, 3))
    assert found["a"][1].shape == ()


def test_tensors_whose_places_read_alike_are_kept_apart() -> None:
    """The second took the place of the first in the file."""
    state = {"a.b": torch.ones(1), "a": {"b": torch.zeros(2)}, 1: torch.full((3,), 3.0), "1": torch.full((4,), 4.0)}
    tensors: dict[str, torch.Tensor] = {}
    found = decode(encode(state, tensors, "client_state"), tensors)
    assert len(tensors) == 4
    assert [found[key].tolist() for key in ("a.b", 1, "1")] == [state[key].tolist() for key in ("a.b", 1, "1")]
    assert found["a"]["b"].tolist() == [0.0, 0.0]


def test_others_are_refused_by_their_place() -> None:
    with pytest.raises(ValueError, match=r"client_state.a\[1\]: expected numbers, .* got pathlib.*PosixPath"):
        encode({"a": [1, Path("x")]}, {}, "client_state")


UNFIT: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (
        lambda: torch.eye(2).to_sparse_csr(),
        "a dense tensor of numbers, got one of the layout torch.sparse_csr",
    ),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "got a nested one"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
        "NestedTensor",
    ),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "got one of torch.qint8"),
    "meta": (lambda: torch.empty(2, device="meta"), "got one on the device meta, which has no values"),
    "masked": (lambda: np.ma.array([1.0, 2.0], mask=[False, True]), "an array of numbers, got a numpy.ma.MaskedArray"),
    "bytes of another order": (lambda: np.ones(2, ">f4"), "an array of numbers, got one of >f4"),
    "long double": (lambda: np.longdouble(0.1), "got numpy.longdouble"),
}


@pytest.mark.parametrize(("make", "expected"), UNFIT.values(), ids=UNFIT)
def test_values_without_a_form_in_a_file_are_refused_by_their_place(make: Callable[[], Any], expected: str) -> None:
    """Each was an error of some library's when the file was written; a masked array lost its mask."""
    with pytest.raises(ValueError, match=r"client_state\.a\[0\]: expected ") as caught:
        encode({"a": [make()]}, {}, "client_state")
    assert expected in str(caught.value)


def test_a_value_in_itself_is_refused() -> None:
    held: list[Any] = []
    held.append(held)
    with pytest.raises(ValueError, match="client_state: expected values that are not nested"):
        encode({"a": held}, {}, "client_state")
