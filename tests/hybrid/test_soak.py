"""Streams of requests that nobody planned: nothing leaks, nobody writes what another one reads."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.hybrid import model as models
from tests.hybrid import serving
from tests.hybrid.pool import Exhausted, Pool
from tests.hybrid.serving import Server
from tests.hybrid.test_serving import EXACT, KINDS, errors, model, prompt

BEGINNINGS = [prompt(seed, 50) for seed in (20, 21)]
PAGES, SLOTS = 14, 4  # a request takes 2 to 6 of these pages


class Arrive(NamedTuple):
    """A request whose first `known` tokens, of `length`, are those of a beginning."""

    length: int
    more: int = 1
    beginning: int = 0
    known: int = 50


class Cancel(NamedTuple):
    """The end of one of the requests so far."""

    which: int


class Step(NamedTuple):
    """A step of the server."""


ARRIVALS = st.builds(
    Arrive,
    length=st.sampled_from([0, 1, 5, 16, 17, 32, 33, 40, 50]),
    more=st.sampled_from([0, 1, 2, 6]),
    beginning=st.integers(0, 1),
    known=st.sampled_from([0, 16, 32, 50]),
)
EVENTS = st.one_of(ARRIVALS, st.builds(Step), st.builds(Step), st.builds(Cancel, st.integers(0, 9)))


class Broken(Exception):
    """An invariant does not hold."""


def guess(tokens):
    """A tree of drafts that is seldom right."""
    a, b = (7 * tokens[-1] + 3) % models.VOCABULARY, (5 * tokens[-1] + 1) % models.VOCABULARY
    return [tokens[-1], a, b, a], [-1, 0, 0, 2]


def foreseen(tokens):
    """Of a model without layers, whose next token follows from the last one: right every time."""
    path = [tokens[-1]]
    for _ in range(2):
        row = models.unembed(empty().head, empty().embedding[jnp.array(path[-1:])])
        path.append(int(np.argmax(row)))
    return [path[0], 0, path[1], path[2]], [-1, 0, 0, 2]


def empty():
    """A model without layers: all that is left is bookkeeping, and that is quick."""
    return model(())


class Watched(Server):
    """A server that checks itself in every step."""

    exhausted = 0

    def open(self, request):
        """Counts how often there is no room."""
        try:
            super().open(request)
        except Exhausted:
            self.exhausted += 1
            raise

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
            (array,) = map(np.array, jax.tree.leaves(store))
            pages = self.pages.size if kind == "mla" else len(array)
            found.append(array.reshape(pages, -1))
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


def serve(server, events):
    """Requests after a stream of events, those that were cancelled left out."""
    kept, number = [], 0
    for event in events:
        if isinstance(event, Arrive):
            beginning = BEGINNINGS[event.beginning][: event.known]
            number += 1
            tokens = (beginning + prompt(100 + number, event.length))[: event.length]
            kept.append(server.submit(tokens, event.length + event.more))
        elif isinstance(event, Cancel) and kept:
            server.cancel(kept.pop(event.which % len(kept)))
        else:
            server.run()
    for _ in range(500):
        if not server.run():
            break
    return kept


def check(server, kept):
    """All was served, what was served is right, and nothing is held any more."""
    assert not server.running
    assert not server.waiting
    for request in kept:
        assert len(request.tokens) == (request.wanted if request.given else 0)
        if request.logits and server.model.kinds:
            assert errors(request, server.model).max() < EXACT[0]
    server.forget_prefixes()
    assert not server.pages.used()
    assert not server.slots.used()


def bookkeeping(events, pages, drafts):
    server = Watched(empty(), pages=pages, slots=SLOTS, drafts=drafts)
    check(server, serve(server, events))


# More prompts than pages, a beginning twice, one cancelled, one empty.
BUSY = [
    Arrive(50, 6), Arrive(33, 2, 1, 0), Step(), Step(), Arrive(40, 1, 0, 32), Arrive(0), Cancel(1),
    Arrive(50, 6, 1, 0), Arrive(16, 0), Step(), Arrive(40, 2, 0, 36), Step(), Arrive(1, 6),
]  # fmt: skip
STREAMS = st.lists(EVENTS, min_size=1, max_size=40)
EXAMPLES = settings().max_examples


@settings(max_examples=4 * EXAMPLES)
@given(STREAMS, st.sampled_from([6, PAGES]), st.sampled_from([None, guess, foreseen]))
def test_nothing_leaks_whatever_comes(events, pages, drafts):
    bookkeeping(events, pages, drafts)


@settings(max_examples=max(2, EXAMPLES // 8))
@given(st.lists(EVENTS, min_size=4, max_size=16))
@example(BUSY)
def test_streams_are_served_right(events):
    server = Watched(model(KINDS[-2:]), pages=PAGES, slots=SLOTS, drafts=guess)
    check(server, serve(server, events))


def test_a_busy_stream_is_one():
    server = Watched(empty(), pages=PAGES, slots=SLOTS, drafts=foreseen)
    kept = serve(server, BUSY)
    assert sum(min(r.logits) > 0 for r in kept if r.logits) >= 1  # a known beginning
    assert server.accepted >= 5
    assert server.exhausted


def uncounted(self, numbers):
    return list(numbers)


def leak_slot(self, request):
    self.pages.give_back(request.pages)
    request.pages, request.slot = [], serving.NOBODY


def snapshot_elsewhere(self, works, bounds, good=Server.snapshots):
    rows, targets, keeps = good(self, works, bounds)
    return rows, [(target + 1) % SLOTS if target >= 0 else target for target in targets], keeps


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
        serve(Watched(model(KINDS[-2:]), pages=PAGES, slots=SLOTS, drafts=guess), BUSY)


def test_a_stream_that_fails_is_shrunk_and_printed(monkeypatch):
    monkeypatch.setattr(Server, "release", leak_slot)
    with pytest.raises(Broken) as failed:
        test_nothing_leaks_whatever_comes()
    text = "\n".join(failed.value.__notes__)
    assert "events=[Arrive(length=1" in text.replace("\n", "").replace(" ", ""), text
    assert text.count("Arrive(") == 1, text  # the shortest: one request that ends
    assert text.count("Step(") == text.count("Cancel(") == 0
