"""The top of a page: the verdict, the numbers that a person asks for first, and what they were measured on."""

from __future__ import annotations

import math

from gemma2tool.model.digest import tensors_digest
from gemma2tool.verify.reports.markup import Markup, tag
from gemma2tool.verify.reports.quality import CLOSENESS, closeness
from gemma2tool.verify.result import Side, Verification


def headline(verification: Verification) -> Markup:
    """The verdict, the two sides, tiles with numbers, and how to repeat the verification."""
    source, candidate = verification.source, verification.candidate
    verdict = "Verified: " if verification.passed else "Failed: "
    lines = [
        tag("h1", tag("b", verdict), verification.verdict),
        tag("p", _path(candidate), tag("span", _describe(candidate), class_="soft")),
        tag(
            "p",
            tag("span", "against " if verification.against_receipt else "made from ", class_="soft"),
            _path(source),
            tag("span", _describe(source), class_="soft"),
        ),
        _tiles(verification),
        _facts(verification),
    ]
    return tag("header", tag("div", *lines), class_="passed" if verification.passed else "failed")


def _path(side: Side) -> Markup:
    return Markup(tag("span", side.path, class_="path") + " ")


def _describe(side: Side) -> str:
    stored = ", ".join(sorted(side.stored, key=lambda name: (-side.stored[name], name)))
    return side.format + (f": {stored}" if stored else "") + (f"; {side.nbytes / 1e6:,.1f} MB" if side.nbytes else "")


def _tiles(verification: Verification) -> Markup:
    tiles = [*_size_tiles(verification), *_quality_tiles(verification)]
    return tag(
        "div",
        *(tag("div", tag("b", number), tag("span", caption), class_="tile") for number, caption in tiles),
        class_="tiles",
    )


def _size_tiles(verification: Verification) -> list[tuple[str, str]]:
    source, candidate = verification.source, verification.candidate
    tiles = []
    if source.nbytes and candidate.nbytes:
        saved = 1 - candidate.nbytes / source.nbytes
        change = "smaller than the source" if saved >= 0 else "larger than the source"
        if round(abs(saved), 2):
            tiles.append((f"{abs(saved):.0%}", f"{change}, which has {source.nbytes / 1e6:,.1f} MB"))
    if candidate.bits_per_weight is not None:
        tiles.append((f"{candidate.bits_per_weight:.2f}", "bits per weight"))
    tensors = verification.metrics("tensors").get("tensors", {})
    if tensors:
        equal = sum(not row["rmse"] and not row["max_abs_error"] for row in tensors.values())
        tiles.append((f"{equal} of {len(tensors)}", "tensors equal bit for bit"))
    return tiles


def _quality_tiles(verification: Verification) -> list[tuple[str, str]]:
    metrics = verification.metrics("distribution")
    tiles = []
    if "kl_mean" in metrics:
        tiles.append((f"{metrics['kl_mean']:.3g}", "mean KL divergence, nats"))
        tiles.append((f"{metrics['top1_agreement']:.2%}", f"same likeliest token, {metrics['positions']:,} positions"))
    if "perplexity_ratio" in metrics:
        tiles.append(
            (f"{metrics['perplexity_ratio']:.5g}", f"perplexity ratio, ± {metrics['perplexity_ratio_se']:.2g}")
        )
    return tiles


def _facts(verification: Verification) -> Markup | None:
    facts: list[tuple[str, Markup]] = []
    tokens = None if verification.measurements is None else verification.measurements.tokens
    if tokens is not None:
        kind = "a text" if tokens.text else "pseudo-random tokens"
        named = tag("span", verification.prompt, class_="path") if verification.prompt else "the built-in prompt"
        facts.append(("measured on", tag("span", named, f": {tokens.ids.size:,} tokens of {kind}")))
    rows = verification.metrics("tensors").get("tensors", {})
    if rows and all(row.get("candidate_digest") for row in rows.values()):
        digest = tensors_digest({name: row["candidate_digest"] for name, row in rows.items()})
        facts.append(("values", tag("span", digest, class_="path", title="as `gemma2tool hash` prints it")))
    if verification.command:
        facts.append(("repeat it", tag("code", verification.command, class_="path")))
    if not facts:
        return None
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts), class_="facts")


def kl_scale(verification: Verification) -> list[Markup]:
    """What the mean KL means: the words for each range of it, with the candidate's marked."""
    kl = verification.metrics("distribution").get("kl_mean")
    if kl is None or not math.isfinite(kl):
        return []
    words, steps, low = closeness(kl), [], 0.0
    for limit, text in CLOSENESS:
        bounds = f"below {limit:g}" if math.isfinite(limit) else f"from {low:g}"
        here = text == words
        value = tag("b", f"{kl:.3g}") if here else None
        steps.append(
            tag("li", tag("span", bounds, class_="bounds"), text, value, aria_current="true" if here else None)
        )
        low = limit
    caption = (
        "KL divergence is how far the predicted distributions are apart, in nats per token. The words are a convention"
        " of gemma2tool; the limit of the gate finds broken files and is looser."
    )
    return [
        tag("h2", "What a KL of this size means"),
        tag("p", caption, class_="soft"),
        tag("ol", *steps, class_="scale"),
    ]
