"""A model of two layers that a CPU can run, for two steps."""

import jax
import jax.numpy as jnp
import numpy as np

from microbench.stack.layer import Config, absorbed
from microbench.stack.steps import Step, batch, whole_step

KINDS = ("mla", "lightning")
# One program for both: as many tokens, requests and pages.
STEPS = Step((20, 9, 2, 1), kv_len=24), Step((1, 1, 8, 22), kv_len=30)


def config(data, tensor, **more):
    """Sizes, on so many devices."""
    sizes = {
        "attention": "reference",
        "moe": "grouped",
        "hidden": 512,
        "heads": 4,
        "inter": 128,
        "layers": 8,
        "experts": 16,
        "top_k": 4,
        "groups": 4,
        "top_groups": 2,
        "q_rank": 64,
        "kv_rank": 128,
        "nope": 32,
        "rope": 32,
        "value_dim": 32,
        "norm_groups": 4,
        "page_size": 16,
    }
    return Config(data=data, tensor=tensor, **{**sizes, **more})


def value(name, spec, rng):
    """A host array of plausible size for an argument."""
    shape, last = spec.shape, name.rsplit(".", 1)[-1]
    drawn = rng.standard_normal(shape, np.float32)
    if last == "words":
        drawn = np.zeros(shape)
    elif last == "k_up":
        rope = 32
        lift = drawn[:, :-rope, :-rope] / np.sqrt(shape[1])
        drawn = absorbed(jnp.asarray(lift), rope)
    elif "scale" in last:
        drawn = (0.5 + rng.random(shape)) / 16
    elif last == "decay":
        drawn = -rng.random(shape)
    elif "norm" in last:
        drawn = 1 + drawn / 10
    elif last in ("router", "v_up"):
        drawn /= np.sqrt(shape[-2])
    return np.asarray(drawn).astype(spec.dtype)


def program(sizes, mesh):
    """A function that runs both steps; it returns tokens of each, and the stores.

    Its argument makes an array on devices from its name, its value and its partition.
    """
    fn, (x, weights, stores, _), splits = whole_step(sizes, KINDS, STEPS[0])

    def run(put):
        rng, outs = np.random.default_rng(0), []
        held = place(weights, splits[1], ".weights", put, rng)
        kept = place(stores, splits[2], ".stores", put, rng)
        for step in STEPS:
            requests = batch(sizes, step, seed=0)[0]._replace(forced=np.bool_(False))  # but routed
            requests = place(requests, splits[3], ".batch", put, rng)
            tokens = place(x, splits[0], ".tokens", put, rng)
            with jax.set_mesh(mesh):
                out, kept = fn(tokens, held, kept, requests)
            outs.append(out)
        return outs, kept

    return run


def place(tree, splits, name, put, rng):
    """A tree of shapes, or of values, on devices."""
    splits = jax.tree.broadcast(splits, tree, is_leaf=is_split)

    def leaf(path, spec, split):
        path = name + jax.tree_util.keystr(path)
        known = not isinstance(spec, jax.ShapeDtypeStruct)
        return put(path, spec if known else value(path, spec, rng), split)

    return jax.tree_util.tree_map_with_path(leaf, tree, splits)


def is_split(x):
    """Whether x says how an array is split."""
    return isinstance(x, jax.P)
