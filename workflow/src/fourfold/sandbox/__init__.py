"""Runs Python that a language model wrote: one isolated process a session, behind a small HTTP service."""
