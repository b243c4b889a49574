"""How much is drafted: a beam width and a beam length for each number of sequences that run at once.

Drafting pays while verifying more tokens costs little more than computing one; the more sequences share a step, the
sooner that ends. So a plan may draft wide for one sequence, one beam for a few, and nothing for many.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class DraftShape:
    """What a step drafts for each sequence."""

    beam_width: int
    """Continuations that are kept at every step of the draft."""
    beam_length: int
    """Tokens of each, the newest one among them; 1 drafts nothing."""


NO_DRAFTS = DraftShape(1, 1)


@dataclass(frozen=True)
class DraftPlan:
    """Shapes by number of running sequences: an entry holds for up to that many, the last one also for more."""

    shapes: Mapping[int, DraftShape]

    @classmethod
    def fixed(cls, beam_width: int, beam_length: int) -> "DraftPlan":
        """The same shape for any number of sequences."""
        return cls({1: DraftShape(beam_width, beam_length)})

    def shape(self, running: int) -> DraftShape:
        """What is drafted while `running` sequences run."""
        ordered = sorted(self.shapes)
        return self.shapes[next((most for most in ordered if most >= running), ordered[-1])]

    @property
    def beam_length(self) -> int:
        """The longest of all."""
        return max(shape.beam_length for shape in self.shapes.values())

    @property
    def beam_width(self) -> int:
        """The widest of all."""
        return max(shape.beam_width for shape in self.shapes.values())
