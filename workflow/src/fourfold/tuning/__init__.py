"""The tune_engine stage: how much an engine drafts, chosen by a small measured search."""
