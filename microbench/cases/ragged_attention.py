"""Paged attention on a device's share of published models, decode to prefill.

Shapes: 8 query heads and 1 key/value head of dim 128 are Llama-3-70B's on 8 devices, 32 and 8
Llama-3-8B's and 64 and 8 Llama-3-70B's on one; latents of rank 512 with 64 rotated lanes are
DeepSeek-V3's and Ling-2.6's, of which a shard has 8 or 16 heads. 128 requests of 200,092 tokens in
all are the batch that SGLang-JAX published a time for. Pages lie in random order; queries and new
rows are bfloat16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ragged_attention as ra
from microbench import peers as others
from microbench.case import Call, Case, Check, Cost
from microbench.cases._attention_models import MODELS, SITUATIONS
from ragged_attention.plan import heads_at_once, style_of
from tpukit import interpret
from tpukit.chips import chip as chip_named
from tpukit.listing import Region


@dataclasses.dataclass(frozen=True)
class Shape:
    """The parameters of a case; a window of 0 is none."""

    kv_lens: tuple[int, ...]
    q_lens: tuple[int, ...]
    q_heads: int = 8
    kv_heads: int = 1
    key_dim: int = 128
    value_dim: int = 128
    latent: bool = False
    cache: str = "bfloat16"
    page_size: int = 128
    window: int = 0
    tree: bool = False
    adjacent: bool = False  # pages of a request lie behind each other in the pool
    row_scales: bool = False
    bounds_checks: bool = True

    @property
    def layout(self) -> ra.CacheLayout:
        """Of the cache."""
        dims = (self.kv_heads, self.key_dim, self.value_dim)
        return ra.CacheLayout(*dims, self.cache, self.page_size, self.latent)

    @property
    def tokens(self) -> int:
        """Query tokens."""
        return sum(self.q_lens)

    @property
    def pages(self) -> tuple[int, ...]:
        """How many pages each request has."""
        return tuple(-(-length // self.page_size) for length in self.kv_lens)

    @property
    def pool(self) -> int:
        """Pages there are: two of them belong to nobody."""
        return sum(self.pages) + 2

    def reduced(self) -> Shape:
        """The same kind of batch, small enough to be interpreted."""
        longest = max(self.kv_lens)
        kv_lens, q_lens = [], []
        requests = list(zip(self.kv_lens, self.q_lens, strict=True))
        for i, (kv_len, q_len) in enumerate(requests[:3] + requests[3:][-1:]):  # both ends of them
            new, old = min(q_len, 64), kv_len - q_len
            kv_lens.append(new + max(0, min(old, 300 * old // longest) - 37 * i))
            q_lens.append(new)
        return dataclasses.replace(
            self, kv_lens=tuple(kv_lens), q_lens=tuple(q_lens), window=min(self.window, 40)
        )


def lengths(total: int, requests: int) -> tuple[int, ...]:
    """Lengths between half and one and a half times the mean, in an order that is not sorted."""
    drawn = 0.5 + np.random.default_rng(0).random(requests)
    found = np.floor(drawn * total / drawn.sum()).astype(int)
    found[: total - found.sum()] += 1
    return tuple(int(length) for length in found)


def _case(name: str, kv_lens: tuple[int, ...], q_len: int = 1, **more: Any) -> Case:
    shape = Shape(kv_lens, (q_len,) * len(kv_lens), **more)
    return Case("ragged_attention", name, dataclasses.asdict(shape))


def _mixed(name: str, requests: tuple[tuple[int, int], ...], **more: Any) -> Case:
    kv_lens, q_lens = zip(*requests, strict=True)
    return Case("ragged_attention", name, dataclasses.asdict(Shape(kv_lens, q_lens, **more)))


GQA: dict[str, Any] = {"q_heads": 32, "kv_heads": 8}
MLA: dict[str, Any] = {"key_dim": 576, "value_dim": 512, "latent": True}
FLOAT8: dict[str, Any] = {"cache": "float8_e4m3fn"}
CASES = (
    _case("decode/8k", (8192,) * 128),
    _case("decode/mean-1.5k", lengths(200_092, 128)),
    _case("decode/2k", (2048,) * 128, **GQA),
    _case("decode/float8", (8192,) * 128, **FLOAT8),
    _case("decode/float8-rows", (8192,) * 128, **FLOAT8, row_scales=True),
    _case("decode/page-16", (8192,) * 128, page_size=16),
    _case("decode/page-16 adjacent", (8192,) * 128, page_size=16, adjacent=True),
    _case("decode/100", (100,) * 128),
    _case("prefill/8k", (8192,), 8192, **GQA),
    _case("prefill/2k", (2048,), 2048, q_heads=64, kv_heads=8),
    _case("mla/4k", (4096,) * 128, **MLA),
    _case("mla/8k", (8192,) * 128, q_heads=16, **MLA),
    _case("mla/8k-float8", (8192,) * 128, q_heads=16, **MLA, **FLOAT8),
    _case("window/128-of-8k", (8192,) * 128, window=128),
    _case("window/256-in-all", (256,) * 128),
    _case("drafts/tree", (4096,) * 16, 64, tree=True),
    _case("drafts/causal", (4096,) * 16, 64),
)
MORE = tuple(
    _mixed(f"{model}/{situation}", requests, **fields)
    for model, fields in MODELS.items()
    for situation, requests in SITUATIONS.items()
)


class Inputs(NamedTuple):
    """Arrays of one call; T tokens, N requests."""

    q: Any  # [T, q_heads, key_dim]
    k: Any  # [T, kv_heads, key_dim]
    v: Any  # [T, kv_heads, value_dim], None where keys hold the values
    words: Any  # of the cache
    kv_lens: Any  # [N]
    cu_q_lens: Any  # [N + 1]
    page_indices: Any
    page_offsets: Any  # [N + 1]
    ancestors: Any  # [T, 2], None without a tree
    k_scale: Any  # [pages, page_size, kv_heads], None without scales of rows
    v_scale: Any  # likewise


def _shape(case: Case) -> Shape:
    params: dict[str, Any] = dict(case.params)
    return Shape(**params)


def _specs(shape: Shape) -> Inputs:
    """Shapes and dtypes of the inputs."""

    def spec(*size: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, jnp.dtype(dtype))

    tokens, requests, layout = shape.tokens, len(shape.kv_lens), shape.layout
    bf16 = jnp.bfloat16
    rows = (shape.pool, shape.page_size, shape.kv_heads)
    scale = spec(*rows, dtype=jnp.float32) if shape.row_scales else None
    return Inputs(
        q=spec(tokens, shape.q_heads, shape.key_dim, dtype=bf16),
        k=spec(tokens, shape.kv_heads, shape.key_dim, dtype=bf16),
        v=None if shape.latent else spec(tokens, shape.kv_heads, shape.value_dim, dtype=bf16),
        words=spec(shape.pool * layout.page_rows, layout.width),
        kv_lens=spec(requests),
        cu_q_lens=spec(requests + 1),
        page_indices=spec(sum(shape.pages)),
        page_offsets=spec(requests + 1),
        ancestors=spec(tokens, 2, dtype=jnp.uint32) if shape.tree else None,
        k_scale=scale,
        v_scale=scale,
    )


def _steering(shape: Shape, seed: int) -> Inputs:
    """Lengths and pages as values, the large arrays as shapes."""
    order = np.random.default_rng(seed).permutation(shape.pool)[: sum(shape.pages)]
    order = np.arange(len(order)) if shape.adjacent else order
    values = {
        "kv_lens": shape.kv_lens,
        "cu_q_lens": np.cumsum([0, *shape.q_lens]),
        "page_indices": order,
        "page_offsets": np.cumsum([0, *shape.pages]),
    }
    return _specs(shape)._replace(**{n: jnp.asarray(x, jnp.int32) for n, x in values.items()})


def _inputs(shape: Shape, seed: int) -> Inputs:
    rng = np.random.default_rng(seed)

    def normal(spec: Any) -> Any:
        return jnp.asarray(rng.standard_normal(spec.shape, dtype=np.float32), spec.dtype)

    args, layout = _steering(shape, seed), shape.layout
    rows = jax.ShapeDtypeStruct((shape.pool, shape.page_size), jnp.dtype(shape.cache))
    heads = [(layout.kv_heads, dim) for dim in (layout.key_dim, layout.value_dim)]
    keys, values = (normal(rows.update(shape=(*rows.shape, *x))) for x in heads)
    args = args._replace(
        q=normal(args.q),
        k=normal(args.k),
        v=None if shape.latent else normal(args.v),
        words=ra.pack_pages(keys, None if shape.latent else values, layout).words,
    )
    if shape.row_scales:
        pair = rng.uniform(0.5, 2, (2, *args.k_scale.shape)).astype(np.float32)
        args = args._replace(k_scale=jnp.asarray(pair[0]), v_scale=jnp.asarray(pair[1]))
    return args._replace(ancestors=_trees(shape, rng)) if shape.tree else args


def _trees(shape: Shape, rng: np.random.Generator) -> jax.Array:
    """[T, 2] words of a random tree per request: every draft's parent is an earlier one."""
    words: list[int] = []
    for q_len in shape.q_lens:
        drafts: list[int] = []
        for i in range(q_len):
            parent = drafts[rng.integers(max(0, i - 8), i)] if i else 0
            drafts.append(parent | 1 << i)
        words += drafts
    low_high = [(word & (2**32 - 1), word >> 32) for word in words]
    return jnp.asarray(np.array(low_high, np.uint32))


