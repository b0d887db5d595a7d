"""What the server computes is what the plain model computes, token by token."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from microbench.stack.layer import FLOAT8
from tests.hybrid import model as models
from tests.hybrid import plain, serving
from tests.hybrid.serving import Server

KINDS = ("lightning",) * 7 + ("mla",)  # as in Ling-2.6
MLA = KINDS.index("mla")
LENGTH = 96  # the plain model's, one program for all
# Of each row of logits, relative, and their mean. The other order of sums makes 1e-5 in float32.
EXACT = 1e-4, 3e-5
# Rows are rounded to float8 before experts, which makes a sixteenth of an element of a last bit now
# and then, and to bfloat16 behind them, which the plain model does not do.
ROUNDED = 0.1, 0.02
FAULT = 100 * EXACT[0]


@functools.cache
def model(kinds=KINDS, tensor=1, rows=None):
    return models.make(kinds, tensor, rows)


def prompt(seed, length):
    return np.random.default_rng(seed).integers(0, models.VOCABULARY, length).tolist()


def errors(request, made):
    """Of each row of logits, relative."""
    found, positions = serving.logits_of(request)
    wanted = plain.logits(made, request.tokens, LENGTH)[positions]
    return np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)


def check(request, made, first=0, limits=EXACT):
    """All of a request's logits from `first` on, and that its new tokens follow from them."""
    found = errors(request, made)
    assert found.max() < limits[0] and found.mean() < limits[1], found
    assert sorted(request.logits) == list(range(first, len(request.tokens) - 1))
    assert len(request.tokens) == request.wanted
    for position in range(request.given - 1, len(request.tokens) - 1):
        assert request.tokens[position + 1] == np.argmax(request.logits[position])


def serve(server, *requests):
    """Submits (tokens, wanted) and serves until all is done."""
    made = [server.submit(*request) for request in requests]
    for _ in range(200):
        if not server.run():
            break
    assert not server.running and not server.waiting
    return made


MIXED = [(prompt(1, 45), 50), (prompt(2, 3), 12), (prompt(3, 17), 20), (prompt(4, 1), 9)]
SHORT = [(prompt(3, 17), 23), (prompt(7, 6), 12), (prompt(2, 3), 9), (prompt(4, 1), 7)]


def test_prompts_in_chunks_beside_decode():
    for request in serve(Server(model(), pages=20), *MIXED):
        check(request, model())


@pytest.mark.parametrize(
    ("tensor", "rows", "limits"),
    [(8, None, EXACT), (1, FLOAT8, ROUNDED)],
    ids=["8 devices", "float8 rows"],
)
def test_prompts_in_chunks_in_two_layers(tensor, rows, limits):
    made = model(KINDS[-2:], tensor, rows)
    for request in serve(Server(made, pages=20), *MIXED):
        check(request, made, limits=limits)


@functools.cache
def greedy(kinds=KINDS):
    """What the model says without drafts: prompt to all tokens."""
    made = serve(Server(model(kinds), pages=20), *SHORT)
    return [request.tokens for request in made]


def guesses(kinds=KINDS):
    """Trees behind the newest token: right and wrong children at two depths, a wrong one first."""

    def guess(tokens):
        known = next((t for t in greedy(kinds) if t[: len(tokens)] == tokens), tokens)
        right = [*known[len(tokens) : len(tokens) + 2], 0, 0][:2]
        wrong = [(right[0] + 1) % models.VOCABULARY, (right[1] + 1) % models.VOCABULARY]
        return [tokens[-1], wrong[0], right[0], wrong[1], right[1]], [-1, 0, 0, 2, 2]

    return guess


def with_drafts(made):
    server = Server(made, pages=20, drafts=guesses(made.kinds))
    return server, serve(server, *SHORT)


@pytest.mark.parametrize(("kinds", "tensor"), [(KINDS, 1), (KINDS[-2:], 4)])
def test_trees_of_drafts_change_nothing_but_the_number_of_steps(kinds, tensor):
    made = model(kinds, tensor)
    server, requests = with_drafts(made)
    for request in requests:
        check(request, made)
    assert server.accepted >= 12


PREFIX = prompt(5, 40)


