"""The problems stage."""
