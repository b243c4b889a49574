"""Memory is computed before it is taken."""

import resource

import psutil
import torch

from fourfold.errors import FourfoldError
from fourfold.modeling.config import TransformerConfig

GIB = 2**30


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


def check_kv_cache(config: TransformerConfig, slots: int, length: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of the KV cache, if they can be taken. Raises FourfoldError with the arithmetic if not."""
    needed = kv_cache_bytes(config, slots, length, dtype)
    free = available_bytes(device)
    if needed > free:
        per_slot = kv_cache_bytes(config, 1, length, dtype)
        raise FourfoldError(
            f"KV cache: {slots} slots (max_num_seqs, times beam_width) x {length} tokens (max_model_len, rounded up) x "
            f"{needed // (slots * length)} bytes a token = {needed / GIB:.2f} GiB, but {free / GIB:.2f} GiB are free "
            f"on {device}; {max(0, free // per_slot)} slots of that length would fit"
        )
    return needed


def check_draft_table(needed: int, device: torch.device) -> None:
    """Raises FourfoldError when the drafter's table of all tokens, of so many bytes, cannot be taken."""
    free = available_bytes(device)
    if needed > free:
        raise FourfoldError(
            f"drafter: its table of all tokens (vocab_size x hidden_size) takes {needed / GIB:.2f} GiB, but "
            f"{free / GIB:.2f} GiB are free on {device}; an engine without a drafter, or one that drafts with several "
            "beams or a draft_min_p, has no table"
        )
