"""The benchmark of lossless compression: what it counts against the entropy of the bytes."""

import pytest
import torch

pytest.importorskip("pyarrow")

from benchmarks.lossless import _CODECS, measure, raw_bytes


def test_the_upper_plane_of_bf16_shrinks_to_about_its_entropy() -> None:
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0)).bfloat16()
    upper = torch.from_numpy(raw_bytes(x)[1::2]).long()
    share = upper.bincount().double() / upper.numel()
    entropy = float(-(share[share > 0] * share[share > 0].log2()).sum())
    found = {way: measure([x], way, _CODECS["zstd 1"])["ratio"] for way in ("whole", "planes", "top plane")}
    assert 0.5 + entropy / 16 <= found["top plane"] < 1.05 * (0.5 + entropy / 16)
    # The lower bytes are noise.
    assert found["planes"] == pytest.approx(found["top plane"], abs=0.002)
    assert found["whole"] > found["planes"]
