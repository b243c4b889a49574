"""The drafter's first weights. A short training gains much from them:

- Residual blocks are the identity (zero weights).
- The output matrix starts from the target's own, so that the drafter knows what hidden states mean in tokens. It is
  scaled down: the target's scores are for the token that is certain already, one before the first draft, and a start
  that is sure of the wrong token has to be unlearnt.
- The recurrence starts random, at a scale where a token's embedding moves the state: input embeddings are small beside
  hidden states, and under the usual scale of a linear layer the state hardly feels which token came.
"""

import torch
from torch import Tensor, nn

from fourfold.modeling.redrafter import Redrafter, RedrafterConfig, ResidualBlock
from fourfold.modeling.transformer import Transformer

HEAD_SCALE = 0.5
"""Share of the target's output matrix at the start."""


@torch.no_grad()
def initial_redrafter(
    config: RedrafterConfig, draft_to_target: Tensor | None, target: Transformer, seed: int
) -> Redrafter:
    """A drafter before training, with float32 weights on the target's device.

    Where exit_dim is smaller than hidden_size the target's output matrix does not fit, and the head starts random.
    What is random depends on `seed` alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drafter = Redrafter(config, draft_to_target)
        if drafter.rnn_w is not None:
            # Then rnn_w(embedding) has a variance of one, whatever the model's embeddings are like.
            nn.init.normal_(drafter.rnn_w.weight, std=1 / embedding_norm(target, draft_to_target))
    for block in drafter.lm_head:
        if isinstance(block, ResidualBlock):
            nn.init.zeros_(block.linear.weight)
            nn.init.zeros_(block.linear.bias)
    width = config.hidden_size
    if config.exit_dim >= width:
        if drafter.input_proj is not None:
            drafter.input_proj.weight[:width] = torch.eye(width, 2 * width)
            drafter.input_proj.bias[:width] = 0
        head = drafter.lm_head[-1]
        assert isinstance(head, nn.Linear)
        head.weight.zero_()
        head.weight[:, :width] = HEAD_SCALE * output_rows(target, draft_to_target).cpu()
    return drafter.to(target.device)


def embedding_norm(target: Transformer, token_ids: Tensor | None) -> float:
    """Root mean square length of the target's input embeddings, of the given tokens or all."""
    if token_ids is None:
        token_ids = torch.arange(target.config.vocab_size)
    embeddings = target.embed(token_ids.to(target.device)).float()
    return embeddings.square().sum(-1).mean().sqrt().item()


def output_rows(target: Transformer, token_ids: Tensor | None) -> Tensor:
    """Rows of the target's output matrix, float32 [tokens, hidden_size]; all of them for None.

    Read through the layer itself, which may hold its weight packed: the logits of unit vectors are its columns.
    """
    unit = torch.eye(target.config.hidden_size, device=target.device, dtype=target.dtype)
    columns = target.logits(unit).float()
    rows = columns if token_ids is None else columns[:, token_ids.to(target.device)]
    return rows.T.contiguous()
