"""GGUF, llama.cpp's format: reads, quantizes and splits any Gemma 2 file, and writes files as llama.cpp's own tools do.

A conversion (``dtype``) writes the file that convert_hf_to_gguf.py writes; a quantization (``type``) writes in one step
what llama-quantize makes of that file. From a GGUF source, both write what llama-quantize writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gemma2tool.containers import gguf
from gemma2tool.containers.gguf import GGUFHeader, GGUFValue
from gemma2tool.errors import InputRefused, ToolError, UsageError
from gemma2tool.formats import other_files
from gemma2tool.formats.base import Format, Output, opening
from gemma2tool.formats.gguf import FACTS
from gemma2tool.formats.gguf.config import ARCHITECTURE, read_config, unrepresentable, unusual_keys
from gemma2tool.formats.gguf.convert import (
    FILE_TYPES,
    DiskTensor,
    common_type,
    converter_keys,
    converter_types,
    disk_tensors,
    out_type,
    plan_tensor,
)
from gemma2tool.formats.gguf.imatrix import OUTPUT
from gemma2tool.formats.gguf.key_values import KeyReader, KeyValue
from gemma2tool.formats.gguf.output import GGUFTensorPlan, place, quantized_keys, quantized_order
from gemma2tool.formats.gguf.quantize import QuantizationRequest, plan_quantized
from gemma2tool.formats.gguf.read_tokenizer import tokenizer_assets
from gemma2tool.formats.gguf.shards import only_model, read_headers
from gemma2tool.formats.gguf.table import TABLE
from gemma2tool.formats.gguf.tensors import FLOATS, GGUFTensor
from gemma2tool.formats.mapping.float_layout import drop_equal_head
from gemma2tool.formats.mapping.transforms import convention_losses, entries, expected_after_roundtrip, to_canonical
from gemma2tool.formats.options import WriteOptions
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.format_facts import CALIBRATION_KEYS, NORMS_KEY, Rounding
from gemma2tool.model.lazy import DTYPE_NAMES, LazyTensor, MappedRows
from gemma2tool.model.names import HEAD
from gemma2tool.model.norm_checksums import parse_checksums
from gemma2tool.quantizers.casts import cast
from gemma2tool.quantizers.mixtures import COPY
from gemma2tool.quantizers.mixtures import FILE_TYPES as MIXTURES
from gemma2tool.storage.paths import path_within_folder
from gemma2tool.storage.quoting import quoted
from gemma2tool.storage.reading import open_for_reading, starts_with

CONFIG_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.ckpt", "*.h5", "*.pth")


@dataclass(frozen=True)
class Source:
    """A GGUF as it is on disk, for writing another: key-values, and tensors by GGUF name in file order."""

    kv: Mapping[str, GGUFValue]
    tensors: Mapping[str, GGUFTensor]


@dataclass(frozen=True)
class _Plan:
    """What a file will hold."""

    tensors: list[GGUFTensorPlan]
    kv: list[KeyValue]


class GGUF(Format):
    """One .gguf file, or any shard of a split one."""

    facts = FACTS
    types = tuple(sorted(MIXTURES))

    def detect(self, path: Path) -> bool:
        try:
            if path.is_dir():
                # Repositories put a GGUF beside the weights that it was made from: those are the model then.
                others = any(next(path.glob(pattern), None) for pattern in OTHER_WEIGHTS)
                return not others and only_model(path) is not None
            return starts_with(path, gguf.MAGIC)
        except (OSError, ToolError):
            return False

    def open(self, path: Path, *, config: Gemma2Config | None = None) -> Checkpoint:
        """Any shard of a split file opens all of them. Unless a config is given, it is the one that llama.cpp makes of
        the file.
        """
        file = path if not path.is_dir() else only_model(path)
        if file is None:
            raise other_files.other_file(path) or InputRefused("gguf.several", f"{path}: the folder holds no GGUF")
        headers = read_headers(file if file == path else path_within_folder(file))
        kv = {key: value for key, value in headers[0].kv.items() if not key.startswith("split.")}
        keys = KeyReader(kv, file.name)
        architecture = keys.text("general.architecture", None)
        if architecture != ARCHITECTURE or keys.text("general.type", None) == "adapter":
            raise _not_a_model(keys, architecture)
        with opening() as closers:
            tensors = _open_tensors(headers, closers)
            head = tensors.pop(OUTPUT, None)
            if config is None:
                config = read_config(keys, _embedding_rows(tensors, keys), _config_dtype(tensors))
            canonical = to_canonical(TABLE, tensors, config)
            if head is not None:
                canonical, config = _with_head(canonical, head, config)
            checkpoint = Checkpoint(
                path,
                self.facts,
                config,
                canonical,
                tokenizer_assets(keys),
                metadata={self.name: Source(kv, tensors)},
                rounding=_rounding(kv),
                tuned_norms=parse_checksums(keys.text(NORMS_KEY, None), config),
                files=tuple(header.path for header in headers),
                closers=closers,
            )
            if head is not None:
                checkpoint.warnings.append(f"{OUTPUT}: llama.cpp does not load a Gemma 2 with it; Ollama does")
            checkpoint.check()
        return checkpoint

    def lacks_config(self, path: Path) -> bool:
        return False

    def expected_after_roundtrip(self, source: Checkpoint, candidate: Checkpoint) -> dict[str, LazyTensor]:
        """Norms whose low bits w + 1 in float32 cannot hold; none of a checkpoint that was a GGUF itself."""
        return {} if self.name in source.metadata else expected_after_roundtrip(TABLE, source.tensors, source.config)

    def layout(self, checkpoint: Checkpoint, options: WriteOptions) -> Output:
        """See the module's docstring.

        Raises ``InputRefused`` (``gguf.cannot-say``) where llama.cpp would run the file as another model than the
        source, unless ``options.allow_mismatch``.
        """
        request = QuantizationRequest.of(options)
        warnings: list[str] = []
        source = checkpoint.metadata.get(self.name)
        if isinstance(source, Source):
            if HEAD in checkpoint.tensors:
                warnings += _representable(checkpoint, options.allow_mismatch)
            plan = self._from_gguf(checkpoint, source, options, request, warnings)
            losses = []
        else:
            warnings += _representable(checkpoint, options.allow_mismatch)
            plan = self._from_canonical(checkpoint, options, request, warnings)
            losses = convention_losses(TABLE, checkpoint.tensors, checkpoint.config)
        files, tensors = place(plan.tensors, plan.kv, options.name, request.split)
        return Output(self.name, not request.split.is_limited, files, tensors, losses=losses, warnings=warnings)

    def _from_canonical(
        self, checkpoint: Checkpoint, options: WriteOptions, request: QuantizationRequest, warnings: list[str]
    ) -> _Plan:
        tensors = disk_tensors(checkpoint)
        if options.type is None:
            outtype = out_type(checkpoint, options.dtype)
            _refuse_without_type(request)
            types = converter_types(tensors, outtype, warnings)
            plans = [plan_tensor(tensor, types[tensor.name]) for tensor in tensors]
            keys = dict(converter_keys(checkpoint, FILE_TYPES[outtype], warnings)) | dict(request.keys)
            return _Plan(plans, list(keys.items()))
        middle = _intermediate_type(checkpoint, options.dtype, options.type)
        tensors = [DiskTensor(tensor.name, tensor.canonical, _narrowed(tensor.tensor, middle)) for tensor in tensors]
        plans, number = plan_quantized(tensors, options.type, checkpoint.config, request, warnings)
        kv = converter_keys(checkpoint, FILE_TYPES[middle], warnings)
        number = FILE_TYPES[middle] if number is None else number
        return _Plan(quantized_order(plans), quantized_keys(kv, number, [*request.keys, *request.origin_keys()]))

    def _from_gguf(
        self,
        checkpoint: Checkpoint,
        source: Source,
        options: WriteOptions,
        request: QuantizationRequest,
        warnings: list[str],
    ) -> _Plan:
        canonical = {entry.disk: entry.canonical for entry in entries(TABLE, checkpoint.config)}
        tensors = [DiskTensor(name, canonical[name], tensor) for name, tensor in source.tensors.items()]
        type = options.type
        if type is None:
            type = COPY if options.dtype is None else out_type(checkpoint, options.dtype)
        elif options.dtype is not None:
            raise UsageError("gguf.dtype-and-type", "--dtype and --type are one choice for a GGUF source")
        plans, number = plan_quantized(tensors, type, checkpoint.config, request, warnings)
        if number is None:
            number = _file_type(source, checkpoint.path.name)
        keys = quantized_keys(list(source.kv.items()), number, [*request.keys, *request.origin_keys()])
        return _Plan(quantized_order(plans), keys)


def _not_a_model(keys: KeyReader, architecture: str | None) -> InputRefused:
    """The error for a GGUF of something else than a Gemma 2."""
    kind = keys.text("general.type", None)
    if kind == "imatrix":
        hint = "give the model as SRC, and --imatrix with this file"
        return InputRefused("gguf.architecture", f"{keys.where}: is an importance matrix", hint=hint)
    if kind in ("adapter", "mmproj"):
        what = "a LoRA adapter" if kind == "adapter" else "the projector of a vision model"
        hint = "give the model as SRC, and --lora with this file" if kind == "adapter" else "give the model's GGUF"
        return InputRefused("gguf.architecture", f"{keys.where}: is {what}, not a model", hint=hint)
    return InputRefused(
        "gguf.architecture", f"{keys.where}: general.architecture is {architecture!r}, not {ARCHITECTURE!r}"
    )


def _file_type(source: Source, where: str) -> int:
    """The source's ``general.file_type``. Raises ``InputRefused`` for a number that llama.cpp cannot read."""
    number = KeyReader(source.kv, where).integer("general.file_type", 0)
    if not 0 <= number < 1 << 32:
        message = f"{where}: general.file_type is {number}, which llama.cpp cannot read"
        raise InputRefused("gguf.key", message, hint="set it to the file's type with gguf-set-metadata")
    return number


