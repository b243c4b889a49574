"""fourfold: a reproducible workflow that makes math language models answer several times faster."""

__version__ = "0.1.0"
