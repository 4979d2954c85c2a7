"""Parsers of untrusted files, with limits on everything they read, and layouts for writing.

Nothing here knows what a model is.
"""
