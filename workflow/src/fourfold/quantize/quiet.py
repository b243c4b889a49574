"""Keeps the libraries' notices out of the user's sight: they are about the libraries, not about the run."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from fourfold.progress import logger


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences warnings and bars of transformers and ModelOpt; what they print goes to the debug log.

    Errors are not touched.
    """
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    printed = io.StringIO()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    modelopt = logging.getLogger("modelopt")
    modelopt_level = modelopt.level
    modelopt.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
        modelopt.setLevel(modelopt_level)
        for line in printed.getvalue().splitlines():
            logger.log(logging.DEBUG, "library: %s", line)
