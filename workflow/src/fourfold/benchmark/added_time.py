"""What `overhead.csv` says: how much time the server adds to each token."""

from collections.abc import Sequence
from statistics import median

from fourfold.benchmark.rows import Row


def added_time(rows: Sequence[Row]) -> list[float]:
    """What the server adds to the engine's time per token, as a share, one for each round in which both were measured.

    Their median is the finding: a machine that has other work at times spoils single rounds.
    """
    tpots = {(row["round"], row["side"]): row["tpot"] for row in rows}
    return [tpots[r, "server"] / tpots[r, "offline"] - 1 for r, side in tpots if side == "server"]


def sentence(rows: Sequence[Row]) -> str:
    """The finding, for people."""
    shares = added_time(rows)
    return (
        f"The HTTP server adds {100 * median(shares):.1f} % to the engine's time per token with "
        f"{rows[0]['concurrency']} at once (median of {len(shares)} rounds, {100 * min(shares):.1f} to "
        f"{100 * max(shares):.1f} %), measured where a token costs least: on a random model of 0.1 million parameters."
    )
