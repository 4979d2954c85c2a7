"""Files as bytes: reading by offset, and crash-safe writing.

Nothing here knows a model or a tensor library. Writers stage, fsync and rename, so a name always holds either the
complete new file or what it held before.
"""
