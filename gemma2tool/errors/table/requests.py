"""What a command or call asks for: options, outputs, receipts and reports."""

from __future__ import annotations

from gemma2tool.errors.entry import refused, resource, usage

ENTRIES = (
    usage(
        "clean.path", "the path passed to clean cannot be an output", "pass the output, or the folder that contains it"
    ),
    resource("device.missing", "torch cannot use the device that --device names", "use --device cpu"),
    usage(
        "engine.format", "the engine does not load checkpoints of this format", "choose one of those listed in the hint"
    ),
    usage("engine.missing", "the engine that --engine names is not installed", "install it as the hint says"),
    usage("engine.prompt", "an engine was given several prompts", "pass one prompt, or a shorter text"),
    usage("engine.unknown", "--engine names an unknown engine", "choose one of those listed in the hint"),
    usage(
        "extra.missing",
        "the format needs a library that is not installed",
        "run the command in the hint, such as pip install 'zstandard>=0.22'",
    ),
    usage("format.unknown", "--to names an unknown format", "run 'gemma2tool formats' and choose one from the list"),
    usage("gate.unknown", "--gate names an unknown gate", "choose one of the gates listed in the hint"),
    usage("gate.contradiction", "two gates contradict each other, or one cannot be met", "give each gate one limit"),
    usage("gate.value", "a gate is not written as name=number", "write for example --gate kl=0.05"),
    usage("option.choice", "the option does not accept this value", "choose one that --help lists"),
    usage("option.device", "--device is not the name of a device", "choose cpu, cuda or cuda:1"),
    usage("option.dtype", "the output format cannot store the --dtype", "choose another --dtype"),
    usage(
        "option.ignored",
        "an option has no effect for this output, or in combination with another option",
        "remove one of them, or choose an output that supports the option",
    ),
    usage("option.lora", "--lora is not a folder, alone or with =SCALE", "write --lora DIR or --lora DIR=0.5"),
    usage(
        "option.pair",
        "the value of an option is not a KEY=VALUE pair",
        "write it as the hint shows",
    ),
    usage("option.prompts", "more than one option supplies a prompt", "give only one of them"),
    usage("option.regex", "--match is not a regular expression", "write for example --match 'layers.0.mlp'"),
    usage("option.size", "a size is not a number with a unit", "write it like 512MiB or 5GB"),
    usage(
        "output.appeared",
        "something was put at the destination, or changed there, while the run was writing its replacement",
        "inspect it, then repeat the command with --force, or choose a different name",
    ),
    usage("output.exists", "the destination exists", "choose a different name, or replace it with --force"),
    usage("output.is-input", "the destination is one of the inputs, or contains one", "choose a different destination"),
    usage(
        "output.kind",
        "the output format is a single file and the destination a folder, or the other way round",
        "rename the output",
    ),
    usage("output.link", "the destination is a symbolic link", "remove the link, or name the file it points to"),
    resource("output.locked", "another process is writing this output", "wait until it ends, or stop it"),
    usage("output.name", "the destination is not a valid output name", "name a file or a folder"),
    usage("output.name-too-long", "the name is too long for the file system", "choose a shorter name"),
    resource(
        "output.no-locks",
        "the destination's file system cannot lock files",
        "write to another disk and move the output",
    ),
    usage("output.no-parent", "the destination's parent folder does not exist", "create it with mkdir -p"),
    usage(
        "output.not-a-checkpoint",
        "--force would replace a folder that contains no checkpoint",
        "choose a different name, or remove the folder yourself",
    ),
    resource("output.not-writable", "the destination's folder is not writable", "choose a folder you may write to"),
    resource(
        "output.staging", "staged output could not be created, moved or removed", "remove it by hand and run again"
    ),
    usage("output.twice", "two outputs of one run have the same name", "name each output differently"),
    resource("output.unwritable", "standard output could not be written to", "free some space, or write elsewhere"),
    refused(
        "receipt.contradiction",
        "the receipt contradicts itself",
        "do not trust the receipt; verify the output against its source with --reference",
    ),
    usage(
        "receipt.exists",
        "a file that is not a receipt has the receipt's name",
        "move it, choose a different name for the output, or pass --no-receipt",
    ),
    usage(
        "receipt.missing",
        "the output has no receipt beside it, and no reference was given",
        "name the checkpoint it was made from with --reference, or a receipt with --against",
    ),
    refused("receipt.schema", "the file is not a receipt", "pass the file that gemma2tool wrote beside the output"),
    refused(
        "receipt.version",
        "the receipt's format version is unknown to this version of gemma2tool",
        "use the version of gemma2tool that wrote it, or a newer one",
    ),
    usage("report.folder", "a report would be written to a folder", "name a file"),
    usage(
        "report.other-file",
        "a report would replace or be appended to a file that is not a report of its kind",
        "name another file, or remove this one",
    ),
    usage("report.same", "a report would have the same name as another file of this run", "name two files"),
    resource("report.unwritable", "a report could not be written", "name a file that can be written"),
    usage(
        "resume.mismatch",
        "an unfinished run at the destination had other inputs or options",
        "repeat that run unchanged, start over with --restart, or remove it with 'gemma2tool clean'",
    ),
    refused(
        "signature.files",
        "the folder to sign contains a link or a special file",
        "copy the files to a separate folder (cp -rL) and sign that",
    ),
    refused(
        "signature.identity",
        "no identity is available to sign with, or Sigstore rejected it",
        "run it in a terminal or in a CI job that may request identity tokens, or set SIGSTORE_IDENTITY_TOKEN",
    ),
    refused(
        "signature.key",
        "a key or certificate cannot be used, or is of the wrong kind",
        "pass a PEM file: an elliptic-curve private key to sign, the public key or certificate to verify",
    ),
    refused(
        "signature.receipt",
        "the output to sign does not match the receipt beside it",
        "verify the output; to sign it without its receipt, move the receipt away",
    ),
    refused(
        "signature.trust",
        "the --trust-config file is not a Sigstore trust configuration",
        "pass a client trust configuration (JSON), or remove --trust-config",
    ),
    resource(
        "signature.unreachable",
        "Sigstore's services or its roots of trust could not be reached",
        "check the network, or use --trust-config to name a Sigstore instance that can be reached",
    ),
    usage("type.missing", "--type is empty", "run 'gemma2tool formats' and choose a type"),
    usage(
        "type.unknown",
        "the output format has no such type",
        "run 'gemma2tool formats' and choose one of the types it lists",
    ),
)
