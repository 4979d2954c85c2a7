"""Work over a text by several machines: each does its shard and writes a part, and the parts are merged.

``shard`` says which machine this is, ``pairwise`` adds so that the sum does not depend on the number of shards,
``part`` is the file that a shard writes.
"""
