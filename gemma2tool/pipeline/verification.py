"""Verifying: an output against its source, a file against its source, its receipt, an engine or a server, two
checkpoints.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemma2tool.errors import UsageError
from gemma2tool.formats import registry
from gemma2tool.formats.options import WriteOptions
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.config import Gemma2Config
from gemma2tool.model.devices import CPU, use_device
from gemma2tool.model.progress import Progress
from gemma2tool.pipeline.held_out import warn_of_text_in_receipt
from gemma2tool.pipeline.inputs import read_logits, read_prompts, read_tokens, resolve_config
from gemma2tool.pipeline.opening import is_remote, log_warnings, open_source
from gemma2tool.pipeline.report_files import ReportFiles
from gemma2tool.pipeline.requests import Checks, default_threads
from gemma2tool.pipeline.serving.request import ServerRequest
from gemma2tool.pipeline.signatures import named_signer, signature_alone, signature_gate
from gemma2tool.receipt.document import receipt_path

if TYPE_CHECKING:
    from gemma2tool.receipt.document import Receipt
    from gemma2tool.verify.difference import Difference
    from gemma2tool.verify.finding import GateResult
    from gemma2tool.verify.result import Verification


@dataclass(frozen=True, kw_only=True)
class VerifyRequest:
    """What to compare a candidate with: its source (``reference``), a receipt (default: the one beside the candidate),
    an engine's ``logits``, the ``engines`` to run on it (names in ``engines.run.ENGINES``), or a running ``server``.

    - ``signed_by``: also check the signature against this public key or certificate (PEM), or against this identity. If
      this is the only comparison requested, nothing else is compared.
    - ``issuer``: who vouches for the identity. ``trust_config``: a Sigstore other than the public one.
    - ``signature``: the path of the signature; default: the one beside the candidate.
    - ``config``: the config of a candidate that has none, and of a reference that has none unless ``reference_config``
      is given.
    - ``readers``: with ``reference``, also read the candidate with the libraries that define its format.
    - ``device``: where the forward passes compute.
    """

    candidate: Path | str
    reference: Path | str | None = None
    receipt: Path | None = None
    logits: Path | None = None
    engines: tuple[str, ...] = ()
    server: ServerRequest | None = None
    signed_by: Path | str | None = None
    issuer: str | None = None
    trust_config: Path | None = None
    signature: Path | None = None
    checks: Checks = field(default_factory=Checks)
    config: Gemma2Config | Path | str | None = None
    reference_config: Gemma2Config | Path | str | None = None
    threads: int = field(default_factory=default_threads)
    reports: ReportFiles = ReportFiles()
    readers: bool = True
    device: str = "cpu"


@dataclass(frozen=True)
class ResolvedChecks:
    """How a candidate is compared with its source: token ids (B, T) or None for the built-in ones, limits that replace
    default ones, and whether the libraries that define the candidate's format read it too. ``asked``: what they were
    made from."""

    ids: NDArray[np.int64] | None = None
    gates: Mapping[str, float] = field(default_factory=dict)
    readers: bool = True
    asked: Checks = field(default_factory=Checks)


def repeated(verification: Verification, checks: Checks) -> Verification:
    """With the file of its prompt, and the command line that repeats it."""
    words = ["gemma2tool", "verify", verification.candidate.path]
    if not verification.against_receipt:
        words += ["--reference", verification.source.path]
    for option, path in (("--tokens", checks.tokens), ("--text", checks.text)):
        words += [] if path is None else [option, str(path)]
    for name, limit in checks.gates.items():
        words += ["--gate", f"{name}={limit:g}"]
    return replace(verification, prompt="".join(map(str, checks.files[:1])), command=shlex.join(words))


def verify(request: VerifyRequest, progress: Progress | None = None) -> Verification:
    """Carry out a verification and write its reports.

    Raises ``UsageError`` for a request that names several things to compare with, or none that exists.
    """
    with use_device(request.device):
        return _verify(request, progress)


def _verify(request: VerifyRequest, progress: Progress | None) -> Verification:
    ways = {
        "--reference": request.reference,
        "--against": request.receipt,
        "--logits": request.logits,
        "--engine": request.engines or None,
        "--server": request.server,
    }
    chosen = [option for option, value in ways.items() if value is not None]
    if len(chosen) > 1:
        raise UsageError(
            "option.pair", f"{' and '.join(chosen)} are different ways to verify", hint="choose one of them"
        )
    if request.reports.bom is not None and (request.reference or request.logits or request.engines or request.server):
        raise UsageError("option.ignored", "--bom is made from a receipt", hint="leave out --reference and --logits")
    if request.checks.sample and request.reference is None:
        raise UsageError(
            "option.ignored", "--sample lets the source and the candidate continue a text", hint="add --reference SRC"
        )
    for option in ("signature", "issuer", "trust_config") if request.signed_by is None else ():
        if getattr(request, option) is not None:
            typed = f"--{option.replace('_', '-')}"
            raise UsageError("option.pair", f"{typed} has no effect without --signed-by", hint="add --signed-by")
    local = Path(request.candidate)
    signature = None if request.signed_by is None else _signature(request, local, str(request.signed_by))
    if signature is not None and not chosen and not receipt_path(local).exists():
        result = signature_alone(local, signature)
    elif request.reference is not None:
        result = _with_source(request, request.reference, progress)
    elif request.logits is not None:
        result = _with_logits(request, request.logits, progress)
    elif request.engines:
        result = _with_engines(request, progress)
    elif request.server is not None:
        result = _with_server(request, request.server, progress)
    else:
        result = _with_receipt(request, progress)
    if signature is not None and signature not in result.gates:
        result = replace(result, gates=(signature, *result.gates))
    request.reports.write([result])
    return result


def _signature(request: VerifyRequest, candidate: Path, signed_by: str) -> GateResult:
    """The gate of the candidate's signature, and of its receipt's where that is what it is held to."""
    if is_remote(str(request.candidate)):
        raise UsageError("option.ignored", "--signed-by works for local files only", hint="download the model first")
    signer = named_signer(signed_by, request.issuer, request.trust_config)
    request.reports.check((*([] if signer.kind == "identity" else [Path(signed_by)]), candidate))
    receipt = request.receipt or receipt_path(candidate)
    uses_receipt = not (request.reference or request.logits or request.engines or request.server) and receipt.exists()
    return signature_gate(candidate, signer, request.signature, receipt if uses_receipt else None)


def verify_output(
    source: Checkpoint,
    candidate: Checkpoint,
    checks: ResolvedChecks,
    *,
    threads: int,
    progress: Progress | None,
    options: WriteOptions | None = None,
) -> Verification:
    """Verify ``candidate`` against ``source``.

    ``options``: with which the candidate was written; what they asked for is reported as chosen, and they say how its
    codes were chosen (None: as the candidate says). What the candidate's format cannot represent of the source is
    reported, not an error.
    """
    from gemma2tool.pipeline.chosen import chosen_differences
    from gemma2tool.pipeline.readers import reading
    from gemma2tool.verify.chosen import Chosen
    from gemma2tool.verify.run import VerifySettings
    from gemma2tool.verify.run import verify as compare

    settings = VerifySettings(
        ids=checks.ids,
        gates=checks.gates,
        expected=registry.by_name(candidate.format).expected_after_roundtrip(source, candidate),
        rounding=None if options is None else options.rounding,
        threads=threads,
        progress=progress,
        chosen=Chosen() if options is None else chosen_differences(options, source, candidate),
        sample=checks.asked.sample,
    )
    wanted = checks.readers and candidate.address is None  # libraries read local files
    with reading(candidate, wanted=wanted, own_names=options is not None) as gate:
        return repeated(gate.added_to(compare(source, candidate, settings)), checks.asked)


@dataclass(frozen=True, kw_only=True)
class DiffRequest:
    """Two checkpoints to compare, neither of which is the reference. ``with_logits``: also run both forward passes."""

    a: Path | str
    b: Path | str
    checks: Checks = field(default_factory=Checks)
    with_logits: bool = True
    config: Gemma2Config | Path | str | None = None
    threads: int = field(default_factory=default_threads)


def diff(request: DiffRequest, progress: Progress | None = None) -> Difference:
    """How two checkpoints differ: tensors as values, config, tokenizer, logits."""
    from gemma2tool.verify.difference import diff as compare

    config = resolve_config(request.config)
    with _opened(request.a, config) as a, _opened(request.b, config) as b:
        log_warnings(a, "A")
        log_warnings(b, "B")
        ids = read_prompts(request.checks.tokens, request.checks.text, a)
        _check_needs(a, b, ids, request.threads, logits=request.with_logits)
        return compare(
            a,
            b,
            ids=ids,
            expected=(
                registry.by_name(b.format).expected_after_roundtrip(a, b),
                registry.by_name(a.format).expected_after_roundtrip(b, a),
            ),
            logits=request.with_logits,
            threads=request.threads,
            progress=progress,
        )


def _check_needs(
    source: Checkpoint,
    candidate: Checkpoint,
    ids: NDArray[np.int64] | None,
    threads: int,
    *,
    readers: bool = False,
    logits: bool = True,
    device: str = CPU,
) -> None:
    """Say what a long comparison will take; raises ``ResourceError`` if its memory is not there."""
    from gemma2tool.pipeline.needs.comparison import comparison_needs
    from gemma2tool.verify.prompts import BUILT_IN_TOKENS

    shape = (1, BUILT_IN_TOKENS) if ids is None else (ids.shape[0], ids.shape[1])
    needs = comparison_needs(source, candidate, shape if logits else None, threads=threads, readers=readers)
    needs.check(device)
    needs.announce()


def _with_source(request: VerifyRequest, reference: Path | str, progress: Progress | None) -> Verification:
    config = resolve_config(request.config)
    reference_config = resolve_config(request.reference_config) or config
    with _opened(reference, reference_config) as source, _opened(request.candidate, config) as candidate:
        request.reports.check((*source.files, *candidate.files))
        log_warnings(source, source.path.name)
        log_warnings(candidate, candidate.path.name)
        warn_of_text_in_receipt(request.checks.files, candidate.path)
        ids = read_prompts(request.checks.tokens, request.checks.text, source)
        checks = ResolvedChecks(ids, request.checks.gates, request.readers, request.checks)
        _check_needs(source, candidate, ids, request.threads, readers=request.readers, device=request.device)
        return verify_output(source, candidate, checks, threads=request.threads, progress=progress)


def _with_logits(request: VerifyRequest, logits: Path, progress: Progress | None) -> Verification:
    from gemma2tool.verify.engine import LogitsSettings, verify_logits

    checks = request.checks
    if checks.tokens is None or checks.text is not None:
        raise UsageError(
            "option.pair", "--logits needs the token ids that they were computed from", hint="add --tokens ids.npy"
        )
    with _opened(request.candidate, resolve_config(request.config)) as candidate:
        request.reports.check((logits, checks.tokens, *candidate.files))
        log_warnings(candidate, candidate.path.name)
        return verify_logits(
            candidate,
            read_tokens(checks.tokens, candidate.config),
            read_logits(logits),
            name=str(logits),
            settings=LogitsSettings(gates=checks.gates, threads=request.threads, progress=progress),
        )


def _with_engines(request: VerifyRequest, progress: Progress | None) -> Verification:
    from gemma2tool.pipeline.engines import EngineChecks, verify_with_engines

    checks = request.checks
    with _opened(request.candidate, resolve_config(request.config)) as candidate:
        if candidate.address is not None:  # an engine would read the stand-ins of its files
            raise UsageError("option.ignored", "--engine works for local files only", hint="download the model first")
        request.reports.check((*checks.files, *candidate.files))
        log_warnings(candidate, candidate.path.name)
        ids = read_prompts(checks.tokens, checks.text, candidate)
        settings = EngineChecks(names=request.engines, ids=ids, gates=checks.gates, threads=request.threads)
        return verify_with_engines(candidate, settings, progress)


def _with_server(request: VerifyRequest, server: ServerRequest, progress: Progress | None) -> Verification:
    from gemma2tool.pipeline.serving.run import ServerChecks, verify_with_server

    checks = request.checks
    with _opened(request.candidate, resolve_config(request.config)) as candidate:
        request.reports.check((*checks.files, *candidate.files))
        log_warnings(candidate, candidate.path.name)
        ids = read_prompts(checks.tokens, checks.text, candidate)
        settings = ServerChecks(server=server, ids=ids, gates=checks.gates, threads=request.threads)
        return verify_with_server(candidate, settings, progress)


def _with_receipt(request: VerifyRequest, progress: Progress | None) -> Verification:
    from gemma2tool.receipt.check import check_against_receipt

    if request.checks != Checks():
        raise UsageError(
            "option.ignored",
            "--tokens, --text and --gate have no effect with a receipt, which has its own prompt and limits",
            hint="they are for --reference",
        )
    with _opened(request.candidate, resolve_config(request.config)) as candidate:
        receipt = _receipt(candidate.path, request.receipt)
        request.reports.check((receipt.path, *candidate.files))
        log_warnings(candidate, candidate.path.name)
        result = check_against_receipt(candidate, receipt, threads=request.threads, progress=progress)
        if request.receipt is None:
            result = repeated(result, request.checks)
        if result.passed:
            request.reports.write_bom(receipt.path, candidate)
        return result


def _receipt(candidate: Path, receipt: Path | None) -> Receipt:
    from gemma2tool.receipt.document import read_receipt

    beside = receipt_path(candidate)
    if receipt is None and not beside.exists():
        raise UsageError(
            "receipt.missing",
            f"{candidate}: nothing to verify it against: there is no {beside.name} beside it",
            hint="name the checkpoint it was made from with --reference, or a receipt with --against",
        )
    return read_receipt(receipt or beside)


def _opened(source: Path | str, config: Gemma2Config | None) -> Checkpoint:
    """Opened with ``config`` if it has none of its own, see ``registry.config_for``."""
    return open_source(source, config, prefer_own_config=True)
