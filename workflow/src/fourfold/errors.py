"""The one error that is shown to a user as a single line, and what the machine refuses, put the same way."""

import errno
import os
import re


class FourfoldError(Exception):
    """Bad input or an impossible request: says what is wrong, where, and what to do about it."""

    exit_code = 1


_SPACE = "free some space there, or write the results to a larger disk"
_RIGHTS = "make it readable and writable for this user, or choose another place"
_PLACE = "move away what is there, or choose another place"
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.ENOTDIR: _PLACE,
    errno.EISDIR: _PLACE,
    errno.EEXIST: _PLACE,
    errno.ENAMETOOLONG: "choose a shorter name",
}
_ALLOCATORS = r"can't allocate memory|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED"
_MEMORY = "not enough memory; lower max_num_seqs, max_model_len or the batch sizes, or use a machine with more"


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory could not be had: Python's own, or that of PyTorch's allocators, which tell in their text."""
    if isinstance(error, MemoryError) or re.search(_ALLOCATORS, str(error)):
        return True
    # Ending a CUDA graph's capture, for one, fails anew while it handles the first error.
    return isinstance(error.__context__, Exception) and is_out_of_memory(error.__context__)


def refusal(error: Exception) -> str | None:
    """What the machine refused, and what to do about it, in one line; None for any other error.

    Knows Python's errors of disks, permissions and memory, those of PyTorch's allocators, and safetensors', which
    name the system's error number in their text alone.
    """
    if is_out_of_memory(error):
        return _MEMORY
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if match := re.search(r"\(os error (\d+)\)", text):
        number = int(match[1])
    if number in _REMEDIES:
        return f"{os.strerror(number)}; {_REMEDIES[number]}"
    # torch.save, for one, fails anew while it handles the error of the file that it writes.
    cause = error.__context__
    return refusal(cause) if isinstance(cause, OSError) and not isinstance(error, FourfoldError | OSError) else None
