"""The compare_logits stage: what a quantised checkpoint's logits lose against the model's own.

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
from fourfold.drafter.states import answer_states
from fourfold.errors import FourfoldError
from fourfold.fidelity import files
from fourfold.fidelity.logits import compare_states, summarize, text_row
from fourfold.model.tokenizer import encode_rendered, load_tokenizer, render_prompt
from fourfold.modeling.checkpoint import load_transformer
from fourfold.problems.read import read_problems
from fourfold.progress import logger, progress


def compare_logits(
    settings: FidelityStage, model: Path, quantized: Path, problems: Path, output: Path, device: str
) -> None:
    """Writes the logits error of a quantised checkpoint, per text and over all texts.

    Args:
        settings: how much text, and the prompt.
        model: manifest of the model that was quantised.
        quantized: manifest of the quantised checkpoint.
        problems: manifest of the problems; the benchmark split is used.
        output: manifest of the artifact to write.
        device: auto, cpu or cuda.
    Raises FourfoldError, before long work starts, when the checkpoint is not a quantised one, when there are too few
    problems, and when the device cannot compute in the precision.
    """
    wanted = settings.fidelity
    read_manifest(model)
    precision: str = read_manifest(quantized, "quantize_model")["settings"]["precision"]
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
    reference, other = load_transformer(model.parent, device), load_transformer(quantized.parent, device)
    with write_artifact(
        output,
        stage="compare_logits",
        settings=settings.model_dump(),
        inputs={"model": model, "quantized": quantized, "problems": problems},
        libraries=["torch", "transformers"],
        device=device_name(str(reference.device)),
    ) as staging:
        rows = []
        with progress(f"compare {precision}", len(texts), "texts") as task:
            for text in texts:
                states = [answer_states(transformer, [text]) for transformer in (reference, other)]
                error = compare_states(states[0], states[1], (reference.logits, other.logits))
                rows.append({"problem_id": text.problem_id, **text_row(error)})
                task.advance()
        summary = {"precision": precision, **summarize(rows)}
        write_csv(staging.path / files.TEXTS, rows)
        write_csv(staging.path / files.SUMMARY, [summary])
        staging.facts = {"precision": precision, "logits_error": summary}
    logger.info(
        "%s against bf16: KL %.4f nats a token (95 %%: %.4f to %.4f), same first choice in %.1f %% of %d tokens",
        precision,
        summary["kl"],
        summary["kl_low"],
        summary["kl_high"],
        100 * summary["top1_agreement"],
        summary["tokens"],
    )
