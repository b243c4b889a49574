"""How much is drafted: a beam width and a beam length for each number of sequences that run at once.

Drafting pays while verifying more tokens costs little more than computing one; the more sequences share a step, the
sooner that ends. So a plan may draft wide for one sequence, one beam for a few, and nothing for many.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fourfold.modeling.trunk_tree import MAX_NODES

MOST = 2
"""How many times the average a sequence may have of what is shared."""


@dataclass(frozen=True)
class DraftShape:
    """What a step drafts for each sequence."""

    beam_width: int
    """Continuations that are kept at every step of the draft."""
    beam_length: int
    """Tokens of each, the newest one among them; 1 drafts nothing."""
    min_p: float = 0.0
    """Drafts that the drafter itself holds for less likely are not verified. On a CPU alone, where every token of a
    verification costs time of its own."""
    draft_tokens: int | None = None
    """Of all drafts, so many of the likeliest are verified; None: all of them. On a GPU the sequences that run together
    share them, and it is how many each has on the average."""

    @classmethod
    def chain(cls, drafts: int) -> "DraftShape":
        """A single beam of so many drafts; 0 drafts nothing."""
        return cls(1, drafts + 1)

    def __str__(self) -> str:
        """Beams x drafts, and how many of them are verified: 1x3, 4x5:7."""
        least = f" p>={self.min_p:g}" if self.min_p else ""
        most = f":{self.draft_tokens}" if self.draft_tokens is not None else ""
        return f"{self.beam_width}x{self.beam_length - 1}{most}{least}"

    @property
    def nodes(self) -> int:
        """Tokens of a verification, the newest one among them."""
        return 1 + (self.candidates if self.draft_tokens is None else min(self.candidates, self.draft_tokens))

    @property
    def candidates(self) -> int:
        """Drafts that there are."""
        return self.beam_width * (self.beam_length - 1)

    @property
    def shares(self) -> bool:
        """Whether sequences that run together share what is verified, on a GPU: where not all of a tree is."""
        return self.beam_width > 1 and self.nodes <= self.candidates

    @property
    def most_nodes(self) -> int:
        """Tokens of the largest verification of a sequence that shares them: more than MOST times the average hardly
        ever pays, and attention takes as long as for the largest."""
        return 1 + min(MOST * (self.nodes - 1), self.candidates, MAX_NODES - 1) if self.shares else self.nodes


NO_DRAFTS = DraftShape(1, 1)


@dataclass(frozen=True)
class DraftPlan:
    """Shapes by number of running sequences: an entry holds for up to that many, the last one also for more."""

    shapes: Mapping[int, DraftShape]

    @classmethod
    def fixed(
        cls, beam_width: int, beam_length: int, min_p: float = 0.0, draft_tokens: int | None = None
    ) -> "DraftPlan":
        """The same shape for any number of sequences."""
        return cls({1: DraftShape(beam_width, beam_length, min_p, draft_tokens)})

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Plain values, for JSON."""
        return {str(most): asdict(shape) for most, shape in sorted(self.shapes.items())}

    @classmethod
    def from_json(cls, values: Mapping[str, Mapping[str, Any]]) -> "DraftPlan":
        """Reads what `to_json` gave."""
        return cls({int(most): DraftShape(**shape) for most, shape in values.items()})

    def __str__(self) -> str:
        def words(shape: DraftShape) -> str:
            if shape.beam_length == 1:
                return "no drafts"
            least = f" of probability {shape.min_p:g} or more" if shape.min_p else ""
            most = f", {shape.nodes - 1} of them verified" if shape.draft_tokens is not None else ""
            return f"{shape.beam_width} x {shape.beam_length - 1} drafts{least}{most}"

        return ", ".join(f"up to {most} at once {words(shape)}" for most, shape in sorted(self.shapes.items()))

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

    @property
    def nodes(self) -> int:
        """Tokens of the largest verification, a sequence on the average."""
        return max(shape.nodes for shape in self.shapes.values())

    @property
    def most_nodes(self) -> int:
        """Tokens of the largest verification of a sequence."""
        return max(shape.most_nodes for shape in self.shapes.values())

    @property
    def drafts(self) -> bool:
        """Whether any number of sequences drafts."""
        return self.beam_length > 1

    def lanes(self, max_num_seqs: int) -> int:
        """Beams of all sequences together, at most: the slots of the KV cache that they need."""
        # A shape needs the most where it ends to hold.
        ends = [most for most in self.shapes if most < max_num_seqs]
        return max(running * self.shape(running).beam_width for running in [*ends, max_num_seqs])
