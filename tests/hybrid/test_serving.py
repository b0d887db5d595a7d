"""What the server computes is what the plain model computes, token by token."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.hybrid import model as models
from tests.hybrid import plain, serving
from tests.hybrid.serving import Server

KINDS = ("lightning", "mla", "lightning")
LENGTH = 96  # the plain model's, one program for all
# The experts' rows are rounded to float8, which makes a sixteenth of an element of a last bit now
# and then. Seeded faults are far larger.
ROW, MEAN, FAULT = 0.1, 0.02, 0.15


@functools.cache
def model(tensor=1):
    return models.make(KINDS, tensor=tensor)


def prompt(seed, length):
    return np.random.default_rng(seed).integers(0, models.VOCABULARY, length).tolist()


def errors(request, made):
    """Of each row of logits, relative."""
    found, positions = serving.logits_of(request)
    wanted = plain.logits(made, request.tokens, LENGTH)[positions]
    return np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)


def check(request, made, first=0):
    """All of a request's logits from `first` on, and that its new tokens follow from them."""
    found = errors(request, made)
    assert found.max() < ROW and found.mean() < MEAN, found.round(3)
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


@pytest.mark.parametrize("tensor", [1, 8])
def test_prompts_in_chunks_beside_decode(tensor):
    made = model(tensor)
    for request in serve(Server(made, pages=20), *MIXED):
        check(request, made)


@functools.cache
def greedy():
    """What the model says without drafts: prompt to all tokens."""
    requests = serve(Server(model(), pages=20), *MIXED)
    return [request.tokens for request in requests]


def guesses(tokens):
    """A tree behind the newest token: right and wrong children at two depths, a wrong one first."""
    known = next((t for t in greedy() if t[: len(tokens)] == tokens), tokens)
    right = [*known[len(tokens) : len(tokens) + 2], 0, 0][:2]
    wrong = [(right[0] + 1) % models.VOCABULARY, (right[1] + 1) % models.VOCABULARY]
    return [tokens[-1], wrong[0], right[0], wrong[1], right[1]], [-1, 0, 0, 2, 2]


def with_drafts(made):
    server = Server(made, pages=20, drafts=guesses)
    return server, serve(server, *MIXED)


@pytest.mark.parametrize("tensor", [1, 4])
def test_trees_of_drafts_change_nothing_but_the_number_of_steps(tensor):
    server, requests = with_drafts(model(tensor))
    for request in requests:
        check(request, model(tensor))
    assert server.accepted >= 6


PREFIX = prompt(5, 40)


def with_prefix(made):
    """A prompt, and then one that begins like it."""
    server = Server(made, pages=20)
    serve(server, (PREFIX, 42))
    (second,) = serve(server, (PREFIX[:38] + prompt(6, 7), 48))
    return server, second


def test_a_known_beginning_is_not_read_again():
    made = model()
    server, second = with_prefix(made)
    check(second, made, first=32)
    server.forget_prefixes()
    assert not server.pages.used() and not server.slots.used()


# Seeded faults, each of one that a server could make.


def other_batch(change):
    """A step whose batch was changed."""
    good = serving.models.step
    return lambda model, tokens, stores, batch: good(model, tokens, stores, change(batch))


FAULTS = {
    "rope off by one": lambda b: b._replace(positions=b.positions + b.positions % 2),
    "states of others": lambda b: b._replace(slot_ids=jnp.roll(b.slot_ids, 1)),
    "states not resumed": lambda b: b._replace(has_state=b.has_state & False),
    "pages of others": lambda b: b._replace(page_indices=jnp.maximum(b.page_indices, 3)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_batch_is_noticed(name, monkeypatch):
    monkeypatch.setattr(serving.models, "step", other_batch(FAULTS[name]))
    made = serve(Server(model(), pages=20), *MIXED)
    assert max(errors(request, model()).max() for request in made) > FAULT


def no_commit(weights, k, v, states, *rest):
    return states


def commit_all(weights, k, v, states, batch, words, how, good=models.accept):
    return good(weights, k, v, states, batch, words | (words > 0) * jnp.uint32(31), how)


DRAFT_FAULTS = {
    "states not advanced": ("accept", no_commit),
    "drafts not rolled back": ("accept", commit_all),
    "latents not moved": ("move_latents", lambda cache, source, target: cache),
}


@pytest.mark.parametrize("name", DRAFT_FAULTS)
def test_a_faulty_commit_is_noticed(name, monkeypatch):
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


PREFIX_FAULTS = {
    "state of the prefix not copied": ("copy_state", lambda self, source, target: None),
    "a stale page": ("longest_prefix", stale_page),
}


@pytest.mark.parametrize("name", PREFIX_FAULTS)
def test_a_faulty_prefix_is_noticed(name, monkeypatch):
    attribute, fault = PREFIX_FAULTS[name]
    monkeypatch.setattr(serving.Server, attribute, fault)
    _, second = with_prefix(model())
    assert errors(second, model()).max() > FAULT