def _rounding(keys: Iterable[str]) -> Rounding:
    """How the file says that its codes were chosen."""
    if any(key.startswith(CALIBRATION_KEYS) for key in keys):
        return "calibration"
    return "imatrix" if any(key.startswith("quantize.imatrix.") for key in keys) else "nearest"


def _open_tensors(headers: list[GGUFHeader], closers: list[Callable[[], None]]) -> dict[str, GGUFTensor]:
    tensors: dict[str, GGUFTensor] = {}
    for header in headers:
        reader = open_for_reading(header.path)
        closers.append(reader.close)
        for name, entry in header.tensors.items():
            _refuse_scales(header, name)
            if name in tensors:
                raise InputRefused("gguf.duplicate-tensor", f"{header.path.name}: {name} is in another shard too")
            tensors[name] = GGUFTensor(reader, entry)
    return tensors


def _refuse_scales(header: GGUFHeader, name: str) -> None:
    """Raises ``InputRefused`` for the scale of a whole NVFP4 tensor, as convert_hf_to_gguf.py writes it.

    llama.cpp's graph of Gemma 2 multiplies attention by it and leaves it out of the feed-forward layers, which gives
    NaN or wrong logits.
    """
    for ending in (".scale", ".input_scale"):
        if name.endswith(ending) and f"{name.removesuffix(ending)}.weight" in header.tensors:
            message = (
                f"{header.path.name}: {quoted(name)} is the scale of a whole tensor, which llama.cpp leaves out of"
                " Gemma 2's feed-forward layers: its logits are NaN or wrong"
            )
            raise InputRefused("gguf.tensor-scale", message)


