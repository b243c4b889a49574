"""For torchrun, and for servers that are started: `python -m fourfold.cli COMMAND`."""

from fourfold.cli import run

run()
