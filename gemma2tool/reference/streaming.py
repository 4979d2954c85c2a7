"""The reference forward pass over a checkpoint that need not fit in memory.

The layers are those of ``layers``; only their projections differ: each multiplies by a block of rows of its weight at a
time, while a thread reads (and, in quantized formats, dequantizes) the blocks that follow. Peak memory is the
activations, the requested logits, and a few hundred MiB, whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.devices import current_device
from gemma2tool.model.lazy import Array, LazyTensor
from gemma2tool.model.names import EMBEDDING
from gemma2tool.model.tensors import tensor_specs
from gemma2tool.reference.amplify import Amplifier
from gemma2tool.reference.cache import KeyValueCache, choose_cache
from gemma2tool.reference.inputs import check_ids, check_mask, check_positions
from gemma2tool.reference.layers import DecoderLayer, RMSNorm, soft_cap
from gemma2tool.reference.model import scale_embeddings
from gemma2tool.reference.outputs import CausalLMOutput
from gemma2tool.reference.readahead import ReadAhead, one_thread_each
from gemma2tool.reference.rotary import cos_sin
from gemma2tool.reference.tensors import load_tensor, to_torch

FEW_TOKENS = 256
"""Up to this many tokens, operations other than projections run on one thread: more would wait longer than they
compute."""

OnInput = Callable[[str, Tensor], None]
"""Called with a weight's canonical name and its inputs (B, T, in), before each product; for calibration."""


class ForwardOptions(TypedDict, total=False):
    """The keyword arguments of ``StreamedForward``."""

    dtype: torch.dtype
    sliding_window: int | Sequence[int] | None
    amplifier: Amplifier | None
    attention_mask: Array | Tensor | None
    position_ids: Tensor | None
    past_key_values: KeyValueCache | None
    device: str | torch.device | None
    on_input: OnInput | None


