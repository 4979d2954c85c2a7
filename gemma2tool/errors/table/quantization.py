"""Quantization: files that are quantized already, types, calibration, importance matrices."""

from __future__ import annotations

from gemma2tool.errors.entry import refused, usage

_DOWNLOAD = (
    "the file is damaged or was not written by the library it names: download it again, or quantize the original again"
)
_IMATRIX = "create the importance matrix again with llama-imatrix"

ENTRIES = (
    refused(
        "quantization.unlabelled",
        "the weights are quantized, but config.json does not say how",
        "use the config.json that came with the quantized weights, or the weights that they were made from",
    ),
    refused(
        "auto-round.format",
        "AutoRound's packing_format is not supported",
        "export with --format auto_gptq, auto_awq or llm_compressor",
    ),
    refused("awq.config", "the AWQ layout or number of bits is not supported", 'use 4 bits in the layout "gemm"'),
    refused("bnb.quant-map", "the values of a quant_map are not those of its type", _DOWNLOAD),
    refused(
        "bnb.saved-after-forward",
        "bitsandbytes saved the model after a forward pass on CPU, which rearranged its scales",
        "libraries load it and compute wrong values: quantize again and save before the first forward pass",
    ),
    refused("bnb.state", "a quant_state is damaged or contradicts its tensor", _DOWNLOAD),
    refused(
        "bnb.weight-format",
        "int8 rows are tiled for one GPU generation",
        "load and save it again with a current bitsandbytes",
    ),
    usage("calibration.hessian-block", "the Hessian blocks would split groups", "use a multiple of the group size"),
    usage(
        "calibration.length",
        "calibration sequences are longer than the model's context",
        "use a smaller --calibration-length",
    ),
    refused(
        "calibration.nonfinite",
        "the model computes NaN or infinities from the calibration text",
        "check the weights: gemma2tool check SRC",
    ),
    usage(
        "calibration.short",
        "the text is shorter than one sequence",
        "pass a longer text, or a smaller --calibration-length",
    ),
    usage(
        "calibration.type",
        "this type cannot be calibrated",
        "choose a type that can be calibrated, or remove --calibration",
    ),
    usage(
        "hessians.calibration",
        "both a calibration text and a file of Hessians are given",
        "leave out one of the two",
    ),
    refused(
        "hessians.damaged",
        "the file is damaged, or is not a file of Hessians",
        "collect it with gemma2tool calibrate --hessians",
    ),
    usage(
        "hessians.folding",
        "the method changes the inputs of matrices, which a file of Hessians cannot follow",
        "leave out --calibration-method, or pass the text with --calibration instead of --hessians",
    ),
    refused(
        "hessians.other-model",
        "the Hessians were collected from a different model",
        "collect them for this model with gemma2tool calibrate --hessians",
    ),
    refused(
        "compressed.config", "the compressed-tensors scheme is not supported", "use one scheme for the whole model"
    ),
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
    refused("gptq.config", "the GPTQ format or number of bits is not supported", "use 4 or 8 bits in gptq or gptq_v2"),
    refused("gptq.g-idx", "g_idx names a group that does not exist", _DOWNLOAD),
    refused(
        "gptq.mislabelled",
        "zero points do not follow the convention that the config states",
        "libraries load this without an error and compute wrong values: correct checkpoint_format in config.json",
    ),
    refused(
        "gptq.symmetric",
        "zero points differ from group to group, but the config says sym true",
        "vLLM would ignore them and compute wrong values: set sym to false in config.json",
    ),
    usage(
        "imatrix.calibration", "both an importance matrix and a calibration text are given", "leave out one of the two"
    ),
    refused(
        "hqq.layout",
        "the HQQ layout is not supported",
        "load the model with hqq, dequantize it and save it again",
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
        "create an importance matrix of this model, or choose a different type for the tensor with --tensor-type",
    ),
    usage("imatrix.needed", "the type needs an importance matrix", "pass one with --imatrix, or choose a larger type"),
    usage(
        "imatrix.none", "options that apply to an importance matrix are given without one", "pass one with --imatrix"
    ),
    refused("imatrix.not-finite", "an entry holds NaN, infinities or negative numbers", _IMATRIX),
    usage("imatrix.short", "the text is shorter than one chunk", "pass a longer text, or a smaller --chunk"),
    refused(
        "imatrix.size",
        "an entry's length differs from the number of columns of its tensor",
        "use the importance matrix of this model",
    ),
    refused(
        "imatrix.zero",
        "an entry is zero for a whole group of columns",
        "create the importance matrix from more text, or exclude the tensor with --exclude-weights",
    ),
    refused("packing.group-size", "the group size does not divide the weights", _DOWNLOAD),
    refused("packing.missing-part", "a part of a quantized weight is missing", _DOWNLOAD),
    refused("packing.part-shape", "a part of a quantized weight has the wrong shape", _DOWNLOAD),
    refused("packing.part-type", "a part of a quantized weight has the wrong type", _DOWNLOAD),
    refused("packing.stray-part", "codes belong to no quantized weight", _DOWNLOAD),
    refused("packing.unknown", "quant_method is unknown", "use one of the methods that 'gemma2tool formats' lists"),
    usage(
        "quantize.block",
        "the row length is not a multiple of the type's block size",
        "choose a different type for the tensor",
    ),
    usage(
        "quantize.double-quant",
        "--double-quant has no effect for the type",
        "choose nf4 or fp4, or remove --double-quant",
    ),
    usage(
        "quantize.group-size",
        "the columns do not divide into groups, or the type has none",
        "choose a different --group-size",
    ),
    refused(
        "quantize.nonfinite",
        "NaN or infinite weights cannot be quantized",
        "use a different copy of the checkpoint",
    ),
    usage(
        "quantize.nothing",
        "no weight would be quantized",
        "change --skip and --only, which exclude every weight",
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
        "the rows or columns of a weight are not a multiple of the type's block",
        "choose a different --type, or --skip the weight",
    ),
    usage(
        "quantize.type",
        "the type does not exist for Hugging Face folders",
        "run 'gemma2tool formats' and choose a type",
    ),
    usage("quantize.unknown-type", "the type does not exist in GGUF", "run 'gemma2tool formats' and choose a type"),
    refused(
        "torchao.layout",
        "the torchao layout is not supported",
        "load the model with torchao, dequantize it and save it again",
    ),
)
