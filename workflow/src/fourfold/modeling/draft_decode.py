"""Drafts on a GPU, trees with one trunk: `Redrafter`'s recurrence, four launches and three products a token.

What it computes is `Redrafter`'s, but for rounding; what is read for each token is less:

- What a token adds to the recurrence, rnn_w(embedding(token)) + rnn_u's bias, is a row of a table of all tokens, made
  once: vocab_size x hidden_size numbers, 1.6 GB in bfloat16 for a model of 14B shape, of which a token reads one row.
- The head's first layer is linear in cat(hidden, state): its product with the target's hidden state is the same for
  all tokens of a draft, so it is made once a draft.
- Its product with the recurrence's state and rnn_u's, which is needed for the token after, are one product.
- The state before the first token is zero, and after the last token none is needed.

In FP8 the weights are those of the packed drafter, whose layers remain for what has no chain: several beams, drafts
with a least probability, and more rows than `split_product` takes. The first layer and rnn_u are held twice: in halves.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.modeling.draft_kernels import Activations, advance, first_layer, residual_block
from fourfold.modeling.kernels import round_rows
from fourfold.modeling.linear import LinearWeights
from fourfold.modeling.noise import DraftNoise
from fourfold.modeling.packed_drafter import stored_weights
from fourfold.modeling.redrafter import Redrafter
from fourfold.modeling.split_product import split_product
from fourfold.modeling.tree_kernels import make_tree
from fourfold.modeling.trunk_kernels import Candidates, Drafted, best_logits
from fourfold.modeling.trunk_tree import TrunkTree, nodes_of

TABLE_ROWS = 8192
"""Rows of the table that are made at once."""


def table_bytes(drafter: Redrafter, dtype: torch.dtype) -> int:
    """Bytes of the table of what each token adds; 0 without a recurrent network, which adds the embedding itself."""
    config = drafter.config
    return config.vocab_size * config.hidden_size * dtype.itemsize if config.rnn else 0


class DraftChain:
    """A drafter's weights as a GPU's drafts take them."""

    @torch.inference_mode()
    def __init__(self, drafter: Redrafter, embedding: Tensor) -> None:
        """Makes the table.

        Args:
            drafter: packed, or as it was loaded.
            embedding: [vocab, hidden], the target's.
        """
        config = drafter.config
        self.rnn, self.draft_to_target = config.rnn, drafter.draft_to_target
        *blocks, output = drafter.lm_head
        layers = [stored_weights(block.get_submodule("linear")) for block in blocks]
        self.projects = drafter.input_proj is not None
        if drafter.input_proj is not None:
            layers.insert(0, stored_weights(drafter.input_proj))
        first, *self.blocks = layers
        self.output = stored_weights(output)
        self.fp8 = first.weight_scale is not None
        size = config.hidden_size
        self.hidden_half = LinearWeights(first.weight[:, :size].contiguous(), first.bias, first.weight_scale)
        self.state_half = LinearWeights(first.weight[:, size:].contiguous(), None, first.weight_scale)
        self.table, self.state_and_rnn = embedding, self.state_half
        if drafter.rnn_w is not None and drafter.rnn_u is not None:
            rnn_u = stored_weights(drafter.rnn_u)
            self.table = _table(embedding, stored_weights(drafter.rnn_w).weight, rnn_u.bias)
            self.state_and_rnn = _stack(self.state_half, rnn_u)
            # The last token's product leaves the rows of rnn_u out.
            self.state_half.weight = self.state_and_rnn.weight[: config.exit_dim]

    @torch.inference_mode()
    def __call__(
        self,
        hidden: Tensor,
        last: Tensor,
        drafts: int,
        width: int = 1,
        nodes: int | None = None,
        noise: DraftNoise | None = None,
        most: int | None = None,
        runs: Tensor | None = None,
    ) -> TrunkTree:
        """The most likely token after each token, and the likeliest beside these, as `draft_trunk` has them.

        Args:
            hidden: [rows, hidden], the target's states that predicted `last`; MAX_ROWS of `split_product` at most.
            last: int64 [rows], contiguous, the newest tokens.
            drafts: tokens of the trunk, 1 or more.
            width: candidates of each depth: drafts * width are 64 at most, and width no more than there are logits.
            nodes: how many of them are kept; None keeps all that a mask has bits for.
            noise: that of sampled requests, contiguous tensors; None if all are greedy.
            most, runs: for trees that share their nodes, as of `pick_nodes`; runs contiguous.
        Returns trees of 1 + nodes nodes, or 1 + most where they share them; tokens in the target's vocabulary.
        """
        rows, fp8, kept = len(last), self.fp8, nodes_of(drafts, width, nodes)
        if width == 1:
            drafts = kept  # the first of a chain are the likeliest
        drafted = Drafted.empty(rows, drafts, width, last.device)
        state, x = torch.empty_like(hidden), hidden.new_empty(rows, len(self.hidden_half.weight))
        fixed = _product(Activations(*round_rows(hidden)) if fp8 else Activations(hidden), self.hidden_half)
        candidates, product = Candidates(last[:, None]), None
        for step in range(drafts):
            pushed = product if self.rnn else None
            inner = advance(state, candidates, self.table, pushed, drafted, step, self.rnn, fp8)
            product = _product(inner, self.state_and_rnn if step < drafts - 1 else self.state_half)
            inner = first_layer(product, fixed, hidden, state, x, not self.projects, fp8)
            for block in self.blocks:
                inner = residual_block(_product(inner, block), x, fp8)
            candidates = best_logits(_product(inner, self.output), self.draft_to_target, width, noise, step)
        return make_tree(candidates, drafted, kept, most, runs)


def _product(x: Activations, weights: LinearWeights) -> Tensor:
    """Partial sums of a layer: [parts, rows, out]."""
    return split_product(x.values, weights.weight, weights.bias, weights.weight_scale, x.scales)


def _table(embedding: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What each token adds to the recurrence: [vocab, hidden] in the weight's dtype."""
    table = torch.empty(embedding.shape, dtype=weight.dtype, device=embedding.device)
    for rows, result in zip(embedding.split(TABLE_ROWS), table.split(TABLE_ROWS), strict=True):
        result.copy_(F.linear(rows.to(weight.dtype), weight, bias))
    return table


def _stack(above: LinearWeights, below: LinearWeights) -> LinearWeights:
    """Two layers that read the same input as one, without bias. In FP8 each row has its layer's scale."""
    weights = (above.weight, below.weight)
    stacked = above.weight.new_empty(sum(map(len, weights)), above.weight.shape[1])
    for part, weight in zip(stacked.split([len(weight) for weight in weights]), weights, strict=True):
        part.copy_(weight)
    if above.weight_scale is None or below.weight_scale is None:
        return LinearWeights(stacked)
    scales = (above.weight_scale.expand(len(weights[0])), below.weight_scale.expand(len(weights[1])))
    return LinearWeights(stacked, None, torch.cat(scales))
