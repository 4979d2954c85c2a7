"""What a user may ask of an output, as typed options. Each option says once which formats and types take it.

The command line builds its options, help texts, hints and completion from these fields; the pipeline refuses what a
target would ignore; a receipt records what was given. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from gemma2tool.formats.option_info import (
    COMPRESSED,
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
from gemma2tool.formats.options_calibration import GPTQ_TYPES, Calibration
from gemma2tool.model.format_facts import Rounding

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

_GGUF = ("gguf",)


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """How a GGUF is split into several files: by bytes or by number of tensors per file."""

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
    """Options of llama.cpp's types: importance matrix, types of individual tensors, metadata.

    - ``pure``: store every tensor in the default type.
    - ``tensor_types``: pairs of a regular expression and a type; the first that matches a tensor's GGUF name applies.
    - ``include_weights``: use the importance matrix for these tensors only. ``exclude_weights``: do not use it for
      these.
    - ``override_kv``: metadata to set, as KEY=TYPE:VALUE.
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

    - ``double_quant``: quantize the scales too.
    - ``group_size``: columns that share a scale; -1: a whole row; None: the type's default.
    - ``symmetric``: True (the default): zero points in the middle; False: zero points chosen for each group.
    - ``gptq_format``: how zero points are stored, "gptq" (the default) or "gptq_v2".
    - ``skip``, ``only``: regular expressions searched in tensor names. Tensors that ``skip`` matches, or that ``only``
      does not match, are not quantized.
    - ``module_types``: pairs of a regular expression and a type, for MLX and compressed-tensors; the first that matches
      a tensor's name applies.
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
        types=GPTQ_TYPES,
    )
    gptq_format: str | None = option(
        None,
        "--gptq-format",
        "how zero points are stored: gptq (default) or gptq_v2.",
        metavar="FORMAT",
        formats=QUANTIZED_FOLDERS,
        types=GPTQ_TYPES,
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
class Adapter:
    """A LoRA adapter to merge, and the factor by which its strength is multiplied."""

    path: Path
    scale: float = 1.0

    @classmethod
    def of(cls, adapter: Adapter | Path | str) -> Adapter:
        """Return ``adapter`` unchanged, or the adapter at that path with a scale of 1."""
        return adapter if isinstance(adapter, Adapter) else cls(Path(adapter))


@dataclass(frozen=True)
class WriteOptions:
    """The options of one output.

    - ``dtype``: the stored float type ("f32", "f16", "bf16", "auto"); None: the source's.
    - ``type``: the quantization type, or None.
    - ``max_shard_size``: in bytes.
    - ``name``: the destination's name, which GGUF's general.name may need.
    - ``single_file``: whether the destination is a file rather than a folder.
    - ``allow_mismatch``: also write what the program that loads the target computes differently.
    - ``allow_requantize``: accept a source that is already quantized.
    - ``adapters``: the adapters that were merged into the source; only recorded.
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
        """Return the options that differ from their defaults, by their names in receipts."""
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
        """Raise ``UsageError`` for an option that an output of this format and type would ignore."""
        self.calibration.check()
        for group in self._groups:
            refuse_ignored(group, format_name, self.type)
            refuse_unknown(group)

    @property
    def _groups(self) -> tuple[SplitOptions, GGUFOptions, PackingOptions, Calibration]:
        return self.split, self.gguf, self.packing, self.calibration
