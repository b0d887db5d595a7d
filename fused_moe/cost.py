"""What the kernel, in both its forms, and the grouped layer are expected to take.

All are sums of what bounds them, for even routing. Moving rows one by one, the kernel starts a DMA
for each, which takes the scalar core some 100 ns, while its weights stay narrow and its exchange is
hidden. In bulk, on one device, it is bound by weights or products, and XLA gathers the rows before
it and adds up the results after it. The grouped layer moves rows in bulk, too, but widens all
weights to bfloat16 first, takes the rows of all devices through memory several times, and
multiplies whole tiles of 256 rows. So on one device bulk wins nearly everywhere; the grouped layer
wins where bfloat16 rows are many and short and the devices two.

The constants come from predictions (`tpukit.predict`; the products of the grouped layer replayed
with the tiles that follow from the group sizes; none is a measurement). On tpu7x, one device, in
microseconds predicted (and by this model):

| hidden x inter, experts, tokens, top_k | weights | one by one | in bulk | grouped |
|---|---|---|---|---|
| 2048 x 768, 8, 32, 2 | float8 | 44 (38) | 33 (29) | |
| 2048 x 768, 16, 32, 8 | float8 | 79 (79) | 53 (48) | 166 (177) |
| 2048 x 768, 16, 256, 8 | float8 | 258 (258) | 82 (69) | 289 (350) |
| 2048 x 768, 16, 256, 8 | bfloat16 | 271 (287) | 115 (106) | 157 (150) |
| 2048 x 768, 16, 2048, 8 | float8 | 1822 (1823) | 339 (328) | 1604 (1727) |
| 2048 x 768, 16, 2048, 8 | bfloat16 | 1897 (1939) | 452 (494) | 664 (746) |
| 2048 x 768, 16, 2048, 1 | float8 | 176 (176) | 92 (79) | 292 (350) |
| 2048 x 768, 16, 2048, 1 | bfloat16 | 189 (206) | 120 (117) | 168 (150) |
| 2048 x 768, 128, 32, 8 | bfloat16 | 546 (617) | 467 (526) | 527 (564) |
| 2048 x 768, 128, 128, 8 | float8 | 437 (461) | 292 (288) | |
| 2048 x 768, 128, 2048, 8 | float8 | 1941 (1997) | 466 (469) | 2658 (2827) |
| 2048 x 768, 128, 2048, 8 | bfloat16 | 2021 (2230) | 711 (761) | 1222 (1234) |
| 2048 x 768, 128, 4096, 8 | float8 | 3665 (3635) | 700 (665) | |
| 8192 x 2048, 8, 256, 8 | float8 | 406 (377) | 261 (265) | 1406 (1811) |
| 8192 x 2048, 8, 2048, 1 | bfloat16 | 712 (451) | 784 (491) | 863 (898) |

On 8 devices, 2048 x 768, bfloat16: 128 experts, 2,048 tokens, top_k 8: 286 (255) and 565 (624); 16
experts, 16,384 tokens, top_k 1: 281 (184) and 1,281 (1,420), the collectives at two links' rate.

A row of the kernel's columns: `python -m microbench predict --kernel fused_moe --chip tpu7x --case
flash/decode`, with `--set` for each of devices=1, shared=0, groups=1, hidden, inter, experts,
tokens and top_k, and for bfloat16 dtype and rows; `--plan bulk=0` or 1 for the form that is not
chosen. What XLA gathers and scatters by index counts as bytes.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from fused_moe.spec import ROWS, ExpertShape, Plan, Problem
from tpukit.chips import Chip

HBM_SHARE = 0.7  # of the vendor's bandwidth, that transfers of slices reach
MXU_SHARE = 0.9  # of the vendor's peak, that products of whole tiles reach
START_US = 10.0  # of lists and of small operations around the kernel
VISIT_US = 0.9  # of a tile that are not hidden behind its weights
ALONE_US = 0.06  # for each row: gathered, and sent home
SEVERAL_US = 0.04  # more where its token has several experts on the device: loaded, and stored
EXCHANGE_GB_PER_S = 90.0  # that a device's rows reach between devices: about one link
BULK_US = 12.0  # of small operations around rows in bulk
BULK_EXPERT_US = 0.1  # more for each expert: its padding is sorted as well
BULK_SHARE = 0.72  # of the vendor's bandwidth, that gathers and sums around them reach, at most
BULK_GB_PER_S = 2000.0  # as much
GATHER_GB_PER_S = 180.0  # that collectives reach: about two
RAGGED_ROWS = 256  # of a tile of `jax.lax.ragged_dot`; every expert begins one
RAGGED_SHARE = 0.48  # of the vendor's peak, that its products reach
ROW_BYTES = 31  # of memory traffic around the products, for each row and hidden channel
SCALED_ROW_BYTES = 100  # the same where every row fetches its expert's scales


@dataclasses.dataclass(frozen=True)
class Costs:
    """Microseconds of one call on one device, by the model above.

    Attributes:
      fused: of the kernel with a plan.
      grouped: of the grouped layer.
      bulk: whether in that plan rows travel in bulk.
      other: of the kernel if they travelled the other way; None on several devices.
    """

    fused: float
    grouped: float
    bulk: bool
    other: float | None

    def __str__(self) -> str:
        relation = "<=" if self.fused <= self.grouped else ">"
        ways = ("rows in bulk", "rows one by one")
        how, instead = ways if self.bulk else ways[::-1]
        kernel = f"kernel {self.fused:.0f} us with {how}"
        if self.other is not None:
            kernel += f" ({self.other:.0f} us with {instead})"
        return f"{kernel} {relation} grouped {self.grouped:.0f} us"


def costs(problem: Problem, plan: Plan, chip: Chip) -> Costs:
    """The costs of a call."""
    other = None
    if problem.num_devices == 1:
        other = fused_us(problem, dataclasses.replace(plan, bulk=1 - plan.bulk), chip)
    fused = fused_us(problem, plan, chip)
    return Costs(fused, grouped_us(problem, chip), bool(plan.bulk), other)


def fused_us(problem: Problem, plan: Plan, chip: Chip) -> float:
    """The kernel: weights once per tile or products, whichever binds, and its rows."""
    weights = products = visits = 0.0
    peak = chip.fp8_tflops if problem.quantised else chip.bf16_tflops
    for shape, rows, experts in parts(problem):
        tiles = experts * math.ceil(rows / experts / plan.tile)
        visits += tiles
        weights += tiles * values(problem, shape) * jnp.dtype(problem.weight_dtype).itemsize
        products += rows * 2 * values(problem, shape)
    multiply = products / (MXU_SHARE * peak * 1e6)
    if plan.bulk:
        return bulk_us(problem, weights, multiply, chip)
    entries, others = problem.num_tokens * problem.top_k, problem.num_devices - 1
    alone = (others / problem.num_devices) ** (problem.top_k - 1)
    by_row = entries * (ALONE_US + SEVERAL_US * (1 - alone))
    busy = max(memory_us(weights, chip), multiply)
    # a token goes once to each device that has experts of it, and one result comes back
    devices = problem.num_devices * (1 - (others / problem.num_devices) ** problem.top_k)
    away = problem.num_tokens * devices * others / problem.num_devices
    sent = 4 * max(problem.rows_out.row_words, problem.rows_back.row_words)
    exchange = 1e-3 * away * 2 * sent / EXCHANGE_GB_PER_S
    return max(START_US + busy + visits * VISIT_US + by_row, exchange)


def bulk_us(problem: Problem, weights: float, multiply: float, chip: Chip) -> float:
    """The kernel with rows in bulk, and what is around it, from bytes of weights and products."""
    there = 4 * problem.rows_out.row_words
    back = problem.hidden * jnp.dtype(problem.dtype).itemsize
    rows = sum(group_rows(rows, experts) for _, rows, experts in parts(problem))
    kernel = max(memory_us(weights + rows * (there + back), chip), multiply)
    tokens = problem.num_tokens * (2 * back + there)
    results = problem.num_tokens * problem.slots * 3 * back  # read, gathered, read again
    around = tokens + problem.bulk_rows * 2 * there + results
    fixed = BULK_US + BULK_EXPERT_US * problem.num_experts
    rate = min(BULK_SHARE * chip.hbm_gb_per_s, BULK_GB_PER_S)
    return kernel + fixed + around / (rate * 1e3)


def group_rows(rows: float, experts: int) -> float:
    """Rows of some experts up to whole groups: half a group more each, at least one."""
    return experts * max(rows / experts + ROWS / 2, ROWS)


def grouped_us(problem: Problem, chip: Chip) -> float:
    """The grouped layer: weights widened, whole tiles multiplied, rows of all devices moved."""
    size = jnp.dtype(problem.weight_dtype).itemsize
    total = 0.0
    for shape, rows, experts in parts(problem):
        blocks = max(shape.gate_blocks, shape.down_blocks) > 1  # then scales go into f32 weights
        wide = 4 if blocks else 2
        widening = (size + wide) if size < wide else 0
        tiles = math.ceil(rows / RAGGED_ROWS) + experts - 1
        products = 2 * tiles * RAGGED_ROWS * values(problem, shape) * wide / 2
        weights = experts * values(problem, shape) * wide
        total += memory_us(experts * values(problem, shape) * widening, chip)
        total += max(memory_us(weights, chip), products / (RAGGED_SHARE * chip.bf16_tflops * 1e6))
    scaled = SCALED_ROW_BYTES if problem.routed.gate_blocks == 1 else ROW_BYTES
    moved = problem.num_devices * problem.num_tokens * problem.top_k * problem.hidden * scaled
    others = (problem.num_devices - 1) * problem.num_tokens * problem.hidden
    gathered = others * (jnp.dtype(problem.dtype).itemsize + 4)  # tokens out, float32 sums back
    return total + memory_us(moved, chip) + 1e-3 * gathered / GATHER_GB_PER_S


def parts(problem: Problem) -> list[tuple[ExpertShape, float, int]]:
    """Of the routed and the shared experts: shape, rows on this device, and how many have any."""
    rows = problem.num_tokens * problem.top_k
    found = [(problem.routed, float(rows), min(problem.experts_here, rows))]
    if problem.shared is not None:
        found.append((problem.shared, float(problem.num_tokens), 1))
    return found


def values(problem: Problem, shape: ExpertShape) -> int:
    """Weights of an expert."""
    return 3 * problem.hidden * shape.inter


def memory_us(size: float, chip: Chip) -> float:
    """Microseconds that HBM takes for as many bytes."""
    return size / (HBM_SHARE * chip.hbm_gb_per_s * 1e3)
