"""A server in miniature: continuous batching over a cache of pages and a pool of states.

A step is one ragged batch of all that there is to do: chunks of prompts, single tokens, and trees
of drafts. Latents live in pages, of which a request owns as many as its tokens need; states in
slots, one per request. A prompt that begins like an earlier one takes over its whole pages of
latents, which nobody writes any more, and a copy of the state that was kept where the last of them
ends.

Drafts are a tree whose root is the newest token, in no store yet. Their latents go to the places
behind the request's tokens, where the next step overwrites them: rolling back is forgetting. States
stay as they are until `commit` advances them along the accepted path, whose latents move together.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

import gla
from tests.hybrid import model as models
from tests.hybrid.pool import Exhausted, Pool

TOKENS, REQUESTS, SNAPSHOTS, PAGES = 32, 4, 2, 32  # of a step: one program for all
NOBODY = -1


@dataclasses.dataclass
class Request:
    """A sequence that is being served.

    Attributes:
      tokens: known so far; those behind `done` are still to be read.
      wanted: how many tokens it shall have in the end.
      given: how many of them were submitted.
      pages, slot: what it owns, or shares.
      done: tokens that are in the stores.
      logits: behind each token that the server has computed, by its position.
    """

    tokens: list
    wanted: int
    given: int = 0
    pages: list = dataclasses.field(default_factory=list)
    slot: int = NOBODY
    done: int = 0
    logits: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Prefix:
    """What is kept of a prompt: whole pages, and the state behind them."""

    pages: list
    slot: int


@dataclasses.dataclass
class Work:
    """A request's part of a step.

    Attributes:
      request: whose.
      rows: tokens to compute.
      parents: of each its parent among them, or None for a chain that is to stay.
      keep: how many tokens the prefix has that ends among these rows and is to be kept, or 0.
    """

    request: Request
    rows: list
    parents: list | None = None
    keep: int = 0


class Server:
    """Serves requests with a model.

    Args:
      model: a `models.Model`.
      pages, slots: sizes of the pools.
      drafts: of a request's tokens, the tree that is guessed behind them: (tokens, parents), the
        first being the newest token; or None.

    Attributes:
      running, waiting: requests.
      prefixes: what is kept of prompts.
      accepted: how many drafts have been right.
    """

    def __init__(self, model, pages=12, slots=6, drafts=None):
        self.model, self.drafts = model, drafts
        self.pages, self.slots = Pool(pages), Pool(slots)
        self.stores = models.stores_of(model, pages, slots)
        self.running, self.waiting, self.prefixes = [], [], {}
        self.accepted = 0

    def submit(self, tokens, wanted):
        """A request that shall have `wanted` tokens in the end."""
        request = Request(list(tokens), wanted, len(tokens))
        self.waiting.append(request)
        return request

    def cancel(self, request):
        """Ends a request at once."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.running:
            self.running.remove(request)
            self.release(request)

    def release(self, request):
        """Gives back what a request holds."""
        self.pages.give_back(request.pages)
        self.slots.give_back([request.slot])
        request.pages, request.slot = [], NOBODY

    def forget_prefixes(self):
        """Gives back what is kept of prompts."""
        for prefix in self.prefixes.values():
            self.pages.give_back(prefix.pages)
            self.slots.give_back([prefix.slot])
        self.prefixes.clear()

    # Admission.

    def admit(self):
        """Starts waiting requests, in order, while there is room for all that they will need."""
        while self.waiting and len(self.running) < REQUESTS:
            request = self.waiting[0]
            if not request.tokens or request.wanted <= len(request.tokens):
                self.waiting.pop(0)
                continue
            try:
                self.open(request)
            except Exhausted:
                if not self.prefixes:
                    return
                self.forget_prefixes()
                continue
            self.running.append(self.waiting.pop(0))

    def open(self, request):
        """Gives a request its slot and pages, some of them with what they hold.

        Raises:
          Exhausted: there is no room; nothing is held.
        """
        size = self.model.config.page_size
        known = self.longest_prefix(request.tokens)
        shared = self.pages.share(known.pages) if known else []
        try:
            slot = self.slots.take()
            most = -(-(request.wanted + TOKENS) // size)
            try:
                own = self.pages.take(most - len(shared))
            except Exhausted:
                self.slots.give_back(slot)
                raise
        except Exhausted:
            self.pages.give_back(shared)
            raise
        request.pages, request.slot = shared + own, slot[0]
        if known:
            request.done = len(shared) * size
            self.copy_state(known.slot, request.slot)

    def longest_prefix(self, tokens):
        """The longest that is kept, and shorter than the tokens."""
        known = (n for n in self.prefixes if len(n) < len(tokens))
        fitting = [n for n in known if n == tuple(tokens[: len(n)])]
        return self.prefixes[max(fitting, key=len)] if fitting else None

    def copy_state(self, source, target):
        """Copies a state in all layers of linear attention."""
        slots = jnp.array([source], jnp.int32), jnp.array([target], jnp.int32)
        self.stores = tuple(
            gla.copy_slots(store, *slots) if kind == "lightning" else store
            for kind, store in zip(self.model.kinds, self.stores, strict=True)
        )

    # A step.

    def run(self):
        """One step; False if there is nothing to do."""
        self.admit()
        works = self.plan()
        if not works:
            return False
        batch, tokens, keeps = self.batch_of(works)
        logits, self.stores, made = models.step(self.model, tokens, self.stores, batch)
        rows, words = np.asarray(logits), np.zeros((REQUESTS, 2), np.uint32)
        moves, start = [], 0
        for n, work in enumerate(works):
            mine = rows[start : start + len(work.rows)]
            start += len(work.rows)
            if work.parents is None:
                self.advance(work.request, work.rows, mine)
            else:
                path = self.follow(work, mine)
                words[n, 0] = sum(1 << draft for draft in path)
                self.accepted += len(path) - 1
                moves += self.moves_of(work.request, path)
                self.advance(work.request, [work.rows[i] for i in path], mine[path])
        if any(work.parents is not None for work in works):
            self.commit(batch, made, words, moves)
        for prompt, prefix in keeps:
            self.prefixes[prompt] = prefix
        for request in [r for r in self.running if len(r.tokens) >= r.wanted]:
            self.running.remove(request)
            self.release(request)
        return True

    def plan(self):
        """What each running request does in this step, within the tokens of a step."""
        left, works, size = TOKENS, [], self.model.config.page_size
        for request in self.running:
            rest = request.tokens[request.done :]
            if len(rest) == 1 and self.drafts is not None:
                guess, parents = self.drafts(request.tokens)
                work = Work(request, guess, parents)
            else:
                work = Work(request, rest[:left])
                whole = (request.done + len(work.rows)) // size * size
                if request.done < whole and whole < len(request.tokens) and len(rest) > 1:
                    work.keep = whole
            if work.rows and len(work.rows) <= left:
                works.append(work)
                left -= len(work.rows)
        return works

    def batch_of(self, works):
        """The batch, its tokens, and what will be kept of prompts."""
        count = len(works)
        lens = [len(work.rows) for work in works]
        bounds = np.cumsum([0, *lens] + [0] * (REQUESTS - count))
        positions, tokens = np.zeros(TOKENS, np.int32), np.zeros(TOKENS, np.int32)
        words = np.zeros((TOKENS, 2), np.uint32)
        for begin, work in zip(bounds, works, strict=False):
            part = slice(begin, begin + len(work.rows))
            tokens[part] = work.rows
            depth = np.arange(len(work.rows))
            words[part, 0] = [(2 << d) - 1 for d in depth]
            if work.parents is not None:
                depth, words[part, 0] = tree(work.parents)
            positions[part] = work.request.done + depth
        pages = [work.request.pages for work in works]
        offsets = np.cumsum([0, *map(len, pages)] + [0] * (REQUESTS - count))
        listed = [page for owned in pages for page in owned]
        listed += [NOBODY] * (PAGES - len(listed))
        rows, targets, keeps = self.snapshots(works, bounds)

        def of(values, fill):
            return jnp.array([*values] + [fill] * (REQUESTS - count))

        batch = models.Batch(
            positions=jnp.asarray(positions),
            cu_q_lens=jnp.asarray(bounds, jnp.int32),
            kv_lens=of((w.request.done + n for w, n in zip(works, lens, strict=True)), 0),
            page_indices=jnp.asarray(listed, jnp.int32),
            page_offsets=jnp.asarray(offsets, jnp.int32),
            slot_ids=of((work.request.slot for work in works), NOBODY),
            has_state=of((work.request.done > 0 for work in works), False),
            drafts=gla.Drafts(
                of((w.parents is not None for w in works), False), jnp.asarray(words)
            ),
            snapshots=gla.Snapshots(jnp.array(rows, jnp.int32), jnp.array(targets, jnp.int32)),
        )
        return batch, jnp.asarray(tokens), keeps

    def snapshots(self, works, bounds):
        """Rows behind which states are kept, their slots, and the prefixes that this makes."""
        rows, targets, keeps = [], [], []
        for begin, work in zip(bounds, works, strict=False):
            prompt = tuple(work.request.tokens[: work.keep])
            known = prompt in self.prefixes or prompt in (kept for kept, _ in keeps)
            if not work.keep or known or len(rows) == SNAPSHOTS:
                continue
            try:
                (slot,) = self.slots.take()
            except Exhausted:
                continue
            rows.append(begin + work.keep - work.request.done - 1)
            targets.append(slot)
            whole = work.request.pages[: work.keep // self.model.config.page_size]
            keeps.append((prompt, Prefix(self.pages.share(whole), slot)))
        fill = [NOBODY] * (SNAPSHOTS - len(rows))
        return rows + fill, targets + fill, keeps

    # What a step found.

    def advance(self, request, rows, logits):
        """Rows are in the stores now; the best token behind the last one is the next."""
        for n, row in enumerate(logits):
            request.logits[request.done + n] = row
        request.done += len(rows)
        request.tokens[request.done - len(rows) : request.done] = rows
        if request.done == len(request.tokens):
            request.tokens.append(int(np.argmax(logits[-1])))

    def follow(self, work, logits):
        """The drafts that the model agrees with, from the root: each is its parent's best token."""
        path, last = [0], len(work.rows)
        room = work.request.wanted - len(work.request.tokens)
        while len(path) < room:
            best = int(np.argmax(logits[path[-1]]))
            children = [i for i in range(last) if work.parents[i] == path[-1] and i]
            agreed = [i for i in children if work.rows[i] == best]
            if not agreed:
                break
            path.append(agreed[0])
        return path

    def moves_of(self, request, path):
        """Where the latents of a path are, and where they belong."""
        size = self.model.config.page_size

        def place(position):
            return request.pages[position // size], position % size

        return [
            (place(request.done + draft), place(request.done + n)) for n, draft in enumerate(path)
        ]

    def commit(self, batch, made, words, moves):
        """Advances states by accepted drafts, and brings their latents together."""
        source, target = np.zeros((TOKENS, 2), np.int32), np.full((TOKENS, 2), NOBODY, np.int32)
        if moves:
            source[: len(moves)], target[: len(moves)] = np.array(moves).swapaxes(0, 1)
        stores = []
        layers = zip(self.model.kinds, self.model.shards, self.stores, made, strict=True)
        for kind, weights, store, kept in layers:
            if kind == "mla":
                stores.append(models.move_latents(store, source, target))
            else:
                how = self.model.config.attention
                stores.append(models.accept(weights, *kept, store, batch, jnp.asarray(words), how))
        self.stores = tuple(stores)


def tree(parents):
    """Depth of each draft, and its word of ancestors; parents come first."""
    depth, words = np.zeros(len(parents), np.int32), np.zeros(len(parents), np.uint32)
    for i, parent in enumerate(parents):
        words[i] = 1 << i
        if i:
            depth[i] = depth[parent] + 1
            words[i] |= words[parent]
    return depth, words


def logits_of(request):
    """[n, VOCABULARY] in the order of positions, and the positions."""
    positions = sorted(request.logits)
    return np.stack([request.logits[p] for p in positions]), np.array(positions)


__all__ = ["Request", "Server", "logits_of", "tree"]
