"""Reports for CI servers, model cards and browsers; no text from a checkpoint can become markup in them."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from gemma2tool.verify.compare.comparison import TensorComparison
from gemma2tool.verify.compare.measurements import Drift, Measurements, Sample, TensorError, Tokens
from gemma2tool.verify.diagnosis.cause import Cause
from gemma2tool.verify.finding import Finding, GateResult
from gemma2tool.verify.reports import junit, markdown, page, plots, svg, tensor_map
from gemma2tool.verify.reports.markup import Markup, tag
from gemma2tool.verify.result import Side, Verification

AXE = Path(__file__).parents[3] / "node_modules" / "axe-core" / "axe.min.js"

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "\x1b[31mred\x1b[0m",
    "line\nbreak\r",
    "a|b|c",
    "[link](https://example.org) ![image](http://example.org/x.png)",
    "`code` **bold** @team $x$",
    "right\u202eleft",
    "\ud800lone",
    "]]>&amp;",
    "\x00\x01\ufffe",
)


def comparison(name: str, kind: str, error: float, ok: bool = True) -> TensorComparison:
    return TensorComparison(
        name=name,
        shape=(4, 4),
        source_type="bf16",
        candidate_type=kind,
        rule="bound" if error else "exact",
        ok=ok,
        values=16,
        rms=1.0,
        rmse=error,
        max_abs_error=3 * error,
        differing=0,
        bad_blocks=0,
        nonfinite=0,
        source_nonfinite=0,
        message="" if ok else "too far",
    )


def verification(text: str = "model", *, passed: bool = False, layers: int = 26) -> Verification:
    """A verification of an invented model; every text that could come from a file is ``text``."""
    errors = [TensorError(None, "embed_tokens", comparison("model.embed_tokens.weight", "q6_k", 0.02))]
    for layer in range(layers):
        for number, kind in enumerate(tensor_map.KINDS):
            error = 0.0 if "norm" in kind else 0.01 * (1 + number) * (1 + layer)
            result = comparison(
                f"model.layers.{layer}.{kind}.weight", text, error, ok=passed or (layer, kind) != (3, "q_proj")
            )
            errors.append(TensorError(layer, kind, result))
    errors.append(TensorError(None, text, comparison(text, "f32", 0.0)))
    rows = {error.comparison.name: error.comparison.to_json() for error in errors}
    depth = layers + 1
    drift = Drift(*(tuple(scale * (1 + i) for i in range(depth)) for scale in (1e-3, 1.0, 1.01, 0.1)))
    kl = np.linspace(0, 1, 60).reshape(2, 30) ** 4
    log_p = np.log(np.full((2, 30), 0.25))
    top = np.arange(60).reshape(2, 30)
    tokens = Tokens(top, kl, top, top + 1, log_p, log_p - 0.1, text=True, pieces=tuple((text,) * 30 for _ in range(2)))
    by_type = {
        text: {"tensors": 3, "values": 48, "rmse": 0.1, "relative_rmse": 0.1, "snr_db": 20.0, "max_abs_error": 0.3}
    }
    distribution = {
        "kl_mean": 0.2,
        "kl_median": 0.1,
        "kl_p99": 0.9,
        "kl_max": 1.0,
        "top1_agreement": 0.5,
        "positions": 60,
    }
    distribution |= {f"perplexity_{which}{se}": 2.0 for which in ("source", "candidate", "ratio") for se in ("", "_se")}
    distribution |= {"chosen_probability_change_mean": 0.0, "chosen_probability_change_rms": 0.1}
    findings = (Finding("tensors", "error", text, f"differs {text}"), Finding("tensors", "note", None, text))
    gates = (
        GateResult("completeness", "passed", text),
        GateResult("config", "skipped", text),
        GateResult("tensors", "passed" if passed else "failed", text, {"tensors": rows, "by_type": by_type}, findings),
        GateResult("distribution", "reported", text, distribution),
    )
    side = Side(text, text, {text: 100}, 50)
    causes = () if passed else (Cause("norm.plus-one", text, (text, "b"), (text,)),)
    sample = Sample((text, "a"), ("b", text), ("b", "c"))
    measurements = Measurements(tuple(errors), drift, tokens, sample=sample)
    return Verification(side, side, text, gates, causes=causes, measurements=measurements)


class ParsedPage(HTMLParser):
    """The elements and attributes of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.slow
@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_from_a_file_becomes_markup_in_the_page(text: str) -> None:
    harmless, hostile = ParsedPage(page.html([verification()])), ParsedPage(page.html([verification(text)]))
    assert hostile.elements == harmless.elements
    assert hostile.attributes == harmless.attributes
    assert not any(ord(c) < 32 and c != "\n" for c in "".join(hostile.words))
    assert "\u202e" not in "".join(hostile.words)


