"""Work over several machines: shards, their parts, ranks."""

from __future__ import annotations

from gemma2tool.errors.entry import refused, resource, usage

ENTRIES = (
    refused("part.damaged", "the file is not a part that a shard wrote, or is damaged", "run that shard again"),
    usage(
        "part.mismatch",
        "parts are of different models, texts, options or versions",
        "give the parts of one command, run with the same model, text and options on every machine",
    ),
    usage("part.missing", "the part of a shard is missing", "run that shard, or name its part too"),
    usage("part.none", "there are no parts to merge", "name the parts, or give OUT as the shards were given it"),
    usage("part.twice", "two parts are of one shard", "leave out one of the two"),
    resource(
        "ranks.lost",
        "processes that calibrate together lost one another: one of them ended, or the network failed",
        "look for the first error that a rank printed, and run the command again: it continues at the layer under way",
    ),
    resource("ray.lost", "the workers of a task died again and again", "look into the nodes' memory and Ray's logs"),
    usage("ray.no-cluster", "no Ray cluster answers", "start one with 'ray start --head', or name it with RAY_ADDRESS"),
    usage("ray.reports", "a report is of one process", "leave it out"),
    usage("shard.value", "the shard is not I/N with I from 0 to N - 1", "give one such as --shard 0/4"),
)
