"""The report on benchmarks of real tiny engines, and its numbers by hand."""

import csv
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import docutils.core
import jinja2
import matplotlib.style
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from tiny_chain import manifest, shared_chain

from fourfold.artifacts import read_manifest
from fourfold.config.benchmark import ReportSettings
from fourfold.errors import FourfoldError
from fourfold.report.data import EngineBenchmark, Results, add_speedups, read_results
from fourfold.report.files import report_files
from fourfold.report.labels import label_points
from fourfold.report.plots_speed import plot_throughput
from fourfold.report.provenance import size, warnings
from fourfold.report.stage import make_report
from fourfold.report.style import engine_colours, to_inline_svg, to_svg
from fourfold.report.tables import fastest, table1
from fourfold.report.verdict import best_engine, verdict

CAPTIONS = Path(__file__).resolve().parents[2] / "workflow" / "report"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_chain(tmp_path_factory)


def report(chain: Path, to: str, engines: tuple[str, ...] = ("bf16", "bf16-redrafter"), **values: str) -> Path:
    output = manifest(chain, to)
    benchmarks = [manifest(chain, f"benchmark/{engine}") for engine in engines]
    drafted = "bf16-redrafter" in engines
    drafter, evaluation = (manifest(chain, name) if drafted else None for name in ("drafter", "evaluation"))
    make_report(ReportSettings(**values), benchmarks, drafter, evaluation, [], None, output)
    return output.parent


@pytest.fixture(scope="module")
def made(chain: Path) -> Path:
    return report(chain, "report", title="Tiny <engines>")


