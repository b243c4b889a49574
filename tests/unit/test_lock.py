"""The lock: exact versions, all that was asked for, and nothing that only one kind of machine can install."""

import re
from pathlib import Path

ENVS = Path(__file__).parents[2] / "envs"
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)$")
NVIDIA = {"nvidia-modelopt", "nvidia-ml-py"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def lines(name: str) -> list[str]:
    """Requirements of a file, without comments."""
    found = (line.split("#")[0].strip() for line in (ENVS / name).read_text(encoding="utf-8").splitlines())
    return [line for line in found if line]


def pins(name: str) -> dict[str, str]:
    """Package → version. Every requirement is an exact pin: no local versions, hashes, addresses or options."""
    matches = {line: PIN.match(line) for line in lines(name)}
    assert [line for line, match in matches.items() if match is None] == []
    return {canonical(match[1]): match[2] for match in matches.values() if match}


def test_every_version_is_exact() -> None:
    assert len(pins("requirements.txt")) == len(lines("requirements.txt")) > 100


def test_the_lock_holds_what_was_asked_for() -> None:
    asked, locked = pins("requirements.in"), pins("requirements.txt")
    assert {name: locked.get(name) for name in asked} == asked


def test_the_lock_leaves_cuda_to_torch() -> None:
    """torch names the CUDA libraries that its file for a platform needs; a CPU-only machine needs none."""
    names = set(pins("requirements.txt"))
    assert {name for name in names if name.startswith("nvidia-")} == NVIDIA
    assert not {name for name in names if name.startswith("cuda") or name == "triton"}
