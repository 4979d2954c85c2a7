"""Bytes: guarded containers in, crash-safe files out.

Nothing here knows a model or a tensor library. Readers parse headers of files that strangers made, within limits, and refuse
what lies; writers stage, fsync and rename, so that a name either holds a whole file or what it held before.
"""