def _embedding_rows(tensors: Mapping[str, GGUFTensor], keys: KeyReader) -> int:
    """Raises ``InputRefused`` for a vocabulary of another size, with which llama.cpp does not load the file."""
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputRefused("gguf.embedding", f"{keys.where}: no token_embd.weight")
    tokens = keys.texts("tokenizer.ggml.tokens", None)
    if tokens is not None and len(tokens) != embedding.rows:
        message = (
            f"{keys.where}: {len(tokens)} tokens and {embedding.rows} rows of token_embd: llama.cpp does not load it"
        )
        hint = "convert the model again: the vocabulary and the weights are of different models, or one was resized"
        raise InputRefused("gguf.tokenizer", message, hint=hint)
    return embedding.rows


def _with_head(
    canonical: Mapping[str, LazyTensor], head: LazyTensor, config: Gemma2Config
) -> tuple[dict[str, LazyTensor], Gemma2Config]:
    """The tensors and the config of a file with an output matrix of its own; one equal to the embedding is none."""
    tensors = {**canonical, HEAD: head}
    try:
        return drop_equal_head(tensors, config), config
    except InputRefused:
        return tensors, replace(config, tie_word_embeddings=False)


def _config_dtype(tensors: Mapping[str, GGUFTensor]) -> str:
    """Hugging Face's name of the type that most of the matrices' values are read in."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        if len(tensor.shape) == 2:
            name = DTYPE_NAMES[tensor.dtype]
            sizes[name] = sizes.get(name, 0) + tensor.size
    return CONFIG_DTYPES[max(sizes, key=sizes.__getitem__)] if sizes else "float32"


def _representable(checkpoint: Checkpoint, allow_mismatch: bool) -> list[str]:
    """Warnings on what the file says differently; ``InputRefused`` unless that is allowed."""
    reasons = unrepresentable(checkpoint.config, checkpoint.tensors)
    if reasons and not allow_mismatch:
        raise InputRefused(
            "gguf.cannot-say", f"{checkpoint.path.name}: GGUF cannot represent this: {'; '.join(reasons)}"
        )
    warnings = [f"GGUF cannot represent this, the file will compute something else: {reason}" for reason in reasons]
    return [*warnings, *unusual_keys(checkpoint.config)]


def _refuse_without_type(request: QuantizationRequest) -> None:
    """Options that only a quantization uses."""
    if request.imatrix is not None or request.overrides.patterns or request.overrides.pure:
        raise UsageError("gguf.no-type", "importance matrix and tensor types need a --type")
    if request.overrides.token_embedding or request.overrides.output:
        raise UsageError("gguf.no-type", "a type for one tensor needs a --type for the others")


def _intermediate_type(checkpoint: Checkpoint, dtype: str | None, type: str) -> str:
    """The float type of the file between converter and llama-quantize; without ``dtype`` one that loses nothing.

    A copy is not a quantization: it keeps the source's own type.
    """
    if dtype is None and type.lower() != COPY:
        return common_type(tensor.dtype for tensor in checkpoint.tensors.values() if len(tensor.shape) >= 2)
    middle = out_type(checkpoint, dtype)
    if middle.upper() not in FLOATS:
        raise UsageError("gguf.dtype-and-type", f"{type} cannot be made from {middle}", hint="leave out --dtype")
    return middle


def _narrowed(tensor: LazyTensor, middle: str) -> LazyTensor:
    dtype = FLOATS[middle.upper()]
    if len(tensor.shape) < 2 or tensor.dtype == dtype:
        return tensor
    return MappedRows(tensor, lambda rows: cast(rows, dtype), dtype)


FORMAT = GGUF()
