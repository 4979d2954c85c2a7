"""Formats whose container is an Orbax checkpoint."""
