"""Quantization: files that are quantized already, types, calibration, importance matrices."""

from __future__ import annotations

from gemma2tool.errors.entry import refused, usage

_DOWNLOAD = (
    "the file is damaged or was not written by the library it names: download it again, or quantize the original again"
)
_IMATRIX = "make the importance matrix again with llama-imatrix"

ENTRIES = (
    refused(
        "quantization.unlabelled",
        "the weights are quantized, and config.json does not say how",
        "give the config.json that the quantized weights came with, or the weights that they were made from",
    ),
    refused("awq.config", "the AWQ layout or number of bits is not read", 'use 4 bits in the layout "gemm"'),
    refused("bnb.quant-map", "the values of a quant_map are not those of its type", _DOWNLOAD),
    refused(
        "bnb.saved-after-forward",
        "bitsandbytes saved the model after a forward pass on CPU, which rearranged its scales",
        "libraries load this and compute wrong values: quantize again and save before the first forward pass",
    ),
    refused("bnb.state", "a quant_state is damaged or contradicts its tensor", _DOWNLOAD),
    refused(
        "bnb.weight-format",
        "int8 rows are tiled for one GPU generation",
        "load and save it again with a current bitsandbytes",
    ),
    usage("calibration.hessian-block", "Hessian blocks would split groups", "use a multiple of the group size"),
    usage(
        "calibration.length",
        "calibration sequences are longer than the model's positions",
        "use a smaller --calibration-length",
    ),
    refused(
        "calibration.nonfinite",
        "the model computes NaN or infinities from the calibration text",
        "check the weights: gemma2tool check SRC",
    ),
    usage(
        "calibration.short",
        "the text does not fill one sequence",
        "give a longer text, or a smaller --calibration-length",
    ),
    usage(
        "calibration.type",
        "no calibration exists for this type",
        "choose a type that can be calibrated, or leave out --calibration",
    ),
    refused("compressed.config", "the compressed-tensors scheme is not read", "use one scheme for the whole model"),
    refused("compressed.order", "the order of columns names a group that does not exist", _DOWNLOAD),
    refused(
        "compressed.uncalibrated",
        "the scales of the activations were never calibrated",
        "quantize again with calibration data, or with dynamic activations (fp8-dynamic)",
    ),
    refused(
        "gptq.act-order",
        "groups are in act-order, but the config says desc_act false",
        "vLLM would ignore the order and compute wrong values: set desc_act to true in config.json",
    ),
    refused("gptq.config", "the GPTQ format or number of bits is not read", "use 4 or 8 bits in gptq or gptq_v2"),
    refused("gptq.g-idx", "g_idx names a group that does not exist", _DOWNLOAD),
    refused(
        "gptq.mislabelled",
        "zero points are stored in another convention than the config says",
        "libraries load this without an error and compute wrong values: correct checkpoint_format in config.json",
    ),
    refused(
        "gptq.symmetric",
        "zero points differ from group to group, but the config says sym true",
        "vLLM would ignore them and compute wrong values: set sym to false in config.json",
    ),
    usage(
        "imatrix.calibration", "an importance matrix and a calibration text are both given", "leave out one of the two"
    ),
    refused("imatrix.damaged", "the file is not an importance matrix", _IMATRIX),
    refused("imatrix.empty", "the importance matrix has no entries", _IMATRIX),
    usage(
        "imatrix.include-exclude", "--include-weights and --exclude-weights are both given", "leave out one of the two"
    ),
    refused("imatrix.kind", "the GGUF is not an importance matrix", "pass a file that llama-imatrix wrote"),
    refused(
        "imatrix.missing-entry",
        "the importance matrix has no entry for a tensor whose type needs one",
        "make the importance matrix from this model, or give the tensor another type with --tensor-type",
    ),
    usage("imatrix.needed", "the type needs an importance matrix", "pass one with --imatrix, or choose a larger type"),
    usage(
        "imatrix.none", "options that select from an importance matrix are given without one", "pass one with --imatrix"
    ),
    refused("imatrix.not-finite", "an entry holds NaN, infinities or negative numbers", _IMATRIX),
    usage("imatrix.short", "the text does not fill one chunk", "give a longer text, or a smaller --chunk"),
    refused(
        "imatrix.size",
        "an entry has another length than its tensor has columns",
        "use the importance matrix of this model",
    ),
    refused(
        "imatrix.zero",
        "an entry is zero for a whole group of columns",
        "make the importance matrix from more text, or leave the tensor out with --exclude-weights",
    ),
    refused("packing.group-size", "the group size does not fit the weights", _DOWNLOAD),
    refused("packing.missing-part", "a part of a quantized weight is missing", _DOWNLOAD),
    refused("packing.part-shape", "a part of a quantized weight has the wrong shape", _DOWNLOAD),
    refused("packing.part-type", "a part of a quantized weight has the wrong type", _DOWNLOAD),
    refused("packing.stray-part", "codes belong to no quantized weight", _DOWNLOAD),
    refused("packing.unknown", "quant_method is unknown", "use one of the methods that 'gemma2tool formats' lists"),
    usage("quantize.block", "rows do not divide into the blocks of the type", "choose another type for the tensor"),
    usage("quantize.double-quant", "--double-quant has no effect for the type", "choose nf4 or fp4, or leave it out"),
    usage(
        "quantize.group-size",
        "the columns do not divide into groups, or the type has none",
        "choose another --group-size",
    ),
    refused(
        "quantize.nonfinite",
        "NaN or infinite weights cannot be quantized",
        "use another copy of the checkpoint",
    ),
    usage(
        "quantize.nothing",
        "no weight would be quantized",
        "change --skip and --only, which leave no weight to the type",
    ),
    usage(
        "quantize.pattern",
        "a pattern is not a regular expression, or matches nothing",
        "correct the pattern, or leave it out",
    ),
    usage(
        "quantize.requantize",
        "the weights are quantized already, and quantizing them again compounds the loss",
        "start from the original weights, or pass --allow-requantize",
    ),
    usage(
        "quantize.shape",
        "the rows or columns of a weight do not fit the type",
        "choose another --type, or --skip the weight",
    ),
    usage("quantize.type", "a Hugging Face folder has no such type", "run 'gemma2tool formats' and choose a type"),
    usage("quantize.unknown-type", "GGUF has no such type", "run 'gemma2tool formats' and choose a type"),
    refused(
        "torchao.layout",
        "the torchao layout is not read",
        "load the model with torchao, dequantize it and save it again",
    ),
)
