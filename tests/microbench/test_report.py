"""The command `report`."""

import base64
import html.parser
import json
import re

import pytest

from microbench import report
from microbench.case import Case
from microbench.record import record

pytest.importorskip("matplotlib")


def made(kind, values, case="model/<b>", chip="tpu7x", **context):
    context |= {"chip": chip} if chip else {}
    case = Case("fake", case, {})
    return record(kind, case, values, label=kind, command=f"do {kind}", **context)


PREDICTED = {"predicted us": 12.5, "MXU %": 40.0, "bound by": "HBM"}
COST = {"cost": {"flops": 1e9, "hbm_bytes": 1e7}}


class Page(html.parser.HTMLParser):
    """Tables as rows of cells, headings and images."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.headings, self.images, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_every_kind_of_record_has_its_table():
    kinds = {
        "predict": PREDICTED,
        "compare": {"who": "XLA", "predicted us": 50.0, "times as slow": 4.0},
        "tune": {"gain %": 7.0},
        "check": {"check": "output", "error": 0.1, "limit": 0.2, "ok": True},
        "time": {"median_ms": 3.0},
        "aot": {"compiles": True, "bundles": 77},
    }
    records = [made(kind, values, **COST) for kind, values in kinds.items()]
    page = Page(report.page(records, report._pictures(records)))
    wanted = [title for title, *_ in report._SECTIONS.values()]
    assert page.headings == ["Where it runs", *wanted, "Commands"]
    for text in ("12.5", "XLA", "output", "77", "model/<b>"):
        assert any(text in cell for row in page.rows for cell in row), text
    for image in page.images:
        assert base64.b64decode(image.partition(",")[2]).startswith(b"\x89PNG")
    assert len(page.images) == 2


def test_the_page_needs_nothing_from_elsewhere():
    text = report.page([made("predict", PREDICTED, **COST)], {})
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "<script" not in text


def test_the_matrix_says_how_far_each_case_got():
    records = [
        made("check", {"ok": True}, chip=None),
        made("check", {"ok": False}, chip=None, case="wrong"),
        made("check", {"ok": True}, chip=None, case="wrong"),
        made("aot", {"compiles": True}),
        made("predict", PREDICTED),
        made("aot", {"compiles": False, "error": "too large"}, chip="v5e"),
        made("aot", {"compiles": True}, chip="v6e"),
        made("predict", {"error": "not understood"}, chip="v6e"),
    ]
    first, second = report.matrix(records)
    assert first["runs here"] is True and second["runs here"] is False
    assert first["tpu7x"] == "predicted 12.5 us"
    assert first["v5e"] == "refused" and first["v6e"] == "compiles"


def test_a_report_is_made_of_files_or_of_a_run(microbench, tmp_path):
    out, records = tmp_path / "page.html", tmp_path / "records"
    words = ["--case", "right", "--chip", "v6e", "--out", str(out)]
    status, text, err = microbench("report", *words, "--json", str(records))
    assert status == 0, err
    assert f"written: {out}" in text and (tmp_path / "page-roofline-v6e.png").exists()
    first = out.read_text()
    kinds = {json.loads(line)["kind"] for line in records.read_text().splitlines()}
    assert kinds == {"check", "predict"}
    out.unlink()
    assert microbench("report", str(records), "--out", str(out))[0] == 0
    assert out.read_text() == first
    status, _, err = microbench("report", __file__)
    assert status == 2 and "not a file of records" in err


def test_no_records_are_no_report(microbench, tmp_path):
    empty = tmp_path / "empty"
    empty.write_text("")
    status, _, err = microbench("report", str(empty))
    assert status == 2 and "no records to report" in err