def _plan(fields: Mapping[str, Any]) -> ra.Plan | None:
    """A case's plan, None for the kernel's own."""
    return ra.Plan(**fields) if fields else None


def _call(shape: Shape, implementation: str, plan: ra.Plan | None = None) -> Callable[..., Any]:
    """The public function on the fields of `Inputs`; returns the output and the cache's words."""

    def fn(q: Any, k: Any, v: Any, words: Any, *rest: Any) -> tuple[jax.Array, jax.Array]:
        *steering, ancestors, k_scale, v_scale = rest
        cache = ra.KVCache(words, shape.layout)
        options: dict[str, Any] = {
            "window": shape.window or None,
            "ancestors": ancestors,
            "k_scale": k_scale,
            "v_scale": v_scale,
            "bounds_checks": shape.bounds_checks,
            "implementation": implementation,
            "plan": plan,
        }
        if shape.latent:
            rank = shape.value_dim
            parts = (q[:, :, :rank], q[:, :, rank:], k[:, 0, :rank], k[:, 0, rank:])
            scale = 192**-0.5  # heads of 128 lanes and 64 rotated ones
            found = ra.mla_ragged_paged_attention(
                *parts, cache, *steering, sm_scale=scale, **options
            )
        else:
            found = ra.ragged_paged_attention(q, k, v, cache, *steering, **options)
        return found.o, found.cache.words

    return fn


