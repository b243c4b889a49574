"""Tells requests how likely their tokens were; costs nothing for those that do not ask."""

from torch import Tensor

from fourfold.engine.logprobs import ROWS, TokenLogprob, token_logprobs
from fourfold.engine.sequence import Sequence
from fourfold.modeling.transformer import Transformer


def tell(sequences: list[Sequence], logits: Tensor, tokens: list[list[int]], rows: Tensor | None = None) -> None:
    """Records how likely new tokens were.

    Args:
        logits: [rows, vocab].
        tokens: each sequence's new tokens.
        rows: int64 [sequences, tokens or more], the row that each was chosen from; None: each sequence has one row.
    """
    for i, sequence in enumerate(sequences):
        if (top := sequence.params.logprobs) is not None:
            chosen = [token for token in tokens[i] if token >= 0]
            path = slice(i, i + 1) if rows is None else rows[i]
            sequence.output.logprobs += token_logprobs(logits[path][: len(chosen)], chosen, top)


def tell_prompt(sequence: Sequence, target: Transformer, hidden: Tensor, start: int) -> None:
    """Records how likely the prompt's tokens after `start` were, from its hidden states [tokens, hidden] there."""
    output, top = sequence.output, sequence.params.prompt_logprobs
    if top is None:
        return
    if start == 0:
        output.prompt_logprobs.append(TokenLogprob(output.prompt_token_ids[0], None))
    # The last state of all predicts the first generated token.
    following = output.prompt_token_ids[start + 1 : start + 1 + len(hidden)]
    for at in range(0, len(following), ROWS):
        tokens = following[at : at + ROWS]
        logits = target.logits(hidden[at : at + len(tokens)])
        output.prompt_logprobs += token_logprobs(logits, tokens, top)
