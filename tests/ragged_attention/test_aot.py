"""The real TPU compiler accepts every option and shape, for every chip; and what it makes of them."""

# ruff: noqa: E501  (a row of a table is a line)

import dataclasses
import time

import jax
import jax.numpy as jnp
import pytest

import ragged_attention as ra
from microbench.cases import ragged_attention as cases
from ragged_attention import plan
from tpukit import aot, chips
from tpukit.predict import predict

V5E, V5P, V6E, V7 = "v5e", "v5p", "v6e", "tpu7x"
BF16, F32 = jnp.bfloat16, jnp.float32
SECONDS = 20  # of a processor, to trace and compile a kernel
BUNDLES = 520  # of a request of 100 tokens that decodes
MXU, SPILLS = 75, 80  # % of bundles of the widest tile of 64 heads


@dataclasses.dataclass(frozen=True)
class Shape:
    """A call: heads, widths, types, pages and options."""

    q_heads: int = 8
    kv_heads: int = 1
    key_dim: int = 128
    value_dim: int = 0  # key_dim unless given
    dtype: jnp.dtype = BF16
    cache: str = "bfloat16"
    page_size: int = 128
    tokens: int = 16
    requests: int = 16
    pages: int = 64  # of a request
    latent: bool = False
    update: bool = True
    table: bool = False
    mask: str = ""  # of "full", "window", "windows", "tree"
    sinks: bool = False
    placed: bool = False
    scales: str = ""  # of "one", "heads", "tokens", "rows"
    options: tuple[tuple[str, float | bool | ra.Plan], ...] = ()

    @property
    def layout(self):
        """Of the cache."""
        dims = (self.kv_heads, self.key_dim, self.value_dim or self.key_dim)
        return ra.CacheLayout(*dims, self.cache, self.page_size, self.latent)

    def call(self):
        """The jitted function, and shapes for it."""
        tokens, n, heads, layout = self.tokens, self.requests, self.q_heads, self.layout

        def array(*shape, dtype=jnp.int32):
            return jax.ShapeDtypeStruct(shape, dtype)

        rows = [
            array(tokens, self.kv_heads, d, dtype=self.dtype)
            for d in (layout.key_dim, layout.value_dim)
        ]
        rows[1] = None if self.latent else rows[1]
        pool = array(n * self.pages * layout.page_rows, layout.width)
        pages = array(n, self.pages) if self.table else array(n * self.pages)
        steering = (array(n), array(n + 1), pages, None if self.table else array(n + 1))
        named = {"num_requests": array()}
        named |= {"ancestors": array(tokens, 2, dtype=jnp.uint32)} if self.mask == "tree" else {}
        named |= {"window": array(n)} if self.mask == "windows" else {}
        named |= {"sinks": array(heads, dtype=F32)} if self.sinks else {}
        named |= {"query_starts": array(n)} if self.placed else {}
        if self.scales:
            each = (n * self.pages, self.page_size, self.kv_heads)
            wide = {"heads": (self.kv_heads,), "rows": each}.get(self.scales, ())
            own = {"heads": (heads,), "tokens": (tokens, heads)}.get(self.scales, ())
            shapes = {"q_scale": own, "k_scale": wide, "v_scale": wide}
            named |= {name: array(*shape, dtype=F32) for name, shape in shapes.items()}
        fixed = dict(self.options) | {"causal": self.mask != "full"}
        fixed |= {"window": 1024} if self.mask == "window" else {}

        def fn(q, k, v, words, kv_lens, cu_q_lens, pages, offsets, named):
            new = (k, v) if self.update else (None, None)
            cache = ra.KVCache(words, layout)
            steering = (kv_lens, cu_q_lens, pages, offsets)
            options = {**named, **fixed, "implementation": "pallas"}
            found = ra.ragged_paged_attention(q, *new, cache, *steering, **options)
            return found.o, found.cache.words, found.lse

        q = array(tokens, heads, self.key_dim, dtype=self.dtype)
        return jax.jit(fn, donate_argnums=3), (q, *rows, pool, *steering, named)


