"""An artifact: a directory of files with a `manifest.json` that says what they are and what they were made of.

Artifacts are written beside their place and moved there whole, manifest included, so that a killed stage leaves
nothing that looks finished. An artifact is named by the path of its manifest, in rules and on the command line.

Who made it, with which versions and where, is in `provenance.json` beside it: the same files made again have the same
manifest, so that what depends on them is not made again because of an unrelated commit.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourfold import __version__
from fourfold.artifacts.files import dump_json, sha256_file, sync_directory, sync_tree
from fourfold.artifacts.provenance import git_commit, library_versions
from fourfold.artifacts.tensors import bytes_by_dtype
from fourfold.errors import FourfoldError, refusal

MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"


@dataclass
class Staging:
    """A directory to fill, and facts to add to its manifest (plain JSON values)."""

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)


@contextmanager
def write_artifact(
    manifest: Path,
    *,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path] | None = None,
    libraries: list[str] | None = None,
    device: str | None = None,
) -> Iterator[Staging]:
    """Fills a new directory and moves it to the manifest's place when the block ends without an error.

    An error in the block leaves nothing new behind, and what was there before stays. What is in place is on disk: a
    power cut afterwards does not cut it.

    Args:
        manifest: path of the artifact's `manifest.json`; its directory is the artifact.
        stage: name of the stage, as its rule is named.
        settings: the configuration that the stage read.
        inputs: manifests (or files) that the stage read; their hashes are recorded.
        libraries: distributions whose versions shape the artifact; for the provenance.
        device: name of the device that computed it; for the provenance.
    Raises FourfoldError for what the machine refuses, and when another process is writing the same artifact.
    """
    target = check_place(manifest).parent
    path = target.with_name(f".{target.name}.partial")
    with _claim(path, target):
        staging = Staging(path)
        yield staging
        content = {
            "stage": stage,
            "settings": dict(settings),
            "inputs": {name: sha256_file(source) for name, source in sorted((inputs or {}).items())},
            **_describe_files(path),
            **staging.facts,
        }
        provenance = {
            "libraries": library_versions(libraries or []),
            "fourfold": {"version": __version__, "commit": git_commit()},
            "device": device,
        }
        for name, facts in ((MANIFEST, content), (PROVENANCE, provenance)):
            (path / name).write_text(dump_json(facts), encoding="utf-8")
        sync_tree(path)
        replace_directory(path, target)


def check_place(manifest: Path) -> Path:
    """The manifest, if its artifact can be written there: asked before long work, not after it.

    Raises FourfoldError when a file is in the way or the place cannot be written to.
    """
    if manifest.name != MANIFEST:
        raise FourfoldError(f"{manifest}: an artifact is named by the path of its {MANIFEST}")
    target = manifest.absolute().parent
    if target.exists() and not target.is_dir():
        raise FourfoldError(f"{target}: a file is where the artifact's folder belongs; move it away")
    check_folder(target.parent)
    return manifest


def check_folder(folder: Path) -> Path:
    """The folder, if it can be written to, or made where it is not there. Raises FourfoldError."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise FourfoldError(f"{there}: a file is where a folder belongs; move it away or choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise FourfoldError(f"{there}: this folder cannot be written to; make it writable or choose another place")
    return folder


def _describe_files(folder: Path) -> dict[str, Any]:
    own = (folder / MANIFEST, folder / PROVENANCE)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path not in own)
    for file in files:
        _open_to_readers(file)
    return {
        "files": {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in files
        },
        "tensor_bytes": bytes_by_dtype([path for path in files if path.suffix == ".safetensors"]),
    }


@contextmanager
def _claim(path: Path, target: Path) -> Iterator[None]:
    """An empty directory that is this process's alone, to become `target`; after an error it is gone.

    The lock is the kernel's and ends with the process. Without it, a job that outlived a killed Snakemake and the job
    of the next run would mix their files.
    """
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not _lock(descriptor) or not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise FourfoldError(f"{path}: another process is writing it; wait for that one, or end it, and run again")
        try:
            for left in path.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            yield
        except BaseException as error:
            shutil.rmtree(path, ignore_errors=True)
            if isinstance(error, Exception) and (reason := refusal(error)) is not None:
                raise FourfoldError(f"{target}: {reason}") from None
            raise
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Locks an open directory; False if another process has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # some network file systems cannot lock a directory; Snakemake's own lock has to do there
    return True


def _open_to_readers(file: Path) -> None:
    # safetensors writes files that their owner alone may read; results are for whoever may read their folder. A file
    # with other names is a hard link to one of the user's own, and is left as it is.
    facts = file.stat()
    if facts.st_nlink == 1:
        file.chmod(facts.st_mode | (file.parent.stat().st_mode & 0o044))


def replace_directory(source: Path, target: Path) -> None:
    """Moves a directory into place; what was there goes. Never leaves a mix of the two.

    A kill between the two renames leaves nothing in the place, and the old one as `.NAME.old` beside it: the artifact
    is missing, hence made again, and then the old one goes.
    """
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    source.rename(target)
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def read_manifest(manifest: Path, *stages: str) -> dict[str, Any]:
    """Reads a manifest and checks that the artifact's files are there with the sizes it states.

    Args:
        manifest: path of the manifest.
        stages: the stages that may have made it; none allows any.
    Raises FourfoldError naming the file that is missing or cut, and for an artifact of another stage.
    """
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        sizes = {name: facts["bytes"] for name, facts in content["files"].items()}
    except (OSError, ValueError) as error:
        raise FourfoldError(f"{manifest}: cannot be read ({error}); delete its folder and run again") from None
    except (AttributeError, KeyError, TypeError):
        raise FourfoldError(f"{manifest}: is no manifest; delete its folder and run again") from None
    if stages and content.get("stage") not in stages:
        expected = " or ".join(stages)
        raise FourfoldError(f"{manifest}: made by {content.get('stage')}; give the manifest that {expected} wrote")
    for name, expected in sizes.items():
        path = manifest.parent / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected:
            found = "is missing" if size is None else f"has {size} bytes"
            raise FourfoldError(f"{path}: {found}, {expected} expected; delete {manifest.parent} and run again")
    return content


def read_provenance(manifest: Path) -> dict[str, Any]:
    """What made an artifact: `libraries` (versions by name), `fourfold` (version, commit), `device`.

    Raises FourfoldError when its file is missing or broken.
    """
    path = manifest.with_name(PROVENANCE)
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FourfoldError(f"{path}: cannot be read ({error}); delete its folder and run again") from None
    return content
