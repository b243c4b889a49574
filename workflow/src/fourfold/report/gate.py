"""The accuracy gate: what each engine's speed costs in accuracy, against what the configuration allows.

A check passes or fails only where its whole 95 % interval is on one side of the limit; else it is undecided. Nothing is
left out of the report for its verdict.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fourfold.config.benchmark import ReportSettings
from fourfold.fidelity.paired import interval, same_text
from fourfold.report.data import EngineBenchmark, Results, Row

Verdict = Literal["pass", "undecided", "fail"]
SEVERITY: tuple[Verdict, ...] = ("pass", "undecided", "fail")
WORDS: dict[Verdict, str] = {"fail": "failed", "undecided": "undecided"}
HEADINGS = {
    "engine": "Engine",
    "check": "Check",
    "measured": "Measured",
    "interval": "95 % interval",
    "allowed": "Allowed",
    "verdict": "Verdict",
    "basis": "Rests on",
}
NOTES = (
    "Accuracy: right answers of the engine less those of the first engine to the same requests (problem, place, "
    "seed), in points of a hundred; the interval is Agresti and Min's for matched pairs, with problems as clusters. "
    "KL: how far the engine's next-token distribution is from bf16's on held-out problems with the dataset's "
    "solutions, in nats a token; Student's interval with texts as clusters. Drafts do not change a distribution, so "
    "engines that round alike share their KL.",
    "A check passes or fails where the whole interval is on one side of the limit; else it is undecided.",
)


@dataclass(frozen=True)
class Check:
    """One line of the gate; everything but the verdict as text."""

    engine: str
    check: str
    measured: str
    interval: str
    allowed: str
    verdict: Verdict
    basis: str


def checks(results: Results, settings: ReportSettings) -> list[Check]:
    """All checks, engine by engine; the first engine is the reference of accuracy and has no check of it."""
    found = []
    for engine in results.engines:
        if engine.name != results.baseline:
            found.append(_accuracy(results, engine, settings.max_accuracy_drop))
        if engine.numerics != "bf16":
            found.append(_divergence(results, engine, settings.max_kl))
        if (plain := _plain_twin(results, engine)) is not None:
            found.append(_text(engine, plain))
    return found


def decide(low: float, high: float, limit: float) -> Verdict:
    """Verdict on a quantity that shall not exceed a limit, from its interval."""
    if high <= limit:
        return "pass"
    return "fail" if low > limit else "undecided"


def worst(found: Sequence[Check]) -> Verdict | None:
    """The gravest verdict; None without checks."""
    return max((check.verdict for check in found), key=SEVERITY.index, default=None)


def engine_verdicts(found: Sequence[Check]) -> dict[str, Verdict | None]:
    """The gravest verdict of each engine that has a check."""
    return {check.engine: worst([other for other in found if other.engine == check.engine]) for check in found}


def gate_sentence(found: Sequence[Check], settings: ReportSettings) -> str:
    """The gate in words; when accuracy is undecided, with the number of problems that could decide."""
    overall = worst(found)
    if overall is None:
        return "Accuracy gate: nothing to compare."
    if overall == "pass":
        return "Accuracy gate: pass for all engines."
    named = {
        verdict: [f"{c.engine} ({c.check.split(',')[0]})" for c in found if c.verdict == verdict] for verdict in WORDS
    }
    said = "; ".join(f"{WORDS[verdict]}: {', '.join(names)}" for verdict, names in named.items() if names)
    sentence = f"Accuracy gate {said}."
    if any(check.verdict == "undecided" and check.check.startswith("accuracy") for check in found):
        least = least_problems(settings.max_accuracy_drop / 100)
        sentence += (
            " No number of problems can show that nothing at all is lost; raise report.max_accuracy_drop."
            if least is None
            else f" To show that at most {settings.max_accuracy_drop:g} points are lost takes {least} problems or more "
            "(benchmark.problems)."
        )
    return sentence


def least_problems(drop: float) -> int | None:
    """The fewest problems that can show a loss of at most `drop` (0 to 1): engines that never differ on them.

    None if no number can.
    """
    if drop <= 0:
        return None
    low, high = 1, 2
    while -interval([0.0] * high)[0] > drop:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if -interval([0.0] * middle)[0] <= drop else (middle, high)
    return high


def _accuracy(results: Results, engine: EngineBenchmark, allowed: float) -> Check:
    name, limit = "accuracy, points", f"−{allowed:g} or better"
    paired = results.paired(engine)
    if paired is None:
        return Check(engine.name, name, "–", "–", limit, "undecided", "no request that both engines finished")
    return Check(
        engine.name,
        name,
        points(paired.difference),
        f"{points(paired.low)} to {points(paired.high)}",
        limit,
        decide(-100 * paired.high, -100 * paired.low, allowed),
        f"problems: {paired.problems}, pairs: {paired.pairs}, gained: {paired.gained}, lost: {paired.lost}",
    )


def _divergence(results: Results, engine: EngineBenchmark, allowed: float) -> Check:
    name, limit = "KL, nats a token", f"{allowed:g} or less"
    row = results.fidelity.get(engine.numerics)
    if row is None:
        return Check(engine.name, name, "–", "–", limit, "undecided", "not measured")
    return Check(
        engine.name,
        name,
        f"{row['kl']:#.2g}",
        f"{row['kl_low']:#.2g} to {row['kl_high']:#.2g}",
        limit,
        decide(row["kl_low"], row["kl_high"], allowed),
        f"{row['texts']} texts, {row['tokens']} tokens: same first choice in {100 * row['top1_agreement']:.1f} %, "
        f"largest logit difference {row['max_logit_difference']:.1f}",
    )


def _text(engine: EngineBenchmark, plain: EngineBenchmark) -> Check:
    same, pairs = same_text(engine.requests, plain.requests)
    return Check(
        engine.name,
        f"same text as {plain.name}",
        f"{same}/{pairs}",
        "–",
        "all",
        # Another text is not a wrong one: rounding that depends on the batch is enough on a GPU.
        "pass" if pairs and same == pairs else "undecided",
        "temperature 0: drafts shall not change a token",
    )


def _plain_twin(results: Results, engine: EngineBenchmark) -> EngineBenchmark | None:
    """The first engine without a drafter that rounds like one that drafts, if both decoded greedily."""
    if not engine.drafts or not engine.greedy:
        return None
    twins = (other for other in results.engines if other.numerics == engine.numerics and not other.drafts)
    return next((twin for twin in twins if twin.greedy), None)


def points(share: float) -> str:
    """A difference of shares in signed points; a true minus sign, and no sign at zero."""
    text = f"{100 * share:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def gate_rows(found: Sequence[Check]) -> list[Row]:
    """The checks as rows; keys are those of HEADINGS."""
    return [{key: getattr(check, key) for key in HEADINGS} for check in found]


def add_columns(results: Results, found: Sequence[Check]) -> None:
    """Adds the gate's numbers to every row, the same at each concurrency; None where there is nothing to compare."""
    verdicts = engine_verdicts(found)
    for engine in results.engines:
        paired = results.paired(engine) if engine.name != results.baseline else None
        logits = results.fidelity.get(engine.numerics, {})
        for row in engine.rows:
            row["accuracy_difference"] = paired and paired.difference
            row["accuracy_difference_low"] = paired and paired.low
            row["accuracy_difference_high"] = paired and paired.high
            row |= {name: logits.get(name) for name in ("kl", "kl_low", "kl_high", "top1_agreement")}
            row["max_logit_difference"] = logits.get("max_logit_difference")
            row["gate"] = verdicts.get(engine.name)
