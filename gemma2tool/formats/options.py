"""What a user may ask of an output, as typed options. Each option says once which formats and types take it.

The command line builds its options, help texts, hints and completion from these fields; the pipeline refuses what a
target would ignore; a receipt records what was given. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from gemma2tool.errors import UsageError
from gemma2tool.formats.option_info import (
    COMPRESSED,
    FOLDERS_QUANTIZED,
    GGUF_QUANTIZED,
    QUANTIZED_FOLDERS,
    normalize,
    option,
    option_fields,
    parse_module_type,
    parse_size,
    parse_tensor_type,
    refuse_ignored,
    refuse_unknown,
)
from gemma2tool.model.format_facts import CALIBRATION_KEYS, Rounding

WHOLE_ROW = -1
"""The group size that stands for a whole row."""
_COLUMNS = (32, 64, 128)

GROUP_SIZES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        **dict.fromkeys(
            ("gptq-4", "gptq-8", "awq-4", "w4a16", "w4a16-asym", "w4afp8", "w8a16"), (*_COLUMNS, WHOLE_ROW)
        ),
        **dict.fromkeys(("torchao-int4", "torchao-int8-int4"), _COLUMNS),
        **dict.fromkeys((f"mlx-{bits}" for bits in (2, 3, 4, 5, 6, 8)), _COLUMNS),
        **dict.fromkeys((f"mlx-mixed-{bits}" for bits in ("2-6", "3-4", "3-6", "4-6")), _COLUMNS),
    }
)
"""Quantization type -> the group sizes (columns that share a scale) that its consumers have kernels for."""

CALIBRATED_TYPES = (*FOLDERS_QUANTIZED, *GGUF_QUANTIZED)
_TEXTBOOK_TYPES = ("gptq-4", "gptq-8", "w4a16", "w4a16-asym", "w4afp8", "awq-4")
_GPTQ_TYPES = ("gptq-4", "gptq-8")
_GGUF = ("gguf",)
HESSIANS = ("model", "layer")
"""What an error is weighed by; the first is the default."""


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """How a GGUF is cut into several files."""

    HEADING: ClassVar[str] = "GGUF"

    split_max_size: int | None = option(
        None,
        "--split-max-size",
        "split into files of at most this size.",
        metavar="SIZE",
        formats=_GGUF,
        parse=parse_size,
    )
    split_max_tensors: int | None = option(
        None, "--split-max-tensors", "split into files of at most this many tensors.", formats=_GGUF, minimum=1
    )

    @property
    def is_asked(self) -> bool:
        return bool(self.split_max_size or self.split_max_tensors)


@dataclass(frozen=True, kw_only=True)
class GGUFOptions:
    """Options of llama.cpp's types: importance matrix, types of single tensors, metadata.

    ``tensor_types``: pairs of a regular expression and a type; the first that matches a tensor's GGUF name counts.
    ``override_kv``: texts KEY=TYPE:VALUE.
    """

    HEADING: ClassVar[str] = "GGUF"

    imatrix: Path | None = option(
        None, "--imatrix", "importance matrix (GGUF or legacy .dat).", metavar="FILE", formats=_GGUF
    )
    pure: bool = option(False, "--pure", "every tensor in the default type.", formats=_GGUF)
    token_embedding_type: str | None = option(
        None, "--token-embedding-type", "type of the embedding.", metavar="TYPE", formats=_GGUF
    )
    output_tensor_type: str | None = option(
        None,
        "--output-tensor-type",
        "type of the output matrix (the embedding, if tied).",
        metavar="TYPE",
        formats=_GGUF,
    )
    tensor_types: tuple[tuple[str, str], ...] = option(
        (),
        "--tensor-type",
        "type of the tensors that match; the first match wins. Repeatable.",
        metavar="REGEX=TYPE",
        formats=_GGUF,
        parse=parse_tensor_type,
    )
    include_weights: tuple[str, ...] = option(
        (),
        "--include-weights",
        "use the importance matrix for these tensors only. Repeatable.",
        metavar="NAME",
        formats=_GGUF,
    )
    exclude_weights: tuple[str, ...] = option(
        (),
        "--exclude-weights",
        "don't use the importance matrix for these tensors. Repeatable.",
        metavar="NAME",
        formats=_GGUF,
    )
    override_kv: tuple[str, ...] = option(
        (), "--override-kv", "set a metadata key. Repeatable.", metavar="KEY=TYPE:VALUE", formats=_GGUF
    )

    def __post_init__(self) -> None:
        normalize(self)


@dataclass(frozen=True, kw_only=True)
class PackingOptions:
    """Options of quantized folders (Hugging Face and MLX).

    ``group_size``: columns that share a scale, -1 for a whole row, None for the type's own. ``symmetric``: zero points
    in the middle (the default) or chosen by group. ``skip``, ``only``: regular expressions searched in tensor names;
    what ``skip`` matches, and what ``only`` does not, is left as it is. ``module_types``: pairs of a regular expression
    and a type, for MLX and compressed-tensors; the first that matches a tensor's name counts.
    """

    HEADING: ClassVar[str] = "Quantized folders"

    double_quant: bool = option(
        False,
        "--double-quant",
        "quantize the scales too.",
        formats=QUANTIZED_FOLDERS,
        types=("nf4", "fp4"),
        id="quantize.double-quant",
    )
    group_size: int | None = option(
        None,
        "--group-size",
        "columns that share a scale: 32, 64 or 128; for all but MLX and torchao also -1, a whole row.",
        metavar="N",
        formats=QUANTIZED_FOLDERS,
        types=tuple(sorted(GROUP_SIZES)),
        choices=("32", "64", "128", "-1"),
        id="quantize.group-size",
    )
    symmetric: bool | None = option(
        None,
        "--sym/--asym",
        "zero points in the middle, or chosen for each group. Default: --sym.",
        formats=QUANTIZED_FOLDERS,
        types=_GPTQ_TYPES,
    )
    gptq_format: str | None = option(
        None,
        "--gptq-format",
        "how zero points are stored: gptq (default) or gptq_v2.",
        metavar="FORMAT",
        formats=QUANTIZED_FOLDERS,
        types=_GPTQ_TYPES,
        choices=("gptq", "gptq_v2"),
    )
    skip: tuple[str, ...] = option(
        (),
        "--skip",
        "don't quantize the tensors that match. Repeatable.",
        metavar="REGEX",
        formats=QUANTIZED_FOLDERS,
    )
    module_types: tuple[tuple[str, str], ...] = option(
        (),
        "--module-type",
        "type of the matrices that match; the first match wins. Repeatable.",
        metavar="REGEX=TYPE",
        formats=QUANTIZED_FOLDERS,
        types=(*(f"mlx-{bits}" for bits in (2, 3, 4, 5, 6, 8)), *COMPRESSED),
        parse=parse_module_type,
    )
    only: tuple[str, ...] = option(
        (), "--only", "quantize only the tensors that match. Repeatable.", metavar="REGEX", formats=QUANTIZED_FOLDERS
    )

    def __post_init__(self) -> None:
        normalize(self)


@dataclass(frozen=True)
class Calibration:
    """Codes and scales are chosen by what the model does with a text. An embedding that the type quantizes is
    calibrated too, as the output head that it also is.

    ``text``: a file of UTF-8 text, or of token ids (.npy); None: no calibration. ``samples``: sequences to run (128),
    ``length``: tokens of a sequence (512). ``act_order``: columns with large inputs are rounded first. ``damping``:
    share of its mean that is added to the Hessian's diagonal (0.01). ``method``: "refit" (the default), scales fitted
    to the codes, or "textbook", GPTQ or AWQ as published. ``hessian_block``: columns of different blocks count as
    independent; None for the whole. ``hessian``: "model" (the default) keeps the KL divergence of the model's
    predictions low, "layer" the error of each layer's outputs, which needs no gradients. ``tune_norms``: afterwards the
    norms are tuned for the same, on other sequences of the text; ``norm_checksums``: what the file says of them, see
    ``model.norm_checksums``.
    """

    HEADING: ClassVar[str] = "Calibration"

    text: Path | None = option(
        None,
        "--calibration",
        "choose codes by what the model does with this text (UTF-8), or with token ids (.npy).",
        key="calibration",
        metavar="FILE",
        types=CALIBRATED_TYPES,
        id="calibration.type",
    )
    samples: int | None = option(
        None,
        "--calibration-samples",
        "sequences to run. Default: 128.",
        key="calibration_samples",
        metavar="N",
        types=CALIBRATED_TYPES,
        minimum=1,
    )
    length: int | None = option(
        None,
        "--calibration-length",
        "tokens of a sequence. Default: 512.",
        key="calibration_length",
        metavar="T",
        types=CALIBRATED_TYPES,
        minimum=16,
    )
    act_order: bool = option(
        False,
        "--act-order",
        "round columns with large inputs first; some kernels run such files more slowly.",
        types=_GPTQ_TYPES,
    )
    damping: float | None = option(
        None,
        "--damping",
        "share of its mean added to the Hessian's diagonal. Default: 0.01.",
        types=CALIBRATED_TYPES,
        minimum=0.0,
        maximum=1.0,
    )
    method: str | None = option(
        None,
        "--calibration-method",
        "refit (default): scales fitted to the codes; textbook: as GPTQ, or for awq-4 AWQ, is published.",
        key="calibration_method",
        metavar="METHOD",
        types=_TEXTBOOK_TYPES,
        choices=("refit", "textbook"),
    )
    hessian_block: int | None = option(
        None,
        "--hessian-block",
        "treat columns of different blocks of N as independent: less memory and time, slightly worse.",
        metavar="N",
        types=CALIBRATED_TYPES,
        minimum=32,
    )
    hessian: str | None = option(
        None,
        "--hessian",
        "model (default): the codes keep the model's predictions; layer: each layer's outputs, in less time.",
        metavar="WHOSE",
        types=GGUF_QUANTIZED,
        choices=HESSIANS,
    )
    tune_norms: bool = option(
        False,
        "--tune-norms",
        "then tune the norms on other parts of the text; kept only where a held-out part agrees.",
        types=GGUF_QUANTIZED,
    )
    norm_checksums: str = ""

    def __post_init__(self) -> None:
        normalize(self)

    @property
    def is_asked(self) -> bool:
        return self.text is not None

    def for_type(self, type: str | None) -> Calibration:
        """With the Hessian that a type has by default, if it has a choice: so plans and receipts name it."""
        if not self.is_asked or self.hessian is not None or type not in GGUF_QUANTIZED:
            return self
        return replace(self, hessian=HESSIANS[0])

    @property
    def metadata(self) -> dict[str, str]:
        """What an output says of its calibration; nothing without one."""
        if self.text is None:
            return {}
        hessian = {} if self.hessian is None else {f"{CALIBRATION_KEYS}hessian": self.hessian}
        return {f"{CALIBRATION_KEYS}file": self.text.name, **hessian}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter to merge, and what its strength is multiplied by."""

    path: Path
    scale: float = 1.0

    @classmethod
    def of(cls, adapter: Adapter | Path | str) -> Adapter:
        """An adapter as it is, or the one at a path with its own strength."""
        return adapter if isinstance(adapter, Adapter) else cls(Path(adapter))


