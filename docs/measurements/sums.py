"""Writes problems of one step with small numbers, of which a model of 135 million parameters solves some.

python docs/measurements/sums.py FILE.jsonl
"""

import json
import random
import sys
from pathlib import Path

COUNT = 3200
NAMES = ("Mia", "Tom", "Ada", "Leo", "Ines", "Noah", "Zoe", "Ben")
THINGS = ("apples", "books", "coins", "stamps", "shells", "pens", "cards", "eggs")


def problem(rng: random.Random) -> dict[str, str]:
    """A random problem with its worked solution."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    kind = rng.randrange(4)
    if kind == 0:
        text, work, answer = f"What is {a} + {b}?", f"{a} + {b} = {a + b}.", a + b
    elif kind == 1:
        text = f"{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?"
        work, answer = f"{name} has {a} {things} and {b} more: {a} + {b} = {a + b}.", a + b
    elif kind == 2:
        text = f"{name} has {a + b} {things} and gives {b} to a friend. How many {things} are left?"
        work, answer = f"{name} gives {b} of {a + b} {things}: {a + b} - {b} = {a}.", a
    else:
        text = f"{name} finds {a} {things} on Monday and {b} on Tuesday. How many {things} are that in all?"
        work, answer = f"{name} finds {a} and {b} {things}: {a} + {b} = {a + b}.", a + b
    return {"problem": text, "solution": f"{work}\n#### {answer}", "answer": str(answer)}


def main() -> None:
    """Writes COUNT different problems to the file that is named."""
    rng = random.Random(0)
    found: dict[str, dict[str, str]] = {}
    while len(found) < COUNT:
        row = problem(rng)
        found.setdefault(row["problem"], row)
    Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in found.values()), encoding="utf-8")


if __name__ == "__main__":
    main()
