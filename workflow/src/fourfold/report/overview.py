"""The overview: one self-contained page with the verdict, Table 1, the plots, samples and provenance."""

from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.figure import Figure

from fourfold.config.benchmark import ReportSettings
from fourfold.report import gate, pages, tables
from fourfold.report.data import Results
from fourfold.report.provenance import provenance_rows, source_line, warnings
from fourfold.report.samples import samples
from fourfold.report.style import to_inline_svg
from fourfold.report.verdict import best_engine, verdict

CAPTIONS = {
    "throughput": "All tokens generated until a workload stops, by its time. Above each bar: the speed-up over "
    "the first engine at the same concurrency.",
    "latency": "Finished requests only; waiting in the queue counts. A token's time is the mean over its request.",
    "accuracy": "Accuracy over all answers of an engine, with standard errors clustered by problem. Right and up is "
    "better.",
    "fidelity": "Left: right answers less those of the first engine to the same requests. Right: how far each "
    "engine's next-token distributions are from bf16's, on held-out problems with the dataset's solutions. Bars are "
    "95 % intervals: one across the dashed line decides nothing.",
    "training": "Every position of the held-out answers starts a draft here, the tokens before it being the true ones; "
    "tokens a step count the bonus token.",
    "acceptance": "Unconditional: draft token 2 counts only where draft token 1 was accepted too. Engines answer "
    "problems of seen groups (templates): training had others of them. Of unseen groups it had none. "
    "* 1 + accepted / drafts: it counts the bonus token.",
}
DEFINITIONS = {
    "ttft": "Time to first token, as a client sees it: from sending the request to the first chunk, waiting included.",
    "tpot": "Time per output token: (e2e_latency − ttft) / (output tokens − 1).",
    "itl, icl": "Inter-token latency shares the gap between two chunks of a stream among the tokens in it; inter-chunk "
    "latency is the gap itself. With speculative decoding they differ, without they are the same.",
    "e2e_latency": "From sending a request to its last token.",
    "request_goodput": "Requests a second that keep all limits of the configuration's benchmark.goodput.",
    "output_throughput": "Output tokens per second: of a workload from submission to the stop, of a request by its own "
    "latency.",
    "acceptance_length": "1 + accepted draft tokens / verifications: tokens that a decoding step yields. The 1 is the "
    "bonus token. Pooled over all requests, so long answers weigh more.",
    "acceptance_rate": "Accepted draft tokens / draft tokens; by position, the share of all verifications.",
    "accuracy": "Answers equal to the expected one (math-verify) / finished answers.",
    "kl": "KL divergence of an engine's next-token distribution from bf16's: the mean of Σ p (log p − log q) over "
    "tokens, in nats; 0 means the same distribution.",
}


def overview(
    results: Results, checks: Sequence[gate.Check], figures: dict[str, Figure], settings: ReportSettings
) -> str:
    """The page as HTML text.

    Args:
        results: all measurements.
        checks: the lines of the accuracy gate.
        figures: plots by stem; those of accuracy and of the drafter are left out when there is nothing to show.
        settings: the page's title, and the limits of the gate.
    """
    hidden = set()
    if not checks:
        hidden.add("fidelity")
    if all(engine.accuracy is None for engine in results.engines):
        hidden.add("accuracy")
    if not results.training:
        hidden.add("training")
    if not results.evaluation and all(row["acceptance_length"] is None for row in results.rows):
        hidden.add("acceptance")
    plots = [
        {"svg": Markup(to_inline_svg(figure, stem, CAPTIONS[stem])), "caption": CAPTIONS[stem]}
        for stem, figure in figures.items()
        if stem not in hidden
    ]
    return pages.render(
        "overview",
        title=settings.title,
        verdict=verdict(results),
        gate=gate.worst(checks),
        gate_sentence=gate.gate_sentence(checks, settings),
        checks=gate.gate_rows(checks),
        check_headings=gate.HEADINGS,
        check_notes=gate.NOTES,
        source=source_line(results),
        warnings=warnings(results),
        tiles=tiles(results),
        table1=tables.table1(results, checks),
        headings=tables.HEADINGS,
        notes=tables.notes(results),
        rates=tables.rate_rows(results),
        rate_headings=tables.RATE_HEADINGS,
        fastest=tables.fastest(results),
        plots=plots,
        samples=samples(results),
        provenance=provenance_rows(results),
        definitions=DEFINITIONS,
    )


def tiles(results: Results) -> list[tuple[str, str]]:
    """The fastest engine's figures at the highest concurrency, each with what it is."""
    best = best_engine(results)
    row = next(r for c in reversed(results.concurrencies) if (r := results.row(best, c)))
    load = f"{row['concurrency']} at once"
    found = []
    if best != results.baseline and row["output_throughput_speedup"]:
        found.append((f"{row['output_throughput_speedup']:.2f}×", f"{best} against {results.baseline}, {load}"))
    if row["output_throughput"]:
        found.append((f"{row['output_throughput']:.0f} tok/s", f"{best}, all requests together, {load}"))
    if row["decode_throughput_mean"]:
        found.append((f"{row['decode_throughput_mean']:.1f} tok/s", f"{best}, one sequence decoding, {load}"))
    if row["acceptance_length"]:
        found.append((f"{row['acceptance_length']:.2f}", "tokens a step (acceptance length, with the bonus token)"))
    return found