LATENT = {"key_dim": 576, "value_dim": 512, "latent": True}
F8, F8W, I8, W32 = "float8_e4m3fn", "float8_e5m2", "int8", "float32"
F4 = "float4_e2m1fn"

SMALL = ra.Plan(queries=64, keys=512, tiles=4, blocks=4)
LSE, CAP, LONG = ("return_lse", True), ("soft_cap", 30.0), ("temperature_len", 8192)
UNCHECKED = ("bounds_checks", False)

# Every number of heads, width, type of the cache, page size and option for every chip, in small
# blocks, which have all the code; the sizes of blocks are tested below.
MATRIX = {
    "8/1 heads, page 128, window, sinks, lse": Shape(mask="window", sinks=True, options=(LSE,)),
    "f32, 2 of 80, page 8, windows, query starts, lse": Shape(2, 2, 80, dtype=F32, cache=W32, page_size=8, mask="windows", placed=True, options=(LSE,)),
    "f32 over bf16, 4/2 of 96, page 16, scales of heads, soft cap": Shape(4, 2, 96, dtype=F32, page_size=16, scales="heads", options=(CAP,)),
    "int8, 5/5 of 64, page 32, one scale, not causal": Shape(5, 5, 64, cache=I8, page_size=32, scales="one", mask="full"),
    "e4m3, 4/2 of 256, page 64, scales of tokens, table": Shape(4, 2, 256, cache=F8, page_size=64, scales="tokens", table=True),
    "e5m2, 7/1 of 112, page 256, temperature, update off": Shape(7, 1, 112, cache=F8W, page_size=256, update=False, options=(LONG,)),
    "4/2 of 192 and 128, page 16, a tree": Shape(4, 2, 192, 128, page_size=16, mask="tree"),
    "e4m3, 8/2 heads, page 128, scales of rows, window": Shape(8, 2, cache=F8, scales="rows", mask="window"),
    "int8, 6/3 of 80, page 16, scales of rows, soft cap, lse": Shape(6, 3, 80, cache=I8, page_size=16, scales="rows", options=(CAP, LSE)),
    "latents, e5m2, page 64, scales of rows": Shape(4, **LATENT, cache=F8W, page_size=64, scales="rows"),
    "latents, e4m3, page 32": Shape(4, **LATENT, cache=F8, page_size=32),
    "latents, page 64, windows, sinks, checks off": Shape(4, **LATENT, page_size=64, mask="windows", sinks=True, options=(UNCHECKED,)),
}  # fmt: skip
PAIRS = [(name, chip) for name in MATRIX for chip in ra.SUPPORTED_CHIPS]


@pytest.mark.parametrize(("name", "chip"), PAIRS)
def test_the_matrix_compiles(name, chip):
    shape = MATRIX[name]
    queries = 64 if shape.mask == "tree" else max(16, shape.layout.group)
    small = dataclasses.replace(SMALL, queries=queries, keys=512 * shape.layout.words_per_row)
    compiles(dataclasses.replace(shape, options=(*shape.options, ("plan", small))), chip)


def compiles(shape, chip):
    compiled_soon(*shape.call(), chip)


def compiled_soon(fn, args, chip):
    begin = time.process_time()
    compiled = aot.compile_for(fn, *args, chip=chip)
    assert compiled.kernels == ("ragged_attention.1",)
    assert time.process_time() - begin < SECONDS
    return compiled


def test_the_matrix_has_every_kind():
    shapes = MATRIX.values()
    assert {shape.cache for shape in shapes} == set(plan.CACHE_DTYPES) - {F4}
    assert {shape.page_size for shape in shapes} == set(plan.PAGE_SIZES)
    assert {64, 80, 96, 112, 128, 192, 256, 576} == {shape.key_dim for shape in shapes}
    assert {shape.scales for shape in shapes} == {"", "one", "heads", "tokens", "rows"}
    assert {shape.mask for shape in shapes} == {"", "full", "window", "windows", "tree"}