class StreamedForward:
    """One forward pass of a checkpoint over ``input_ids``, int (B, T).

    ``dtype``: of activations and products. ``sliding_window``: replaces the config's, to test the window with a short
    prompt; one number, or one for each prompt. ``amplifier``: amplifies the attention scores of some prompts.
    ``attention_mask`` (B, tokens in the cache + T): 0 for padding. ``position_ids`` and ``past_key_values``: as for
    ``Gemma2Model``; the pass adds to the cache. ``device``: None for the current one (see ``devices``). ``on_input``:
    see ``OnInput``. Raises ``UsageError`` for ids outside
    the vocabulary, a mask of another shape, or a prompt beyond max_position_embeddings.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        input_ids: Array | Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        sliding_window: int | Sequence[int] | None = None,
        amplifier: Amplifier | None = None,
        attention_mask: Array | Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        device: str | torch.device | None = None,
        on_input: OnInput | None = None,
    ) -> None:
        config, device = checkpoint.config, current_device() if device is None else torch.device(device)
        if isinstance(sliding_window, int):
            config = dataclasses.replace(config, sliding_window=sliding_window)
        self.config: Gemma2Config = config
        self.windows: Tensor | None = None
        if sliding_window is not None and not isinstance(sliding_window, int):
            self.windows = torch.tensor(sliding_window, device=device).view(-1, 1, 1, 1)
        self.amplifier = amplifier
        self.tensors, self.dtype, self.device, self.on_input = checkpoint.tensors, dtype, device, on_input
        self.input_ids = check_ids(torch.as_tensor(input_ids), config)
        batch, length = self.input_ids.shape
        mask = None if attention_mask is None else torch.as_tensor(attention_mask)
        self.cache = past_key_values
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        self.attention_mask = check_mask(mask, batch, past + length, self.device)
        self.positions = check_positions(position_ids, None, past, batch, length, config, self.device)
        self._scratch = threading.local()
        self._last: Tensor | None = None

    @torch.no_grad()
    def hidden_states(self) -> Iterator[Tensor]:
        """Yield the residual stream (B, T, D) L + 1 times: the scaled embeddings, then after each layer, before the
        final norm."""
        config = self.config
        x = self.embeddings()
        yield x
        cos, sin = cos_sin(config, self.positions, self.dtype)
        one_thread = x.shape[0] * x.shape[1] <= FEW_TOKENS
        with ReadAhead(self._matrices(), torch.get_num_threads()) as weights:
            for index in range(config.num_hidden_layers):
                layer = self._layer(index, weights)
                with one_thread_each() if one_thread else contextlib.nullcontext():
                    x, _ = layer(x, cos, sin, self.attention_mask, self.cache)
                yield x
        self._last = self.final_norm(x)

    @torch.no_grad()
    def embeddings(self) -> Tensor:
        """The scaled embeddings (B, T, D)."""
        return scale_embeddings(self._embed(), self.config)

    @torch.no_grad()
    def run_layer(self, index: int, x: Tensor) -> Tensor:
        """The output of layer ``index`` for the residual stream ``x`` (B, T, D); reads only that layer."""
        matrices = self._matrices(index)
        cos, sin = cos_sin(self.config, self.positions, self.dtype)
        with ReadAhead(matrices, torch.get_num_threads()) as weights:
            output: Tensor = self._layer(index, weights)(x, cos, sin, self.attention_mask)[0]
            return output

    @torch.no_grad()
    def final_norm(self, x: Tensor) -> Tensor:
        """The residual stream ``x`` (B, T, D) after the last layer, normalized."""
        normalized: Tensor = self._norm("model.norm.weight")(x)
        return normalized

    @torch.no_grad()
    def head_logits(self, x: Tensor, last: int = 1) -> Tensor:
        """Logits (B, ``last``, V) of the residual stream ``x`` (B, T, D) after the last layer, at its last
        positions."""
        self._last = self.final_norm(x[:, -last:])
        return torch.cat([logits for _, _, logits in self.vocabulary_slices()], dim=-1)

    def last_hidden_state(self) -> Tensor:
        """(B, T, D) after the final norm; runs the layers unless ``hidden_states`` has run them."""
        if self._last is None:
            for _ in self.hidden_states():
                pass
        if self._last is None:
            raise RuntimeError("hidden_states ended without a last state")
        return self._last

    @torch.no_grad()
    def vocabulary_slices(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """Logits of positions ``first`` to ``last``, a slice of the vocabulary at a time: its bounds and (B, positions,
        slice)."""
        hidden = self.last_hidden_state()[:, first:last]
        name = self.config.head_name
        if self.on_input is not None:
            self.on_input(name, hidden)
        cap = self.config.final_logit_softcapping
        with ReadAhead({name: self.tensors[name]}, torch.get_num_threads()) as weights:
            yield from weights.map(name, lambda start, end, rows: soft_cap(F.linear(hidden, self.widen(rows)), cap))

    def logits(self, first: int = 0, last: int | None = None) -> Array:
        """Float32 logits of positions ``first`` to ``last``: (B, positions, V)."""
        batch, positions = self.last_hidden_state()[:, first:last].shape[:2]
        out = np.empty((batch, positions, self.config.vocab_size), dtype=np.float32)
        for start, end, logits in self.vocabulary_slices(first, last):
            out[:, :, start:end] = logits.float().cpu().numpy()
        return out

    def position_chunks(self, positions: int) -> Iterator[tuple[int, int, Array]]:
        """Float32 logits of ``positions`` positions at a time: their bounds and (B, positions, V). Each chunk reads the
        vocabulary projection again, so a chunk should be as large as memory allows."""
        length = self.input_ids.shape[1]
        for first in range(0, length, positions):
            last = min(first + positions, length)
            yield first, last, self.logits(first, last)

    def widen(self, block: Array) -> Tensor:
        """A block of rows as ``dtype`` on the device, in memory that the thread's next call reuses."""
        rows = to_torch(block).to(self.device)
        if rows.dtype == self.dtype:
            return rows
        scratch: Tensor | None = getattr(self._scratch, "tensor", None)
        if scratch is None or scratch.numel() < rows.numel():
            scratch = self._scratch.tensor = torch.empty(rows.numel(), dtype=self.dtype, device=self.device)
        return scratch[: rows.numel()].view(rows.shape).copy_(rows)

    def _embed(self) -> Tensor:
        """Embeddings (B, T, D); reads only the rows of the tokens that occur."""
        table = self.tensors[EMBEDDING]
        tokens, indices = torch.unique(self.input_ids, return_inverse=True)
        rows = torch.cat([to_torch(table.load_rows(token, token + 1)) for token in tokens.tolist()])
        return rows.to(self.device, self.dtype)[indices]

    def _layer(self, index: int, weights: ReadAhead) -> DecoderLayer:
        prefix = f"model.layers.{index}."

        def linear(in_features: int, out_features: int, bias: bool, name: str) -> nn.Module:
            return StreamedLinear(self, weights, f"{prefix}{name}", out_features, bias)

        with torch.device("meta"):
            layer = DecoderLayer(self.config, index, linear)
        for name, module in layer.named_modules():
            if isinstance(module, RMSNorm):
                layer.set_submodule(name, self._norm(f"{prefix}{name}.weight"))
        if self.windows is not None and layer.self_attn.window is not None:
            layer.self_attn.window = self.windows
        if self.amplifier is not None:
            self.amplifier.attach(layer, index)
        return layer.eval()

    def _norm(self, name: str) -> RMSNorm:
        with torch.device("meta"):
            norm = RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        norm.weight = nn.Parameter(load_tensor(self.tensors[name], self.dtype, self.device), requires_grad=False)
        return norm

    def _matrices(self, layer: int | None = None) -> dict[str, LazyTensor]:
        """The projections of a layer, or of all layers, in the order in which they are used."""
        specs = (spec for spec in tensor_specs(self.config).values() if spec.layer is not None and len(spec.shape) == 2)
        return {spec.name: self.tensors[spec.name] for spec in specs if layer in (None, spec.layer)}


