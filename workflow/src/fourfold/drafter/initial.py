"""The drafter's first weights: it starts as the target's own output layer and learns what to add."""

import torch
from torch import Tensor, nn

from fourfold.modeling.redrafter import Redrafter, RedrafterConfig, ResidualBlock
from fourfold.modeling.transformer import Transformer


@torch.no_grad()
def initial_redrafter(
    config: RedrafterConfig, draft_to_target: Tensor | None, target: Transformer, seed: int
) -> Redrafter:
    """A drafter that proposes the target's own next token: residual blocks are the identity, and the output matrix is
    the target's on the hidden state and zero on the recurrent state.

    Where exit_dim is smaller than hidden_size the target's output matrix does not fit, and the start is random.
    The recurrence starts random, from `seed`. Returns float32 weights on the target's device.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drafter = Redrafter(config, draft_to_target)
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
        head.weight[:, :width] = output_rows(target, draft_to_target).cpu()
    return drafter.to(target.device)


def output_rows(target: Transformer, token_ids: Tensor | None) -> Tensor:
    """Rows of the target's output matrix, float32 [tokens, hidden_size]; all of them for None.

    Read through the layer itself, which may hold its weight packed: the logits of unit vectors are its columns.
    """
    unit = torch.eye(target.config.hidden_size, device=target.device, dtype=target.dtype)
    columns = target.logits(unit)
    rows = columns if token_ids is None else columns[:, token_ids.to(target.device)]
    return rows.T.contiguous()
