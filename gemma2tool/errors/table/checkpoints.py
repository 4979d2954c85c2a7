"""Checkpoints: their tensors, the formats that hold them, adapters."""

from __future__ import annotations

from gemma2tool.errors.entry import refused, usage

_ADAPTER = "check that the adapter was trained on this model"
_DOWNLOAD = "the checkpoint is damaged or incomplete: download it again"

ENTRIES = (
    refused(
        "checkpoint.dtype",
        "a tensor has a dtype that unquantized weights never have",
        "save the weights as float32, float16 or bfloat16; codes of a quantization need their scales and the"
        " quantization_config of the library that wrote them",
    ),
    refused(
        "checkpoint.empty-tensor",
        "tensors have the shape (0,), as DeepSpeed ZeRO-3 and FSDP save the ones that they have not gathered",
        "save gathered weights: zero_to_fp32.py or stage3_gather_16bit_weights_on_model_save of DeepSpeed,"
        " FULL_STATE_DICT of FSDP",
    ),
    refused(
        "checkpoint.missing-tensor",
        "tensors that the config requires are missing",
        "the checkpoint is incomplete: download it again, or check num_hidden_layers in its config",
    ),
    refused(
        "checkpoint.other-model",
        "the checkpoint lacks two kinds of tensors that a Gemma 2 has in every layer: it is a different model",
        "only Gemma 2 (2B, 9B, 27B and models of their architecture) can be read",
    ),
    refused(
        "checkpoint.repeated-tensor",
        "two files of the checkpoint hold the same tensor",
        "remove the file that does not belong to the checkpoint",
    ),
    refused(
        "checkpoint.several-models",
        "a file holds the weights of several models",
        "save the one that you want with torch.save or safetensors",
    ),
    refused(
        "checkpoint.shape",
        "a tensor's shape differs from what the config requires",
        "the config contradicts the weights: pass the right one with --config",
    ),
    refused(
        "checkpoint.unexpected-tensor",
        "the checkpoint contains tensors that a Gemma 2 with this config does not have",
        "pass the config of these weights with --config; only plain Gemma 2 models can be read",
    ),
    refused(
        "checkpoint.unmerged-adapter",
        "the state dict contains an adapter that is not merged into the weights",
        "load it with peft and save what merge_and_unload() returns",
    ),
    refused(
        "checkpoint.untied-head",
        "the output matrix differs from the embedding, but the config ties them",
        "set tie_word_embeddings to false in the config if the head was trained separately, otherwise remove it",
    ),
    refused(
        "format.mismatch",
        "programs that read the format would compute something other than this model",
        "choose a different format, or write it anyway with --allow-mismatch",
    ),
    refused(
        "format.no-place", "the format cannot hold one of the tensors", "write a Hugging Face folder instead: --to hf"
    ),
    usage(
        "format.type",
        "the format cannot hold the quantization type",
        "run 'gemma2tool formats' for the types of each format",
    ),
    refused(
        "gemma-pytorch.no-place",
        "the format cannot hold one of the tensors",
        "write a Hugging Face folder instead: --to hf",
    ),
    refused("gemma-pytorch.scaler", "int8 codes and their scales do not match", _DOWNLOAD),
    refused("gemma-pytorch.state-dict", "the file holds no model_state_dict", "give a Gemma 2 .ckpt"),
    usage(
        "gemma-pytorch.type",
        "the format cannot hold the quantization type",
        "choose a .gguf file or a Hugging Face folder",
    ),
    refused("hf.no-weights", "the folder has no weights", "download the weights"),
    refused(
        "keras.archive",
        "a .keras archive, not a preset",
        "unzip it into a folder of its own and pass the folder, or save a preset: model.save_to_preset(...)",
    ),
    refused(
        "keras.backbones",
        "the file holds the weights of two backbones",
        "save one of them: model.backbone.save_to_preset(...)",
    ),
    refused(
        "keras.config",
        "the preset is not a Gemma 2 backbone",
        "use a preset with a Gemma 2 backbone: no other is supported",
    ),
    refused(
        "keras.quantized",
        "the weights use an unsupported quantization",
        "pass the unquantized preset, or one quantized to int8 or int4",
    ),
    refused(
        "keras.scales",
        "the scales of an int8 or int4 weight do not match it",
        "the file is damaged or was not saved by Keras: download it again",
    ),
    usage(
        "lora.base",
        "the config of the adapter's base model is not known",
        "pass it with --config FILE, or --config 2b for a released model",
    ),
    refused("lora.config", "adapter_config.json has an unknown structure or a setting that cannot be merged", _ADAPTER),
    refused("lora.dora", "the adapter's weights contradict its use_dora", _ADAPTER),
    refused("lora.empty", "the folder holds no adapter weights", "download the adapter again"),
    refused(
        "lora.gguf",
        "the adapter contains more than a llama.cpp LoRA adapter can hold, or more than llama.cpp applies",
        "merge it: gemma2tool convert MODEL OUT.gguf --lora ADAPTER",
    ),
    refused(
        "lora.kind",
        "the adapter is not LoRA",
        "merge the adapter with the library that trained it, then convert the merged model",
    ),
    refused(
        "lora.missing",
        "the adapter's folder, or its weights, do not exist",
        "pass the folder that contains adapter_config.json",
    ),
    refused("lora.name", "a tensor of the adapter is not named as peft names it", _ADAPTER),
    refused(
        "lora.option",
        "adapter_config.json sets an option that is unknown or cannot be merged",
        "merge the adapter with the library that trained it, then convert the merged model",
    ),
    refused("lora.part", "a pair of LoRA matrices is incomplete", _ADAPTER),
    refused(
        "lora.pattern",
        "target_modules is a pattern that is not supported, or whose matching might not end",
        "list the modules by name",
    ),
    refused("lora.rank", "the rank of the matrices differs from the config's", _ADAPTER),
    usage("lora.scale", "the adapter's scale is not a finite number", "pass a finite number, such as --lora DIR=0.5"),
    refused("lora.shape", "the adapter's shapes do not fit the model", _ADAPTER),
    refused("lora.target", "the adapter changes weights that the model does not have", _ADAPTER),
    refused(
        "maxtext.converter",
        "maxtext_converter in config.json is not the name of one of MaxText's converters",
        "write convert_gemma2_chkpt or to_maxtext, or remove it",
    ),
    refused(
        "maxtext.layers",
        "MaxText stores layers in pairs, and the model has an odd number",
        "choose a different format with --to",
    ),
    refused(
        "mlx.config",
        "the kind of MLX quantization is not supported",
        "use affine quantization, mxfp4, mxfp8 or nvfp4",
    ),
    refused(
        "orbax.adapter",
        "a saved state contains a LoRA adapter, alone or beside the model",
        "merge it into the model (peft.fuse_params, MaxText's to_huggingface.py), and save the result",
    ),
    refused("orbax.broken", "a part of an array is damaged", _DOWNLOAD),
    refused(
        "orbax.compressor",
        "an array uses an unsupported compressor",
        "save it again with Orbax's default settings",
    ),
    refused("orbax.dtype", "an array does not hold floating-point values", "check that it is a Gemma 2 checkpoint"),
    refused("orbax.expands", "a small file would expand to far more bytes than weights ever do", _DOWNLOAD),
    refused("orbax.link", "the checkpoint contains a symbolic link", "replace the link with a copy"),
    refused(
        "orbax.metadata",
        "the metadata of an array is damaged or of an unsupported kind",
        "download the checkpoint again, or save it with Orbax's default settings",
    ),
    refused("orbax.missing", "the folder contains no Orbax checkpoint", "pass the checkpoint's folder"),
    refused(
        "orbax.models",
        "a saved state contains several models",
        "save the parameters of one of them as a checkpoint",
    ),
    refused("orbax.missing-chunk", "a part of an array is missing", _DOWNLOAD),
    refused("orbax.quantized", "a saved state contains quantized weights", "pass the unquantized checkpoint"),
    refused("orbax.shape", "the shape or the chunks of an array are impossible", _DOWNLOAD),
    refused("orbax.steps", "the folder holds several checkpoints", "pass the folder of one of them"),
    refused("orbax.too-many-arrays", "the checkpoint has more arrays than the limit allows", _DOWNLOAD),
    refused("orbax.too-many-chunks", "the arrays have more chunks than the limit allows", _DOWNLOAD),
    refused("orbax.too-many-files", "the checkpoint has more files than the limit allows", _DOWNLOAD),
    refused(
        "orbax.unfinished",
        "the folder is a checkpoint that was not saved completely",
        "pass the folder of an earlier step, or save the checkpoint again",
    ),
)
