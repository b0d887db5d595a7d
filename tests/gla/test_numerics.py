"""The numerics card of docs/gla.md is what this machine measures."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.gla import numerics

PAGE = (Path(__file__).parents[2] / "docs" / "gla.md").read_text()
FIGURE = re.compile(r"\d\.\de-\d\d")


def documented(rule, state=None):
    """Figures of a rule with a state, or of what is not offered for it."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.split("\n")]
    rows = [r for r in rows if r and r[0] == rule and FIGURE.search(r[-1])]
    (row,) = [r for r in rows if (r[1] if r[1] in numerics.STATES else None) == state]
    return [float(x) for x in FIGURE.findall(" ".join(row))]


def check_figures(found, page):
    """Within a tenth: rounding to two digits, and sums in another order on another machine."""
    assert len(found) == len(page)
    np.testing.assert_allclose(found, page, rtol=0.1)


@pytest.mark.parametrize("rule,state", [("Lightning", "bf16"), ("decays per token", "f32")])
def test_the_card(rule, state):
    ours, plain = numerics.card(rule, state)
    assert all(x <= 1.1 * y + 1e-7 for x, y in zip(ours, plain, strict=True))
    check_figures(
        [x for pair in zip(ours, plain, strict=True) for x in pair], documented(rule, state)
    )


@pytest.mark.parametrize("rule", ["Lightning", "Gated DeltaNet"])
def test_what_is_not_offered(rule):
    found = numerics.split_states(rule) + numerics.float8_inputs(rule)
    check_figures(found, documented(rule))


def test_a_wrong_figure_is_seen():
    page = documented("Lightning", "bf16")
    assert len(page) == 8
    with pytest.raises(AssertionError):
        check_figures([1.2 * x for x in page], page)


@pytest.mark.parametrize("fault", ["high only", "no chain"])
def test_faults_of_the_measurement_are_seen(fault, monkeypatch):
    """The lower term dropped, or every call's state from nothing."""
    keep = {"high only": numerics.oracle.bf16, "no chain": np.zeros_like}[fault]
    stored = lambda pool: keep(np.asarray(pool)).astype(np.float32)  # noqa: E731
    monkeypatch.setattr(numerics, "high_and_low", stored)
    with pytest.raises(AssertionError):
        check_figures(numerics.split_states("Lightning"), documented("Lightning")[:4])
