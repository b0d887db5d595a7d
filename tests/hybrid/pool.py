"""Who owns which page or slot: a free list with a count of readers."""

import collections


class Exhausted(Exception):
    """There is no page or slot left."""


class Pool:
    """Numbers from 0 to size - 1, each free or held by one or more holders."""

    def __init__(self, size):
        self.size = size
        self.free, self.holders = list(range(size))[::-1], collections.Counter()

    def take(self, count=1):
        """Numbers that nobody holds, or none at all.

        Raises:
          Exhausted: there are not as many.
        """
        if len(self.free) < count:
            raise Exhausted
        taken = [self.free.pop() for _ in range(count)]
        self.holders.update(taken)
        return taken

    def share(self, numbers):
        """One more holder of each."""
        self.holders.update(numbers)
        return list(numbers)

    def give_back(self, numbers):
        """One holder less of each; what nobody holds is free."""
        for number in numbers:
            self.holders[number] -= 1
            if not self.holders[number]:
                del self.holders[number]
                self.free.append(number)

    def used(self):
        """Numbers that somebody holds."""
        return set(self.holders)
