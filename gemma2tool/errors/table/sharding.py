"""Work over several machines: shards, their parts, ranks."""

from __future__ import annotations

from gemma2tool.errors.entry import refused, resource, usage

ENTRIES = (
    refused("part.damaged", "the file is damaged, or is not part of a sharded run", "run that shard again"),
    usage(
        "part.mismatch",
        "the parts come from different models, texts, options or versions",
        "pass parts of the same command, run with the same model, text and options on every machine",
    ),
    usage("part.missing", "the part of a shard is missing", "run that shard, or pass its part too"),
    usage("part.none", "there are no parts to merge", "name the parts, or pass the same OUT as to the shards"),
    usage("part.twice", "two parts come from the same shard", "leave out one of the two"),
    resource(
        "ranks.lost",
        "processes of a joint calibration lost contact: one of them ended, or the network failed",
        "look for the first error that a rank printed, then run the command again: it resumes at that layer",
    ),
    resource("ray.lost", "the workers of a task died repeatedly", "check the nodes' memory and Ray's logs"),
    usage("ray.no-cluster", "no Ray cluster was found", "start one with 'ray start --head', or set RAY_ADDRESS"),
    usage("ray.reports", "reports cannot be written by several processes", "leave it out"),
    usage("shard.value", "the shard is not I/N with I from 0 to N - 1", "give one such as --shard 0/4"),
)
