"""Streams of requests that nobody planned: nothing leaks, nobody writes what another one reads."""

import random

import numpy as np
import pytest

from tests.hybrid import model as models
from tests.hybrid import serving
from tests.hybrid.pool import Pool
from tests.hybrid.serving import Server
from tests.hybrid.test_serving import FAULT, errors, model, prompt

BEGINNINGS = [prompt(seed, 36) for seed in (20, 21)]


class Broken(Exception):
    """An invariant does not hold."""


def guess(tokens):
    """A tree of drafts that is seldom right."""
    a, b = (7 * tokens[-1] + 3) % models.VOCABULARY, (5 * tokens[-1] + 1) % models.VOCABULARY
    return [tokens[-1], a, b, a], [-1, 0, 0, 2]


class Watched(Server):
    """A server that checks itself in every step."""

    def plan(self):
        """Notes who may write what."""
        works, size = super().plan(), self.model.config.page_size
        self.pages_to_write = {p for w in works for p in w.request.pages[w.request.done // size :]}
        for page in self.pages_to_write:
            if self.pages.holders[page] != 1:
                raise Broken(f"page {page} is written, and held {self.pages.holders[page]} times")
        self.slots_to_write = {request.slot for request in self.running}
        self.kept = {prefix.slot for prefix in self.prefixes.values()}
        return works

    def run(self):
        """A step, and what it has to leave as it was."""
        before = self.contents()
        busy = super().run()
        new = {prefix.slot for prefix in self.prefixes.values()} - self.kept
        for kind, old, now in zip(self.model.kinds, before, self.contents(), strict=True):
            allowed = self.pages_to_write if kind == "mla" else self.slots_to_write | new
            changed = {n for n in range(len(old)) if old[n].tobytes() != now[n].tobytes()}
            if not changed <= allowed:
                raise Broken(f"{kind}: {changed - allowed} changed, which nobody may write")
        self.check_owners()
        return busy

    def contents(self):
        """Every layer's pages or slots, on the host."""
        found = []
        for kind, store in zip(self.model.kinds, self.stores, strict=True):
            array = np.array(store.words if kind == "mla" else store)
            found.append(array.reshape(store.num_pages, -1) if kind == "mla" else array)
        return found

    def check_owners(self):
        """Holders are the running requests and the prefixes, no more and no less."""
        keepers = [*self.running, *self.prefixes.values()]
        for pool, held in (
            (self.pages, [page for keeper in keepers for page in keeper.pages]),
            (self.slots, [keeper.slot for keeper in keepers]),
        ):
            if sorted(pool.holders.elements()) != sorted(held):
                raise Broken(f"held {sorted(held)}, counted {sorted(pool.holders.elements())}")
        slots = [keeper.slot for keeper in keepers]
        if len(set(slots)) != len(slots):
            raise Broken(f"slots {slots} have two owners")


def stream(seed, steps=30):
    """A server after a random stream, and the requests that it was not told to cancel."""
    rng = random.Random(seed)
    server, kept = Watched(model(), pages=14, slots=4, drafts=guess), []
    for _ in range(steps):
        if rng.random() < 0.5:
            length = rng.choice([0, 1, 5, 33, 40, 50])
            beginning = rng.choice(BEGINNINGS)[: max(0, length - rng.randrange(8))]
            tokens = beginning + [rng.randrange(models.VOCABULARY) for _ in range(length)]
            kept.append(server.submit(tokens[:length], length + rng.choice([0, 1, 6])))
        if kept and rng.random() < 0.1:
            server.cancel(kept.pop(rng.randrange(len(kept))))
        server.run()
    while server.run():
        pass
    return server, kept


@pytest.mark.parametrize("seed", [0, 1])
def test_random_streams(seed):
    server, kept = stream(seed)
    assert not server.running and not server.waiting
    served = [request for request in kept if request.logits]
    assert len(served) >= 5 and sum(min(r.logits) > 0 for r in served) >= 1  # some known beginnings
    assert max(errors(request, server.model).max() for request in served) < FAULT
    for request in kept:
        assert len(request.tokens) == (request.wanted if request.given else 0)
    server.forget_prefixes()
    assert not server.pages.used() and not server.slots.used()


def uncounted(self, numbers):
    return list(numbers)


def leak_slot(self, request):
    self.pages.give_back(request.pages)
    request.pages, request.slot = [], serving.NOBODY


def snapshot_elsewhere(self, works, bounds, good=Server.snapshots):
    rows, targets, keeps = good(self, works, bounds)
    return rows, [(target + 1) % 4 if target >= 0 else target for target in targets], keeps


def one_page_early(self, request, good=Server.open):
    good(self, request)
    if request.done:
        request.done -= 1


FAULTS = {
    "shared pages not counted": (Pool, "share", uncounted),
    "slots never given back": (Server, "release", leak_slot),
    "snapshots to another slot": (Server, "snapshots", snapshot_elsewhere),
    "a shared page is written": (Server, "open", one_page_early),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faulty_bookkeeping_is_noticed(name, monkeypatch):
    owner, attribute, fault = FAULTS[name]
    monkeypatch.setattr(owner, attribute, fault)
    with pytest.raises(Broken):
        stream(0)