@pytest.mark.parametrize("text", HOSTILE)
def test_junit_is_valid_xml_with_any_text(text: str) -> None:
    root = ElementTree.fromstring(junit.junit([verification(text), verification(passed=True)]))
    assert (root.get("tests"), root.get("failures"), root.get("skipped")) == ("8", "1", "2")
    assert [case.get("name") for case in root[0].iter("testcase")] == [
        "completeness",
        "config",
        "tensors",
        "distribution",
    ]
    failure = next(root.iter("failure"))
    assert failure.text is not None and failure.text.startswith("cause [norm.plus-one]: ")
    assert {element.tag for element in root.iter()} == {
        *("testsuites", "testsuite", "properties", "property", "testcase", "failure", "skipped", "system-out")
    }


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_from_a_file_becomes_markdown(text: str) -> None:
    parser = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False})
    harmless, hostile = (ParsedPage(parser.render(markdown.summary([verification(name)]))) for name in ("model", text))
    assert hostile.elements == harmless.elements
    words = " ".join(hostile.words)
    assert "https://" not in markdown.summary([verification(text)])
    if "|" in text or "`" in text:
        assert text in words


def test_equal_verifications_give_equal_bytes() -> None:
    assert page.html([verification()]) == page.html([verification()])
    assert junit.junit([verification()]) == junit.junit([verification()])


def test_the_page_says_what_was_measured_and_how_to_repeat_it() -> None:
    text = page.html([replace(verification(), prompt="wiki.txt", command="gemma2tool verify a.gguf --reference b")])
    assert "wiki.txt</span>: 60 tokens of a text" in text and ">gemma2tool verify a.gguf --reference b<" in text


def test_the_page_shows_what_both_sides_write() -> None:
    text = page.html([verification("<i>")])
    assert "the continuations differ from token 2 on" in text
    assert "b<mark>&lt;i&gt;</mark>" in text and "b<mark>c</mark>" in text


def test_a_page_of_several_results_has_one_main_part() -> None:
    text = page.html([verification(), verification(passed=True)], [tag("h2", "The budget")])
    assert (
        text.count("<main>") == 1
        and text.count("<h1>") == 2
        and text.index("The budget") < text.rindex("Worst tensors")
    )


def test_the_map_shows_what_is_not_equal() -> None:
    grid = verification().measurements.grid()
    kinds = {kind for _, kind in tensor_map.inexact_kinds(grid)}
    assert kinds == {"embed_tokens", *(kind for kind in tensor_map.KINDS if kind.endswith("proj"))}


def test_findings_that_a_cause_explains_are_folded_away() -> None:
    assert "<details open" not in page.html([verification()])
    assert "<details open" in page.html([replace(verification(), causes=())])


def test_the_card_has_the_measurements() -> None:
    table = markdown.card([verification()]).splitlines()
    assert table[2] == "| model | model | 4.00 | 0.2 | 0.9 | 50.00% | 2 ± 2 | 2 ± 2 |"
    assert markdown.card([replace(verification(), gates=())]) == ""


def test_a_subject_appears_once_and_findings_are_counted_in_one_way() -> None:
    findings = (
        Finding("config", "warning", "query_scalar", "query_scalar: transformers takes 256"),
        Finding("config", "note", "dtype", "source bfloat16, candidate float32"),
        Finding("config", "error", "hidden_size", "is 3"),
    )
    whole = replace(verification(), gates=(GateResult("config", "failed", "3 differ", {}, findings),))
    for report in (markdown.summary([whole]).replace("\\_", "_"), junit.junit([whole]), page.html([whole])):
        assert report.count("query_scalar") == 1
        assert "query_scalar: transformers takes 256" in report and "hidden_size: is 3" in report
    assert "<summary>1 error, 1 warning of config</summary>" in markdown.summary([whole])
    assert "<summary>1 error, 1 warning, 1 note</summary>" in page.html([whole])
    few = replace(verification(), gates=(GateResult("config", "passed", "1 warning", {}, findings[:2]),))
    assert "<summary>1 warning of config</summary>" in markdown.summary([few])


@pytest.mark.parametrize(
    "places", [(1.0, 1.3, 1.35), (1.0, 1.35, 1.65), (0.001, 0.001, 0.001), (90, 95, 100), (1.0, 1.8, 2.6)]
)
def test_labels_of_a_histogram_do_not_overlap(places: tuple[float, float, float]) -> None:
    values = np.geomspace(0.1, 100, 50)
    drawn = plots.histogram(values, list(zip(("median", "mean", "99 %"), places, strict=True)), x_label="x", title="y")
    root = ElementTree.fromstring(str(drawn))
    labels = [
        (float(text.get("x", "")), float(text.get("y", "")), len(text.text or ""))
        for text in root.iter("{http://www.w3.org/2000/svg}text")
        if "note" in text.get("class", "")
    ]
    assert len(labels) == 3 and all(y >= 8 for _, y, _ in labels)
    for number, (x, y, size) in enumerate(labels):
        for other_x, other_y, other_size in labels[number + 1 :]:
            assert abs(y - other_y) >= 12 or abs(x - other_x) >= 3 * (
                size + other_size
            )  # letters of 10 px are about 6 wide


