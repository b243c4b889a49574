"""Memory is computed before it is taken."""

import resource

import psutil
import torch

from fourfold.errors import FourfoldError
from fourfold.modeling.attention import KEY_BLOCK
from fourfold.modeling.config import TransformerConfig

GIB = 2**30
SCORE_BYTES = 64
"""Of each score while a token is drawn: copies in float32 and float64, and their order where top_p asks for it."""
NUMBER_BYTES = 4
"""Of any other number of a step; half of that where the model computes in bfloat16."""


def kv_cache_bytes(config: TransformerConfig, slots: int, length: int, dtype: torch.dtype) -> int:
    """Bytes of a KV cache: 2 x layers x kv_heads x head_dim x slots x length x item size."""
    item = torch.empty((), dtype=dtype).element_size()
    return config.kv_bytes_per_token * slots * length * item


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be taken on a device; on a CPU within the process's own limit (ulimit -v), if it has one."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What PyTorch holds but does not use can be taken too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = int(psutil.virtual_memory().available)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return free
    return max(0, min(free, limit - psutil.Process().memory_info().vms))


def step_bytes(config: TransformerConfig, rows: int, chunk: int, length: int, together: int = 0, keys: int = 0) -> int:
    """Bytes that a step takes beside weights and cache, counted generously.

    Args:
        rows: tokens whose scores are looked at in one step: sequences x drafts.
        chunk: tokens of one prompt in one forward.
        length: positions of a slot.
        together: tokens of several prompts in one forward, of each no more than a chunk, in whole blocks of keys.
        keys: of all those prompts, known ones among them; `together` or more.
    """
    scores = rows * config.vocab_size * SCORE_BYTES
    activations = max(rows, chunk, together) * (4 * config.intermediate_size + 8 * config.hidden_size)
    # A short prompt looks at whole blocks of keys.
    padded_chunk = -(-chunk // KEY_BLOCK) * KEY_BLOCK
    # Which keys each query head of a key/value head may see, once a token and once a head.
    group = config.num_attention_heads // config.num_key_value_heads
    mask = (group + 1) * max(chunk * length, min(together * length, padded_chunk * keys))
    # One layer's keys and values in the model's dtype, where the cache has another.
    widened = config.kv_bytes_per_token // config.num_hidden_layers * max(length, keys)
    return scores + (activations + mask + widened) * NUMBER_BYTES


def usable_bytes(device: torch.device, gpu_memory_utilization: float) -> int:
    """Bytes that may still be taken on a device, so that a GPU is not fuller than that share."""
    free = available_bytes(device)
    if device.type != "cuda":
        return free
    _, total = torch.cuda.mem_get_info(device)
    return max(0, free - int(total * (1 - gpu_memory_utilization)))


def plan_kv_cache(
    config: TransformerConfig,
    *,
    slots: int,
    length: int,
    rows: int,
    chunk: int,
    together: int = 0,
    keys: int = 0,
    aside: int = 0,
    dtype: torch.dtype,
    device: torch.device,
    gpu_memory_utilization: float,
) -> int:
    """Bytes of a KV cache, if they can be taken and leave room for a step's own numbers; takes nothing.

    Args:
        slots, length: sequences, and positions of each.
        rows, chunk, together, keys: as of `step_bytes`.
        aside: tokens of a prompt whose keys and values are kept beside the slots.
        gpu_memory_utilization: share of a GPU's memory that may be in use.
    Raises FourfoldError with the arithmetic, and what would fit, if not.
    """
    needed, free = kv_cache_bytes(config, slots, length, dtype), usable_bytes(device, gpu_memory_utilization)
    step = step_bytes(config, rows, chunk, length, together, keys) + kv_cache_bytes(config, 1, aside, dtype)
    if needed + step > free:
        token, left = needed // (slots * length), max(0, free - step)
        limit = f" within gpu_memory_utilization {gpu_memory_utilization:g}" if device.type == "cuda" else ""
        raise FourfoldError(
            f"KV cache: {slots} slots (max_num_seqs, times beam_width, and one for prompts in parts) x {length} tokens "
            f"(max_model_len, rounded up) x {token} bytes a token = {needed / GIB:.2f} GiB, and {step / GIB:.2f} GiB "
            f"for a step's numbers, but {free / GIB:.2f} GiB are free on {device}{limit}; {left // (token * length)} "
            f"slots of that length would fit, or {left // (token * slots)} tokens in each slot"
        )
    return needed


def check_draft_table(needed: int, device: torch.device) -> None:
    """Raises FourfoldError when the drafter's table of all tokens, of so many bytes, cannot be taken."""
    free = available_bytes(device)
    if needed > free:
        raise FourfoldError(
            f"drafter: its table of all tokens (vocab_size x hidden_size) takes {needed / GIB:.2f} GiB, but "
            f"{free / GIB:.2f} GiB are free on {device}; leave more memory free, or the drafter out"
        )
