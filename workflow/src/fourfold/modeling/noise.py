"""Gumbel noise for sampling: a function of a request's seed, the index of a token and the token itself.

The most likely token after adding such noise to log-probabilities is a draw from their distribution (Gumbel-max;
Maddison, Tarlow, Minka 2014). No generator has a state, so a request's tokens do not depend on the batch, on the slot,
on drafts or on what ran before, and a run can be resumed anywhere. Who knows a request's seed also knows the noise in
advance: a drafter that adds it guesses what will be drawn rather than what is most likely.
"""

from dataclasses import dataclass

from torch import Tensor


def signed(value: int) -> int:
    """The low 64 bits as a signed integer, which is what tensors hold."""
    return (value + 2**63) % 2**64 - 2**63


GOLDEN = 0x9E3779B97F4A7C15
"""The increment of splitmix64."""
OTHER = 0xD1B54A32D192ED03


DRAFT_WEIGHT = 0.7
"""How much of the noise a drafter adds, times the temperature: it does not know the target's distribution, so the
noise counts for less than where a token is drawn. Half the noise is best for a drafter of texts drawn at temperature
0.7 (docs/performance.md), and none for greedy requests."""


@dataclass(frozen=True)
class DraftNoise:
    """The noise of the tokens that are drafted; each is a tensor [batch] on the drafter's device."""

    seed: Tensor
    """int64: the requests' seeds."""
    index: Tensor
    """int64: tokens that each has generated; the first draft guesses the token of this index."""
    weight: Tensor
    """float32: what the noise is multiplied with before it is added to the drafter's logits; 0 for greedy requests."""

    def rows(self, part: slice) -> "DraftNoise":
        """That of some requests."""
        return DraftNoise(self.seed[part], self.index[part], self.weight[part])

    def add_to(self, logits: Tensor, depth: int, tokens: Tensor) -> Tensor:
        """Scores of the drafts of a depth: the drafter's logits with the noise that their place has.

        Args:
            logits: [batch, ..., tokens].
            depth: drafts before this one.
            tokens: int64 [tokens], what the target calls them.
        Returns float32 of the same shape.
        """
        weighted = gumbel(noise_keys(self.seed, self.index + depth)[:, None], tokens) * self.weight[:, None]
        return logits.float() + weighted.float().view(len(self.seed), *[1] * (logits.ndim - 2), -1)


def noise_keys(seed: Tensor, index: Tensor) -> Tensor:
    """Where the noise of the index-th generated token starts: int64, from int64 seeds and indices broadcast together.

    splitmix64 (Steele, Lea, Flood 2014) over both in turn; int64 products wrap as they should.
    """
    return _mix(_mix(seed + signed(GOLDEN)) ^ _mix(index + signed(OTHER)))


def gumbel(keys: Tensor, tokens: Tensor) -> Tensor:
    """Gumbel noise of tokens: float64, from `noise_keys` and int64 tokens broadcast together; all finite."""
    bits = _mix(keys + tokens * signed(GOLDEN))
    bits >>= 12
    bits &= 2**52 - 1
    # 52 bits and a half: neither 0 nor 1.
    uniform = bits.double().add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """splitmix64's function of 64 bits, written over x."""
    # In place: for a whole vocabulary, taking memory costs a CPU as much time as the arithmetic.
    x ^= _shifted(x, 30)
    x *= signed(0xBF58476D1CE4E5B9)
    x ^= _shifted(x, 27)
    x *= signed(0x94D049BB133111EB)
    x ^= _shifted(x, 31)
    return x


def _shifted(x: Tensor, bits: int) -> Tensor:
    # Shifts of int64 keep the sign: the mask makes them shifts of the bare bits.
    return (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)
