"""Crash-safe output: written beside its destination, journaled, and renamed when complete."""
