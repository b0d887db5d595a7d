"""The numerics card of docs/gla.md, measured: `python -m tests.gla.numerics` prints its tables.

A state goes through 8 calls of one ragged batch; the wanted values are those of one recurrence in
float64 on the same bf16 q, k, v, whose state is never rounded.
"""

import dataclasses
import functools
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np

import gla
from tests.gla import oracle
from tests.gla.test_gla import run

CALLS, LENGTHS, HEADS = 8, [70, 1, 17, 1], 2
RULES = {
    "Lightning": {},
    "decays per token": {"per_token": True},
    "decays per key channel": {"per_channel": True},
    "Gated DeltaNet": {"per_token": True, "delta": True},
    "KDA": {"per_channel": True, "delta": True},
}
STATES = {"f32": np.float32, "bf16": ml_dtypes.bfloat16}


def batches(rule, state=np.float32):
    """One batch per call; log decays of tokens are drawn from -1 to -0.001, evenly in their log."""
    for n in range(CALLS):
        options = {"state": state, "slots": range(4), "known": [n > 0] * 4, **RULES[rule]}
        batch = oracle.random_batch(100 + n, LENGTHS, **options)
        low, high = np.log(1e-3), 0.0
        g = -np.exp(np.random.default_rng(200 + n).uniform(low, high, batch.g.shape))
        if rule == "Lightning":  # the strongest and the weakest of 64 heads
            g = np.asarray(gla.ling_decay(64, layer=0, num_layers=80).g)[[0, 63]]
        yield dataclasses.replace(batch, g=g.astype(np.float32), pool=0 * batch.pool)


def chained(rule, call, state=np.float32, stored=None):
    """o of all calls and the last states; `call(batch) -> (o, pool)`, `stored(pool)` the pool."""
    outputs, pool = [], None
    for batch in batches(rule, state):
        o, pool = call(batch if pool is None else dataclasses.replace(batch, pool=pool))
        pool = pool if stored is None else stored(pool)
        outputs.append(oracle.wide(o))
    return np.concatenate(outputs), oracle.wide(pool)[: len(LENGTHS)]


def plain(operands):
    """The reference, with the kernel's chunks."""
    return functools.partial(oracle.chunked, chunk=128, operands=operands)


@functools.cache
def wanted(rule):
    return chained(rule, oracle.exact, np.float64)


def errors(found, rule):
    """Of o and of the states: relative RMS error, and that of the worst token, or head's state."""
    pairs = zip(found, wanted(rule), ((1, 2), (2, 3)), strict=True)
    return [oracle.error(x, y, axis) for x, y, rows in pairs for axis in (None, rows)]


def card(rule, state):
    """Errors of the kernel and of the reference, operands rounded as the kernel's."""
    dtype = STATES[state]
    kernel = chained(rule, run, dtype)
    return errors(kernel, rule), errors(chained(rule, plain(jnp.bfloat16), dtype), rule)


def high_and_low(pool):
    """A state as the sum of two bf16 numbers."""
    high = oracle.bf16(np.asarray(pool))
    return (high + oracle.bf16(np.asarray(pool) - high)).astype(np.float32)


def float8(x):
    """Rows [..., dim] in float8_e4m3fn with a scale each, as numbers of their own type."""
    scale = np.abs(oracle.wide(x)).max(axis=-1, keepdims=True) / 448
    return (oracle.wide(oracle.wide(x) / scale).astype(ml_dtypes.float8_e4m3fn) * scale).astype(
        np.float32
    )


def split_states(rule):
    """Errors of f32 arithmetic whose states are stored as two bf16 numbers."""
    return errors(chained(rule, plain(jnp.float32), stored=high_and_low), rule)


def float8_inputs(rule):
    """Errors of f32 arithmetic on q, k, v that are rounded to float8."""

    def call(batch):
        q, k, v = map(float8, (batch.q, batch.k, batch.v))
        return plain(jnp.float32)(dataclasses.replace(batch, q=q, k=k, v=v))

    return errors(chained(rule, call), rule)


def main():
    print("| rule | state | o | worst token | state | worst head |\n|---|---|---|---|---|---|")
    for rule in RULES:
        for state in STATES:
            pairs = zip(*card(rule, state), strict=True)
            cells = " | ".join(f"{ours:.1e} ({plain:.1e})" for ours, plain in pairs)
            print(f"| {rule} | {state} | {cells} |", flush=True)
    print(
        "\n| rule | split states: o, worst, state, worst | float8 inputs: the same |\n|---|---|---|"
    )
    for rule in RULES:
        cells = (split_states(rule), float8_inputs(rule))
        cells = " | ".join(", ".join(f"{x:.1e}" for x in found) for found in cells)
        print(f"| {rule} | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