def with_prefix(made):
    """A prompt, and then one that begins like it."""
    server = Server(made, pages=20)
    serve(server, (PREFIX, 41))
    (second,) = serve(server, (PREFIX[:38] + prompt(6, 7), 48))
    return server, second


def test_a_known_beginning_is_not_read_again():
    server, second = with_prefix(model())
    check(second, model(), first=32)
    server.forget_prefixes()
    assert not server.pages.used() and not server.slots.used()


# Seeded faults, each of one layer only, and of one that a server could make.


def other_batch(layer, change, good=models.one_layer):
    """A step in which one layer has a batch that was changed."""

    def one_layer(model, number, x, store, batch):
        return good(model, number, x, store, change(batch) if number == layer else batch)

    return one_layer


def off_by_one(batch):
    return batch._replace(positions=batch.positions + batch.positions % 2)


def rolled_later(batch):
    """Slots of others, except where prompts begin: the same others every time would be no fault."""
    others = jnp.roll(batch.slot_ids, 1)
    return batch._replace(slot_ids=jnp.where(batch.has_state.all(), others, batch.slot_ids))


FAULTS = {
    "rope off by one": (3, off_by_one),
    "rope off by one, latents": (MLA, off_by_one),
    "states of others": (5, rolled_later),
    "states not resumed": (0, lambda b: b._replace(has_state=b.has_state & False)),
    "pages of others": (MLA, lambda b: b._replace(page_indices=jnp.maximum(b.page_indices, 3))),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_layer_with_a_faulty_batch_is_noticed(name, monkeypatch):
    monkeypatch.setattr(models, "one_layer", other_batch(*FAULTS[name]))
    made = serve(Server(model(), pages=20), *SHORT)
    assert max(errors(request, model()).max() for request in made) > FAULT


def in_layer(layer, fault, good=models.accept):
    """A commit of which one layer makes a fault."""

    def accept(weights, *rest):
        return (fault if weights is model().shards[layer] else good)(weights, *rest)

    return accept


def no_commit(weights, k, v, states, *rest):
    return states


def commit_all(weights, k, v, states, batch, words, how, good=models.accept):
    return good(weights, k, v, states, batch, words | (words > 0) * jnp.uint32(31), how)


DRAFT_FAULTS = {
    "states not advanced": ("accept", in_layer(6, no_commit)),
    "drafts not rolled back": ("accept", in_layer(2, commit_all)),
    "latents not moved": ("move_latents", lambda cache, source, target: cache),
}


@pytest.mark.parametrize("name", DRAFT_FAULTS)
def test_a_layer_with_a_faulty_commit_is_noticed(name, monkeypatch):
    attribute, fault = DRAFT_FAULTS[name]
    greedy()
    monkeypatch.setattr(serving.models, attribute, fault)
    monkeypatch.setattr(serving.Server, "follow", follow_right)
    _, requests = with_drafts(model())
    assert max(errors(request, model()).max() for request in requests) > FAULT


def follow_right(self, work, logits):
    """The right path, whatever a faulty model thinks."""
    room = work.request.wanted - len(work.request.tokens)
    return [0, 2, 4][: max(room, 1)]


def stale_page(self, tokens, good=serving.Server.longest_prefix):
    found = good(self, tokens)
    if found:
        spare = [p for p in range(20) if p not in self.pages.used()]
        found = serving.Prefix([*found.pages[:-1], spare[0]], found.slot)
    return found


def copied_in_others(self, source, target, good=serving.Server.copy_state):
    before = self.stores[4]
    good(self, source, target)
    self.stores = (*self.stores[:4], before, *self.stores[5:])


PREFIX_FAULTS = {
    "state of the prefix not copied": ("copy_state", copied_in_others),
    "a stale page": ("longest_prefix", stale_page),
}


@pytest.mark.parametrize("name", PREFIX_FAULTS)
def test_a_layer_with_a_faulty_prefix_is_noticed(name, monkeypatch):
    attribute, fault = PREFIX_FAULTS[name]
    monkeypatch.setattr(serving.Server, attribute, fault)
    _, second = with_prefix(model())
    assert errors(second, model()).max() > FAULT
