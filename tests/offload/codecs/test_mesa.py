"""Mesa's rounding against its formulas, in fp64."""

import pytest
import torch
from torch import Tensor

from narrowgauge.offload.codecs import Mesa8

DRAWS = 4000


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def through(codec: Mesa8, x: Tensor, seed: int = 0, place: str = "here") -> tuple[Tensor, Tensor, Tensor]:
    """What comes back, and alpha and beta of each group."""
    codes, decoder = codec.encode(x, place, torch.Generator().manual_seed(seed))
    assert codes.dtype is torch.uint8
    assert codes.stride() == x.stride()
    found = torch.empty(0, dtype=x.dtype)
    found.set_(decoder.decode(codes.untyped_storage()), 0, x.shape, x.stride())  # type: ignore[call-overload]
    alpha, beta = decoder.ranges.double()
    return found, alpha, beta


def over_channels(values: Tensor, channels: int) -> Tensor:
    return values.repeat_interleave(64)[:channels]


def test_what_comes_back_is_a_neighbouring_level_and_right_in_the_mean() -> None:
    x = normal(1, 130) * torch.logspace(-3, 3, 130)
    found, alpha, beta = through(Mesa8(), x.expand(DRAWS, 130).contiguous())
    wide, low = over_channels(alpha, 130), over_channels(beta, 130)
    for group in (slice(0, 64), slice(64, 128), slice(128, 130)):
        assert alpha[group.start // 64] == (x[0, group].max() - x[0, group].min()).double()
        assert beta[group.start // 64] == x[0, group].min()
    level = (x[0].double() - low) * 255 / wide
    up = level - level.floor()
    taken = (found.double() - low) * 255 / wide
    # Of fp32 arithmetic: the level's place, and the value's last digits.
    slack = 255 * 2**-22 * (1 + low.abs() / wide)
    assert ((taken - level.floor()).abs().minimum((taken - level.floor() - 1).abs()) < slack).all()
    assert ((found - x).double().abs() <= wide / 255 * (1 + 1e-4)).all()
    error = (1e-12 + up * (1 - up) / DRAWS).sqrt()
    assert ((taken.mean(0) - level).abs() <= 4 * error + slack).all()


def test_each_head_has_its_own_range() -> None:
    """Also of attention's tensors, which lie in memory in another order of dimensions."""
    x = (normal(2, 5, 3, 7) * torch.tensor([1.0, 100.0, 0.01]).view(1, 1, 3, 1)).transpose(1, 2)
    found, alpha, beta = through(Mesa8(), x)
    assert torch.equal(beta, x.amin((0, 2, 3)).double())
    assert torch.equal(alpha, (x.amax((0, 2, 3)) - x.amin((0, 2, 3))).double())
    assert ((found - x).abs() <= alpha.view(1, 3, 1, 1) / 255 * 1.0001).all()


def test_ranges_follow_with_a_decay_and_what_is_beyond_them_is_clamped_on_both_sides() -> None:
    """The paper's code clamps from below only: larger values wrap round to small ones."""
    codec, first, wide = Mesa8(), normal(50, 8), 10 * normal(50, 8, seed=1)
    _, alpha, beta = through(codec, first)
    found, alpha_2, beta_2 = through(codec, wide)
    span, low = (wide.max() - wide.min()).double(), wide.min().double()
    assert alpha_2.item() == pytest.approx((0.9 * alpha + 0.1 * span).item(), rel=1e-6)
    assert beta_2.item() == pytest.approx((0.9 * beta + 0.1 * low).item(), rel=1e-6)
    clamped = wide.double().clamp(beta_2.item(), (beta_2 + alpha_2).item())
    assert (clamped != wide).double().mean() > 0.2
    assert ((found.double() - clamped).abs() <= alpha_2 / 255 * 1.001).all()


def test_equal_values_come_back_exactly() -> None:
    """Their range is 0: dividing by it would give NaN."""
    x = torch.full((4, 70), 3.7)
    codec = Mesa8()
    for _ in range(2):
        assert torch.equal(through(codec, x)[0], x)


def test_a_later_forward_changes_nothing_of_an_earlier_one() -> None:
    """The paper's code saves references to ranges that the next forward changes."""
    codec, x = Mesa8(), normal(30, 8)
    codes, decoder = codec.encode(x, "here", torch.Generator())
    before = torch.tensor(decoder.decode(codes.untyped_storage()).tolist(), dtype=torch.uint8)
    codec.encode(100 * x, "here", torch.Generator())
    codec.encode(x - 1e3, "here", torch.Generator())
    assert torch.equal(torch.tensor(decoder.decode(codes.untyped_storage()).tolist(), dtype=torch.uint8), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_ranges_are_fp32_whatever_the_tensor_is(dtype: torch.dtype) -> None:
    """A shift in half precision loses the digits that are rounded; sums near fp16's largest number overflow."""
    x = (60000 + 2000 * normal(64, 8)).clamp(max=65504).to(dtype)
    found, alpha, _ = through(Mesa8(), x)
    assert found.dtype is dtype
    unit = float(torch.finfo(dtype).eps) * 65504 if dtype is not torch.float64 else 0.02
    assert ((found.double() - x.double()).abs() <= alpha / 255 + unit).all()
    y = x * -1
    both = torch.cat([x, y])
    found, alpha, _ = through(Mesa8(), both)
    assert found.isfinite().all()
    assert ((found.double() - both.double()).abs() <= alpha / 255 + unit).all()


def test_what_is_not_finite_stays_visible_and_spoils_no_later_batch() -> None:
    codec, x = Mesa8(), normal(30, 130)
    _, alpha, beta = through(codec, x)
    bad = x.clone()
    bad[3, 70] = torch.inf
    found, _, _ = through(codec, bad)
    assert found[:, 64:128].isnan().all()
    assert found[:, :64].isfinite().all()
    found, alpha_2, beta_2 = through(codec, x)
    assert torch.equal(alpha_2, alpha)
    assert torch.equal(beta_2, beta)
    assert found.isfinite().all()


def test_the_state_is_all_there_is() -> None:
    codec, other = Mesa8(), Mesa8()
    for seed in range(3):
        through(codec, normal(30, 8, seed=seed))
    other.load_state_dict(codec.state_dict())
    x = normal(30, 8, seed=9)
    for one, two in zip(through(codec, x), through(other, x), strict=True):
        assert torch.equal(one, two)
