"""Adapters (LoRA and its relatives) of every framework, merged into a checkpoint while its rows are read.

``reading`` finds which framework wrote an adapter; a module or package here reads each kind into ``adapter.Adapter``,
which names the checkpoint's canonical tensors; ``merging`` applies it.
"""
