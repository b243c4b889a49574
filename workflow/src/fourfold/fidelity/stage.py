"""The compare_logits stage: what is lost in an engine's logits against the model's own, by all that it rounds.

Both read benchmark problems with the dataset's solutions, computed as the engine computes them on this device;
compared are the positions that predict a token of the solution. `texts.csv` has a row for each problem, `summary.csv`
one for all.
"""

from pathlib import Path

from fourfold.artifacts import read_manifest, write_artifact
from fourfold.artifacts.provenance import device_name
from fourfold.benchmark.rows import write_csv
from fourfold.config.stages import FidelityStage
from fourfold.drafter.samples import Text
from fourfold.errors import FourfoldError
from fourfold.fidelity import files
from fourfold.fidelity.logits import compare_states, summarize, text_row
from fourfold.fidelity.states import engine_states
from fourfold.model.tokenizer import encode_rendered, load_tokenizer, render_prompt
from fourfold.modeling.checkpoint import cache_dtype, load_transformer
from fourfold.problems.read import read_problems
from fourfold.progress import logger, progress


def compare_logits(
    settings: FidelityStage, model: Path, checkpoint: Path, problems: Path, output: Path, device: str
) -> None:
    """Writes the logits error of an engine's numerics, per text and over all texts.

    Args:
        settings: what is rounded, how much text, and the prompt.
        model: manifest of the model.
        checkpoint: manifest of the checkpoint in the precision: a quantised one, or for bf16 the model itself.
        problems: manifest of the problems; the benchmark split is used.
        output: manifest of the artifact to write.
        device: auto, cpu or cuda.
    Raises FourfoldError, before long work starts, when the checkpoint is not of that precision, when there are too few
    problems, and when the device cannot compute in FP8 but shall.
    """
    wanted, numerics = settings.fidelity, settings.numerics
    read_manifest(model)
    _check_precision(checkpoint, numerics.precision)
    chosen = read_problems(problems, "benchmark")[: wanted.problems]
    if len(chosen) < wanted.problems:
        raise FourfoldError(
            f"{problems}: fidelity.problems is {wanted.problems}, but the benchmark split holds {len(chosen)}; "
            "lower it or raise problems.splits.benchmark"
        )
    tokenizer = load_tokenizer(model.parent)
    texts = []
    for problem in chosen:
        # Prompt and solution are tokenised apart, as they are when the model generates.
        solution = encode_rendered(tokenizer, problem.solution)[: wanted.max_tokens]
        if not solution:
            raise FourfoldError(f"{problems}: benchmark problem {problem.id} has no solution; its logits need one")
        prompt = render_prompt(tokenizer, settings.prompt, problem.problem)
        texts.append(Text(problem.id, problem.id, tuple(prompt), tuple(solution)))
    reference = load_transformer(model.parent, device)
    other = load_transformer(checkpoint.parent, device, fp8_lm_head=numerics.fp8_lm_head)
    kept = cache_dtype(numerics.kv_cache_dtype, other.device)
    with write_artifact(
        output,
        stage="compare_logits",
        settings=settings.model_dump(),
        inputs={"model": model, "checkpoint": checkpoint, "problems": problems},
        libraries=["torch", "transformers"],
        device=device_name(str(reference.device)),
    ) as staging:
        rows = []
        with progress(f"compare {numerics.numerics}", len(texts), "texts") as task:
            for text in texts:
                states = engine_states(reference, text, None), engine_states(other, text, kept)
                error = compare_states(*states, (reference.logits, other.logits))
                rows.append({"problem_id": text.problem_id, **text_row(error)})
                task.advance()
        summary = {"numerics": numerics.numerics, **summarize(rows)}
        write_csv(staging.path / files.TEXTS, rows)
        write_csv(staging.path / files.SUMMARY, [summary])
        staging.facts = {"numerics": numerics.numerics, "logits_error": summary}
    logger.info(
        "%s against bf16: KL %.4f nats a token (95 %%: %.4f to %.4f), same first choice in %.1f %% of %d tokens",
        numerics.numerics,
        summary["kl"],
        summary["kl_low"],
        summary["kl_high"],
        100 * summary["top1_agreement"],
        summary["tokens"],
    )


def _check_precision(checkpoint: Path, precision: str) -> None:
    """Raises FourfoldError for a checkpoint of another precision."""
    if precision == "bf16":
        read_manifest(checkpoint, "fetch_model")
        return
    held = read_manifest(checkpoint, "quantize_model")["settings"]["precision"]
    if held != precision:
        raise FourfoldError(f"{checkpoint}: holds {held}, but numerics.precision is {precision}; give that checkpoint")
