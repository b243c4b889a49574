"""Any running server's benchmark, and the measurement of what the server costs."""

from pathlib import Path

import pytest
from tiny_chain import manifest, shared_chain
from tiny_server import tiny_server

from fourfold.artifacts import read_manifest
from fourfold.artifacts.files import read_jsonl
from fourfold.benchmark import overhead
from fourfold.benchmark.added_time import added_time, sentence
from fourfold.benchmark.any_server import bench_serve, parse_goodput
from fourfold.benchmark.rows import read_csv
from fourfold.config.benchmark import BenchmarkSettings
from fourfold.engine import load_engine
from fourfold.errors import FourfoldError


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_chain(tmp_path_factory)


def test_any_server_is_measured_by_its_address(chain: Path, tmp_path: Path) -> None:
    directory, output = chain / "engines" / "bf16-redrafter", tmp_path / "result.jsonl"
    settings = BenchmarkSettings(
        problems=3, concurrency=[1, 2], request_rate=[30.0], same_problem=False, max_tokens=16, goodput={"ttft": 60.0}
    )
    with tiny_server(lambda: load_engine(directory, "cpu"), root=directory) as server:
        bench_serve(f"{server.url}/v1", manifest(chain, "problems"), output, settings)
        with pytest.raises(FourfoldError, match="nowhere: the server's model is not on this machine; give its --tok"):
            bench_serve(server.url, manifest(chain, "problems"), output, settings, tokenizer=Path("nowhere"))
    records = read_jsonl(output)
    assert [(r["max_concurrency"], r["request_rate"]) for r in records] == [(1, "inf"), (2, "inf"), (None, 30.0)]
    for record in records:
        assert (record["completed"], record["failed"], record["num_prompts"]) == (3, 0, 3)
        assert record["request_goodput"] == record["request_throughput"]
        assert record["spec_decode_num_drafts"] > 0
        assert 0 < record["mean_ttft_ms"] < record["mean_e2el_ms"]


def test_goodput_limits_are_read() -> None:
    assert parse_goodput(["ttft:0.5", "tpot:1e-3"]) == {"ttft": 0.5, "tpot": 0.001}
    with pytest.raises(FourfoldError, match="--goodput ttft=3: give NAME:SECONDS"):
        parse_goodput(["ttft=3"])


def test_the_servers_cost_is_measured_with_equal_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "PARAMS", [overhead.SamplingParams(max_tokens=60, seed=i) for i in range(8)])
    output = manifest(tmp_path, "overhead")
    overhead.measure_overhead(output, "cpu", rounds=2)
    assert read_manifest(output, "measure_overhead")["settings"]["rounds"] == 2
    rows = read_csv(output.parent / "overhead.csv")
    assert [(row["side"], row["round"]) for row in rows] == [(s, r) for r in (0, 1) for s in ("offline", "server")]
    assert all(0 < row["tpot"] < row["seconds"] for row in rows)


def test_answers_that_differ_are_an_error() -> None:
    sides = {"offline": lambda: (0.1, 1.0, ["a"]), "server": lambda: (0.1, 1.0, ["b"])}
    with pytest.raises(FourfoldError, match="the server's answers are not the engine's"):
        overhead.measure(sides, 1)


def test_added_time_by_hand() -> None:
    tpots = {"offline": [1.0, 2.0, 4.0], "server": [1.1, 2.1, 4.6]}
    rows = [
        {"side": side, "round": i, "tpot": value, "concurrency": 8}
        for side, v in tpots.items()
        for i, value in enumerate(v)
    ]
    assert added_time(rows) == pytest.approx([0.1, 0.05, 0.15])
    said = (
        "The HTTP server adds 10.0 % to the engine's time per token with 8 at once (median of 3 rounds, 5.0 to 15.0 %)"
    )
    assert sentence(rows).startswith(said)
