"""Artifacts: directories of files with a manifest, written whole or not at all."""

from fourfold.artifacts.artifact import (
    Staging,
    check_folder,
    check_place,
    read_manifest,
    read_provenance,
    write_artifact,
)

__all__ = ["Staging", "check_folder", "check_place", "read_manifest", "read_provenance", "write_artifact"]
