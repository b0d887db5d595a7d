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


def visible(q_len, kv_len, causal=True, window=None, tree=None):
    """[q_len, kv_len] who sees whom; `tree` [q_len, q_len] is for the query tokens among them."""
    position = np.arange(kv_len - q_len, kv_len)[:, None]
    key = np.arange(kv_len)[None]
    seen = np.broadcast_to(key <= position, (q_len, kv_len)) | (not causal)
    if tree is not None:
        seen = np.concatenate([np.ones((q_len, kv_len - q_len), bool), tree], axis=1)
    return seen & (key > position - window) if window else seen


def attend(q, keys, values, seen, scale, soft_cap=None, sinks=None, temperatures=None):
    """[tokens, q_heads, value_dim]: every head of every query by itself.

    Args:
      q: [tokens, q_heads, dim].
      keys, values: [keys, kv_heads, dim] each.
      seen: [tokens, keys].
      scale: of the logits.
      soft_cap: of the scaled logits.
      sinks: [q_heads] logits.
      temperatures: [tokens] that logits are multiplied by before the cap.
    """
    q, keys, values = map(f64, (q, keys, values))
    group = q.shape[1] // keys.shape[1]
    out = np.zeros((*q.shape[:2], values.shape[2]))
    for t, h in np.ndindex(*q.shape[:2]):
        logits = scale * keys[seen[t], h // group] @ q[t, h]
        logits = logits if temperatures is None else logits * temperatures[t]
        logits = logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)
        weights = softmax_over(logits, None if sinks is None else sinks[h])
        out[t, h] = weights @ values[seen[t], h // group]
    return out


def activated(gate, up, activation):
    """As SGLang-JAX defines it; its swigluoai clips at 7."""
    if activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    if activation == "gelu":
        cube = gate + 0.044715 * gate**3
        return 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * cube)) * up
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)


def wide(weight, scale, block):
    """A matrix [inputs, outputs] times its scales [inputs / block, 1, outputs], in float64."""
    weight = f64(weight)
    if scale is None:
        return weight
    scale = f64(scale).reshape(-1, weight.shape[1])
    return weight * np.repeat(scale, block or len(weight) // len(scale), axis=0)


def moe(tokens, w1, w2, w3, scales, weights, ids, activation="silu", block=None, shared=None):
    """[T, hidden]: token after token, expert after expert.

    Args:
      tokens: [T, hidden].
      w1, w2, w3: [E, ...] gate, down and up.
      scales: of each of them, or None.
      weights, ids: [T, k]; an id outside [0, E) is skipped.
      activation: its name.
      block: inputs that share a scale.
      shared: (w1, w2, w3, scales) of the expert that all tokens go to.
    """
    scales = scales or (None,) * 3
    tokens, out = f64(tokens), np.zeros(tokens.shape)

    def expert(x, matrices, scales, block):
        gate, down, up = (wide(w, s, block) for w, s in zip(matrices, scales, strict=True))
        return activated(x @ gate, x @ up, activation) @ down

    for t, k in np.ndindex(*ids.shape):
        e = ids[t, k]
        if 0 <= e < len(w1):
            held = [w[e] for w in (w1, w2, w3)], [None if s is None else s[e] for s in scales]
            out[t] += float(weights[t, k]) * expert(tokens[t], *held, block)
    if shared is not None:
        out += expert(tokens, shared[:3], shared[3] or (None,) * 3, None)
    return out
