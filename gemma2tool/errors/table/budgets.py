"""Sensitivity tables, budgets and quality at a size."""

from __future__ import annotations

from gemma2tool.errors.entry import refused, usage

ENTRIES = (
    usage("budget.candidates", "a candidate is not a type that matrices can be stored in", "choose other --candidates"),
    usage("budget.impossible", "no choice of types meets the target", "allow more, or add other --candidates"),
    usage(
        "budget.no-table",
        "a budget needs a table of what each matrix costs",
        "collect one with gemma2tool sensitivity, then pass it with --sensitivity",
    ),
    usage("budget.not-in-table", "the sensitivity table lacks a candidate", "collect it again with these --candidates"),
    usage("budget.options", "an option and the target conflict", "leave out one of the two"),
    usage("budget.target", "several targets are given", "give one of --target-size, --target-bpw and --target-kl"),
    usage("budget.unquantized", "the target is met without quantizing anything", "convert the model, or allow less"),
    usage("quality.label", "two texts have the same label", "write --text LABEL=FILE"),
    usage(
        "quality.no-font",
        "no font was found for the labels of the picture",
        "install one, such as DejaVu, or use --svg",
    ),
    usage(
        "quality.nothing", "nothing to measure is given, or no text to measure on", "pass --types or --file, and --text"
    ),
    refused(
        "quality.other-model",
        "a file to measure has different dimensions than the source",
        "pass a file of the same model",
    ),
    usage("quality.short", "the text is shorter than one window", "pass a longer text, or a smaller --length"),
    usage(
        "sensitivity.merge", "the sensitivity tables cannot be merged", "merge tables of one model from different texts"
    ),
    usage("sensitivity.no-text", "no text is given to collect a sensitivity table", "give one with --calibration"),
    refused(
        "sensitivity.nonfinite",
        "the model computes NaN or infinities from the text",
        "check the weights: gemma2tool check SRC",
    ),
    refused(
        "sensitivity.other-model",
        "the sensitivity table was collected from a different model",
        "collect one for this model with gemma2tool sensitivity",
    ),
    refused(
        "sensitivity.schema",
        "the file is not a sensitivity table, or of an unsupported version",
        "collect it with gemma2tool sensitivity",
    ),
    usage(
        "sensitivity.short",
        "the text is too short for a sensitivity table",
        "pass a longer text, a smaller --calibration-length, or fewer --windows",
    ),
    refused("sensitivity.unfinished", "the collection of a sensitivity table was interrupted", "run it again"),
)