def inputs(case: Case, seed: int) -> Inputs:
    """See `microbench.case.Suite`, as for all that follows."""
    return _inputs(_shape(case), seed)


def timed(case: Case) -> Case:
    """A reduced batch."""
    if jax.default_backend() == "tpu":
        return case
    small = dataclasses.asdict(_shape(case).reduced())
    return dataclasses.replace(case, name=f"{case.name} (reduced)", params=small)


def chips(case: Case) -> tuple[str, ...]:
    """All."""
    del case
    return ra.SUPPORTED_CHIPS


def reference_fn(case: Case) -> Callable[..., Any]:
    """The reference."""
    return jax.jit(_call(_shape(case), "reference"))


def kernel_fn(case: Case) -> Callable[..., Any]:
    """The kernel on this machine's TPU."""
    return jax.jit(_call(_shape(case), "pallas", _plan(case.plan)))


def check(case: Case, seed: int) -> list[Check]:
    """Compares a reduced batch with float64, interpreted where there is no TPU."""
    shape = _shape(case).reduced()
    args = _inputs(shape, seed)
    if jax.default_backend() == "tpu":
        run = _call(shape, "pallas", _plan(case.plan))
        o, words = jax.block_until_ready(jax.jit(run)(*args))
    else:
        with interpret.strict():
            run = _call(shape, "interpret", _plan(case.plan))
            o, words = jax.block_until_ready(jax.jit(run)(*args))
    plain, _ = jax.jit(_call(shape, "reference"))(*args)
    old = ra.KVCache(args.words, shape.layout)
    scales = {"k_scale": args.k_scale, "v_scale": args.v_scale}
    wanted = ra.update_kv_cache(args.k, args.v, old, *args[4:8], **scales)
    exact = _exact(shape, args, wanted)
    live = _live(shape, args)
    idle = np.setdiff1d(np.arange(shape.pool), args.page_indices)
    differ = touched = 0.0
    for new, right in zip(ra.KVCache(words, shape.layout).unpack(), wanted.unpack(), strict=True):
        new, right = np.asarray(new).astype(np.float32), np.asarray(right).astype(np.float32)
        differ += np.sum(new[live] != right[live])
        touched += np.sum(new[idle] != right[idle])
    return [
        _no_worse("output", o, plain, exact),
        _no_worse("worst token", o, plain, exact, axis=(1, 2)),
        Check("cache", float(differ), 0.0, note="elements of the requests' rows that differ"),
        Check("other pages", float(touched), 0.0, note="elements changed in pages of nobody"),
    ]


