"""The kernels themselves under the strict harness, in the server: a prompt, drafts, commits."""

import dataclasses

import numpy as np

from tests.hybrid import model as models
from tests.hybrid import plain
from tests.hybrid.serving import Server
from tests.hybrid.test_serving import LENGTH, check, prompt, serve
from tpukit import interpret


def foreseen(made):
    """Trees of drafts: a wrong one, the right one, and the right one behind it."""

    def guess(tokens):
        path = list(tokens)
        for _ in range(2):
            path.append(int(np.argmax(plain.logits(made, path, LENGTH)[-1])))
        first, second = path[-2:]
        return [tokens[-1], (first + 1) % models.VOCABULARY, first, second], [-1, 0, 0, 2]

    return guess


def test_steps_of_the_kernels():
    made = models.make(("mla", "lightning"))
    kernels = dataclasses.replace(made.config, attention="interpret")
    used = dataclasses.replace(made, config=kernels)
    server = Server(used, pages=6, slots=2, drafts=foreseen(made))
    with interpret.strict(interpret.MODES[0]):
        (request,) = serve(server, (prompt(7, 5), 12))
    check(request, made)
    assert server.accepted >= 3  # so that steps follow what was committed
