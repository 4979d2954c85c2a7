"""Every error id once: its exit code, what it means and what to do. ``python -m gemma2tool.errors`` prints it."""

from __future__ import annotations

from gemma2tool.errors.entry import Entry
from gemma2tool.errors.table import (
    archives,
    budgets,
    checkpoints,
    containers,
    files,
    models,
    publishing,
    quantization,
    requests,
    servers,
    sharding,
    sources,
)

AREAS = {
    "Requests": requests.ENTRIES,
    "Files, folders and the machine": files.ENTRIES,
    "Hubs, object stores, web servers and archives": sources.ENTRIES,
    "safetensors, GGUF, JSON and YAML": containers.ENTRIES,
    "torch files, HDF5, OCDBT and gemma.cpp files": archives.ENTRIES,
    "Checkpoints and formats": checkpoints.ENTRIES,
    "Config, tokenizer, text and the forward pass": models.ENTRIES,
    "Quantization, calibration and importance matrices": quantization.ENTRIES,
    "Running servers": servers.ENTRIES,
    "Recipes, releases and publishing": publishing.ENTRIES,
    "Sensitivity tables, budgets and quality at a size": budgets.ENTRIES,
    "Several machines": sharding.ENTRIES,
}
"""The entries by area, in the order of the documentation."""

TABLE: dict[str, Entry] = {entry.id: entry for entries in AREAS.values() for entry in entries}
