"""Hidden states of known texts, as an engine computes them: with what its KV cache keeps."""

import torch
from torch import Tensor

from fourfold.drafter.samples import Text
from fourfold.modeling.kv_cache import KVCache
from fourfold.modeling.transformer import Transformer


def engine_states(target: Transformer, text: Text, cache_dtype: torch.dtype | None) -> Tensor:
    """Reads a text in one forward pass through a cache of its own.

    Args: cache_dtype: of keys and values; None for the target's. Returns [answer tokens, hidden]: the last prompt
    position and all of the answer's but the last.
    """
    known = torch.tensor([(*text.prompt_token_ids, *text.token_ids)[:-1]], device=target.device)
    length = known.shape[1]
    cache = KVCache.allocate(target.config, 1, length, target.device, cache_dtype or target.dtype)
    positions = torch.arange(length, device=target.device)[None]
    return target.forward(known, positions, cache, length)[0, len(text.prompt_token_ids) - 1 :]
