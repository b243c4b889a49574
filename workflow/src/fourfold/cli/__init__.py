"""The command line: one command a stage, the same that the workflow's rules call, and more for people.

What a command does is imported inside it, so that `fourfold --help` and a dry run stay quick.
"""

from fourfold.cli import stages, serving, machine  # isort: skip  (the order of the help)
from fourfold.cli.program import app, run

__all__ = ["app", "machine", "run", "serving", "stages"]
