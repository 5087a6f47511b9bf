"""The order of samples: a pure function of (seed, epoch, position).

A Feistel network permutes the numbers below the next power of four, and numbers outside the range walk on until they
fall inside (Black and Rogaway, 2002, "Ciphers with Arbitrary Finite Domains", the cycle-walking cipher). Nothing is
stored, so a corpus may have any number of samples and a run resumes at any of them, on any number of ranks.
"""

import numpy as np
import numpy.typing as npt

_ROUNDS = 6
Positions = npt.NDArray[np.uint64]


def sample_order(global_samples: npt.ArrayLike, num_samples: int, seed: int) -> npt.NDArray[np.int64]:
    """Which sample of the corpus stands at each place of the endless stream of epochs.

    Args:
        global_samples: places in the stream, counted from 0 over all ranks and epochs.
        num_samples: samples in the corpus; each occurs once per epoch.

    Returns:
        int64 in ``[0, num_samples)``, shaped like ``global_samples``.
    """
    places = np.atleast_1d(np.asarray(global_samples, dtype=np.uint64))
    epochs, positions = np.divmod(places, np.uint64(num_samples))
    half_bits = np.uint64(max(1, -(-(num_samples - 1).bit_length() // 2)))
    keys = _mix(_mix(np.full_like(epochs, np.uint64(seed & 0xFFFFFFFFFFFFFFFF))) ^ epochs)
    found = _permute(positions, keys, half_bits)
    while np.any(outside := found >= num_samples):
        found[outside] = _permute(found[outside], keys[outside], half_bits)
    return found.astype(np.int64).reshape(np.shape(global_samples))


def _permute(positions: Positions, keys: Positions, half_bits: np.uint64) -> Positions:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = positions >> half_bits, positions & mask
    for number in range(_ROUNDS):
        left, right = right, left ^ (_mix(right ^ _mix(keys + np.uint64(number))) & mask)
    return (left << half_bits) | right


def _mix(x: Positions) -> Positions:
    """The finalizer of SplitMix64; products wrap."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
