"""Artifacts: directories of files with a manifest, written whole or not at all."""

from fourfold.artifacts.artifact import Staging, read_manifest, read_provenance, write_artifact

__all__ = ["Staging", "read_manifest", "read_provenance", "write_artifact"]
