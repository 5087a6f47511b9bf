"""Which text is held out for validation: a share of its bytes, chosen by the hash of what the documents say.

Whole documents are held out, equal ones together. Where no choice of whole documents comes near the share, because
they are few or one is most of the text, a single document gives what is missing: whole pieces of it, and the end of
one piece, cut at a line's end, else at a space, else between two characters.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ..errors import DataError

# Relative to the share asked for. What is met at once is taken; what is chosen aims closer.
_TOLERANCE, _AIM = 0.1, 0.05
_BOUNDARIES = (re.compile(r"\n"), re.compile(r"\s"))

Part = tuple[str, bool]


@dataclass
class _Unit:
    """Equal documents, or equal pieces of a document: how many there are, and the bytes of one."""

    nbytes: int
    copies: int = 0

    @property
    def weight(self) -> int:
        return self.nbytes * self.copies


@dataclass
class _Text(_Unit):
    pieces: dict[bytes, _Unit] = field(default_factory=dict)


class Holdout:
    """The choice for one text; made in one pass over it, applied in others."""

    def __init__(self, pieces: Iterable[Part], fraction: float) -> None:
        """Choose about ``fraction`` of the bytes of ``pieces``: their text, and whether it ends its document."""
        self._order: list[bytes] = []
        self._cut: bytes | None = None
        self._pieces = set[bytes]()
        self._cut_piece, self._held_bytes, self._slack = b"", 0, 0
        texts = self._read(pieces)
        total = sum(text.weight for text in texts.values())
        smaller = min(fraction, 1 - fraction) * total
        self._whole = set(sorted(texts)[: min(max(1, round(fraction * len(texts))), len(texts) - 1)])
        if abs(sum(texts[name].weight for name in self._whole) - fraction * total) <= _TOLERANCE * smaller:
            return
        self._whole, missing = _choose(texts, fraction * total, _AIM * smaller)
        left = sorted(texts.keys() - self._whole)
        if missing <= _AIM * smaller or not left:
            return
        self._cut = left[0]
        text = texts[self._cut]
        slack = _AIM * smaller / text.copies
        self._pieces, missing = _choose(text.pieces, missing / text.copies, slack)
        left = sorted(text.pieces.keys() - self._pieces)
        if missing > slack and left:
            copies = text.pieces[left[0]].copies
            self._cut_piece, self._held_bytes = left[0], round(missing / copies)
            self._slack = int(slack / copies)

    def _read(self, pieces: Iterable[Part]) -> dict[bytes, _Text]:
        texts: dict[bytes, _Text] = {}
        whole, text = hashlib.sha256(), _Text(0)
        for piece, last in pieces:
            raw = piece.encode()
            whole.update(raw)
            unit = text.pieces.setdefault(hashlib.sha256(raw).digest(), _Unit(len(raw)))
            unit.copies += 1
            text.nbytes += len(raw)
            if last:
                self._order.append(whole.digest())
                texts.setdefault(whole.digest(), text).copies += 1
                whole, text = hashlib.sha256(), _Text(0)
        return texts

    def select(self, pieces: Iterable[Part], held_out: bool) -> Iterator[Part]:
        """The pieces of one side, in order; a side's text ends, too, where the document goes on on the other one."""
        before: tuple[str, bool, bool] | None = None
        for part in self._parts(pieces):
            if before is not None and before[2] == held_out:
                yield before[0], before[1] or part[2] != held_out
            before = part
        if before is not None and before[2] == held_out:
            yield before[0], True

    def _parts(self, pieces: Iterable[Part]) -> Iterator[tuple[str, bool, bool]]:
        """Text, whether it ends its document, whether it is held out."""
        document = 0
        for piece, last in pieces:
            if document == len(self._order):
                raise DataError("data.train: the files changed while they were read")
            name = self._order[document]
            document += last
            if name != self._cut:
                yield piece, last, name in self._whole
                continue
            digest = hashlib.sha256(piece.encode()).digest()
            if digest != self._cut_piece:
                yield piece, last, digest in self._pieces
                continue
            at = _boundary(piece, self._held_bytes, self._slack)
            if piece[:at]:
                yield piece[:at], last and at == len(piece), False
            if piece[at:]:
                yield piece[at:], last, True


def _choose(units: Mapping[bytes, _Unit], wanted: float, slack: float) -> tuple[set[bytes], float]:
    """Units in the order of their hashes until there are ``wanted`` bytes, none that makes it ``slack`` too many.

    Returns:
        The chosen ones, and how many bytes are missing.
    """
    chosen: set[bytes] = set()
    for name in sorted(units):
        if wanted <= 0:
            break
        if units[name].weight <= wanted + slack:
            chosen.add(name)
            wanted -= units[name].weight
    return chosen, wanted


def _boundary(text: str, nbytes: int, slack: int) -> int:
    """Where the last ``nbytes`` of ``text`` begin: just after the nearest line end or space within ``slack`` bytes."""
    raw = text.encode()
    wanted = len(raw[: len(raw) - nbytes].decode(errors="ignore"))
    # Characters are at least a byte each.
    first, last = max(wanted - slack, 0), wanted + slack
    for boundary in _BOUNDARIES:
        ends = [found.end() for found in boundary.finditer(text, first, last)]
        near = [end for end in ends if abs(len(text[min(end, wanted) : max(end, wanted)].encode())) <= slack]
        if near:
            return min(near, key=lambda end: abs(end - wanted))
    return wanted
