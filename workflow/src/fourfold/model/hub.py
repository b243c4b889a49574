"""Fetches a model repository from the Hugging Face hub at a pinned commit."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from fourfold.config.model import HubModel
from fourfold.errors import FourfoldError
from fourfold.model.local import PATTERNS, take_file


def fetch_hub(settings: HubModel, directory: Path) -> str:
    """Downloads weights (safetensors only), configuration, tokenizer and chat template; returns the commit.

    The download goes through the hub's own cache, so that a killed one resumes. A token is read from HF_TOKEN in the
    environment alone. Raises FourfoldError when the repository cannot be had.
    """
    where = f"{settings.repo}@{(settings.revision or 'newest')[:12]}"
    try:
        snapshot = snapshot_download(
            settings.repo,
            revision=settings.revision,
            allow_patterns=list(PATTERNS),
            token=os.environ.get("HF_TOKEN") or False,
        )
    except GatedRepoError:
        raise FourfoldError(f"{where}: access is restricted; accept its terms on the hub and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise FourfoldError(f"{where}: the repository has no such commit; correct model.revision") from None
    except RepositoryNotFoundError:
        raise FourfoldError(
            f"{where}: no such repository, or it is private; correct model.repo or set HF_TOKEN"
        ) from None
    except Exception as error:  # the client lets its transport's errors through, and they share no base
        reason = " ".join(str(error).split())[:160]
        raise FourfoldError(
            f"{where}: the hub cannot be reached ({reason}); run again where there is network"
        ) from None
    files = [file for file in sorted(Path(snapshot).iterdir()) if file.is_file() and file.name != "manifest.json"]
    if not any(file.suffix == ".safetensors" for file in files):
        raise FourfoldError(f"{where}: the repository holds no safetensors weights; choose one that does")
    for file in files:
        take_file(file, directory / file.name)
    # The cache names a snapshot's folder after its commit.
    return Path(snapshot).name
