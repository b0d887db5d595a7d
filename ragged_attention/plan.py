"""The static problem, the block sizes, and the memory they take."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from ragged_attention.layout import LANES, CacheLayout, round_up
from ragged_attention.schedule import GROUP_ROWS, Limits
from tpukit import checks, planning, tuning
from tpukit.buffers import padded
from tpukit.chips import Chip
from tpukit.errors import ArgumentError, UnsupportedError

CACHE_DTYPES = ("bfloat16", "float32", "int8", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn")
DTYPES = (jnp.bfloat16, jnp.float32)
PAGE_SIZES = (8, 16, 32, 64, 128, 256)
MANY = 64  # query tokens from which on a block is worth the arithmetic for large blocks
SECTION = 128  # tokens of a block that are laid out together, where they are many
STRIP_ROWS = 256  # rows of logits that are computed together
STRIP_COLUMNS = 512  # columns of them: the matrix units work on one half while the other is weighed
STRIPS_AT_ONCE = 4  # of a block of many queries: the next one's products hide the last one's sums
F32_PASSES = 6  # products of bf16 that make one of f32
NARROW_LANES = 18  # of keys and values that pay for taking a row of float8 products apart
CODE = 10_000  # most products in unrolled code: some 10 seconds of compiling
CHUNK = 2048  # keys of a tile that are computed together
TILE_BYTES = 8 * 2**20  # longest tile worth having
TILES_BYTES = 32 * 2**20  # more in flight does not hide more
RESIDENT_PAGES = 2**16  # longest list of pages that is kept in SMEM
RESIDENT_BYTES = 8 * 2**20  # most queries, new rows and outputs that are kept in VMEM
VMEM_LEFT = 2 * 2**20  # of a core's VMEM, for everything but this kernel
SMEM_WORDS = 2**16  # for the description of the batch, of the 2**18 of every chip


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything about a call that is known when it is traced.

    Attributes:
      num_tokens, num_requests, num_indices, num_pages: query tokens, requests, length of the list
        of pages, pages of the pool.
      q_heads: query heads.
      layout: what is in the cache.
      dtype: of queries and output.
      causal: a query sees no later position.
      windowed: requests have windows.
      window: of all requests, where it is known when the call is traced, else 0.
      tree: query tokens have words of ancestors.
      sinks: heads have sinks.
      soft_cap: limit of the logits, or None.
      update: new keys and values are given.
      placed: positions of queries are given.
      lse: the logarithms of the softmax's sums are wanted.
      k_scales, v_scales: rows of keys, of values, have scales of their own.
    """

    num_tokens: int
    num_requests: int
    num_indices: int
    num_pages: int
    q_heads: int
    layout: CacheLayout
    dtype: Any
    causal: bool
    windowed: bool
    tree: bool
    sinks: bool
    soft_cap: float | None
    update: bool
    placed: bool
    lse: bool
    window: int = 0
    k_scales: bool = False
    v_scales: bool = False

    @property
    def any_work(self) -> bool:
        """Whether there are tokens, requests and pages at all."""
        return bool(self.num_tokens and self.num_requests and self.num_pages)

    @property
    def row_scales(self) -> bool:
        """Whether rows of the pool have scales of their own."""
        return self.k_scales or self.v_scales

    @property
    def compute_dtype(self) -> Any:
        """Of the operands of matrix products."""
        wide = self.dtype == jnp.float32 or self.layout.dtype == "float32"
        return jnp.float32 if wide else jnp.bfloat16

    @property
    def streams_pages(self) -> bool:
        """Whether the list of pages is too long for SMEM, and is read from HBM as needed."""
        return self.num_indices > RESIDENT_PAGES

    @property
    def unit(self) -> int:
        """Rows of words that a transfer of pages moves at least: a group, or one of small pages."""
        return GROUP_ROWS if self.layout.page_rows % GROUP_ROWS == 0 else 1

    @property
    def page_units(self) -> int:
        """Units of a page."""
        return self.layout.page_rows // self.unit

    @property
    def resident(self) -> bool:
        """Whether queries, new rows and outputs of the whole batch are kept in VMEM.

        Those of a short block cost more as transfers than as bytes.
        """
        rows = ((self.q_heads, self.layout.key_dim), (self.q_heads, self.layout.value_dim))
        size = sum(padded((self.num_tokens, *row), self.dtype) for row in rows)
        size += padded((self.num_tokens, self.layout.token_width), self.layout.dtype)
        return size <= RESIDENT_BYTES and not (self.lse or self.tree)

    @property
    def group(self) -> int:
        """Query heads of a key/value head."""
        return self.q_heads // self.layout.kv_heads

    @property
    def lse_lanes(self) -> int:
        """Lanes of a token's logarithms."""
        return round_up(self.q_heads, LANES)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Block sizes of the kernel.

    Attributes:
      queries: most query tokens of a block, a power of two.
      keys: keys of a tile.
      tiles: buffers of tiles, a power of two.
      blocks: buffers of blocks of queries, a power of two; all but one are being fetched ahead.
    """

    queries: int
    keys: int
    tiles: int = 4
    blocks: int = 4

    @property
    def query_sizes(self) -> tuple[int, ...]:
        """Numbers of query tokens that the kernel is specialised for, ascending."""
        return (*(n for n in (1, 8, 64) if 2 * n < self.queries), self.queries)

    @property
    def chunk(self) -> int:
        """Keys that are computed together, a power of two that divides a tile."""
        return math.gcd(self.keys, CHUNK if self.queries <= SECTION else CHUNK // 2)

    def key_sizes(self, style: Style) -> tuple[int, ...]:
        """Numbers of keys that it is specialised for where a chunk is not full, ascending."""
        quarters = (1, 2, 4)
        if style.columns:  # the largest blocks are most of a prefill
            quarters = (1, 2, 3, 4) if style.tokens == self.queries else (1, 4)
        return tuple(self.chunk // 4 * n for n in quarters)

    @property
    def records(self) -> int:
        """Records that are known at once, a power of two."""
        return 1 << self.ahead.bit_length()

    @property
    def lookahead(self) -> int:
        """Tiles that are being fetched ahead; of the others, all but one are being written back."""
        return {2: 1, 4: 2}.get(self.tiles, self.tiles - max(self.tiles // 4, 4))

    @property
    def ahead(self) -> int:
        """Records that are made ahead of the one being computed: their pages may be on the way."""
        return max(self.lookahead + 2, self.blocks - 1)

    def limits(self, problem: Problem) -> Limits:
        """What the schedule depends on."""
        return Limits(
            num_tokens=problem.num_tokens,
            num_indices=problem.num_indices,
            block=self.queries,
            tile=self.keys,
            page_size=problem.layout.page_size,
            group=problem.layout.group,
            causal=problem.causal,
            windowed=problem.windowed,
            update=problem.update,
            placed=problem.placed,
        )


@dataclasses.dataclass(frozen=True)
class Style:
    """How a block of so many query tokens is computed on a chip.

    Attributes:
      tokens: query tokens of the block.
      rows: rows of a key/value head: its query heads, one after another, each with all tokens.
      columns: they are columns of logits, whose weights need no maximum first (see `columns.py`).
      split: queries carry their scale, as two halves (see `flash.halves`).
      narrow: float8 keys and values are multiplied as they are (see `flash.narrow_dot`).
      unrolled: all heads are unrolled, not a loop.
    """

    tokens: int
    rows: int
    columns: bool
    split: bool
    narrow: bool
    unrolled: bool

    @property
    def keys_axis(self) -> int:
        """Axis of the keys among logits."""
        return 0 if self.columns else 1

    @property
    def strips(self) -> list[tuple[int, int]]:
        """Rows, or columns, that are computed together: the first, and how many."""
        step = math.gcd(self.rows, STRIP_COLUMNS) if self.columns else min(self.rows, STRIP_ROWS)
        return [(r, min(step, self.rows - r)) for r in range(0, self.rows, step)]


def style_of(problem: Problem, tokens: int, chip: Chip) -> Style:
    """The style of blocks of `tokens` on a chip."""
    rows = tokens * problem.group
    columns = tokens >= MANY and rows % LANES == 0 and problem.compute_dtype != jnp.float32
    columns &= not problem.layout.latent  # values as wide as those take too long to turn
    columns &= not problem.row_scales  # their keys would be along sublanes
    # v6e has products of float8 as well, but takes NaN for a number.
    narrow = chip.name == "tpu7x" and problem.layout.dtype == "float8_e4m3fn"
    narrow &= problem.compute_dtype == jnp.bfloat16 and not problem.row_scales
    narrow &= NARROW_LANES * rows <= problem.layout.keys.width + problem.layout.vals.width
    return Style(
        tokens=tokens,
        rows=rows,
        columns=columns,
        split=columns and 2 * problem.layout.keys.width <= chip.mxu_side,
        narrow=narrow and not columns,
        unrolled=tokens < MANY,
    )


def heads_at_once(style: Style, layout: CacheLayout, plan: Plan, *, whole: bool = False) -> int:
    """Key/value heads whose code is unrolled; `whole`: for whole chunks, which have less code."""
    if style.unrolled:
        return layout.kv_heads
    strips = STRIPS_AT_ONCE
    if style.tokens <= MANY:  # few of a prefill's blocks
        strips //= 2
    elif whole and plan.chunk * layout.keys.width < CHUNK * LANES:
        strips *= 2
    return math.gcd(layout.kv_heads, max(1, strips // len(style.strips)))


def buffers(problem: Problem, plan: Plan, chip: Chip) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and type of every buffer in VMEM, by name."""
    layout, f32 = problem.layout, jnp.float32
    heads, queries = layout.kv_heads, plan.queries
    styles = [style_of(problem, n, chip) for n in plan.query_sizes]
    rows = round_up(max([0, *(style.rows for style in styles if not style.columns)]), 16)
    columns = max([0, *(style.rows for style in styles if style.columns)])
    lanes = layout.keys.width * (2 if any(style.split for style in styles) else 1)
    blocks, outs, held, fresh = plan.blocks, 2, queries, max(queries, layout.group)
    if problem.resident:  # the last block may be shorter than what it is computed as
        blocks, outs, held = 1, 1, problem.num_tokens + queries
        fresh = round_up(problem.num_tokens, layout.run)
    fresh += (5 + layout.words_per_row) * layout.run  # see `Plumbing.fresh_above`; the rest below
    found = {
        "tiles": ((plan.tiles, plan.keys // layout.group, GROUP_ROWS, layout.width), jnp.int32),
        "queries": ((blocks, held, problem.q_heads, layout.key_dim), problem.dtype),
        "scaled": ((heads, max(rows, columns), lanes), problem.compute_dtype),
        "out": ((outs, held, problem.q_heads, layout.value_dim), problem.dtype),
    }
    if rows:
        found["top"] = found["total"] = ((heads, rows, LANES), f32)
        found["sum"] = ((heads, rows, layout.vals.width), f32)
    if columns:
        found["column_top"] = found["column_total"] = ((heads, 8, columns), f32)
        found["column_sum"] = ((heads, layout.vals.width, columns), f32)
        found["far"] = ((plan.keys // plan.chunk, heads, 8, columns), f32)
    if problem.update:
        found["fresh"] = ((blocks, fresh, layout.token_width), jnp.dtype(layout.dtype))
    if problem.tree:
        found["tree"] = ((plan.blocks, queries + GROUP_ROWS, LANES), jnp.int32)
    if problem.lse:
        found["lse"] = ((2, round_up(queries, 8), problem.lse_lanes), f32)
    for name in ("k_scales", "v_scales"):
        if getattr(problem, name):
            found[name] = ((plan.tiles, plan.keys // LANES + 1, heads, LANES), f32)
    return found


def vmem_bytes(problem: Problem, plan: Plan, chip: Chip) -> int:
    """Bytes of VMEM that the kernel's buffers take."""
    return sum(padded(*buffer) for buffer in buffers(problem, plan, chip).values())


def vmem_needed(problem: Problem, plan: Plan, chip: Chip) -> int:
    """Bytes that the kernel may need: the buffers, and room for logits and what is spilled."""
    strip = min(STRIP_ROWS, max(8, plan.queries * problem.group))
    arrays = 6 if problem.v_scales else 4  # of logits, weights and their halves
    values = strip * plan.chunk * 4 * arrays + plan.chunk * problem.layout.token_width * 2
    dim = round_up(max(problem.layout.key_dim, problem.layout.value_dim), LANES)
    laid = 2 * round_up(problem.q_heads, 8) * dim * 4  # a token that is laid out
    if style_of(problem, plan.queries, chip).columns:
        values = max(values, laid * min(plan.queries, SECTION))
    else:
        values += laid * plan.queries
    return vmem_bytes(problem, plan, chip) + values + 6 * 2**20


def code_size(problem: Problem, plan: Plan, chip: Chip) -> int:
    """Products of registers in the code of the largest block, which is unrolled."""
    style, layout = style_of(problem, plan.queries, chip), problem.layout
    heads = heads_at_once(style, layout, plan)
    passes = F32_PASSES if problem.compute_dtype == jnp.float32 else 1
    halves = 2 if problem.v_scales and passes == 1 else 1
    lanes = (layout.keys.width + layout.vals.width * halves) // LANES
    return heads * -(-style.rows // 8) * (plan.chunk // LANES) * lanes * passes


def scalars(problem: Problem) -> int:
    """32-bit words of SMEM that the description of the batch takes."""
    return 5 * (problem.num_requests + 2)


def check_plan(problem: Problem, plan: Plan, chip: Chip) -> None:
    """Checks that a plan is legal for a problem.

    Raises:
      ArgumentError: a field does not suit the problem.
      UnsupportedError: it needs more memory than the chip has.
    """

    def refuse(field: str, expected: str) -> None:
        raise ArgumentError(
            where="ragged_attention",
            argument=f"plan.{field}",
            got=f"is {getattr(plan, field)}",
            expected=expected,
        )

    checks.check_type("ragged_attention", "plan", plan, Plan, "Use ragged_attention.Plan.")
    for name, value in dataclasses.asdict(plan).items():
        checks.check_type("ragged_attention", f"plan.{name}", value, int)
    layout = problem.layout
    least = 64 if problem.tree else 8
    if plan.queries & (plan.queries - 1) or not least <= plan.queries <= 512:
        refuse("queries", f"a power of two, {least} to 512")
    unit = max(layout.page_size, 4 * LANES * layout.words_per_row)
    if plan.keys % unit or plan.keys < unit:
        refuse("keys", f"a multiple of {unit}")
    for field in ("tiles", "blocks"):
        value = getattr(plan, field)
        if value < 2 or value & (value - 1):
            refuse(field, "a power of two, at least 2")
    if plan.blocks > plan.tiles:
        refuse("blocks", f"at most plan.tiles = {plan.tiles}")
    needed = vmem_needed(problem, plan, chip)
    if needed > chip.vmem_bytes - VMEM_LEFT:
        raise UnsupportedError(
            where="ragged_attention",
            what=f"plan {plan} with {needed / 2**20:.1f} MiB of VMEM",
            place=chip.name,
            why=f"a core has {chip.vmem_bytes / 2**20:.0f} MiB",
            advice="Use fewer queries, keys or tiles.",
        )


def model(problem: Problem, chip: Chip) -> Plan:
    """The cost model: the longest tiles and largest blocks that fit.

    Long tiles, because a tile costs a pass over the sums and a maximum over lanes whatever its
    length; large blocks, because keys are loaded into the matrix unit once for all their rows.

    Raises:
      UnsupportedError: nothing fits.
    """
    least = 64 if problem.tree else 8
    prefill = problem.num_tokens > 8 * problem.num_requests
    wanted = max(least, min(256 if prefill else 128, problem.num_tokens))
    sizes = [n for n in (256, 128, 64, 32, 16, 8) if n >= least and n < 2 * wanted]
    keys = (2048, 1024, 512) if prefill else (8192, 4096, 2048, 1024, 512)
    if problem.window and problem.causal:  # longer tiles are not filled
        seen = problem.window + wanted + problem.layout.page_size
        keys = tuple(k for k in keys if k < 2 * max(seen, 512 * problem.layout.words_per_row))
    if prefill:  # many rows matter more than many buffers
        order = itertools.product(sizes, keys, (4, 2))
    else:
        order = (
            (n, k, t)
            for least in (4, 2)
            for k in keys
            for n in sizes
            for t in (8, 4, 2)  # of more the first would wait for longer
            if t >= least
        )
    for queries, length, tiles in order:
        tile = length * problem.layout.token_bytes
        plan = Plan(queries, length, tiles, min(tiles, 8))
        useful = tile <= TILE_BYTES and (tiles <= 4 or tiles * tile <= TILES_BYTES)
        useful &= code_size(problem, plan, chip) <= (CODE if prefill else 2 * CODE)
        if useful and PLANS.fits(problem, plan, chip):
            return plan
    raise UnsupportedError(
        where="ragged_attention",
        what=f"{problem.q_heads} heads of {problem.layout}",
        place=chip.name,
        why="the smallest blocks do not fit VMEM",
        advice="Shard the heads, or use implementation='reference'.",
    )


def key(problem: Problem) -> dict[str, tuning.Value]:
    """How the table knows a problem."""
    layout = problem.layout
    return {
        "dtype": jnp.dtype(problem.dtype).name,
        "cache_dtype": layout.dtype,
        "kv_heads": layout.kv_heads,
        "key_dim": layout.key_dim,
        "value_dim": layout.value_dim,
        "latent": layout.latent,
        "page_size": layout.page_size,
        "q_heads": problem.q_heads,
        "num_tokens": problem.num_tokens,
    }


PLANS = planning.Planner(
    kernel="ragged_attention",
    plan=Plan,
    check=check_plan,
    model=model,
    exact={
        "dtype": str,
        "cache_dtype": str,
        "kv_heads": int,
        "key_dim": int,
        "value_dim": int,
        "latent": bool,
        "page_size": int,
    },
    bucketed=("q_heads", "num_tokens"),
    key=key,
    choices={
        "keys": (512, 1024, 2048, 4096, 8192),
        "queries": (8, 16, 32, 64, 128, 256),
        "tiles": (2, 4, 8, 16),
        "blocks": (2, 4, 8),
    },
    path=Path(__file__).parent / "tuned.json",
)
Explanation = planning.Explanation[Problem, Plan]


def plan_for(problem: Problem, chip: Chip, plan: Plan | None = None) -> Explanation:
    """The plan of a call: the caller's, else the table's, else the cost model's.

    Raises:
      ArgumentError, UnsupportedError: the caller's plan is not legal, or none is.
    """
    if scalars(problem) > SMEM_WORDS:
        raise UnsupportedError(
            where="ragged_attention",
            what=f"a batch of {problem.num_requests} requests",
            place=chip.name,
            why=f"their lengths take {scalars(problem)} scalars, and {SMEM_WORDS} fit",
            advice="Split the batch.",
        )
    if problem.layout.dtype == "float4_e2m1fn" and chip.name != "tpu7x":
        raise UnsupportedError(
            where="ragged_attention",
            what="a cache of float4_e2m1fn",
            place=chip.name,
            why="its vector units do not know it",
            advice="Use float8_e4m3fn, or implementation='reference'.",
        )
    plan, source, why = PLANS.choose(problem, chip, plan)
    used = vmem_bytes(problem, plan, chip)
    return Explanation(problem, plan, source, why, used, chip.vmem_bytes)
