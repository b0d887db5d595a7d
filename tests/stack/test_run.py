"""The command `layers`: what it adds up, and what it leaves out."""

import dataclasses
import json
import types

import pytest

from microbench import cli
from microbench.stack import run
from tpukit.predict import GluePrediction

HLO = """
ENTRY %main (x: bf16[64,128]) -> bf16[64,128] {
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="x"}
  %copy.1 = bf16[64,128]{0,1:T(8,128)(2,1)} copy(%x), metadata={op_name="jit(run)/dot_general"}
  ROOT %all-gather.1 = bf16[64,512]{1,0:T(8,128)(2,1)} all-gather(%copy.1), dimensions={1}
}
"""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a prediction has, as far as it is read."""

    others: tuple = (types.SimpleNamespace(milliseconds=0.5), types.SimpleNamespace(milliseconds=1))
    kernel_milliseconds: float = 2.0
    glue: tuple = (
        GluePrediction("copy.1", "copy", "tensorcore", 0.1, "replayed", "jit(run)/project/dot"),
        GluePrediction("fusion.1", "fusion", "tensorcore", 0.2, "replayed", "jit(run)/route/top_k"),
        GluePrediction("copy-start.1", "copy-start", "tensorcore", 0.3, "bytes"),
        GluePrediction("all-gather.1", "all-gather", "sparsecore", 9.0, "bytes", "jit(run)/norm/x"),
    )
    hlo: str = HLO
    argument_bytes: int = 3_000_000
    output_bytes: int = 2_000_000
    temp_bytes: int = 1_000_000


@pytest.fixture
def predicted(monkeypatch):
    """The calls of `predict_mesh`, which predicts nothing."""
    calls = []

    def predict_mesh(target, chip, arguments, **options):
        calls.append((target, chip, arguments, options))
        return Found()

    monkeypatch.setattr(run, "predict_mesh", predict_mesh)
    return calls


def test_a_layer_is_the_sum_of_its_parts_without_collectives(predicted, tmp_path, capsys):
    path = tmp_path / "layers.jsonl"
    options = cli.Options(command="layers", case="1t/mla/decode", json=str(path))
    assert run.run(options) == 0
    (row,) = map(json.loads, path.read_text().splitlines())
    assert row["label"] == "predicted"
    assert row["command"] == "python -m microbench layers --case ling-2.6-1t/mla/decode"
    parts = ("attention kernel", "experts kernel", "norms, projections", "router, lists", "rest")
    assert [row[part] for part in parts] == pytest.approx([1500, 2000, 100, 200, 300])
    assert row["us"] == pytest.approx(4100)  # not 9000 more
    assert row["collectives MB"] == pytest.approx(64 * 512 * 2 / 1e6)
    assert (row["arguments MB"], row["outputs MB"], row["temporary MB"]) == (3, 2, 1)
    assert row["of these moves"] == pytest.approx(100)
    out = capsys.readouterr().out
    assert "collectives are not predicted" in out
    assert "moved: copy.1 (copy) bf16[64,128]" in out
    ((target, chip, arguments, options),) = predicted
    assert (target, chip) == ("microbench.stack.steps:build", "tpu7x")
    assert arguments == {"model": "ling-2.6-1t", "kinds": ["mla"], "step": "decode", "seed": 0}
    assert options == {"wraps": True, "from_vectors": 0}


def test_small_moves_are_not_named(monkeypatch, predicted, capsys):
    monkeypatch.setattr(run, "least_move", lambda config, step: 10**6)
    assert run.run(cli.Options(command="layers", case="flash/mla/decode")) == 0
    assert "moved:" not in capsys.readouterr().out
    assert predicted[0][3] == {"wraps": False, "from_vectors": 0}


def test_every_layer_is_predicted_by_default(predicted):
    assert run.run(cli.Options(command="layers")) == 0
    assert len(predicted) == len(run.names()) == 8


@pytest.mark.parametrize("options", [{"case": "tango"}, {"chips": ("v6e",)}])
def test_what_there_is_none_of_is_refused(options, predicted, capsys):
    assert run.run(cli.Options(command="layers", **options)) == 2
    assert "no layer" in capsys.readouterr().err
    assert not predicted
