"""Split ears into training and validation, with each group on one side.

`Links` forms the groups: whatever is linked, directly or through others, is one group. `choose_validation` chooses
groups so that every source contributes the requested share of its ears, and so do all sources together. Both depend
only on names and the seed, not on the order in which files are found.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass


class Links:
    """Groups of things that belong together (union-find): paths, identities, anything hashable."""

    def __init__(self) -> None:
        self._above: dict[Hashable, Hashable] = {}

    def find(self, thing: Hashable) -> Hashable:
        """Return the representative of a thing's group; the thing itself if nothing is linked to it."""
        top = thing
        while (above := self._above.get(top, top)) != top:
            top = above
        while (above := self._above.get(thing, thing)) != top:  # path compression
            self._above[thing], thing = top, above
        return top

    def link(self, things: Iterable[Hashable]) -> None:
        """Join the groups of these things."""
        first: Hashable = None
        for place, thing in enumerate(things):
            if place == 0:
                first = self.find(thing)
            else:
                self._above[self.find(thing)] = first

    def groups(self, things: Iterable[Hashable]) -> list[list]:
        """Return the things by group, in the order given; groups in the order of their first thing."""
        members: dict[Hashable, list] = defaultdict(list)
        for thing in things:
            members[self.find(thing)].append(thing)
        return list(members.values())


@dataclass(frozen=True)
class Group:
    """Ears that must stay on one side."""

    name: str  # unique, and the same in every run
    ears: Mapping[str, int]  # source -> number of ears


def choose_validation(groups: Sequence[Group], share: float, seed: int) -> set[int]:
    """Return the positions of the groups for validation: about `share` of the ears of every source, and of all.

    Groups are visited in an order given by the seed and their names. In a first pass a group is chosen if that brings
    the sources closer to the share. In a second pass a group is also chosen if that brings the total closer by more
    than it moves the sources away; this matters if sources are too small to be divided (a source per person). With two
    or more groups, neither side is empty.
    """
    order = sorted(range(len(groups)), key=lambda place: _sort_key(seed, groups[place].name))
    balance = _Balance(groups, share)
    chosen: set[int] = set()
    for with_total in (False, True):
        for place in order:
            group = groups[place]
            change = balance.by_source(group) + with_total * balance.of_total(group)
            if place not in chosen and change < -_TOLERANCE:
                chosen.add(place)
                balance.move(group)
    if len(groups) > 1 and len(chosen) in (0, len(groups)):
        sign = -1 if chosen else 1
        place = min(order, key=lambda p: balance.by_source(groups[p], sign) + balance.of_total(groups[p], sign))
        chosen ^= {place}
    return chosen


class _Balance:
    """How far validation is from the requested share, in ears."""

    def __init__(self, groups: Sequence[Group], share: float):
        total: Counter[str] = Counter()
        for group in groups:
            total.update(group.ears)
        self._target = {source: share * count for source, count in total.items()}
        self._total_target = share * total.total()
        self._chosen: Counter[str] = Counter()
        self._total_chosen = 0

    def by_source(self, group: Group, sign: int = 1) -> float:
        """Return by how much adding the group (removing it, if `sign` is -1) moves the sources from their shares."""
        return sum(
            abs(self._chosen[source] + sign * count - self._target[source])
            - abs(self._chosen[source] - self._target[source])
            for source, count in group.ears.items()
        )

    def of_total(self, group: Group, sign: int = 1) -> float:
        """As `by_source`, for all ears together."""
        excess = self._total_chosen - self._total_target
        return abs(excess + sign * sum(group.ears.values())) - abs(excess)

    def move(self, group: Group) -> None:
        """Count the group as chosen."""
        self._chosen.update(group.ears)
        self._total_chosen += sum(group.ears.values())


_TOLERANCE = 1e-9  # ears: sums of shares are not exact


def _sort_key(seed: int, name: str) -> bytes:
    """Return a pseudo-random key that depends on the seed and the name only: other groups do not change it."""
    return hashlib.sha256(f"{seed}\n{name}".encode("utf-8", "surrogateescape")).digest()
