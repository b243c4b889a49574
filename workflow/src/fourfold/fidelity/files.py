"""Names of the files that compare_logits writes: the workflow declares them as outputs (standard library only)."""

TEXTS = "texts.csv"
"""One row per text."""
SUMMARY = "summary.csv"
"""One row for all texts."""