def test_markup_escapes_what_is_not_markup() -> None:
    assert tag("p", "<b>", Markup("<i></i>"), title='"') == '<p title="&quot;">&lt;b&gt;<i></i></p>'


@pytest.mark.parametrize("values", [(1e-9,), (0.5, 0.5), (1e-12, 1e6), (3e-4, 2e-3), (9.99, 10.0)])
def test_a_scale_holds_its_values_and_has_ticks(values: tuple[float, ...]) -> None:
    scale = svg.LogScale.around(values, 0, 100)
    assert scale is not None and scale.low <= min(values) and max(values) <= scale.high
    assert 2 <= len(scale.ticks) <= 9
    assert all(0 <= scale.at(value) <= 100 for value in values)


def test_plots_without_positive_values_are_left_out() -> None:
    assert plots.lines([plots.Line("a", "source", (0.0, 0.0))], x_label="x", title="y") is None
    assert plots.histogram(np.zeros(3), [], x_label="x", title="y") is None


def against_receipt() -> Verification:
    """A verification that compares nothing but what a receipt says."""
    gates = (GateResult("files", "passed", "as in the receipt"), GateResult("values", "passed", "as in the receipt"))
    return Verification(Side("a.receipt.json", "receipt"), Side("a.gguf", "gguf", {"q4_k": 9}, 5), "q4_k", gates)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible(browser, tmp_path: Path, scheme: str) -> None:
    """axe finds nothing on a phone, in either color scheme: a page that passed, one that failed, one of a receipt."""
    if not AXE.is_file():
        pytest.skip("axe-core is not installed: npm install --no-save axe-core")
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme=scheme, bypass_csp=True)
    view = context.new_page()
    for result in (verification(passed=True), verification(), against_receipt()):
        file = tmp_path / "report.html"
        file.write_text(page.html([replace(result, prompt="a.txt", command="gemma2tool verify a")]), encoding="utf-8")
        view.goto(file.as_uri())
        view.add_script_tag(path=AXE)
        audit = view.evaluate("axe.run(document)")
        assert len(audit["passes"]) > 10
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in audit["violations"]] == []
    context.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("passed", [True, False])
def test_a_browser_shows_the_page(browser, tmp_path: Path, width: int, passed: bool) -> None:
    """No console messages, no requests, every plot visible inside the page, no horizontal scrolling on a phone."""
    file = tmp_path / "report.html"
    file.write_text(page.html([verification(passed=passed, layers=46)]), encoding="utf-8")
    view = browser.new_page(viewport={"width": width, "height": 800})
    messages, requests = [], []
    view.on("console", lambda message: messages.append(message.text))
    view.on("pageerror", lambda error: messages.append(str(error)))
    view.on("request", lambda request: requests.append(request.url))
    view.goto(file.as_uri())
    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == [file.as_uri()]
    drawn = view.locator("figure > svg")
    assert drawn.count() == 5
    for number in range(drawn.count()):
        box = drawn.nth(number).bounding_box()
        assert box is not None and box["width"] > 200 and box["height"] > 15
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    assert not view.locator("figure svg").filter(has_text="input norm").count(), "equal kinds are left out"
    assert view.locator(".scale li[aria-current]").inner_text().endswith("0.2")
    for table in ("Worst tensors", "By stored type"):
        cells = view.locator(f"h2:has-text('{table}') + .table tbody td.number")
        edges = [(box["x"], box["x"] + box["width"]) for box in (cells.nth(i).bounding_box() for i in range(4))]
        assert all(left >= 0 and right <= width for left, right in edges), "numbers are inside the page"
    cells = view.locator("figure rect[class^=h]")
    assert cells.count() > 46 * 7
    assert view.locator("rect.refused").count() == (0 if passed else 1)
    colors = {cells.nth(i).evaluate("e => getComputedStyle(e).fill") for i in range(0, 330, 30)}
    assert len(colors) > 3
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [view.locator(".plots figure").nth(number).bounding_box() for number in range(4)]
    columns = {round(box["x"]) for box in boxes}
    assert len(columns) == (2 if width > 1000 else 1)
    for column in columns:
        stack = sorted((box["y"], box["y"] + box["height"]) for box in boxes if round(box["x"]) == column)
        assert all(below - bottom < 24 for (_, bottom), (below, _) in pairwise(stack)), "no holes between figures"
    assert len({round(min(box["y"] for box in boxes if round(box["x"]) == column)) for column in columns}) == 1
    assert view.locator("h1").inner_text().startswith("Verified" if passed else "Failed")
    smallest = view.evaluate(
        "Math.min(...[...document.querySelectorAll('figure svg text')].map(e => e.getBoundingClientRect().height))"
    )
    assert smallest > 7
    view.close()
