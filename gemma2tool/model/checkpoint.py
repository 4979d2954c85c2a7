"""An opened Gemma 2 checkpoint: its config, its lazily loaded tensors in canonical form, and the files that belong to
it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gemma2tool.errors import InputRefused
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.format_facts import FormatFacts, Rounding
from gemma2tool.model.lazy import FLOAT32, FLOAT64, FLOAT_DTYPES, DType, LazyTensor, equal_values
from gemma2tool.model.names import EMBEDDING, HEAD
from gemma2tool.model.tensors import TensorSpec, check_tensors, tensor_specs
from gemma2tool.model.tokenizer import Tokenizer
from gemma2tool.storage.watching import Watch

ASSET_NAMES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that belong to a model besides its weights and config, as Hugging Face repositories name them."""


@dataclass(frozen=True)
class LoaderFiles:
    """Files of a folder that a ``loader`` acts on: "transformers" "applies the adapter to the weights"."""

    names: tuple[str, ...]
    loader: str
    effect: str
    remedy: str

    @property
    def sentence(self) -> str:
        return f"{self.loader} {self.effect}"


TokenizerReader = Callable[[Mapping[str, bytes], Gemma2Config], Tokenizer]
"""Makes the canonical tokenizer from a checkpoint's assets and config."""


class Assets(Mapping[str, bytes]):
    """Tokenizer, generation config and chat template: names at once, contents read when asked for.

    ``read_tokenizer``: how the canonical tokenizer is read; None: there is none. ``derived``: the files were made from
    the canonical tokenizer and are not the checkpoint's own.
    """

    def __init__(
        self,
        readers: Mapping[str, Callable[[], bytes]] | None = None,
        read_tokenizer: TokenizerReader | None = None,
        *,
        derived: bool = False,
    ) -> None:
        self._readers = dict(readers or {})
        self.read_tokenizer = read_tokenizer
        self.derived = derived

    def __getitem__(self, name: str) -> bytes:
        return self._readers[name]()

    def reader(self, name: str) -> Callable[[], bytes]:
        """What reads the file of that name."""
        return self._readers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __contains__(self, name: object) -> bool:
        return name in self._readers


