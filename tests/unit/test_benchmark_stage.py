"""The benchmark stage on real tiny engines."""

import json
from pathlib import Path

import pytest
from tiny_chain import SETTINGS, benchmark, manifest, shared_chain

from fourfold.artifacts import read_manifest
from fourfold.artifacts.files import read_jsonl
from fourfold.benchmark.files import benchmark_files
from fourfold.benchmark.rows import read_csv
from fourfold.benchmark.stage import benchmark_engine, engine_info, provenance
from fourfold.config.benchmark import BenchmarkSettings
from fourfold.config.engine import EngineSettings
from fourfold.config.stages import BenchmarkStage
from fourfold.engine import SamplingParams, load_engine
from fourfold.errors import FourfoldError
from fourfold.model.tokenizer import render_prompt
from fourfold.problems.read import read_problems

TIMES = {"queue_time", "ttft", "tpot", "itl", "icl", "e2e_latency", "output_throughput", "decode_throughput"}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_chain(tmp_path_factory)


@pytest.fixture(scope="module")
def plain(chain: Path) -> Path:
    return manifest(chain, "benchmark/bf16")


@pytest.fixture(scope="module")
def drafted(chain: Path) -> Path:
    return manifest(chain, "benchmark/bf16-redrafter")


def changed(**values: object) -> BenchmarkStage:
    settings = SETTINGS.benchmark.model_dump() | values
    return BenchmarkStage(benchmark=BenchmarkSettings(**settings), prompt=SETTINGS.prompt)


def test_files_and_counts(plain: Path) -> None:
    assert {path.name for path in plain.parent.iterdir()} == set(benchmark_files())
    requests = read_jsonl(plain.parent / "requests.jsonl")
    # 2 problems x 2 repeats, at 1 and at 3 at once; warm-up requests are not among them.
    assert len(requests) == 2 * 2 * (1 + 3)
    assert len(read_csv(plain.parent / "workloads.csv")) == 2 * 2 * 2
    rows = read_csv(plain.parent / "benchmark.csv")
    assert [(row["concurrency"], row["requests"]) for row in rows] == [(1, 4), (3, 12)]
    for row in rows:
        mine = [request for request in requests if request["concurrency"] == row["concurrency"]]
        assert row["output_tokens"] == sum(request["output_tokens"] for request in mine)
        assert row["output_throughput"] == pytest.approx(row["output_tokens"] / row["total_generation_time"], rel=1e-6)
        assert row["truncated"] == sum(request["finish_reason"] == "length" for request in mine)
        assert row["acceptance_length"] is None
        assert row["peak_memory_bytes"] > 10_000_000
        assert row["precision"] == "bf16"


def test_every_request_is_timed(plain: Path) -> None:
    for request in read_jsonl(plain.parent / "requests.jsonl"):
        assert 0 <= request["queue_time"] <= request["ttft"] <= request["e2e_latency"]
        if request["output_tokens"] > 1:
            assert request["tpot"] == pytest.approx(
                (request["e2e_latency"] - request["ttft"]) / (request["output_tokens"] - 1)
            )
        if request["icl"] is not None:
            assert request["icl"] >= request["itl"] > 0


def test_drafts_are_counted(drafted: Path) -> None:
    requests = read_jsonl(drafted.parent / "requests.jsonl")
    for row in read_csv(drafted.parent / "benchmark.csv"):
        mine = [request for request in requests if request["concurrency"] == row["concurrency"]]
        drafts = sum(request["num_drafts"] for request in mine)
        accepted = sum(sum(request["accepted_per_position"]) for request in mine)
        assert drafts > 0
        assert row["num_drafts"] == drafts
        assert row["acceptance_length"] == pytest.approx(1 + accepted / drafts, rel=1e-6)
        assert row["acceptance_rate"] == pytest.approx(accepted / row["draft_tokens"], rel=1e-6)
        positions = [row[f"acceptance_rate_{i}"] for i in range(3)]
        assert 1 + sum(positions) == pytest.approx(row["acceptance_length"], rel=1e-6)


def test_engines_get_the_same_requests(plain: Path, drafted: Path) -> None:
    def asked(path: Path) -> list[tuple]:
        keys = ("concurrency", "repeat", "workload", "problem_id", "index", "seed", "prompt_tokens")
        return [tuple(row[key] for key in keys) for row in read_jsonl(path.parent / "requests.jsonl")]

    assert asked(plain) == asked(drafted)


def test_the_same_run_differs_only_in_times(chain: Path, plain: Path) -> None:
    again = benchmark(chain, "bf16", to="again")
    one, two = (read_jsonl(path.parent / "requests.jsonl") for path in (plain, again))
    for left, right in zip(one, two, strict=True):
        assert {k: v for k, v in left.items() if k not in TIMES} == {k: v for k, v in right.items() if k not in TIMES}

    def facts(path: Path) -> str:
        return json.dumps({key: value for key, value in read_manifest(path).items() if key != "files"})

    assert facts(plain) == facts(again)


