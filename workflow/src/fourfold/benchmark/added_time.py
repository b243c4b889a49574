"""What `overhead.csv` says: how much time the server adds to each token."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from fourfold.benchmark.metrics import interval

Row = dict[str, Any]


def added_time(rows: Sequence[Row]) -> tuple[float, tuple[float, float] | None]:
    """What the server adds to the engine's time per token, as a share, and its 95 % interval over the rounds."""
    tpots = {(row["round"], row["side"]): row["tpot"] for row in rows}
    shares = [tpots[r, "server"] / tpots[r, "offline"] - 1 for r, side in tpots if side == "server"]
    return fmean(shares), interval(shares)


def sentence(rows: Sequence[Row]) -> str:
    """The finding, for people."""
    share, bounds = added_time(rows)
    between = "" if bounds is None else f" (95 % interval {100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} %)"
    return (
        f"The HTTP server adds {100 * share:.1f} %{between} to the engine's time per token with "
        f"{rows[0]['concurrency']} at once, measured where a token costs least: on a random model of 0.1 million "
        "parameters."
    )