@dataclass
class Checkpoint:
    """An opened checkpoint, as a reader returns it.

    - ``tensors``: the tensors in canonical layout, (out, in), by canonical name.
    - ``facts``: what the format declares about itself.
    - ``assets``: the tokenizer and other files of the model.
    - ``warnings``: one-line warnings from the reader that the user must see.
    - ``metadata``: what the format records about the model besides the config (a GGUF's general.* keys, a model card).
    """

    path: Path
    facts: FormatFacts
    config: Gemma2Config
    tensors: dict[str, LazyTensor]
    assets: Assets = field(default_factory=Assets)
    warnings: list[str] = field(default_factory=list)
    metadata: dict[str, object] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    """The files that make up the checkpoint (weights and config), for hashes and to protect the input from being
    overwritten."""

    loader_files: tuple[LoaderFiles, ...] = ()
    """Files of its folder that were not read although a loader acts on them, see ``model.loaders``."""

    buffers: dict[str, LazyTensor] = field(default_factory=dict)
    """Tensors that the format stores although the config determines them (a rotary table), by the file's names."""

    rounding: Rounding = "nearest"
    """How the file says that its codes were chosen."""

    tuned_norms: dict[str, str] = field(default_factory=dict)
    """Checksums of the norms of a file that says that they were tuned, see ``norm_checksums``."""

    misread: dict[str, str] = field(default_factory=dict)
    """Tensors that the reader has right and the program that loads the files would not, each with a sentence."""

    watch: Watch | None = field(default=None, repr=False, compare=False)
    """The files that were read to open it; None where it was made in memory or is being written."""

    address: str | None = None
    """What people know a source by that is not a local file or folder; ``path`` is then a stand-in."""

    pinned: str | None = None
    """The address of exactly this content, for receipts: with the commit of a revision."""

    closers: list[Callable[[], None]] = field(default_factory=list)

    _equal_head: tuple[LazyTensor, LazyTensor, bool] | None = field(default=None, repr=False, compare=False)
    _tokenizer: tuple[Assets, Gemma2Config, Tokenizer] | None = field(default=None, repr=False, compare=False)

    @property
    def format(self) -> str:
        """The name of the format it came from: "hf", "gguf", ..."""
        return self.facts.name

    @property
    def known_as(self) -> Path | str:
        """Its path, or its address if it is not local."""
        return self.address or self.path

    @property
    def all_warnings(self) -> tuple[str, ...]:
        """What the user should know of the checkpoint: the reader's warnings, those of its config, files not read."""
        misread = (f"{name} {sentence}" for name, sentence in self.misread.items())
        unread = (
            f"{', '.join(files.names)}: not read, but {files.sentence}: {files.remedy}" for files in self.loader_files
        )
        return (*self.warnings, *misread, *self.config.warnings, *unread)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that the tensors are read from."""
        while self.closers:
            self.closers.pop()()

    def check_unchanged(self) -> None:
        """Raise ``InputRefused`` (``file.changed``) if one of the files has changed since it was opened."""
        if self.watch is not None:
            self.watch.check()

    def check(self) -> None:
        """Compare the tensors with the table (see ``check_tensors``), and refuse values that are not floats."""
        check_tensors(self.config, {name: tensor.shape for name, tensor in self.tensors.items()}, self.path.name)
        for name, tensor in self.tensors.items():
            if tensor.dtype not in (*FLOAT_DTYPES.values(), FLOAT64):
                raise InputRefused(
                    "checkpoint.dtype",
                    f"{self.path.name}: {name} holds {tensor.dtype} values, and nothing says how they make weights",
                )

    @property
    def tokenizer(self) -> Tokenizer:
        """The canonical tokenizer, read when it is first asked for; without a vocabulary where the checkpoint has none.

        Raises ``InputRefused`` for files that are damaged or not a Gemma's.
        """
        cached = self._tokenizer
        if cached is None or cached[0] is not self.assets or cached[1] != self.config:
            read = self.assets.read_tokenizer
            tokenizer = Tokenizer() if read is None else read(self.assets, self.config)
            cached = self._tokenizer = (self.assets, self.config, tokenizer)
        return cached[2]

    @property
    def has_equal_head(self) -> bool:
        """Whether there is an output matrix whose values are the embedding's. The first use reads both."""
        head, embedding = self.tensors.get(HEAD), self.tensors.get(EMBEDDING)
        if head is None or embedding is None:
            return False
        if self._equal_head is None or self._equal_head[0] is not head or self._equal_head[1] is not embedding:
            self._equal_head = head, embedding, equal_values(head, embedding)
        return self._equal_head[2]

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The specs of the tensors that this checkpoint has, in table order."""
        return {name: spec for name, spec in tensor_specs(self.config).items() if name in self.tensors}

    @property
    def parameters(self) -> int:
        """How many values its tensors have together."""
        return sum(tensor.size for tensor in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        """The size of its files together."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def dtype(self) -> DType:
        """The float type that most of the model's values are stored in; float32 where they are quantized."""
        sizes: Counter[DType] = Counter()
        for name, spec in self.specs.items():
            tensor = self.tensors[name]
            if spec.role != "norm":
                sizes[tensor.stored_dtype] += tensor.size
        return sizes.most_common(1)[0][0] if sizes else FLOAT32

    @property
    def is_quantized(self) -> bool:
        return any(tensor.stored not in ("f32", "f16", "bf16", "f64") for tensor in self.tensors.values())


@contextmanager
def unchanged(*checkpoints: Checkpoint) -> Iterator[None]:
    """Raises ``InputRefused`` (``file.changed``) if a file of a checkpoint changed by the end of the block, also in
    place of an error of the block: what was read of a changing file says nothing about it.
    """
    try:
        yield
    except InputRefused:
        for checkpoint in checkpoints:
            checkpoint.check_unchanged()
        raise
    for checkpoint in checkpoints:
        checkpoint.check_unchanged()
