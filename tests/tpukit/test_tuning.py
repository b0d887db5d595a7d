"""Block-size tables: lookup, refusal of bad tables, byte-identical writing."""

import copy
import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpukit import tuning
from tpukit.errors import TableError

SCHEMA = tuning.Schema("toy", {"dtype": str}, ("tokens", "heads"), {"block": int, "fast": bool})
MEASURED = {
    "how": "measured",
    "date": "2026-08-01",
    "command": "python -m microbench run --kernel toy",
    "versions": {"jax": "0.12.0"},
    "microseconds": 12.5,
}


def entry(tokens=1024, heads=8, block=128, chip="v6e", dtype="bfloat16"):
    key = {"dtype": dtype, "tokens": tokens, "heads": heads}
    plan = {"block": block, "fast": True}
    return {"chip": chip, "key": key, "plan": plan, "found": copy.deepcopy(MEASURED)}


def write(path, *entries, **top):
    path.write_text(json.dumps({"schema": 1, "kernel": "toy", "entries": list(entries), **top}))
    return path


@pytest.fixture
def table(tmp_path):
    entries = [entry(), entry(tokens=4096, block=256), entry(heads=64, block=512)]
    return tuning.load(write(tmp_path / "t.json", *entries), SCHEMA)


def resolve(table, chip="v6e", valid=lambda plan: True, dtype="bfloat16", tokens=1024, heads=8):
    key = {"dtype": dtype, "tokens": tokens, "heads": heads}
    return table.resolve(chip, key, valid=valid, model=lambda: {"block": 1, "fast": False})


def test_exact_entry(table):
    found = resolve(table)
    assert (found.source, found.value["block"]) == ("exact", 128)
    assert "measured on 2026-08-01" in found.why


@pytest.mark.parametrize(("tokens", "block"), [(900, 128), (1500, 128), (3000, 256), (16000, 256)])
def test_nearest_entry(table, tokens, block):
    found = resolve(table, tokens=tokens)
    assert (found.source, found.value["block"]) == ("nearest", block)
    assert "nearest" in found.why


def test_nearest_is_by_ratio_over_all_buckets(table):
    # A factor of 1.9 and 2 away from one entry, 2.1 and 4 away from the next.
    assert resolve(table, tokens=1900, heads=16).value["block"] == 128
    assert resolve(table, tokens=1024, heads=40).value["block"] == 512


@pytest.mark.parametrize(
    "problem", [{"chip": "v5e"}, {"dtype": "float32"}, {"tokens": 20000}, {"tokens": 200}]
)
def test_model_where_no_entry_is_near(table, problem):
    found = resolve(table, **problem)
    assert (found.source, found.value["block"]) == ("model", 1)
    assert "no entry" in found.why


def test_entries_are_validated_for_the_problem_at_hand(table):
    found = resolve(table, tokens=2000, valid=lambda plan: plan["block"] != 128)
    assert (found.source, found.value["block"]) == ("nearest", 256)
    found = resolve(table, valid=lambda plan: False)
    assert found.source == "model"
    assert "2 near enough are not valid here" in found.why


def _change(path, value):
    def change(raw):
        *parents, last = path
        for name in parents:
            raw = raw[name]
        if value is _change:
            del raw[last]
        else:
            raw[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("plan", "blok"), 1, "unknown field 'blok'"),
        (("plan", "block"), _change, "no field 'block'"),
        (("plan", "block"), "128", "block is '128'; needs int"),
        (("plan", "block"), 128.0, "block is 128.0; needs int"),
        (("plan", "block"), True, "block is True; needs int"),
        (("plan", "fast"), 1, "fast is 1; needs bool"),
        (("key", "tokens"), 0, "tokens is not positive"),
        (("key", "dtype"), None, "dtype is None; needs str"),
        (("key", "page"), 1, "unknown field 'page'"),
        (("chip",), "v4", "unknown chip 'v4'"),
        (("chip",), _change, "no field 'chip'"),
        (("plan",), [1], "plan is [1]; needs dict"),
        (("found", "how"), "guessed", "unknown origin 'guessed'"),
        (("found", "how"), "static", "a time belongs to"),
        (("found", "microseconds"), _change, "a time belongs to"),
        (("found", "microseconds"), "1", "microseconds is '1'; needs float"),
        (("found", "date"), "yesterday", "yesterday"),
        (("found", "versions"), {"libtpu": "0"}, "do not name jax's"),
        (("found", "command"), _change, "no field 'command'"),
        (("note",), "x", "unknown field 'note'"),
    ],
)
def test_bad_entries_name_file_and_entry(tmp_path, path, value, message):
    good, bad = entry(), entry(tokens=77)
    _change(path, value)(bad)
    with pytest.raises(TableError) as caught:
        tuning.load(write(tmp_path / "t.json", good, bad), SCHEMA)
    assert str(caught.value).startswith("t.json, entry 1: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ({"kernel": "other"}, "schema 1 of 'other'; needs 1 of 'toy'"),
        ({"schema": 2}, "schema 2"),
        ({"extra": 1}, "unknown field 'extra'"),
        ({"entries": {}}, "entries is {}"),
    ],
)
def test_bad_tables(tmp_path, top, message):
    with pytest.raises(TableError, match=r"^t\.json: ") as caught:
        tuning.load(write(tmp_path / "t.json", **top), SCHEMA)
    assert message in str(caught.value)


def test_broken_json_and_twins(tmp_path):
    path = tmp_path / "t.json"
    path.write_text("{")
    with pytest.raises(TableError, match=r"t\.json: not JSON"):
        tuning.load(path, SCHEMA)
    with pytest.raises(TableError, match="entry 1: same chip and key as 0"):
        tuning.load(write(path, entry(), entry(block=1)), SCHEMA)


@given(st.permutations(range(5)))
def test_writing_is_deterministic(tmp_path_factory, order):
    folder = tmp_path_factory.mktemp("tables")
    entries = [entry(tokens=2**i, chip="v5e" if i % 2 else "v6e") for i in range(5)]
    first = tuning.load(write(folder / "a.json", *entries), SCHEMA)
    second = tuning.load(write(folder / "b.json", *(entries[i] for i in order)), SCHEMA)
    tuning.dump(folder / "a.json", first)
    tuning.dump(folder / "b.json", second)
    assert (folder / "a.json").read_bytes() == (folder / "b.json").read_bytes()
    again = tuning.load(folder / "a.json", SCHEMA)
    assert all(entry in first.entries for entry in again.entries)
    assert len(again.entries) == len(first.entries)


def test_bad_entries_are_not_written(tmp_path, table):
    wrong = dataclasses.replace(table.entries[0], plan={"block": "x", "fast": True})
    with pytest.raises(TableError, match="block is 'x'"):
        tuning.dump(tmp_path / "new.json", dataclasses.replace(table, entries=(wrong,)))
    assert not (tmp_path / "new.json").exists()
