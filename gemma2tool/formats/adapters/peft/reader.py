"""Reads a folder that peft saved into an ``Adapter``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gemma2tool.containers.torch_zip import reader as torch_zip
from gemma2tool.errors import InputRefused
from gemma2tool.formats.adapters.adapter import MERGE_ELSEWHERE, Adapter, Delta, TokenRows, refused
from gemma2tool.formats.adapters.names import canonical_module
from gemma2tool.formats.adapters.peft.config import CLASSIFIER_HEADS, CONFIG, AdapterConfig
from gemma2tool.formats.adapters.peft.names import PeftTensors
from gemma2tool.formats.mapping import container_tensors
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.lazy import LazyTensor
from gemma2tool.model.names import EMBEDDING, HEAD
from gemma2tool.storage.paths import confined_path
from gemma2tool.storage.quoting import quoted

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
NEW_ROWS = "new_embeddings.safetensors"


def read(folder: Path, checkpoint: Checkpoint) -> Adapter:
    """The adapter in ``folder``. Raises ``InputRefused`` (``lora.*``) for one that cannot be merged."""
    config = AdapterConfig.read(folder)
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise InputRefused(
            "lora.missing", f"{folder}: contains none of {', '.join(WEIGHTS)}", hint="download the adapter again"
        )
    if (folder / NEW_ROWS).is_file():
        raise refused("option", folder / NEW_ROWS, "holds rows of tokens that were added", hint=MERGE_ELSEWHERE)
    path = confined_path(folder, path.name)
    tensors = PeftTensors.named(_open(path, checkpoint.closers), path)
    return _adapter(config, tensors, checkpoint.tensors)


def _open(path: Path, closers: list[Callable[[], None]]) -> Mapping[str, LazyTensor]:
    if path.suffix == ".safetensors":
        return container_tensors.open_safetensors([path], closers)[0]
    return container_tensors.open_torch(torch_zip.read_index(path), path, closers)


def _adapter(config: AdapterConfig, tensors: PeftTensors, base: Mapping[str, LazyTensor]) -> Adapter:
    replacements, base_weights = dict(tensors.trained), dict(tensors.base)
    for name, tensor in tensors.plain.items():
        module = name.rpartition(".")[0]
        of_the_base = name in (EMBEDDING, HEAD) and not config.saves(module)
        (base_weights if of_the_base else replacements)[name] = tensor
    deltas = adapter_deltas(config, tensors)
    if config.ensure_weight_tying and EMBEDDING in deltas:
        deltas.pop(HEAD, None)  # the transpose of the embedding's
    warnings = check_targets(config, tensors, [*replacements, *base_weights], base)
    return Adapter(
        tensors.path,
        (tensors.path, config.path),
        deltas,
        replacements,
        base_weights,
        _token_rows(config, tensors),
        ties=config.ensure_weight_tying,
        warnings=warnings,
    )


def adapter_deltas(config: AdapterConfig, tensors: PeftTensors) -> dict[str, Delta]:
    """The differences that an adapter makes to weights, by their names, checked."""
    modules = list(tensors.parts)
    names = [tensors.trained_names[module] for module in modules]
    ranks, scalings = config.ranks(names), config.scalings(names)
    return {
        f"{module}.weight": _delta(module, tensors, config, rank, scaling)
        for module, rank, scaling in zip(modules, ranks, scalings, strict=True)
    }


def _delta(module: str, tensors: PeftTensors, config: AdapterConfig, rank: float, scaling: float) -> Delta:
    parts, path = tensors.parts[module], tensors.path
    is_embedding = "embedding_A" in parts or "embedding_B" in parts
    a, b = (parts.get(f"{'embedding_' if is_embedding else ''}{side}") for side in "AB")
    if a is not None and b is not None and 0 in (*a.shape, *b.shape):
        raise refused(
            "part",
            path,
            f"{module}: lora_A has shape {a.shape}, lora_B {b.shape}: parameters that DeepSpeed ZeRO-3 or FSDP had "
            "not gathered",
            hint="save the adapter again with its parameters gathered, or convert the training checkpoint with "
            "zero_to_fp32.py",
        )
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
        raise refused("part", path, f"{module}: lora_A or lora_B is missing or is not a matrix")
    if not a.shape[0] == b.shape[1] == rank > 0:
        raise refused(
            "rank",
            path,
            f"{module}: the rank is {rank} in {CONFIG}, {a.shape[0]} and {b.shape[1]} in its matrices",
        )
    magnitude = parts.get("magnitude_vector")
    if config.use_dora != (magnitude is not None):
        has = "no magnitude" if magnitude is None else "a magnitude"
        raise refused("dora", path, f"{module}: use_dora is {config.use_dora}, but there is {has}")
    if magnitude is not None and is_embedding:
        raise refused("dora", path, f"{module}: uses use_dora for an embedding", hint=MERGE_ELSEWHERE)
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        raise refused("dora", path, f"{module}: the magnitude has shape {magnitude.shape}, lora_B {b.shape}")
    delta = Delta.of(b, a, scaling, transposed=is_embedding)
    start = None if is_embedding else config.start
    return replace(delta, magnitude=magnitude, start=start, start_scaling=scaling)


def _token_rows(config: AdapterConfig, tensors: PeftTensors) -> dict[str, TokenRows]:
    indices = {canonical_module(name): rows for name, rows in config.token_indices.items()}
    rows = {}
    for module, values in tensors.rows.items():
        trained = next((value for name, value in indices.items() if f".{module}".endswith(f".{name}")), None)
        trained = trained if trained is not None or len(indices) != 1 else next(iter(indices.values()))
        if trained is None:
            raise refused("target", tensors.path, f"{quoted(module)}: {CONFIG} does not say which rows were trained")
        rows[f"{module}.weight"] = TokenRows(trained, values)
    return rows


def check_targets(
    config: AdapterConfig, tensors: PeftTensors, whole: Sequence[str], base: Mapping[str, LazyTensor]
) -> tuple[str, ...]:
    """Compare what the config targets with the weights that are there; returns warnings.

    Raises ``InputRefused`` for weights of modules that the config does not target, which peft would not load, and for
    trained modules without weights.
    """
    names = {module: {tensors.trained_names[module], module, module.removeprefix("model.")} for module in tensors.parts}
    targeted = config.targeted({name for variants in names.values() for name in variants})
    for module, variants in names.items():
        if not variants & targeted and not (module == "lm_head" and config.ensure_weight_tying):
            raise refused(
                "target",
                tensors.path,
                f"contains weights for {quoted(module)}, which {CONFIG} does not target",
                hint=f"correct target_modules in {CONFIG}: peft would not load them",
            )
    modules = {name.rpartition(".")[0] for name in whole}
    matrices = [name.removesuffix(".weight") for name, tensor in base.items() if len(tensor.shape) == 2]
    for name in config.content.get("modules_to_save") or ():
        aliases = CLASSIFIER_HEADS if name in CLASSIFIER_HEADS else (name,)
        in_model = any(_is_called(module.removesuffix(".weight"), name) for module in base)
        if in_model and not any(_is_called(module, alias) for module in modules for alias in aliases):
            raise refused(
                "target", tensors.path, f"modules_to_save names {quoted(name)}, for which there are no weights"
            )
    without = [
        module
        for module in matrices
        if module not in tensors.parts
        and module not in modules
        and config.content.get("target_modules") is not None
        and config.targeted({module, module.removeprefix("model.")})
    ]
    without = [] if config.content.get("peft_type") == "TRAINABLE_TOKENS" else without
    if not without:
        return ()
    more = f" and {len(without) - 1} more" if len(without) > 1 else ""
    return (f"the adapter targets {without[0]}{more}, for which it has no weights: they stay the base's",)


def _is_called(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")
