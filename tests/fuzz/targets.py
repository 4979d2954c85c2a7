"""All targets, by name."""

from __future__ import annotations

from tests.fuzz import containers as c
from tests.fuzz import servers as v
from tests.fuzz import settings as s
from tests.fuzz import texts as t
from tests.fuzz import trust as u
from tests.fuzz.base import Target

KINDS: tuple[type[Target], ...] = (
    c.Json, c.Safetensors, c.GGUF, c.Pickle, c.TorchZip, c.TorchModel, c.HDF5, c.OCDBT, c.Zarr, c.SbsDirectory,
    c.SbsConfig,
    s.HFConfig, s.HFIndex, s.KerasConfig, s.LoraConfig, s.Packing, s.Receipt, s.Journal,
    t.SentencePiece, t.SentencePieceLibrary, t.Tokenizer, t.ModelCard, t.GGUFModel, t.Imatrix,
    u.PickleScan, u.ArchiveScan, u.TemplateTree, u.YamlTags, u.Recipe, u.Bundle,
    v.HubAnswer, v.HTTPAnswer,
)  # fmt: skip


def all_targets() -> dict[str, Target]:
    return {kind.name: kind() for kind in KINDS}
