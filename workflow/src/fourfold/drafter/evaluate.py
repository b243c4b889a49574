"""The evaluate_drafter stage: acceptance in real decoding, on problems that were never trained on.

The engine answers problems with the drafter: those of the benchmark split, whose groups (GSM-Symbolic's templates) the
training may have had other problems of (groups `seen`), and those of groups that it had none of (groups `unseen`).
`acceptance.csv` has a row for each problem, `summary.csv` one for all of a kind at a temperature.

acceptance_length = 1 + accepted / drafts: it counts the bonus token that the target yields with every verification.
acceptance_rate_i is the share of all drafts in which token i and all before it were accepted (unconditional, vLLM's
per-position rate); conditional_acceptance_rate_i is that share among the drafts accepted up to i - 1.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fourfold.artifacts import read_manifest, write_artifact
from fourfold.artifacts.files import write_text
from fourfold.artifacts.provenance import device_name
from fourfold.config.drafter import DrafterEvaluation
from fourfold.config.stages import DrafterEvaluationStage
from fourfold.drafter.rows import to_csv
from fourfold.engine.draft_plan import DraftPlan
from fourfold.engine.llm_engine import LLMEngine
from fourfold.engine.requests import RequestOutput, SamplingParams, SpeculationStats
from fourfold.errors import FourfoldError
from fourfold.model.tokenizer import end_token_ids, load_tokenizer, render_prompt
from fourfold.modeling.checkpoint import load_transformer
from fourfold.modeling.redrafter import check_target, load_redrafter
from fourfold.problems.read import Problem, Split, read_problems
from fourfold.progress import logger, progress

ROWS_FILE = "acceptance.csv"
SUMMARY_FILE = "summary.csv"
SEED = 0
"""Of the sampling, for temperatures above 0."""


def evaluate_drafter(
    settings: DrafterEvaluationStage, target: Path, drafter: Path, problems: Path, output: Path, device: str
) -> None:
    """Writes the drafter's acceptance, per problem and pooled; drafts are as long as the drafter was trained for.

    At a temperature above 0 a draft token is accepted with the target's probability of it, as in any sampled request.

    Args:
        settings: evaluation and prompt.
        target: manifest of the checkpoint that the drafter drafts for.
        drafter: manifest of the drafter.
        problems: manifest of the problems; the splits benchmark and unseen are used.
        output: manifest of the artifact to write.
        device: auto, cpu or cuda.
    Raises FourfoldError when there are too few problems, or drafter and target do not belong together.
    """
    evaluation = settings.evaluation
    positions: int = read_manifest(drafter, "train_drafter")["predict_tokens"]
    asked = choose_problems(evaluation, problems)
    tokenizer = load_tokenizer(target.parent)
    prompts = [render_prompt(tokenizer, settings.prompt, problem.problem) for _, problem in asked]
    transformer = load_transformer(target.parent, device)
    network = load_redrafter(drafter.parent, transformer.dtype, transformer.device)
    check_target(network.config, transformer.config, drafter.parent)
    with write_artifact(
        output,
        stage="evaluate_drafter",
        settings=settings.model_dump(),
        inputs={"target": target, "drafter": drafter, "problems": problems},
        libraries=["torch", "transformers"],
        device=device_name(str(transformer.device)),
    ) as staging:
        engine = LLMEngine(
            transformer,
            tokenizer,
            end_token_ids=end_token_ids(target.parent, tokenizer),
            drafter=network,
            plan=DraftPlan.fixed(beam_width=1, beam_length=positions + 1),
            max_num_seqs=min(evaluation.max_num_seqs, len(prompts)),
            max_model_len=max(map(len, prompts)) + evaluation.max_tokens,
        )
        rows, summaries = [], []
        for temperature in evaluation.temperatures:
            outputs = answer(engine, evaluation.max_tokens, temperature, prompts)
            answered = [(groups, problem, out) for (groups, problem), out in zip(asked, outputs, strict=True)]
            rows += [
                {"groups": groups, "temperature": temperature, "problem_id": problem.id}
                | acceptance_row([out], positions)
                for groups, problem, out in answered
            ]
            for kind in dict.fromkeys(groups for groups, _ in asked):
                summary = summarize([out for groups, _, out in answered if groups == kind], positions)
                summaries.append({"groups": kind, "temperature": temperature} | summary)
        write_text(staging.path / ROWS_FILE, to_csv(rows))
        write_text(staging.path / SUMMARY_FILE, to_csv(summaries))
        staging.facts = {"acceptance": {"counts_bonus_token": True, "summary": summaries}}
    for summary in summaries:
        logger.info(
            "%s groups, temperature %g: acceptance length %.3f (1 + accepted / drafts, bonus token counted) over %d "
            "drafts on %d problems",
            summary["groups"],
            summary["temperature"],
            summary["acceptance_length"] or 1.0,
            summary["drafts"],
            summary["problems"],
        )


def choose_problems(evaluation: DrafterEvaluation, problems: Path) -> list[tuple[str, Problem]]:
    """The problems to answer, each with its groups: `seen` or `unseen`. Raises FourfoldError when there are too few."""
    wanted: list[tuple[str, Split, int, str]] = [
        ("seen", "benchmark", evaluation.problems, "problems"),
        ("unseen", "unseen", evaluation.unseen_problems, "unseen_problems"),
    ]
    chosen = []
    for groups, split, count, key in wanted:
        found = read_problems(problems, split)[:count] if count else []
        if len(found) < count:
            raise FourfoldError(
                f"{problems}: drafter.evaluation.{key} is {count}, but the {split} split holds {len(found)}"
            )
        chosen += [(groups, problem) for problem in found]
    return chosen


def answer(engine: LLMEngine, max_tokens: int, temperature: float, prompts: list[list[int]]) -> list[RequestOutput]:
    """Answers to the prompts, in their order."""
    params = [
        SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=SEED + i) for i in range(len(prompts))
    ]
    with progress("evaluate", len(prompts), "answers") as task:
        return engine.generate(prompts, params, on_finish=lambda output: task.advance(1))


def pool(statistics: Sequence[SpeculationStats], positions: int) -> SpeculationStats:
    """Counts of several requests added up, per-position counts filled up to `positions`."""
    accepted = [0] * positions
    for stats in statistics:
        for i, number in enumerate(stats.accepted_per_position):
            accepted[i] += number
    drafts = sum(stats.num_drafts for stats in statistics)
    return SpeculationStats(drafts, sum(stats.num_draft_tokens for stats in statistics), accepted)


def acceptance_row(outputs: Sequence[RequestOutput], positions: int) -> dict[str, Any]:
    """Counts and rates over some requests; a rate without drafts is None."""
    stats = pool([output.speculation for output in outputs], positions)
    row: dict[str, Any] = {
        "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "output_tokens": sum(len(output.token_ids) for output in outputs),
        "drafts": stats.num_drafts,
        "draft_tokens": stats.num_draft_tokens,
        "accepted": stats.num_accepted_tokens,
        "acceptance_length": stats.acceptance_length,
        "acceptance_rate": ratio(stats.num_accepted_tokens, stats.num_draft_tokens),
    }
    before = stats.num_drafts
    for i, number in enumerate(stats.accepted_per_position):
        row[f"accepted_{i}"] = number
        row[f"acceptance_rate_{i}"] = ratio(number, stats.num_drafts)
        row[f"conditional_acceptance_rate_{i}"] = ratio(number, before)
        before = number
    return row


def summarize(outputs: Sequence[RequestOutput], positions: int) -> dict[str, Any]:
    """Pooled figures, which weigh every draft alike, and the mean of the requests' own acceptance lengths."""
    lengths = [output.speculation.acceptance_length for output in outputs]
    known = [length for length in lengths if length is not None]
    return {
        "problems": len(outputs),
        **acceptance_row(outputs, positions),
        "acceptance_length_request_mean": sum(known) / len(known) if known else None,
    }


def ratio(part: int, whole: int) -> float | None:
    """part / whole; None if whole is 0."""
    return part / whole if whole else None
