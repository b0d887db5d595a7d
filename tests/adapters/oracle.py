"""What the stacks say that their kernels compute, in float64, token by token.

Written from the stacks' documentation of arguments and layouts, not from the adapters.
"""

import math

import numpy as np


def f64(x):
    return np.asarray(x, np.float64)


def gather_reduce(x, indices, weights, group, valid=None):
    """[tokens, hidden]: rows of a token one after another in the flat `indices`."""
    x, weights = f64(x), f64(weights).reshape(-1)
    out = np.zeros((len(indices) // group, x.shape[1]))
    for place, index in enumerate(np.asarray(indices)):
        if valid is None or valid[place]:
            out[place // group] += weights[place] * x[index]
    return out


def simple_gla(q, k, v, decays, starts, bounds, scale=None):
    """Outputs [tokens, heads, V] and last states, token after token.

    Args:
      q, k, v: [tokens, heads, dim].
      decays: [tokens, heads] log decays.
      starts: [requests, heads, K, V] first states.
      bounds: [requests + 1].
      scale: K ** -0.5 by default.
    """
    q, k, v, decays = map(f64, (q, k, v, decays))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    states, out = f64(starts).copy(), np.zeros(v.shape)
    for request, state in enumerate(states):
        for t in range(bounds[request], bounds[request + 1]):
            state *= np.exp(decays[t])[:, None, None]
            state += k[t][:, :, None] * v[t][:, None, :]
            out[t] = scale * np.einsum("hk,hkv->hv", q[t], state)
    return out, states


def softmax_over(logits, sink=None):
    """Weights [keys]; a sink takes part and has none."""
    top = max([*logits, -math.inf if sink is None else sink])
    weights = np.exp(logits - top)
    return weights / (weights.sum() + (0 if sink is None else math.exp(sink - top)))
