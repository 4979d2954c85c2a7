"""What a command or call asks for: options, outputs, receipts and reports."""

from __future__ import annotations

from gemma2tool.errors.entry import refused, resource, usage

ENTRIES = (
    usage("clean.path", "the path given to clean cannot be an output", "name the output, or the folder that it is in"),
    resource("device.missing", "torch cannot use the device that --device names", "use --device cpu"),
    usage("engine.format", "the engine does not load checkpoints of this format", "choose one that the hint names"),
    usage("engine.missing", "the engine that --engine names is not installed", "install it as the hint says"),
    usage("engine.prompt", "an engine is given several prompts", "pass one prompt, or a shorter text"),
    usage("engine.unknown", "--engine names an unknown engine", "choose one of those that the hint lists"),
    usage(
        "extra.missing",
        "the format needs a library that is not installed",
        "run the command of the hint, such as pip install 'zstandard>=0.22'",
    ),
    usage("format.unknown", "--to names an unknown format", "run 'gemma2tool formats' and choose one of its list"),
    usage("gate.unknown", "--gate names an unknown gate", "choose one of the gates that the hint lists"),
    usage("gate.contradiction", "two gates contradict each other, or one cannot be met", "give one limit of each gate"),
    usage("gate.value", "a gate is not written as name=number", "write for example --gate kl=0.05"),
    usage("option.choice", "the option does not have this value", "choose one that --help lists"),
    usage("option.device", "--device is not the name of a device", "choose cpu, cuda or cuda:1"),
    usage("option.dtype", "the output format cannot hold the type that --dtype names", "choose another --dtype"),
    usage(
        "option.ignored",
        "an option has no effect for this output or beside another option",
        "leave out one of the two, or choose an output that takes the option",
    ),
    usage("option.lora", "--lora is not a folder, alone or with =SCALE", "write --lora DIR or --lora DIR=0.5"),
    usage(
        "option.pair",
        "the value of an option that takes KEY=VALUE pairs has another form",
        "write it as the hint shows",
    ),
    usage("option.prompts", "several options each give a prompt", "give only one of them"),
    usage("option.regex", "--match is not a regular expression", "write for example --match 'layers.0.mlp'"),
    usage("option.size", "a size is not a number with a unit", "write it like 512MiB or 5GB"),
    usage(
        "output.appeared",
        "something was put at the destination, or changed there, while the run was writing its replacement",
        "look at it, then repeat the command with --force, or choose another name",
    ),
    usage("output.exists", "the destination exists", "choose another name, or replace it with --force"),
    usage("output.is-input", "the destination is an input, or contains one", "choose another destination"),
    usage("output.kind", "the output format needs a file where a folder is named, or the reverse", "rename the output"),
    usage("output.link", "the destination is a symbolic link", "remove the link, or name the file it points to"),
    resource("output.locked", "another process is writing this output", "wait until it ends, or stop it"),
    usage("output.name", "the destination is not a name for an output", "name a file or a folder"),
    usage("output.name-too-long", "the file system does not accept so long a name", "choose a shorter name"),
    resource(
        "output.no-locks",
        "the destination's file system cannot lock files",
        "write to another disk and move the output",
    ),
    usage("output.no-parent", "the folder that the destination goes into does not exist", "create it with mkdir -p"),
    usage(
        "output.not-a-checkpoint",
        "--force would replace a folder that contains no checkpoint",
        "choose another name, or remove the folder yourself",
    ),
    resource("output.not-writable", "the destination's folder is not writable", "choose a folder you may write to"),
    resource(
        "output.staging", "staged output could not be created, moved or removed", "remove it by hand and run again"
    ),
    usage("output.twice", "two outputs of one run have the same name", "name each output differently"),
    resource("output.unwritable", "the standard output could not be written", "free some space, or write elsewhere"),
    refused(
        "receipt.contradiction",
        "the receipt contradicts itself",
        "do not trust the receipt; verify the output against its source with --reference",
    ),
    usage(
        "receipt.exists",
        "a file that is not a receipt has the name that the receipt needs",
        "move it, choose another name for the output, or write no receipt with --no-receipt",
    ),
    usage(
        "receipt.missing",
        "the output has no receipt beside it, and no reference was given",
        "name the checkpoint it was made from with --reference, or a receipt with --against",
    ),
    refused("receipt.schema", "the file is not a receipt", "give the file that gemma2tool wrote beside the output"),
    refused(
        "receipt.version",
        "the receipt has a version that this gemma2tool does not know",
        "use the gemma2tool that wrote it, or a newer one",
    ),
    usage("report.folder", "a report would be written to a folder", "name a file"),
    usage(
        "report.other-file",
        "a report would replace or be appended to a file that is not a report of its kind",
        "name another file, or remove this one",
    ),
    usage("report.same", "a report has the name of another file that is written", "name two files"),
    resource("report.unwritable", "a report could not be written", "name a file that can be written"),
    usage(
        "resume.mismatch",
        "an unfinished run at the destination had other inputs or options",
        "repeat that run unchanged, start over with --restart, or remove it with 'gemma2tool clean'",
    ),
    refused(
        "signature.files",
        "what is to be signed holds a link or a special file",
        "copy the files to a folder of their own, as with 'cp -rL', and sign that one",
    ),
    refused(
        "signature.identity",
        "there is no identity to sign with, or Sigstore does not accept it",
        "run it in a terminal or in a CI job that may ask for an identity, or set SIGSTORE_IDENTITY_TOKEN",
    ),
    refused(
        "signature.key",
        "a key or certificate cannot be used, or is of another kind than is needed",
        "name a PEM file: an elliptic-curve private key to sign, its public key or certificate to verify",
    ),
    refused(
        "signature.receipt",
        "the output to sign is not what the receipt beside it describes",
        "verify the output; to sign it without its receipt, move the receipt away",
    ),
    refused(
        "signature.trust",
        "the file that --trust-config names is not a trust configuration of Sigstore",
        "name a client trust configuration (JSON), or leave out --trust-config",
    ),
    resource(
        "signature.unreachable",
        "Sigstore's services or its roots of trust could not be reached",
        "check the network, or name a Sigstore that can be reached with --trust-config",
    ),
    usage("type.missing", "--type names no type", "run 'gemma2tool formats' and choose a type"),
    usage("type.unknown", "the output format has no such type", "run 'gemma2tool formats' and choose a type it lists"),
)
