"""Verifications and comparisons from Python, of one checkpoint and of several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from gemma2tool.api.arguments import Config, PathLike, as_path
from gemma2tool.pipeline import candidates as several
from gemma2tool.pipeline import verification
from gemma2tool.pipeline.candidates import CandidateResult
from gemma2tool.pipeline.events import ProgressCallback, as_progress
from gemma2tool.pipeline.report_files import ReportFiles
from gemma2tool.pipeline.requests import Checks, default_threads
from gemma2tool.pipeline.serving.request import ServerRequest
from gemma2tool.pipeline.verification import DiffRequest, VerifyRequest

if TYPE_CHECKING:
    from gemma2tool.verify.difference import Difference
    from gemma2tool.verify.result import Verification


def verify(
    candidate: PathLike,
    *,
    reference: PathLike | None = None,
    receipt: PathLike | None = None,
    logits: PathLike | None = None,
    engines: Sequence[str] = (),
    server: str | ServerRequest | None = None,
    signed_by: PathLike | None = None,
    issuer: str | None = None,
    trust_config: PathLike | None = None,
    signature: PathLike | None = None,
    tokens: PathLike | None = None,
    text: PathLike | None = None,
    gates: Mapping[str, float] | None = None,
    sample: int = 0,
    config: Config | None = None,
    reference_config: Config | None = None,
    readers: bool = True,
    threads: int | None = None,
    device: str = "cpu",
    reports: ReportFiles | None = None,
    progress: ProgressCallback | None = None,
) -> Verification:
    """Compare a checkpoint with its source, its receipt, an engine's results or what a server serves.

    ``reference``: the source. ``receipt``: the receipt; default: the one beside the candidate. ``logits``: an engine's
    float logits (.npy) for ``tokens``. ``engines``: programs to run on the candidate ("transformers", "llama.cpp",
    "mlx-lm", "keras-hub", "gemma"). ``server``: a running server that should serve it, such as "http://localhost:8080";
    its token is read from the environment variable GEMMA2TOOL_SERVER_TOKEN.

    ``signed_by``: also check the signatures of the candidate and its receipt against this public key, certificate or
    identity. ``issuer`` vouches for the identity; ``trust_config`` names a Sigstore other than the public one;
    ``signature`` defaults to the file beside the candidate. ``config``: for a candidate without a config, and for such
    a reference unless ``reference_config`` is given. ``readers``: also read the candidate with its format's libraries.
    ``sample``: how many tokens both models add to the prompt, for people to compare.

    A difference is not an exception but a failed gate in the result (``result.passed``, ``result.causes``). Raises
    ``InputRefused`` for a file that cannot be read and ``ResourceError`` for a server that does not answer.
    """
    request = VerifyRequest(
        candidate=candidate,
        reference=reference,
        receipt=as_path(receipt),
        logits=as_path(logits),
        engines=tuple(engines),
        server=ServerRequest(url=server) if isinstance(server, str) else server,
        signed_by=signed_by,
        issuer=issuer,
        trust_config=as_path(trust_config),
        signature=as_path(signature),
        checks=Checks.of(tokens, text, gates, sample),
        config=config,
        reference_config=reference_config,
        readers=readers,
        threads=threads or default_threads(),
        device=device,
        reports=reports or ReportFiles(),
    )
    return verify_request(request, progress=progress)


def candidates(paths: Iterable[PathLike]) -> list[PathLike]:
    """Return the checkpoints that ``paths`` name, without duplicates. A folder that is not a checkpoint stands for the
    checkpoints directly in it.
    """
    return several.candidates(paths)


def verify_request(request: VerifyRequest, *, progress: ProgressCallback | None = None) -> Verification:
    """Carry out a ``VerifyRequest``; ``verify`` builds one from its arguments."""
    return verification.verify(request, as_progress(progress))


def verify_several(
    request: VerifyRequest, candidates: Sequence[PathLike], *, progress: ProgressCallback | None = None
) -> tuple[CandidateResult, ...]:
    """Verify each of ``candidates`` with the settings of ``request``, against its own receipt or the request's
    reference, and write one report for all of them.

    If a candidate is refused, its result contains the error; the others are still verified. Raises ``UsageError`` for a
    request that applies to a single candidate only.
    """
    return several.verify_several(request, candidates, as_progress(progress))


def diff(
    a: PathLike,
    b: PathLike,
    *,
    tokens: PathLike | None = None,
    text: PathLike | None = None,
    with_logits: bool = True,
    config: Config | None = None,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> Difference:
    """Compare two checkpoints of any formats. Neither is the reference; ``result.same`` is the verdict."""
    request = DiffRequest(
        a=a,
        b=b,
        checks=Checks.of(tokens, text, None),
        with_logits=with_logits,
        config=config,
        threads=threads or default_threads(),
    )
    return verification.diff(request, as_progress(progress))