@dataclass(frozen=True)
class WriteOptions:
    """What a user asked of one output.

    ``dtype``: stored float type ("f32", "f16", "bf16", "auto") or None for the source's. ``type``: quantization type or
    None. ``max_shard_size``: bytes. ``name``: the destination's name (GGUF's general.name may need it).
    ``single_file``: whether the destination is a file rather than a folder. ``allow_mismatch``: write even what the
    target's consumer computes differently. ``allow_requantize``: take a source that is quantized already. ``adapters``:
    what was merged into the source; recorded only.
    """

    dtype: str | None = None
    type: str | None = None
    max_shard_size: int = 50_000_000_000
    name: str = "model"
    single_file: bool = True
    allow_mismatch: bool = False
    allow_requantize: bool = False
    split: SplitOptions = SplitOptions()
    gguf: GGUFOptions = GGUFOptions()
    packing: PackingOptions = PackingOptions()
    calibration: Calibration = Calibration()
    adapters: tuple[Adapter, ...] = ()

    @property
    def act_order(self) -> bool:
        """Whether calibration rounds columns with large inputs first, which the file must then say."""
        return self.calibration.act_order

    @property
    def rounding(self) -> Rounding:
        """How codes are chosen."""
        if self.calibration.is_asked:
            return "calibration"
        return "nearest" if self.gguf.imatrix is None else "imatrix"

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults, by their names in receipts."""
        chosen = {
            info.key or option_field.name: getattr(group, option_field.name)
            for group in self._groups
            for option_field, info in option_fields(group)
            if getattr(group, option_field.name) != option_field.default
        }
        plain: dict[str, Any] = {"dtype": self.dtype, "type": self.type, "lora": self.adapters}
        if self.max_shard_size != WriteOptions.max_shard_size:
            plain["max_shard_size"] = self.max_shard_size
        return chosen | {name: value for name, value in plain.items() if value}

    def check_target(self, format_name: str) -> None:
        """Raises ``UsageError`` for an option that an output of this format and type would ignore."""
        if not self.calibration.is_asked:
            for option_field, info in option_fields(Calibration):
                if getattr(self.calibration, option_field.name) != option_field.default:
                    raise UsageError(
                        "option.ignored",
                        f"{info.flag} has no effect without --calibration",
                        hint="pass a text with --calibration",
                    )
        for group in self._groups:
            refuse_ignored(group, format_name, self.type)
            refuse_unknown(group)

    @property
    def _groups(self) -> tuple[SplitOptions, GGUFOptions, PackingOptions, Calibration]:
        return self.split, self.gguf, self.packing, self.calibration
