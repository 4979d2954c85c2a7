"""Files with a header: safetensors, GGUF, JSON, YAML."""

from __future__ import annotations

from gemma2tool.errors.entry import refused, usage

_DOWNLOAD = "the file is not a valid GGUF: download it again, or convert the model again"
_JSON = "correct the file, or download it again"
_YAML = "download the checkpoint again"
_SAFETENSORS = "the file is damaged or was not written by safetensors: download it again"
_KIND = "check that the file is a Gemma 2 model"

ENTRIES = (
    refused("gguf.alignment", "general.alignment is not a power of two within the limit", _DOWNLOAD),
    refused(
        "gguf.architecture",
        "general.architecture is not gemma2",
        "use a Gemma 2 model: no other architecture is supported",
    ),
    refused("gguf.array-length", "an array claims more elements than fit in the file", _DOWNLOAD),
    refused("gguf.array-type", "an array has elements of an unknown type, or arrays", _DOWNLOAD),
    refused(
        "gguf.big-endian",
        "the file is big-endian",
        "convert it with 'gguf-convert-endian FILE little' of the gguf package",
    ),
    refused("gguf.block", "the rows of a tensor do not divide into the blocks of its type", _DOWNLOAD),
    refused("gguf.bool", "a truth value is neither 0 nor 1", _DOWNLOAD),
    refused(
        "gguf.cannot-say",
        "GGUF cannot represent the model's config",
        "write a Hugging Face folder instead, or pass --allow-mismatch to write a GGUF that computes something else",
    ),
    refused("gguf.dims", "a tensor has too many dimensions", _DOWNLOAD),
    usage("gguf.dtype", "a GGUF cannot be converted to the type that --dtype names", "choose f32, f16 or bf16"),
    usage("gguf.dtype-and-type", "both --dtype and --type are given for a GGUF source", "leave out --dtype"),
    refused("gguf.duplicate-key", "a key appears twice", _DOWNLOAD),
    refused("gguf.duplicate-tensor", "a tensor appears twice", _DOWNLOAD),
    refused(
        "gguf.embedding", "the file has no token embedding", "pass a file with weights, not a vocabulary-only file"
    ),
    refused("gguf.gap", "bytes between two tensors belong to no tensor", _DOWNLOAD),
    refused("gguf.header-too-large", "the header is larger than the limit", _DOWNLOAD),
    refused("gguf.key", "a key is missing, has the wrong type or an impossible value", _DOWNLOAD),
    refused("gguf.magic", "the file does not begin with GGUF", _DOWNLOAD),
    refused("gguf.name-length", "a name is longer than the limit", _DOWNLOAD),
    refused("gguf.name-utf8", "a name is not UTF-8", _DOWNLOAD),
    usage("gguf.no-type", "quantization options are given without --type", "choose a type, such as --type q4_k_m"),
    refused("gguf.overflow", "the dimensions of a tensor overflow", _DOWNLOAD),
    refused("gguf.overlap", "two tensors overlap", _DOWNLOAD),
    usage(
        "gguf.override",
        "--override-kv is not KEY=TYPE:VALUE",
        "write for example --override-kv gemma2.context_length=int:2048",
    ),
    refused(
        "gguf.past-end", "the tensor data extends past the end of the file", "the file is incomplete: download it again"
    ),
    refused("gguf.range", "a config value does not fit its GGUF key", "correct config.json"),
    refused("gguf.rope-scaling", "the file requests a RoPE scaling that no Gemma 2 has", _KIND),
    refused("gguf.several", "the folder holds no GGUF, or several", "name the file"),
    refused("gguf.split", "the shards do not belong together, or one is missing", "download the shards again"),
    refused("gguf.split-name", "a shard does not have a shard's file name", "give the shards their original names"),
    refused(
        "gguf.tensor-scale",
        "an NVFP4 tensor has a scale of its own, which llama.cpp leaves out",
        "convert the model that the file was made from with --type nvfp4, which needs no such scales",
    ),
    refused("gguf.tensor-shape", "a tensor that is not a matrix is quantized", _KIND),
    refused(
        "gguf.tensor-type",
        "a tensor has an unsupported type",
        "use a file of one of the types that 'gemma2tool formats' lists, or the model that it was made from",
    ),
    refused("gguf.tokenizer", "the tokenizer is not of Gemma's kind, or its lists differ in length", _KIND),
    refused("gguf.too-many-keys", "the file claims more keys than are accepted", _DOWNLOAD),
    refused("gguf.too-many-tensors", "the file claims more tensors than are accepted", _DOWNLOAD),
    refused("gguf.trailing-bytes", "bytes follow the last tensor", _DOWNLOAD),
    refused("gguf.truncated", "the file ends within its header", "the file is incomplete: download it again"),
    refused("gguf.unaligned", "a tensor begins at an unaligned byte", _DOWNLOAD),
    refused("gguf.value-type", "a key has an unknown value type", _DOWNLOAD),
    refused(
        "gguf.version",
        "the file has a GGUF version other than 2 and 3",
        "convert the model again with a current llama.cpp",
    ),
    refused("json.depth", "the JSON is nested too deep", _JSON),
    refused("json.duplicate-key", "an object has a key twice", "remove one of the two"),
    refused("json.nonfinite", "the JSON holds NaN or an infinity", _JSON),
    refused("json.syntax", "the file is not valid JSON", _JSON),
    refused("json.too-large", "the JSON is larger than is accepted", _JSON),
    refused("json.too-many-values", "the JSON has more values than are accepted", _JSON),
    refused("json.utf8", "the JSON is not UTF-8", _JSON),
    refused("safetensors.dtype", "a tensor has an unknown dtype", _SAFETENSORS),
    refused("safetensors.duplicate-key", "the header has a key twice", _SAFETENSORS),
    refused("safetensors.gap", "bytes between two tensors belong to no tensor", _SAFETENSORS),
    refused("safetensors.header-too-large", "the header is larger than the limit", _SAFETENSORS),
    refused("safetensors.header-too-small", "the file is too short for a header", _SAFETENSORS),
    refused("safetensors.invalid-header", "the header is not UTF-8", _SAFETENSORS),
    refused("safetensors.invalid-header-json", "the header is not a JSON object", _SAFETENSORS),
    refused("safetensors.invalid-header-length", "the header is longer than the file", _SAFETENSORS),
    refused("safetensors.invalid-header-start", "the header does not begin with a brace", _SAFETENSORS),
    refused("safetensors.invalid-offset", "the offsets of a tensor are not a range in the file", _SAFETENSORS),
    refused("safetensors.metadata", "the metadata is not a map of text to text", _SAFETENSORS),
    refused("safetensors.misaligned-slice", "a tensor ends within a byte", _SAFETENSORS),
    refused("safetensors.name-too-long", "a tensor has a longer name than is accepted", _SAFETENSORS),
    refused("safetensors.overlap", "two tensors overlap", _SAFETENSORS),
    refused("safetensors.shape", "a tensor's shape is not a list of sizes", _SAFETENSORS),
    refused(
        "safetensors.tensor-fields",
        "the fields of a tensor are not exactly dtype, shape and data_offsets",
        _SAFETENSORS,
    ),
    refused("safetensors.tensor-invalid-info", "a tensor's offsets contradict its shape and dtype", _SAFETENSORS),
    refused("safetensors.too-many-tensors", "the file has more tensors than are accepted", _SAFETENSORS),
    refused("safetensors.trailing-bytes", "bytes follow the last tensor", _SAFETENSORS),
    refused(
        "safetensors.truncated",
        "the tensor data extends past the end of the file",
        "the file is incomplete: download it again",
    ),
    refused("safetensors.validation-overflow", "the shape of a tensor overflows", _SAFETENSORS),
    refused("yaml.alias", "the YAML has an anchor or an alias, which are not read", _YAML),
    refused("yaml.depth", "the YAML is nested too deep", _YAML),
    refused("yaml.syntax", "the file is not valid YAML", _YAML),
    refused("yaml.tag", "the YAML contains a tag, which is not supported", _YAML),
    refused("yaml.too-large", "the YAML is larger than is accepted", _YAML),
)
