"""The comparison with transformers.generate on a tiny model."""

from pathlib import Path

import pytest
from tiny_chain import manifest, shared_chain
from typer.testing import CliRunner

from fourfold.benchmark.compare import agreement, compare_transformers
from fourfold.benchmark.rows import read_csv
from fourfold.cli import app
from fourfold.errors import FourfoldError


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_chain(tmp_path_factory)


def test_measures_both_sides_and_their_tokens_agree(chain: Path, tmp_path: Path) -> None:
    table = tmp_path / "compare.csv"
    arguments = ["--model", manifest(chain, "model"), "--problems", manifest(chain, "problems"), "--output", table]
    options = ["--concurrency", 1, "--concurrency", 3, "--new-tokens", 12]
    result = CliRunner().invoke(app, ["compare-transformers", *map(str, [*arguments, *options])])
    assert result.exit_code == 0, result.output
    assert "Speed-up" in result.output
    rows = read_csv(table)
    assert [(row["concurrency"], row["round"], row["side"]) for row in rows] == [
        (concurrency, round_, side)
        for concurrency in (1, 3)
        for round_ in range(3)
        for side in ("transformers", "fourfold")
    ]
    for row in rows:
        # Prompts of different lengths: left padding on one side, none on the other, and the same tokens.
        assert row["same_tokens"] == row["concurrency"]
        assert row["output_throughput"] == pytest.approx(row["concurrency"] * 12 / row["seconds"], rel=1e-6)


def test_agreement_says_where_tokens_part() -> None:
    assert str(agreement([[1, 2], [3, 4]], [[1, 2], [3, 4]])) == "greedy tokens agree for all 2 prompts"
    parted = agreement([[1, 2, 3], [3, 4, 5]], [[1, 2, 3], [3, 9, 5]])
    assert (parted.same, parted.first_difference) == (1, 1)
    assert str(parted) == "greedy tokens agree for 1 of 2 prompts; the first difference is at token 2"


@pytest.mark.parametrize(
    ("concurrency", "rounds", "message"), [([8], 3, "needs as many problems, 3 found"), ([1], 2, "--rounds is 2")]
)
def test_refuses(chain: Path, tmp_path: Path, concurrency: list[int], rounds: int, message: str) -> None:
    with pytest.raises(FourfoldError, match=message):
        compare_transformers(
            manifest(chain, "model"), manifest(chain, "problems"), tmp_path / "x.csv", concurrency, 8, rounds
        )
