"""Checks of one checkpoint by itself: is it sane, and if not, why.

``run`` puts them together: one module an area, each a function that yields findings. ``catalog`` lists every finding
that there can be.
"""
