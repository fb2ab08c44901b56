"""A column of text in few objects, for the paths, identities and sides of millions of ears."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise

import numpy as np

_BLOCK = 4096  # texts that are joined


class Texts(Sequence[str]):
    """A sequence of N texts that takes 4 bytes each besides their characters, instead of more than 50 as a list of str.

    It equals a list of the same texts. Blocks of texts are joined to one str each, so that memory is not moved as the
    column grows, and that reading it changes few reference counts: processes share its memory after a fork.
    """

    def __init__(self, texts: Iterable[str] = ()):
        self._blocks: list[tuple[str, array]] = []  # joined texts, and where each begins and the last one ends
        self._last: list[str] = []  # fewer than a block
        for text in texts:
            self.append(text)

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        """Return the texts themselves if they are Texts, else a copy of them."""
        return texts if isinstance(texts, cls) else cls(texts)

    def append(self, text: str) -> None:
        """Add one text."""
        self._last.append(text)
        if len(self._last) == _BLOCK:
            places = array("I", accumulate(map(len, self._last), initial=0))
            self._blocks.append(("".join(self._last), places))
            self._last = []

    def __len__(self) -> int:
        return len(self._blocks) * _BLOCK + len(self._last)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, place = divmod(range(len(self))[index], _BLOCK)
        if number == len(self._blocks):
            return self._last[place]
        text, places = self._blocks[number]
        return text[places[place] : places[place + 1]]

    def __iter__(self) -> Iterator[str]:
        for text, places in self._blocks:
            for begin, end in pairwise(places):
                yield text[begin:end]
        yield from self._last

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Texts):
            return self._blocks == other._blocks and self._last == other._last
        return list(self) == other if isinstance(other, list) else NotImplemented

    def firsts(self) -> np.ndarray:
        """Return for each text the position of the first one that is equal to it, int32 or int64 [N].

        They are found by sorting hashes, which takes about 25 bytes per text; a dict would take 160.
        """
        positions = np.arange(len(self), dtype=np.int32 if len(self) < 2**31 else np.int64)
        hashes = np.fromiter(map(hash, self), np.int64, len(self))
        order = np.argsort(hashes, kind="stable").astype(positions.dtype)
        hashes = hashes[order]
        new = np.append(True, hashes[1:] != hashes[:-1])[: len(self)]
        del hashes
        again = np.flatnonzero(~new)
        firsts, leaders = positions.copy(), np.where(new, positions, 0)
        np.maximum.accumulate(leaders, out=leaders)
        firsts[order[again]] = order[leaders[again]]
        repeats = order[again]
        if all(self[one] == self[first] for one, first in zip(repeats, firsts[repeats], strict=True)):
            return firsts
        known: dict[str, int] = {}  # different texts have one hash
        return np.fromiter((known.setdefault(text, i) for i, text in enumerate(self)), np.int64, len(self))

    def groups(self) -> Iterator[list[int]]:
        """Yield the positions of each different text, in ascending order, by first position."""
        firsts = self.firsts()
        order = np.argsort(firsts, kind="stable")
        starts = np.flatnonzero(np.diff(firsts[order], prepend=-1))
        for start, end in zip(starts, np.append(starts, len(order))[1:], strict=True):
            yield order[start:end].tolist()
