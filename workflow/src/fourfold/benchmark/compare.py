"""Plain decoding of the engine beside `transformers.generate`: same weights, prompts, dtype and process, greedy.

Both sides read the prompts and generate a fixed number of tokens each (end-of-text is ignored); the time covers both
prompt and decoding. Rounds alternate, so that a machine whose speed drifts treats both alike; medians are compared.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from fourfold.artifacts import read_manifest
from fourfold.artifacts.provenance import device_name, git_commit, library_versions
from fourfold.benchmark.rows import write_csv
from fourfold.benchmark.tables import Row
from fourfold.config.problems import Prompt
from fourfold.engine import LLMEngine, SamplingParams
from fourfold.errors import FourfoldError
from fourfold.model.tokenizer import end_token_ids, load_tokenizer, render_prompt
from fourfold.modeling.checkpoint import load_transformer
from fourfold.problems.read import read_problems
from fourfold.progress import logger, progress

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""Prompts and the number of new tokens → the new tokens of each prompt."""
WARMUP_TOKENS = 4


@dataclass(frozen=True)
class Agreement:
    """How many prompts got the same tokens from both sides, and where the first difference is."""

    same: int
    prompts: int
    first_difference: int | None

    def __str__(self) -> str:
        if self.first_difference is None:
            return f"greedy tokens agree for all {self.prompts} prompts"
        return (
            f"greedy tokens agree for {self.same} of {self.prompts} prompts; the first difference is at token "
            f"{self.first_difference + 1}"
        )


def compare_transformers(
    model: Path, problems: Path, output: Path, concurrencies: list[int], new_tokens: int, rounds: int
) -> None:
    """Measures both sides on the CPU in float32, prints a table and writes one CSV row a measurement.

    Args:
        model: manifest of the bf16 checkpoint.
        problems: manifest of the problems; the first ones of the benchmark split are the prompts.
        output: CSV file to write.
        concurrencies: prompts generated for at once; each is measured separately.
        new_tokens: tokens to generate for each prompt.
        rounds: measurements of each side, alternated; three or more, for a median.
    Raises FourfoldError when there are too few problems or rounds.
    """
    if rounds < 3:
        raise FourfoldError(f"--rounds is {rounds}: a median needs three or more")
    if not concurrencies or min(concurrencies) < 1 or new_tokens < 1:
        raise FourfoldError("--concurrency and --new-tokens must be 1 or more")
    read_manifest(model)
    tokenizer = load_tokenizer(model.parent)
    chosen = read_problems(problems, "benchmark")
    if len(chosen) < max(concurrencies):
        raise FourfoldError(
            f"{problems}: --concurrency {max(concurrencies)} needs as many problems, {len(chosen)} found"
        )
    prompts = [render_prompt(tokenizer, Prompt(), p.problem) for p in chosen[: max(concurrencies)]]
    length = max(map(len, prompts)) + new_tokens
    sides = {
        "transformers": transformers_side(model.parent, tokenizer),
        "fourfold": engine_side(model.parent, tokenizer, max(concurrencies), length),
    }
    rows: list[Row] = []
    agreements: dict[int, Agreement] = {}
    about = provenance()
    with progress("compare", len(concurrencies) * rounds * len(sides), "measurements") as task:
        for concurrency in concurrencies:
            batch = prompts[:concurrency]
            found: dict[str, list[list[int]]] = {}
            for generate in sides.values():
                generate(batch, WARMUP_TOKENS)
            for round_ in range(rounds):
                for side, generate in sides.items():
                    seconds, found[side] = timed(generate, batch, new_tokens)
                    row: Row = {"side": side, "concurrency": concurrency, "round": round_, "new_tokens": new_tokens}
                    speed = concurrency * new_tokens / seconds
                    rows.append(row | {"seconds": seconds, "output_throughput": speed} | about)
                    task.advance(1, f"{side} {concurrency} at once {speed:.1f} tok/s")
            agreements[concurrency] = agreement(found["fourfold"], found["transformers"])
    for row in rows:
        row["same_tokens"] = agreements[row["concurrency"]].same
    write_csv(output, rows)
    show(rows, agreements)


def transformers_side(directory: Path, tokenizer: PreTrainedTokenizerBase) -> Generate:
    """`transformers.generate` in float32, prompts padded on the left."""
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_token_ids(directory, tokenizer)[0]
    # None: generation does not end before its length.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = pad

    @torch.inference_mode()
    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        tokens = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens)
        return tokens[:, width:].tolist()

    return generate


def engine_side(directory: Path, tokenizer: PreTrainedTokenizerBase, max_num_seqs: int, length: int) -> Generate:
    """The engine in float32, without a drafter."""
    engine = LLMEngine(
        load_transformer(directory, "cpu", torch.float32),
        tokenizer,
        end_token_ids=end_token_ids(directory, tokenizer),
        max_num_seqs=max_num_seqs,
        max_model_len=length,
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
        return [output.token_ids for output in engine.generate(prompts, [params] * len(prompts))]

    return generate


def timed(generate: Generate, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
    """Seconds that a generation took, and its tokens; RuntimeError if a side stopped early."""
    start = time.perf_counter()
    tokens = generate(prompts, new_tokens)
    seconds = time.perf_counter() - start
    if any(len(row) != new_tokens for row in tokens):
        raise RuntimeError(f"{[len(row) for row in tokens]} tokens were generated, {new_tokens} each expected")
    return seconds, tokens


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> Agreement:
    """Compares the tokens of both sides prompt by prompt."""
    differences = [
        next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), None)
        for left, right in zip(ours, theirs, strict=True)
    ]
    found = [place for place in differences if place is not None]
    return Agreement(len(differences) - len(found), len(differences), min(found, default=None))


def provenance() -> Row:
    """Columns that say what was measured, where and when."""
    versions = library_versions(["torch", "transformers"])
    return {
        "dtype": "float32",
        "device": device_name("cpu"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": git_commit(),
        **versions,
    }


def medians(rows: list[Row], concurrency: int) -> dict[str, float]:
    """Median tokens/s of each side at a concurrency."""
    sides = dict.fromkeys(row["side"] for row in rows)
    return {
        side: median(r["output_throughput"] for r in rows if r["side"] == side and r["concurrency"] == concurrency)
        for side in sides
    }


def show(rows: list[Row], agreements: dict[int, Agreement]) -> None:
    """Prints medians, the speed-up, and whether the tokens agree."""
    first = rows[0]
    table = Table(title=f"Plain greedy decoding, {first['dtype']}, {first['new_tokens']} tokens a prompt")
    for heading in ("At once", "transformers, tok/s", "fourfold, tok/s", "Speed-up"):
        table.add_column(heading, justify="right")
    for concurrency in agreements:
        middle = medians(rows, concurrency)
        ratio = middle["fourfold"] / middle["transformers"]
        table.add_row(str(concurrency), f"{middle['transformers']:.1f}", f"{middle['fourfold']:.1f}", f"{ratio:.2f}×")
    Console().print(table)
    for concurrency, found in agreements.items():
        logger.info("%d at once: %s", concurrency, found)
    logger.info(
        "medians of %d rounds; %s; torch %s, transformers %s; %s; commit %s",
        1 + max(row["round"] for row in rows),
        first["device"],
        first["torch"],
        first["transformers"],
        first["date"],
        first["commit"],
    )