def _no_worse(name: str, found: Any, plain: Any, exact: Any, axis: Any = None) -> Check:
    """Relative error of `found`, limited to 1.1 times that of the reference."""
    found, plain = (np.asarray(x).astype(np.float64) for x in (found, plain))

    def error(x: np.ndarray) -> float:
        difference = np.sqrt(np.sum((x - exact) ** 2, axis=axis))
        return float(np.max(difference / (np.sqrt(np.sum(exact**2, axis=axis)) + 1e-30)))

    return Check(f"{name}: relative error", error(found), 1.1 * error(plain))


def _live(shape: Shape, args: Inputs) -> np.ndarray:
    """[pages, page_size] which rows of the pool are tokens of a request."""
    live = np.zeros((shape.pool, shape.page_size), bool)
    pages, offsets = np.asarray(args.page_indices), np.asarray(args.page_offsets)
    for kv_len, begin in zip(shape.kv_lens, offsets, strict=False):
        position = np.arange(kv_len)
        live[pages[begin + position // shape.page_size], position % shape.page_size] = True
    return live


def _exact(shape: Shape, args: Inputs, cache: ra.KVCache) -> np.ndarray:
    """Attention in float64 over a cache that has the new rows already."""
    keys, values = (np.asarray(x).astype(np.float64) for x in cache.unpack())
    if shape.row_scales:
        keys *= np.asarray(args.k_scale)[..., None]
        values *= np.asarray(args.v_scale)[..., None]
    q = np.asarray(args.q).astype(np.float64)
    scale = 192**-0.5 if shape.latent else shape.key_dim**-0.5
    pages, offsets = np.asarray(args.page_indices), np.asarray(args.page_offsets)
    found, row = [], 0
    for r, (kv_len, q_len) in enumerate(zip(shape.kv_lens, shape.q_lens, strict=True)):
        mine = pages[offsets[r] : offsets[r + 1]]
        k, v = (x[mine].reshape(-1, *x.shape[2:])[:kv_len] for x in (keys, values))
        first, key = kv_len - q_len, np.arange(kv_len)
        query = first + np.arange(q_len)[:, None]
        seen = key <= query
        if shape.tree:
            low, high = np.asarray(args.ancestors[row : row + q_len]).astype(np.uint64).T
            word = (low | high << np.uint64(32))[:, None]
            bit = word >> np.maximum(key - first, 0).astype(np.uint64) & np.uint64(1)
            seen = (key < first) | (bit == 1)
        if shape.window:
            seen &= key > query - shape.window
        heads = q[row : row + q_len].reshape(q_len, shape.kv_heads, -1, shape.key_dim)
        s = np.einsum("nhgd,khd->nhgk", heads, k) * scale
        s = np.where(seen[:, None, None], s, -np.inf)
        w = np.exp(s - s.max(axis=-1, keepdims=True))
        o = np.einsum("nhgk,khd->nhgd", w / w.sum(axis=-1, keepdims=True), v)
        found.append(o.reshape(q_len, shape.q_heads, -1))
        row += q_len
    return np.concatenate(found)


def aot_target(case: Case) -> tuple[str, dict[str, Any]]:
    """Names `build`."""
    arguments = {**case.params, "plan": dict(case.plan)}
    return "microbench.cases.ragged_attention:build", arguments


def build(
    chip: str, plan: Mapping[str, int], **params: Any
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The full-size call, for a chip that need not be present."""
    del chip  # the kernel asks what it is compiled for
    for name in ("kv_lens", "q_lens"):
        params[name] = tuple(params[name])  # JSON made a list of it
    shape = Shape(**params)
    run = _call(shape, "pallas", _plan(plan))
    return jax.jit(run, donate_argnums=Inputs._fields.index("words")), tuple(_specs(shape))


def steered(case: Case, seed: int) -> Call:
    """`build` with the lengths and pages that `inputs` would have."""
    _, arguments = aot_target(case)
    fn, _ = build("", **arguments)
    return fn, tuple(_steering(_shape(case), seed))


def peers(case: Case, seed: int) -> Mapping[str, Call]:
    """XLA where a token's keys can all be gathered, and kernels of others where they apply."""
    shape, (_, args) = _shape(case), steered(case, seed)
    ones, found = max(shape.q_lens) == 1, dict[str, Call]()
    if ones:
        found["XLA, gathered keys"] = (reference_fn(case), args)
    if shape.latent or shape.tree or shape.row_scales or shape.key_dim != shape.value_dim:
        return found
    named = Inputs(*args)
    if ones and not shape.window:
        found["JAX's paged_attention, no cache update"] = others.jax_paged_attention(shape, named)
    name = "JAX's ragged_paged_attention, no cache update"
    found[name] = others.jax_ragged_paged_attention(shape, named)
    if others.has_tokamax():
        found["tokamax's batched_rpa"] = others.tokamax_paged_attention(shape, named)
    return found


def cost(case: Case) -> Cost:
    """Products of the keys that are seen; rows of those in the cache, and of the tokens, once.

    With scales of rows, those as well; that XLA has to gather them first is not counted.
    """
    shape, layout = _shape(case), _shape(case).layout
    pairs = keys = 0
    for kv_len, q_len in zip(shape.kv_lens, shape.q_lens, strict=True):
        position = np.arange(kv_len - q_len, kv_len) + 1
        pairs += int(np.minimum(position, shape.window or kv_len).sum())
        keys += min(kv_len - q_len, shape.window - 1 if shape.window else kv_len)
    row = layout.values * jnp.dtype(shape.cache).itemsize
    row += 2 * 4 * shape.kv_heads if shape.row_scales else 0
    new = layout.values * 2  # as the projections leave them
    io = shape.q_heads * (shape.key_dim + shape.value_dim) * 2
    return Cost(
        flops=2.0 * pairs * shape.q_heads * (shape.key_dim + shape.value_dim),
        hbm_bytes=float(keys * row + shape.tokens * (row + new + io)),
    )


def explain(case: Case, chip: str) -> ra.Explanation:
    """What `ragged_attention.explain` says."""
    shape = _shape(case)
    args = _specs(shape)
    return ra.explain(
        *args[:3],
        ra.KVCache(args.words, shape.layout),
        *args[4:8],
        window=shape.window or None,
        ancestors=args.ancestors,
        k_scale=args.k_scale,
        v_scale=args.v_scale,
        chip=chip,
        plan=_plan(case.plan),
    )


def figures(case: Case, report: Any) -> dict[str, float]:
    """A whole chunk of keys for the case's blocks of queries: bundles, MXU use, spilled registers.

    Of the pieces of code with products it is the shortest with the most of them; for blocks of one
    token, of the first few, one per size of a chunk.
    """
    shape, kernel = _shape(case), report.kernel("ragged_attention")
    found = explain(case, report.chip)
    problem, plan = found.problem, found.plan
    regions = [*kernel.outside, *(r for loop in kernel.loops for r in loop.regions)]
    busy = sorted((r for r in regions if r.ops.matmuls), key=lambda r: r.start)
    tokens = plan.queries if max(shape.q_lens) > 1 else 1
    style = style_of(problem, tokens, chip_named(report.chip))
    if tokens == 1:
        busy = busy[: len(plan.key_sizes(style))]
    tile: Region = min(busy, key=lambda r: (-r.ops.matmuls, r.bundles))
    return {
        "chunk keys": plan.chunk,
        "block queries": tokens,
        "chunk heads": heads_at_once(style, problem.layout, plan, whole=True),
        "chunk bundles": tile.bundles,
        "chunk MXU %": 100 * tile.ops.mxu / (2 * tile.bundles),
        "chunk spills/bundle %": 100 * tile.ops.spill / tile.bundles,
        "chunk fills/bundle %": 100 * tile.ops.fill / tile.bundles,
    }
