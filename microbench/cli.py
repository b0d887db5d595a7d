"""Checks, times, compiles, predicts and compares the kernels on the shapes that matter.

Usage: microbench [list | run | aot | predict | compare | tune | report | validate | layers | env]
[flags] (or python -m microbench)

  (nothing)  every default case: check, then time, then the ahead-of-time report
  list       the cases and their parameters
  run        check, then time what this machine has: on a TPU the kernel, elsewhere the reference
  aot        compile for chips that are not here and report what the compiler made
  predict    compile for chips that are not here and predict the time by replaying the schedules
  compare    predict each case beside what one would take instead: XLA, JAX's kernels, tokamax's
  compare OLD [NEW]
             two runs side by side, regressions marked: each a file that --json wrote, or a git
             revision, which is predicted now, or compiled where no prediction follows its
             schedules; NEW is the working tree where it is not given
  tune       look for better block sizes with the compiler in the loop; --save keeps them
  report [FILE ...]
             one HTML page of the records in these files; without any, checks and predicts first
  validate   predict kernels whose times others have published, and show the errors
  layers     predict whole layers of a model on the devices of a slice, and show what XLA adds
  env        versions, commit, machine

A case whose check fails is not timed. Exit status: 0 all is well, 1 a check failed or a figure got
worse, 2 something asked for is not supported, 3 the environment is at fault, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from microbench import environment

COMMANDS = (
    "bench",
    "list",
    "run",
    "aot",
    "predict",
    "compare",
    "tune",
    "report",
    "validate",
    "layers",
    "env",
)
OPERANDS = {"compare": 2, "report": 1000}  # how many words may follow the command
CHIPS = ("tpu7x",)  # where none is named


class UsageError(ValueError):
    """The command line asks for something that does not exist."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line.

    Attributes:
      command: one of COMMANDS; "bench" is what runs when none is given.
      operands: words after the command: files of records, or revisions.
      kernels: names of kernels; empty for all.
      case: part of the names of the cases wanted.
      chips: chips to compile for.
      settings: parameters to change in every case, as text.
      plan: fields of the kernel's plan to change, as text.
      json, csv: files for the records, or None.
      resume: whether what the file of records holds already is taken from there.
      save: whether tuning keeps what it finds.
      out: file for the report.
      trace: folder for the timelines of predictions, or None.
      picture: folder for pictures of predictions, or None.
      seed: of the inputs.
    """

    command: str = "bench"
    operands: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    case: str = ""
    chips: tuple[str, ...] = CHIPS
    settings: tuple[tuple[str, str], ...] = ()
    plan: tuple[tuple[str, str], ...] = ()
    json: str | None = None
    csv: str | None = None
    resume: bool = False
    save: bool = False
    out: str = "report.html"
    trace: str | None = None
    picture: str | None = None
    seed: int = 0


def _define() -> flags.FlagValues:
    """The flags, kept apart from absl's global ones so that importing this defines none."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # flags may follow the command
    own: Any = {"flag_values": values}
    flags.DEFINE_bool("help", False, "Show this.", short_name="h", **own)
    flags.DEFINE_list("kernel", [], "Kernels, with commas between; all by default.", **own)
    flags.DEFINE_string("case", "", "Only the case of this name, or those that contain it.", **own)
    flags.DEFINE_list("chip", list(CHIPS), "Chips to compile for, such as tpu7x,v6e,v5e.", **own)
    flags.DEFINE_multi_string("set", [], "key=value: changes a parameter of every case.", **own)
    plan = "key=value: changes a field of every plan; tune: tries those fields and values only."
    flags.DEFINE_multi_string("plan", [], plan, **own)
    flags.DEFINE_string("json", None, "File for the records, one JSON object a line.", **own)
    flags.DEFINE_string("csv", None, "File for the records, as a table.", **own)
    flags.DEFINE_bool("resume", False, "Take from the file of --json what it has.", **own)
    flags.DEFINE_bool("save", False, "tune: write the winners to tuned.json.", **own)
    flags.DEFINE_string("out", "report.html", "report: the file to write.", **own)
    flags.DEFINE_string("trace", None, "predict: folder for timelines (ui.perfetto.dev).", **own)
    flags.DEFINE_string("picture", None, "predict: folder for pictures (matplotlib).", **own)
    flags.DEFINE_integer("seed", 0, "Seed of the inputs.", **own)
    return values


def parse(argv: Sequence[str]) -> Options | str:
    """Reads a command line, `argv[0]` being the program.

    Returns:
      The options, or the help text where that was asked for.

    Raises:
      UsageError: an unknown command or flag, or a malformed value.
    """
    values = _define()
    try:
        words = values(list(argv))[1:]
    except flags.Error as error:
        raise UsageError(f"{error}. See --help.") from error
    if values.help:
        return f"{__doc__}\nFlags:\n{values.get_help()}"
    command, *operands = words or ["bench"]
    if command not in COMMANDS or len(operands) > OPERANDS.get(command, 0):
        known = ", ".join(COMMANDS)
        raise UsageError(f"unknown command {' '.join(words)!r}; the commands are {known}")
    if values.resume and not values.json:
        raise UsageError("--resume needs --json=FILE, the file of records to go on with")
    return Options(
        command=command,
        operands=tuple(operands),
        kernels=tuple(values.kernel),
        case=values.case,
        chips=tuple(values.chip),
        settings=_pairs("set", values.set),
        plan=_pairs("plan", values.plan),
        json=values.json,
        csv=values.csv,
        resume=values.resume,
        save=values.save,
        out=values.out,
        trace=values.trace,
        picture=values.picture,
        seed=values.seed,
    )


def _pairs(flag: str, texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    if not all("=" in text for text in texts):
        raise UsageError(f"--{flag} needs key=value, got {' '.join(texts)}")
    return tuple((key, value) for key, _, value in (text.partition("=") for text in texts))


def main(argv: Sequence[str]) -> int:
    """Runs a command line, `argv[0]` being the program, and returns the exit status."""
    try:
        options = parse(argv)
    except UsageError as error:
        print(f"microbench: {error}", file=sys.stderr)
        return 2
    if isinstance(options, str):
        print(options)
        return 0
    if options.command == "env":
        facts = environment.describe()
        print("\n".join(f"{name:20} {value}" for name, value in facts.items()))
        return 0
    environment.prepare()
    if options.command == "validate":
        from microbench.validation import report  # noqa: PLC0415  (imports JAX in its workers)

        return report.run(options)
    if options.command == "layers":
        from microbench.stack import run  # noqa: PLC0415  (imports JAX)

        return run.run(options)
    from microbench import bench  # noqa: PLC0415  (imports JAX, so after `prepare`)

    return bench.run(options)


def run_and_exit() -> None:
    """The console script."""
    sys.exit(main(sys.argv))
