"""Sensitivity tables, budgets and quality at a size."""

from __future__ import annotations

from gemma2tool.errors.entry import refused, usage

ENTRIES = (
    usage("budget.candidates", "a candidate is not a type that matrices can be stored in", "choose other --candidates"),
    usage("budget.impossible", "no choice of types meets the target", "allow more, or add other --candidates"),
    usage(
        "budget.no-table",
        "a budget needs to know what each matrix costs",
        "collect a table with gemma2tool sensitivity, then give it with --sensitivity",
    ),
    usage("budget.not-in-table", "the sensitivity table lacks a candidate", "collect it again with these --candidates"),
    usage("budget.options", "an option and a target decide the same", "leave out one of the two"),
    usage("budget.target", "several targets are given", "give one of --target-size, --target-bpw and --target-kl"),
    usage("budget.unquantized", "the target is met without quantizing anything", "convert the model, or allow less"),
    usage("quality.label", "two texts have one label", "write --text LABEL=FILE"),
    usage("quality.no-font", "a picture needs a font for its labels", "install one, such as DejaVu, or use --svg"),
    usage("quality.nothing", "nothing is given to measure, or no text to do so", "give --types or --file, and --text"),
    refused("quality.other-model", "a file to measure is not of the source's shape", "give a file of the same model"),
    usage("quality.short", "the text does not fill one window", "give a longer text, or a smaller --length"),
    usage("sensitivity.merge", "sensitivity tables do not add up", "merge tables of one model from different texts"),
    usage("sensitivity.no-text", "no text is given to collect a sensitivity table from", "give one with --calibration"),
    refused(
        "sensitivity.nonfinite",
        "the model computes NaN or infinities from the text",
        "check the weights: gemma2tool check SRC",
    ),
    refused(
        "sensitivity.other-model",
        "the sensitivity table is of another model",
        "collect one of this model with gemma2tool sensitivity",
    ),
    refused(
        "sensitivity.schema",
        "the file is not a sensitivity table that this version reads",
        "collect it with gemma2tool sensitivity",
    ),
    usage(
        "sensitivity.short",
        "the text is too short for a sensitivity table",
        "give a longer text, a smaller --calibration-length, or fewer --windows",
    ),
    refused("sensitivity.unfinished", "the collection of a sensitivity table was interrupted", "run it again"),
)
