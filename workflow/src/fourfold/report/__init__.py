"""The report stage: tables and plots."""