@pytest.mark.parametrize("engine", ["bf16", "bf16-redrafter"])
def test_answers_are_those_of_the_engine_without_a_server(chain: Path, engine: str) -> None:
    """The same tokens for the same seeds, hence the same texts and the same acceptance, counted at the client."""
    llm = load_engine(chain / "engines" / engine, "cpu")
    asked = {p.id: p.problem for p in read_problems(manifest(chain, "problems"), "benchmark")}
    rows = read_jsonl(manifest(chain, f"benchmark/{engine}").parent / "requests.jsonl")
    prompts = [render_prompt(llm.tokenizer, SETTINGS.prompt, asked[row["problem_id"]]) for row in rows]
    values = SETTINGS.benchmark
    params = [SamplingParams(values.max_tokens, values.temperature, values.top_p, seed=row["seed"]) for row in rows]
    for row, output in zip(rows, llm.generate(prompts, params), strict=True):
        assert row["text"] == output.text
        assert row["output_tokens"] == len(output.token_ids)
        assert row["prompt_tokens"] == len(output.prompt_token_ids)
        assert row["finish_reason"] == output.finish_reason
        assert row["accepted_per_position"] == output.speculation.accepted_per_position
        assert row["num_drafts"] == output.speculation.num_drafts
        assert row["draft_tokens"] == output.speculation.num_draft_tokens


def test_a_server_that_tells_nothing_of_its_engine_is_described_by_the_row() -> None:
    """As other backends' are: the report needs these."""
    row = EngineSettings(precision="fp8", drafter="redrafter", backend="tensorrt_llm")
    info = engine_info(row, {"F8_E4M3": 5, "BF16": 2}, "cpu", 3.5)
    assert (info["precision"], info["drafter"], info["backend"]) == ("fp8", "redrafter", "tensorrt_llm")
    assert (info["weight_bytes"], info["load_time"]) == ({"F8_E4M3": 5, "BF16": 2}, 3.5)
    assert {"precision", "load_time", "device", "weight_bytes"} <= set(provenance(info))


def test_vllms_names_hold_the_same_numbers(drafted: Path) -> None:
    rows, records = read_csv(drafted.parent / "benchmark.csv"), read_jsonl(drafted.parent / "bench_serve.jsonl")
    for row, record in zip(rows, records, strict=True):
        assert record["max_concurrency"] == row["concurrency"] == record["max_concurrent_requests"]
        assert record["output_throughput"] == pytest.approx(row["output_throughput"], rel=1e-6)
        assert record["p99_e2el_ms"] == pytest.approx(1000 * row["e2e_latency_p99"], rel=1e-6)
        assert record["median_itl_ms"] == pytest.approx(1000 * row["icl_p50"], rel=1e-6)
        assert record["spec_decode_acceptance_length"] == pytest.approx(row["acceptance_length"], rel=1e-6)
        assert record["failed"] == 0


def test_keep_first_cancels_and_does_not_score_and_rates_are_measured(chain: Path) -> None:
    values = {"concurrency": [4], "keep_first": 2, "temperature": 1.5, "repeats": 1, "request_rate": [20.0]}
    path = benchmark(chain, "bf16", changed(**values, goodput={"ttft": 60.0}), "first")
    every = read_jsonl(path.parent / "requests.jsonl")
    requests = [row for row in every if row["request_rate"] is None]
    (rate,) = read_csv(path.parent / "rates.csv")
    assert (rate["concurrency"], rate["request_rate"], rate["requests"]) == (None, 20, 2)
    assert rate["finished"] == 2 == len(every) - len(requests)
    assert rate["request_goodput"] == pytest.approx(2 / rate["total_generation_time"], rel=1e-6)
    (row,) = read_csv(path.parent / "benchmark.csv")
    stopped = [request for request in requests if request["finish_reason"] == "cancelled"]
    assert row["finished"] + row["cancelled"] == 8
    assert row["cancelled"] == len(stopped)
    assert row["finished"] == row["scored"] >= 4
    assert all(request["correct"] is None and request["e2e_latency"] is None for request in stopped)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"concurrency": [8]}, r"benchmark\.concurrency is 8, but engines\.bf16\.max_num_seqs is 4"),
        ({"max_tokens": 500}, r"benchmark\.max_tokens is 500 .* engines\.bf16\.max_model_len is 160"),
        ({"problems": 9}, r"benchmark\.problems is 9, but there are 3"),
    ],
)
def test_an_impossible_workload_stops_before_the_server_starts(
    chain: Path, values: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object) -> None:
        raise AssertionError("the server was started")

    monkeypatch.setattr("fourfold.benchmark.stage.running_server", start)
    output = manifest(chain, "impossible")
    with pytest.raises(FourfoldError, match=message):
        benchmark_engine(changed(**values), manifest(chain, "engines/bf16"), manifest(chain, "problems"), output, "cpu")
    assert not output.parent.exists()