class StreamedLinear(nn.Module):
    """A projection that multiplies by a block of rows of its weight at a time; each gives that many columns of the
    product."""

    def __init__(self, run: StreamedForward, weights: ReadAhead, name: str, out_features: int, bias: bool) -> None:
        super().__init__()
        self.run, self.weights, self.name, self.out_features, self.has_bias = run, weights, name, out_features, bias

    def forward(self, x: Tensor) -> Tensor:
        if self.run.on_input is not None:
            self.run.on_input(f"{self.name}.weight", x)
        out = x.new_empty(*x.shape[:-1], self.out_features)

        def columns(first: int, last: int, rows: Array) -> None:
            out[..., first:last] = F.linear(x, self.run.widen(rows))

        for _ in self.weights.map(f"{self.name}.weight", columns):
            pass
        if self.has_bias:
            out += load_tensor(self.run.tensors[f"{self.name}.bias"], self.run.dtype, self.run.device)
        return out


class StreamedForCausalLM:
    """``Gemma2ForCausalLM`` for ``generate`` where the weights do not fit in memory. Every call reads all weights."""

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        self.checkpoint, self.config, self.dtype, self.device = checkpoint, checkpoint.config, dtype, device

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:
        """Float32 logits (B, kept, V) of the last ``logits_to_keep`` positions (0: all), and the cache."""
        cache = choose_cache(self.config, past_key_values, use_cache)
        run = StreamedForward(
            self.checkpoint,
            input_ids,
            dtype=self.dtype,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            device=self.device,
        )
        first = input_ids.shape[1] - logits_to_keep if logits_to_keep else 0
        logits = torch.from_numpy(run.logits(first)).to(input_ids.device)
        return CausalLMOutput(loss=None, logits=logits, past_key_values=cache)


def logits(
    checkpoint: Checkpoint,
    input_ids: Array | Tensor,
    *,
    on_layer: Callable[[int, Tensor], None] | None = None,
    threads: int | None = None,
    **options: Unpack[ForwardOptions],
) -> Array:
    """Float32 logits (B, T, V) of ``input_ids`` (B, T), a layer's blocks at a time.

    ``on_layer(i, x)`` is called with the residual stream (B, T, D) after i layers. ``threads``: torch's, for this call.
    ``options``: those of ``StreamedForward``. Runs with the same number of threads give the same bits, and so do runs
    of up to FEW_TOKENS tokens with any number. With more tokens, or on another machine, sums are split differently:
    float32 logits then agree within 5e-5 plus 1e-5 of the value.
    """
    with use_threads(threads):
        run = StreamedForward(checkpoint, input_ids, **options)
        for layers, x in enumerate(run.hidden_states()):
            if on_layer is not None:
                on_layer(layers, x)
        return run.logits()


@dataclass(frozen=True)
class HiddenDifference:
    """The difference between two residual streams after ``layers`` layers (0: the embeddings).

    ``largest``: the largest absolute difference. ``rms``: the root mean square of the difference. ``relative``: ``rms``
    divided by ``reference_rms``. ``reference_rms``, ``candidate_rms``: the root mean squares of the two streams.
    """

    layers: int
    largest: float
    rms: float
    relative: float
    reference_rms: float
    candidate_rms: float


def compare_hidden_states(
    reference: StreamedForward, candidate: StreamedForward, prompts: int | None = None
) -> Iterator[HiddenDifference]:
    """Run two forward passes in step and compare the first ``prompts`` prompts (None: all) after each layer. Afterwards
    both can return their logits."""
    for layers, pair in enumerate(zip(reference.hidden_states(), candidate.hidden_states(), strict=True)):
        x, y = (stream[:prompts].double() for stream in pair)
        difference = (y - x).abs()
        rms, reference_rms, candidate_rms = (values.pow(2).mean().sqrt().item() for values in (difference, x, y))
        relative = rms / reference_rms if reference_rms else float(rms > 0)
        yield HiddenDifference(layers, difference.max().item(), rms, relative, reference_rms, candidate_rms)


@contextlib.contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """Set torch's number of threads inside the block; None leaves it unchanged."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
