"""Two sides of a set of ears, training and validation, with nothing of one group on both.

`Links` makes the groups: whatever is linked, through others too, is one. `choose_validation` picks groups so that every
source gives the wanted share of its ears, and so does the whole. Both depend on names and the seed alone, not on the
order in which files were found.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass


class Links:
    """Which things belong together (union-find): paths, names of people, anything hashable."""

    def __init__(self) -> None:
        self._above: dict[Hashable, Hashable] = {}

    def find(self, thing: Hashable) -> Hashable:
        """The representative of a thing's group; the thing itself where nothing is linked to it."""
        top = thing
        while (above := self._above.get(top, top)) != top:
            top = above
        while (above := self._above.get(thing, thing)) != top:  # the next time it is near
            self._above[thing], thing = top, above
        return top

    def link(self, things: Iterable[Hashable]) -> None:
        """Put things, and all that is linked to them, into one group."""
        first: Hashable = None
        for place, thing in enumerate(things):
            if place == 0:
                first = self.find(thing)
            else:
                self._above[self.find(thing)] = first

    def groups(self, things: Iterable[Hashable]) -> list[list]:
        """The things by group; groups by their first thing, things in the order given."""
        members: dict[Hashable, list] = defaultdict(list)
        for thing in things:
            members[self.find(thing)].append(thing)
        return list(members.values())


@dataclass(frozen=True)
class Group:
    """Ears that must stay on one side. `name`: the same in every run, and of no other group."""

    name: str
    ears: Mapping[str, int]  # source -> how many


def choose_validation(groups: Sequence[Group], share: float, seed: int) -> set[int]:
    """Places of the groups to validate on: about `share` of the ears of every source, and of all.

    The groups are taken in an order that the seed and their names fix. A group joins if it brings the sources nearer to
    their share; then others join if that brings the whole nearer to it by more than it takes the sources away, which
    matters where sources are too small to be divided (a source per person). Neither side stays empty if there are two
    groups or more.
    """
    order = sorted(range(len(groups)), key=lambda place: _drawn(seed, groups[place].name))
    balance = _Balance(groups, share)
    chosen: set[int] = set()
    for whole in (False, True):
        for place in order:
            group = groups[place]
            if place not in chosen and balance.by_source(group) + whole * balance.by_all(group) < -_LEAST:
                chosen.add(place)
                balance.move(group)
    if len(groups) > 1 and len(chosen) in (0, len(groups)):
        sign = -1 if chosen else 1
        place = min(order, key=lambda p: balance.by_source(groups[p], sign) + balance.by_all(groups[p], sign))
        chosen ^= {place}
    return chosen


class _Balance:
    """How far validation is from the wanted share, in ears."""

    def __init__(self, groups: Sequence[Group], share: float):
        total: Counter[str] = Counter()
        for group in groups:
            total.update(group.ears)
        self._wanted = {source: share * count for source, count in total.items()}
        self._wanted_of_all = share * total.total()
        self._taken: Counter[str] = Counter()
        self._taken_of_all = 0

    def by_source(self, group: Group, sign: int = 1) -> float:
        """How much farther from their shares the sources are with the group (without it, if `sign` is -1)."""
        return sum(
            abs(self._taken[source] + sign * count - self._wanted[source])
            - abs(self._taken[source] - self._wanted[source])
            for source, count in group.ears.items()
        )

    def by_all(self, group: Group, sign: int = 1) -> float:
        """The same of all ears together."""
        missing = self._taken_of_all - self._wanted_of_all
        return abs(missing + sign * sum(group.ears.values())) - abs(missing)

    def move(self, group: Group) -> None:
        self._taken.update(group.ears)
        self._taken_of_all += sum(group.ears.values())


_LEAST = 1e-9  # ears; sums of shares are not exact


def _drawn(seed: int, name: str) -> bytes:
    """A number drawn for a name: it does not change when other groups come or go."""
    return hashlib.sha256(f"{seed}\n{name}".encode("utf-8", "surrogateescape")).digest()
