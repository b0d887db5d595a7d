"""What a chip can do per cycle: every constant with its value, where it is from, and its standing.

Standing is "vendor" (a data sheet), "schedule" (read off the compiler's own schedules), "derived"
(follows from those), "fitted" (on the rows named and no others), or "assumed" (nothing public to
test it by). The rows are in `microbench/validation/published.csv`, those for fitting marked `fit`.
A first fit for tpu7x, on the grouped matmuls alone, gave 1.75 GHz, 3,000 GB/s and 1.2 us; flash
attention showed that latency to be too long, and all the rows marked `fit` were used instead. That
XLA's operations have a bandwidth of their own, on v5e too, was decided after rows marked `test` had
been predicted; its values are not taken from them.
"""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from tpukit import chips
from tpukit.errors import UnsupportedError


@dataclasses.dataclass(frozen=True)
class Constant:
    """A number and its standing.

    Attributes:
      value: the number.
      unit: what it counts.
      standing: see the module.
      source: where it is from.
    """

    value: float
    unit: str
    standing: str
    source: str


@dataclasses.dataclass(frozen=True)
class Rates:
    """The constants of one chip, for one TensorCore.

    Attributes:
      chip: its name.
      clock: GHz; turns cycles into time.
      bandwidth: of HBM, GB/s, for the transfers of Pallas kernels.
      xla_bandwidth: the same, for XLA's own operations, which copy in larger pieces.
      latency: us from the end of a transfer's turn on HBM to its semaphore.
      matmul: cycles a matrix unit is busy with 16 rows of bf16.
      queue: matrix operations that a unit holds before issue stalls.
      local_bandwidth, local_latency: GB/s and us of transfers that stay on the chip.
    """

    chip: str
    clock: Constant
    bandwidth: Constant
    xla_bandwidth: Constant
    latency: Constant
    matmul: Constant
    queue: Constant
    local_bandwidth: Constant
    local_latency: Constant

    @property
    def mxus(self) -> int:
        """Matrix units."""
        return chips.chip(self.chip).mxus

    @property
    def peak_clock(self) -> float:
        """GHz at which the matrix units would reach the vendor's peak."""
        chip = chips.chip(self.chip)
        rows_per_cycle = 16 / self.matmul.value
        return chip.bf16_tflops * 1e3 / (2 * chip.mxus * chip.mxu_side**2 * rows_per_cycle)

    @property
    def mxu_queue(self) -> int:
        """Operations a matrix unit holds."""
        return int(self.queue.value)

    @property
    def hbm_latency(self) -> float:
        """Cycles."""
        return self.latency.value * 1e3 * self.clock.value

    @property
    def local_latency_cycles(self) -> float:
        """Cycles."""
        return self.local_latency.value * 1e3 * self.clock.value

    def hbm_cycles(self, size: int) -> float:
        """Cycles that a transfer of `size` bytes occupies HBM."""
        return size * self.clock.value / self.bandwidth.value

    def local_cycles(self, size: int) -> float:
        """Cycles that a transfer of `size` bytes occupies the local path."""
        return size * self.clock.value / self.local_bandwidth.value

    def matmul_cycles(self, dtype: str) -> int:
        """Cycles of one matrix operation, whose rows fill one vector register.

        That is 8 rows of f32, 16 of bf16, 32 of bytes. f32 takes the time of as many rows of bf16,
        bytes that of the vendor's peak rate for them.

        Raises:
          UnsupportedError: the chip has no known rate for the type.
        """
        chip = chips.chip(self.chip)
        peak = {"s8": chip.int8_tops, "u8": chip.int8_tops}.get(
            dtype, chip.fp8_tflops if dtype.startswith("f8") else 0.0
        )
        relative = {"bf16": 1.0, "f32": 0.5}.get(dtype, 2 * chip.bf16_tflops / peak if peak else 0)
        if not relative:
            raise UnsupportedError(
                where="predict",
                what=f"a kernel with matrix operations of {dtype}",
                place=self.chip,
                why="no rate is published for them",
            )
        return round(self.matmul.value * relative)


def _rates(
    chip: str,
    *,
    clock: Constant,
    bandwidth: Constant,
    xla_bandwidth: Constant | None = None,
    latency: Constant,
    matmul: int,
) -> Rates:
    schedule = "issue intervals in the compiler's static profile of packed matrix products"
    return Rates(
        chip=chip,
        clock=clock,
        bandwidth=bandwidth,
        xla_bandwidth=xla_bandwidth or bandwidth,
        latency=latency,
        matmul=Constant(matmul, "cycles", "schedule", schedule),
        queue=Constant(2, "operations", "assumed", "the smallest that lets products overlap"),
        local_bandwidth=Constant(4000.0, "GB/s", "assumed", "nothing public"),
        local_latency=Constant(0.1, "us", "assumed", "nothing public"),
    )


_NOMINAL = "the vendor's data sheet"
_PEAK = "the vendor's peak rate over the size of the matrix units"
# Grids were searched for the least mean error, of the kernels' rows first.
_MATMUL = "grouped matmul (P0077, P0078, P0079, P0082, P0083, P0085, P0087) and XLA matmul rows"
_COPY = "the limit that the HBM copy rows reach"
_COPY_SHARE = "nominal times the share of it that the HBM copy rows reach on tpu7x"
_FLASH = "flash attention rows P0373, P0376, P0377, P0378, P0379"
RATES = MappingProxyType(
    {
        "v5e": _rates(
            "v5e",
            clock=Constant(1.5, "GHz", "derived", _PEAK),
            bandwidth=Constant(820.0, "GB/s", "vendor", _NOMINAL),
            xla_bandwidth=Constant(713.0, "GB/s", "derived", _COPY_SHARE),
            latency=Constant(0.8, "us", "assumed", "as fitted on v6e and tpu7x"),
            matmul=16,
        ),
        "v6e": _rates(
            "v6e",
            clock=Constant(1.75, "GHz", "derived", _PEAK),
            bandwidth=Constant(1480.0, "GB/s", "fitted", _FLASH),
            latency=Constant(0.8, "us", "fitted", _FLASH),
            matmul=8,
        ),
        "tpu7x": _rates(
            "tpu7x",
            clock=Constant(1.8, "GHz", "fitted", _MATMUL),
            bandwidth=Constant(2600.0, "GB/s", "fitted", _MATMUL),
            xla_bandwidth=Constant(3200.0, "GB/s", "fitted", _COPY),
            latency=Constant(0.8, "us", "fitted", _MATMUL),
            matmul=8,
        ),
    }
)


def rates(chip: str) -> Rates:
    """Returns the constants of a chip.

    Raises:
      ArgumentError: no such chip.
      UnsupportedError: its constants are not known.
    """
    name = chips.chip(chip).name
    if name not in RATES:
        raise UnsupportedError(
            where="predict",
            what="a prediction",
            place=name,
            why="its constants are not known: published times of two-core kernels did not fit",
            advice=f"Use one of {', '.join(RATES)}.",
        )
    return RATES[name]
