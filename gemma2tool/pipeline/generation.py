"""Text from a prompt, with the built-in forward pass and the tokenizer that travels with a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from gemma2tool.errors import UsageError, choices
from gemma2tool.errors.memory import out_of_memory_as_error
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.devices import CPU, check_device
from gemma2tool.pipeline.memory import check_memory
from gemma2tool.pipeline.needs.needs import Least
from gemma2tool.pipeline.needs.work import LEAST_TORCH_BYTES, least_of_forward
from gemma2tool.pipeline.prompt import PromptTokenizer
from gemma2tool.pipeline.requests import default_threads

COMPUTE_DTYPES = ("f32", "bf16", "f16")


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How text is generated.

    - ``raw``: use the prompt as it is, without the chat template.
    - ``temperature``: 0 takes the likeliest token.
    - ``top_k``: draw from the K likeliest tokens. ``top_p``: draw from the smallest set of tokens with this
      probability.
    - ``stream_weights``: read the weights again for every token instead of holding them in memory.
    - ``dtype``: the type of the computation, one of ``COMPUTE_DTYPES``.
    - ``device``: where to compute.
    """

    raw: bool = False
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stream_weights: bool = False
    dtype: str = "f32"
    device: str = "cpu"
    threads: int = field(default_factory=default_threads)

    def __post_init__(self) -> None:
        if self.dtype not in COMPUTE_DTYPES:
            raise UsageError(
                "option.dtype",
                f"--dtype {self.dtype} is not a computation type",
                hint=choices.hint(self.dtype, ("f32", "bf16", "f16")),
            )


@dataclass(frozen=True)
class Generation:
    """Generated text.

    - ``prompt_tokens``: the token ids that the model was given.
    - ``tokens``: the token ids that it generated, including a stop token.
    - ``text``: the generated text.
    - ``stopped``: whether generation ended at a stop token.
    """

    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    stopped: bool

    def to_json(self) -> dict[str, object]:
        """Return the generation as ``--json`` prints it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "text": self.text,
            "stopped": self.stopped,
        }


def generate(
    checkpoint: Checkpoint, prompt: str, options: GenerationOptions, on_text: Callable[[str], None] | None = None
) -> Generation:
    """Generate token by token, in the chat template if the checkpoint has one. ``on_text`` receives each piece of text
    as it comes.

    Raises ``ResourceError`` if memory runs out.
    """
    hint = "read the layers again for every token with --stream-weights"
    if options.dtype == "f32":
        hint += ", or use --dtype bf16"
    if options.stream_weights:
        hint = "close other programs, or generate fewer tokens"
    tokenizer = PromptTokenizer(checkpoint)
    ids = tokenizer.encode(prompt if options.raw else tokenizer.chat(prompt) or prompt)
    if options.device == CPU:
        least = least_of_forward(checkpoint.config, (1, len(ids)), hint)
        if not options.stream_weights:
            least = Least(LEAST_TORCH_BYTES + _weight_bytes(checkpoint, options.dtype), "the model's weights", hint)
        check_memory(least.memory, least.what, least.hint)
    with out_of_memory_as_error("the model's weights and its cache", hint):
        return _generate(checkpoint, tokenizer, ids, options, on_text)


def _weight_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Bytes of all weights in memory."""
    return checkpoint.parameters * (4 if dtype == "f32" else 2)


def _generate(
    checkpoint: Checkpoint,
    tokenizer: PromptTokenizer,
    ids: list[int],
    options: GenerationOptions,
    on_text: Callable[[str], None] | None,
) -> Generation:
    import torch

    from gemma2tool.reference.generate import Sampling
    from gemma2tool.reference.generate import generate as generate_tokens
    from gemma2tool.reference.model import Gemma2ForCausalLM
    from gemma2tool.reference.streaming import StreamedForCausalLM

    torch.set_num_threads(options.threads)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[options.dtype]
    device = check_device(options.device)
    model: Gemma2ForCausalLM | StreamedForCausalLM
    if options.stream_weights:
        model = StreamedForCausalLM(checkpoint, dtype=dtype, device=device)
    else:
        model = Gemma2ForCausalLM.from_checkpoint(checkpoint, dtype=dtype, device=device)
    stops = tokenizer.stop_ids()
    produced: list[int] = []
    emitted = ""
    for token in generate_tokens(
        model,
        torch.tensor([ids], device=options.device),
        max_new_tokens=options.max_new_tokens,
        sampling=Sampling(options.temperature, options.top_k, options.top_p, options.seed),
        eos_token_ids=stops,
    ):
        produced.append(int(token))
        if produced[-1] in stops:
            break
        text = tokenizer.decode(produced)
        if on_text is not None and not text.endswith("\ufffd"):  # the last character may still lack bytes
            on_text(text[len(emitted) :])
            emitted = text
    text = tokenizer.decode([token for token in produced if token not in stops])
    if on_text is not None:
        on_text(text[len(emitted) :])
    return Generation(ids, produced, text, bool(produced) and produced[-1] in stops)
