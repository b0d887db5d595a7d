"""The kernels themselves under the strict harness, in the server: a prompt, drafts, a commit."""

import dataclasses

from tests.hybrid import model as models
from tests.hybrid.serving import Server
from tests.hybrid.test_serving import check, prompt, serve
from tpukit import interpret


def chain(tokens):
    """A wrong draft, and one behind it."""
    return [tokens[-1], (tokens[-1] + 1) % models.VOCABULARY, tokens[-1]], [-1, 0, 1]


def test_steps_of_the_kernels():
    made = models.make(("mla", "lightning"))
    kernels = dataclasses.replace(made.config, attention="interpret")
    server = Server(dataclasses.replace(made, config=kernels), pages=6, slots=2, drafts=chain)
    with interpret.strict(interpret.MODES[0]):
        (request,) = serve(server, (prompt(7, 5), 7))
    check(request, made)