def test_writes_the_files_that_it_names(chain: Path, made: Path) -> None:
    assert {path.name for path in made.iterdir()} == set(report_files())
    pictures = report(chain, "pictures", plot_format="png")
    assert {path.name for path in pictures.iterdir()} == set(report_files("png"))
    assert (pictures / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_inputs_give_the_same_bytes(chain: Path, made: Path) -> None:
    again = report(chain, "report-again", title="Tiny <engines>")
    for name in report_files():
        assert (made / name).read_bytes() == (again / name).read_bytes(), name


def test_combined_table(made: Path) -> None:
    with (made / "benchmark.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["engine"], row["concurrency"]) for row in rows] == [
        ("bf16", "1"),
        ("bf16", "3"),
        ("bf16-redrafter", "1"),
        ("bf16-redrafter", "3"),
    ]
    assert [float(row["output_throughput_speedup"]) for row in rows[:2]] == [1, 1]
    for base, row in zip(rows[:2], rows[2:], strict=True):
        for speedup, column in (
            ("output_throughput_speedup", "output_throughput"),
            ("request_throughput_speedup", "request_throughput_mean"),
        ):
            assert float(row[speedup]) == pytest.approx(float(row[column]) / float(base[column]), rel=1e-6)


def test_svgs_are_well_formed_and_name_the_engines(made: Path) -> None:
    for path in made.glob("*.svg"):
        root = ElementTree.parse(path).getroot()
        assert root.tag.endswith("svg")
        assert "dc:date" not in path.read_text()
    for stem in ("throughput", "latency", "accuracy", "fidelity"):
        assert "bf16-redrafter" in (made / f"{stem}.svg").read_text(), stem
    assert "No engine of this run" not in (made / "training.svg").read_text()
    acceptance = (made / "acceptance.svg").read_text()
    for groups in ("seen", "unseen"):
        for choice in ("greedy", "temperature 0.5"):
            assert re.search(rf"evaluation, {groups} groups, {choice}: [1-9]\.\d\d tokens a step", acceptance)


class Page(HTMLParser):
    """Tags that must be closed are; ids are unique; nothing is fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)
        self._note(tag, dict(attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, dict(attrs))

    def _note(self, tag: str, attrs: dict[str, str | None]) -> None:
        self.ids += [attrs["id"]] if attrs.get("id") else []
        links = [attrs.get("src"), attrs.get("href") if tag == "link" else None]
        self.fetched += [link for link in links if link]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_overview_stands_alone(made: Path) -> None:
    text = (made / "overview.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.fetched == []
    assert len(page.ids) == len(set(page.ids))
    assert "url(http" not in text
    assert "<h1>Tiny &lt;engines&gt;</h1>" in text
    assert text.count("<svg") == 6
    assert "Ada has" in text
    assert "var(--ink)" in text
    assert '"Segoe UI"' in text  # the style sheet is not escaped


def test_every_reference_inside_an_svg_is_there(made: Path) -> None:
    text = (made / "overview.html").read_text()
    wanted = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    assert wanted
    assert wanted <= set(re.findall(r'\bid="([^"]+)"', text))


def test_without_a_drafter(chain: Path) -> None:
    folder = report(chain, "alone", ("bf16",))
    assert "No engine of this run has a drafter." in (folder / "training.svg").read_text()
    assert (folder / "overview.html").read_text().count("<svg") == 3
    assert (folder / "gate.csv").read_text() == "engine,check,measured,interval,allowed,verdict,basis\n"
    assert "there is nothing to compare it with" in (folder / "gate.html").read_text()
    assert re.search(r"bf16 generates [\d.]+ tokens/s with 3 at once\.", (folder / "overview.html").read_text())


def test_manifest_records_the_inputs(chain: Path, made: Path) -> None:
    assert set(read_manifest(made / "manifest.json")["inputs"]) == {
        "benchmark bf16",
        "benchmark bf16-redrafter",
        "drafter",
        "evaluation",
    }


def test_refuses_what_is_no_benchmark(chain: Path) -> None:
    with pytest.raises(FourfoldError, match="made by fetch_problems; give the manifest that benchmark_engine wrote"):
        read_results([manifest(chain, "problems")], None, None, [])
    with pytest.raises(FourfoldError, match="made by fetch_problems; give the manifest that compare_logits wrote"):
        read_results([manifest(chain, "benchmark/bf16")], None, None, [manifest(chain, "problems")])
    twice = [manifest(chain, "benchmark/bf16")] * 2
    with pytest.raises(FourfoldError, match="each engine once, but given were bf16, bf16"):
        read_results(twice, None, None, [])


def engine(
    name: str, throughputs: dict[int, float], right: int, scored: int, emulated: bool = False, stopped: int = 0
) -> EngineBenchmark:
    rows = [
        {
            "engine": name,
            "concurrency": concurrency,
            "total_generation_time": 10.04,
            "output_throughput": throughput,
            "request_throughput_mean": throughput / concurrency,
            "request_throughput_sd": 0.25,
            "decode_throughput_mean": None,
            "acceptance_length": None,
            "accuracy": right / scored,
            "accuracy_se": 0.06,
            "correct": right,
            "requests": scored + stopped,
            "cancelled": stopped,
            "scored": scored,
        }
        for concurrency, throughput in throughputs.items()
    ]
    requests = [{"correct": i < right, "problem_id": f"p{i}"} for i in range(scored)]
    info = {"precision": "fp8" if emulated else "bf16", "fp8_emulated": emulated}
    about = {"engine_info": info, "engine_settings": {"precision": info["precision"]}, "settings": {}}
    return EngineBenchmark(name, about, {"device": "a processor"}, rows, requests, [])


def test_verdict_by_hand() -> None:
    results = Results(
        [
            engine("bf16", {1: 100.0, 8: 400.0}, 45, 150),
            engine("fp8", {1: 90.0, 8: 440.0}, 45, 150, emulated=True),
            engine("fp8-redrafter", {1: 180.0, 8: 560.0}, 48, 150, emulated=True),
        ]
    )
    add_speedups(results)
    assert best_engine(results) == "fp8-redrafter"
    assert verdict(results) == (
        "fp8-redrafter is 1.40× as fast as bf16 with 8 at once and 1.80× with one request; "
        "accuracy 32 % ± 4 against 30 % ± 4."
    )
    assert table1(results, [])[5] == {
        "concurrency": "8",
        "engine": "fp8-redrafter",
        "total_generation_time": "10.0",
        "output_throughput": "560.0",
        "request_throughput": "70.0 ± 0.2",
        "speedup": "1.40×",
        "acceptance_length": "–",
        "accuracy": "32 % ± 6 (48/150)",
        "gate": "–",
    }
    assert fastest(results) == [("1", "fp8-redrafter"), ("8", "fp8-redrafter")]
    (note,) = warnings(results)
    assert note.startswith("FP8 arithmetic is emulated on this device (fp8, fp8-redrafter)")


def test_stopped_requests_are_owned_up_to() -> None:
    results = Results([engine("a", {1: 10.0, 4: 30.0}, 60, 120, stopped=5)])
    add_speedups(results)
    (note,) = warnings(results)
    assert note.startswith("10 of 250 requests were stopped before their end")


def test_an_engine_without_a_base_row_has_no_speedup() -> None:
    results = Results([engine("a", {1: 10.0}, 1, 2), engine("b", {4: 40.0}, 1, 2)])
    add_speedups(results)
    assert results.rows[1]["output_throughput_speedup"] is None
    assert best_engine(results) == "a"
    assert fastest(results) == []
    assert "too few" in " ".join(warnings(results))


def test_bars_are_as_high_as_the_numbers() -> None:
    results = Results([engine("a", {1: 10.0, 4: 30.0}, 1, 2), engine("b", {1: 15.0, 4: 60.0}, 1, 2)])
    add_speedups(results)
    (axes,) = plot_throughput(results).axes
    assert [bar.get_height() for bar in axes.patches] == [10, 30, 15, 60]
    assert [text.get_text() for text in axes.texts] == ["10.0", "30.0", "15.0", "1.50×", "60.0", "2.00×"]


def test_colours_belong_to_engines() -> None:
    names = ["bf16", "fp8", "int8-wo", "fp8-redrafter"]
    colours = engine_colours(names)
    assert len(set(colours.values())) == 4
    assert engine_colours(names[:2])["fp8"] == colours["fp8"]


def test_svg_text_is_stable_and_ids_are_prefixed() -> None:
    def draw() -> Figure:
        figure = Figure(figsize=(3, 2))
        figure.add_subplot().plot([1, 2], [1, 3], "o")
        return figure

    with matplotlib.style.context("default"):
        assert to_svg(draw(), "a") == to_svg(draw(), "a")
        inline = to_inline_svg(draw(), "a", 'a "picture" & more')
    assert inline.startswith("<svg")
    assert 'aria-label="a &quot;picture&quot; &amp; more"' in inline
    assert all(name.startswith("a-") for name in re.findall(r'\bid="([^"]+)"', inline))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=6))
@example([(0.0, 0.0)] * 3)
@example([(0.0, 100.0)] * 6)
def test_labels_keep_clear_of_each_other(places: list[tuple[float, float]]) -> None:
    figure = Figure(figsize=(8, 3.8))
    axes = figure.add_subplot()
    axes.set_xlim(0, 125)
    axes.set_ylim(0, 100)
    label_points(axes, [f"engine{i}" for i in range(len(places))], places, ["#000000"] * len(places))
    spots = {(text.xy[0], text.xy[1], *text.get_position()) for text in axes.texts}
    assert len(spots) == len(places)  # even points at the same place have their names at different ones


@pytest.mark.parametrize(
    ("amount", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (269_060_352, "269 MB"), (3.5e9, "3.5 GB")]
)
def test_sizes(amount: float, text: str) -> None:
    assert size(amount) == text


@pytest.mark.parametrize("path", sorted(CAPTIONS.glob("*.rst")), ids=lambda path: path.stem)
def test_captions_are_valid(path: Path) -> None:
    for benchmark in ({}, {"keep_first": 10}):
        config = {"name": "tiny", "benchmark": benchmark}
        text = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(path.read_text())
        source = text.render(snakemake=SimpleNamespace(config=config))
        docutils.core.publish_string(source, writer="html", settings_overrides={"halt_level": 2, "report_level": 2})


def test_every_plot_and_page_has_a_caption() -> None:
    shown = {Path(name).stem for name in report_files() if name.endswith((".svg", ".html"))} | {"benchmark", "workflow"}
    assert shown <= {path.stem for path in CAPTIONS.glob("*.rst")}