# Blocks as they are chosen.
CHOSEN = {
    "one token": ((V5E,), Shape(tokens=1, requests=1)),
    "odd numbers": ((V6E,), Shape(4, tokens=37, requests=5, pages=3)),
    "256 requests of 262,144": ((V7,), Shape(1, 1, tokens=256, requests=256, pages=2048, cache=F8)),
    "1,048,576 tokens, page 16": ((V7,), Shape(tokens=4, requests=4, pages=65536, page_size=16)),
    "chunks, dim 64, not causal, float8": ((V5P,), Shape(4, 1, 64, tokens=64, requests=4, mask="full", cache=F8)),
    "float4, 8/1 heads": ((V7,), Shape(cache=F4, page_size=64)),
    "float4, windows, page 8": ((V7,), Shape(4, 2, 64, cache=F4, page_size=8, mask="windows")),
    "chunks, f32, lse": ((V6E,), Shape(8, 2, dtype=F32, cache=W32, tokens=512, requests=4, options=(LSE,))),
    "chunks, float8, scales of rows": ((V6E,), Shape(8, 4, cache=F8, tokens=64, requests=4, scales="rows")),
    "f32, page 8, scales of rows": ((V5P,), Shape(4, 2, dtype=F32, cache=W32, page_size=8, scales="rows")),
    "float4, page 256, scales of rows": ((V7,), Shape(16, 8, cache=F4, page_size=256, scales="rows")),
    "latents, e4m3, 128 heads": ((V7,), Shape(128, **LATENT, cache=F8)),
    "chunks, latents": ((V5E,), Shape(16, **LATENT, tokens=512, requests=4)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "chip"), [(n, chip) for n, (on, _) in CHOSEN.items() for chip in on]
)
def test_chosen_blocks_compile(name, chip):
    compiles(CHOSEN[name][1], chip)


BY_NAME = {case.name: case for case in cases.CASES}
PRODUCTION = [  # other cases are these with other lengths
    *((name, V7) for name in ("decode/page-16", "prefill/8k", "mla/8k")),
]


@pytest.mark.parametrize(("name", "chip"), PRODUCTION)
def test_production_shapes_compile_with_default_plans(name, chip):
    target, arguments = cases.aot_target(BY_NAME[name])
    assert target.endswith(":build")
    fn, args = cases.build(chip, **arguments)
    compiled = compiled_soon(fn, args, chip)
    pool = args[3].shape[0] * args[3].shape[1] * 4
    rows = sum(x.size * 2 for x in args[:3] if x is not None)
    assert compiled.temp_bytes < pool / 8 + rows  # the cache is not copied


def test_64_heads_of_2048_tokens_compile():
    """Products fill most matrix slots; a register that is spilled costs a store, counted too."""
    case = BY_NAME["prefill/2k"]
    target, arguments = cases.aot_target(case)
    report = aot.static_report(target, V7, **arguments)
    figures = cases.figures(case, report)
    assert figures["block queries"] >= 128 and figures["chunk keys"] >= 1024
    assert figures["chunk MXU %"] >= MXU
    assert figures["chunk spills/bundle %"] <= SPILLS
    assert report.kernel("ragged_attention").vmem_bytes <= chips.chip(V7).vmem_bytes


def test_a_short_request_takes_few_bundles():
    """Issued for 128 requests of 100 tokens, the kernel's beginning and end included."""
    fn, args = cases.steered(BY_NAME["decode/100"], 0)
    kernel = predict(fn, *args, chip=V7).kernels[0]
    assert 100 < kernel.bundles / 128 <= BUNDLES


def test_what_is_read_from_hbm_does_not_grow_smem():
    few, many = (
        aot.static_report("tests.ragged_attention.test_aot:long", V7, pages=n).kernels[0].smem_bytes
        for n in (1024, 65536)
    )
    assert many <= few + 4096


def long(chip, pages):
    """Requests with so many pages each."""
    del chip
    return Shape(1, 1, tokens=4, requests=128, pages=pages, page_size=16).call()
