"""`python -m microbench layers`: a layer's HBM, its predicted time by part, and what XLA moves."""

from __future__ import annotations

import itertools
import sys
from typing import Any

from microbench import environment
from microbench.cli import Options
from microbench.predicted import NOTHING_RARE
from microbench.record import Log, Record
from microbench.stack import steps
from microbench.table import table
from tpukit import copies
from tpukit.predict import MeshPrediction, predict_mesh
from tpukit.predict.hlo import parse

CHIP = "tpu7x"
STEPS = ("decode", "prompts")
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
# Parts of a layer, by the scope that the operations of the traced program are in.
PARTS = {
    "norms, projections": ("norm", "project"),
    "router, lists": ("route", "moe"),
}


def names() -> list[tuple[str, steps.Kind, str]]:
    """Model, kind of layer and step of every case."""
    return list(itertools.product(steps.CONFIGS, steps.KINDS, STEPS))


def least_move(config: steps.Config, step: steps.Step) -> int:
    """Bytes from which on a move counts: a fraction of the smallest array of rows of a rank."""
    return step.tokens * config.kv_rank


def run(options: Options) -> int:
    """Predicts the layers that the options name; 2 if there are none."""
    selected = [name for name in names() if options.case in "/".join(name)]
    if not selected or CHIP not in options.chips:
        print(f"microbench: no layer of {CHIP} is so called", file=sys.stderr)
        return 2
    rows, log = [], Log(options.json, options.csv)
    try:
        for model, kind, step in selected:
            name = f"{model}/{kind}/{step}"
            arguments = {"model": model, "kinds": [kind], "step": step, "seed": options.seed}
            torus = steps.CONFIGS[model].data > 2  # ends of dimensions longer than two are linked
            found = predict_mesh(
                f"{steps.__name__}:build", CHIP, arguments, wraps=torus, from_vectors=NOTHING_RARE
            )
            config = steps.CONFIGS[model]
            moved = copies.moves(found.hlo, least_move(config, steps.step_of(step, config)))
            rows.append({"layer": name, **figures(found, moved)})
            log.add(_record(name, rows[-1]))
            lines = [f"  moved: {move}" for move in moved]
            print("\n".join([f"{name}: {found}", *lines]), flush=True)
    finally:
        log.close()
    print(f"\npredicted for {CHIP}, microseconds; collectives are not predicted\n{table(rows)}")
    return 0


def figures(found: MeshPrediction, moved: tuple[copies.Move, ...]) -> dict[str, Any]:
    """A row about a layer."""
    glue = [op for op in found.glue if op.opcode.removesuffix("-start") not in COLLECTIVES]
    parts = {
        part: sum(op.milliseconds for op in glue if _scope(op.source) in scopes)
        for part, scopes in PARTS.items()
    }
    attention = sum(kernel.milliseconds for kernel in found.others)
    parts = {
        "attention kernel": attention,
        "experts kernel": found.kernel_milliseconds,
        **parts,
    }
    rest = sum(op.milliseconds for op in glue if _scope(op.source) is None)
    total = sum(parts.values()) + rest
    by_move = {move.name for move in moved}
    return {
        "us": 1e3 * total,
        **{part: 1e3 * milliseconds for part, milliseconds in parts.items()},
        "rest": 1e3 * rest,
        "of these moves": 1e3 * sum(op.milliseconds for op in glue if op.name in by_move),
        "collectives MB": sum(
            max((shape.size for shape in op.results), default=0)
            for op in parse(found.hlo)
            if op.opcode.removesuffix("-start") in COLLECTIVES
        )
        / 1e6,
        "arguments MB": found.argument_bytes / 1e6,
        "outputs MB": found.output_bytes / 1e6,
        "temporary MB": found.temp_bytes / 1e6,
    }


def _scope(source: str) -> str | None:
    """The part of a layer that an operation of the traced program is in."""
    scopes = {scope for part in PARTS.values() for scope in part}
    return next((word for word in source.split("/") if word in scopes), None)


def _record(name: str, row: dict[str, Any]) -> Record:
    figures = {key: value for key, value in row.items() if key != "layer"}
    return {
        "kind": "layers",
        "label": "predicted",
        "layer": name,
        "chip": CHIP,
        **figures,
        "versions": environment.versions(),
        "commit": environment.commit(),
        "command": f"python -m microbench layers --case {name}",
    }
