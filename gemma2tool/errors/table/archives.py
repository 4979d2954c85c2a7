"""Files that are archives or trees: torch's zip and pickle, HDF5, OCDBT, gemma.cpp's blobs."""

from __future__ import annotations

from gemma2tool.errors.entry import refused

_DOWNLOAD = "the file is damaged or incomplete: download it again"
_KERAS = "the file is damaged or was not saved by Keras: download it again"
_PICKLE = "save the tensors alone, as a state dict, with torch.save; nothing of this file was executed"
_TORCH = "the file is damaged or was not written by torch.save: download it again, or save it again with torch.save"
_OCDBT = "the checkpoint is damaged or incomplete: download it again"

ENTRIES = (
    refused("hdf5.broken", "a structure of the file is cut off or contradicts itself", _KERAS),
    refused("hdf5.checksum", "a checksum does not match", _KERAS),
    refused("hdf5.cycle", "groups are nested too deep or contain themselves", _KERAS),
    refused(
        "hdf5.dense",
        "a group stores its links in a fractal heap, which is not supported",
        "save it again with a current Keras",
    ),
    refused("hdf5.dtype", "an array does not hold floating-point values", "check that the file is a Gemma 2 model"),
    refused("hdf5.duplicate-name", "a group holds a name twice", _KERAS),
    refused("hdf5.empty", "an array has no values", _KERAS),
    refused("hdf5.extent", "the values of an array lie outside the file", _KERAS),
    refused("hdf5.external", "an array keeps its values in another file", "save it again with Keras, in one file"),
    refused("hdf5.link", "a group holds a soft or external link", "save it again with Keras"),
    refused("hdf5.magic", "the file is not HDF5", _KERAS),
    refused("hdf5.name", "a name is not UTF-8 or not plain", _KERAS),
    refused("hdf5.object", "an object is neither a group nor an array", _KERAS),
    refused("hdf5.overflow", "the shape of an array overflows", _KERAS),
    refused("hdf5.overlap", "two arrays overlap", _KERAS),
    refused("hdf5.superblock", "the superblock version is not supported", _KERAS),
    refused("hdf5.too-many-objects", "the file has more objects than are accepted", _KERAS),
    refused("hdf5.truncated", "the file is shorter than its superblock says", _KERAS),
    refused("ocdbt.checksum", "a checksum does not match", _OCDBT),
    refused("ocdbt.compression", "a node cannot be decompressed", _OCDBT),
    refused("ocdbt.extent", "a reference lies outside its file", _OCDBT),
    refused("ocdbt.key", "the keys of a node are not in order", _OCDBT),
    refused("ocdbt.length", "a node's length differs from its header", _OCDBT),
    refused("ocdbt.link", "the database contains a symbolic link", "replace the link with a copy"),
    refused("ocdbt.magic", "a file of the database is not OCDBT", _OCDBT),
    refused("ocdbt.manifest", "the kind of manifest is not supported", _OCDBT),
    refused("ocdbt.path", "the database refers to a file outside its folder, or its table of files is broken", _OCDBT),
    refused("ocdbt.too-large", "the tree is larger than is accepted", _OCDBT),
    refused("ocdbt.too-many-entries", "the database has more keys than are accepted", _OCDBT),
    refused("ocdbt.too-many-files", "a node refers to more files than are accepted", _OCDBT),
    refused("ocdbt.tree", "the tree of nodes contradicts itself", _OCDBT),
    refused("ocdbt.truncated", "a manifest or node ends too early", _OCDBT),
    refused("ocdbt.version", "a file of the database is of an unknown version or compression", _OCDBT),
    refused("pickle.duplicate-key", "a dictionary has a key twice", _PICKLE),
    refused("pickle.global", "the pickle names a function or class that a file of tensors does not need", _PICKLE),
    refused("pickle.key", "the key of a dictionary is not text", _PICKLE),
    refused("pickle.memo", "the pickle recalls an object that it did not store", _PICKLE),
    refused("pickle.opcode", "the pickle has an opcode that torch.save does not write for tensors", _PICKLE),
    refused("pickle.protocol", "the pickle is not of the protocols 2 to 5", _PICKLE),
    refused("pickle.reduce", "the pickle calls something that a file of tensors does not need", _PICKLE),
    refused(
        "pickle.sharded",
        "the file holds one rank's part of tensors that a training run has sharded",
        "save whole tensors: full_tensor() of each, or get_model_state_dict with full_state_dict=True",
    ),
    refused("pickle.stack", "the pickle takes from an empty stack", _PICKLE),
    refused("pickle.stop", "the pickle ends with objects or bytes left over", _PICKLE),
    refused("pickle.storage", "the pickle refers to something that is not a storage", _PICKLE),
    refused("pickle.tensor", "a tensor is described in an unknown way", _PICKLE),
    refused("pickle.too-large", "the pickle has more steps or objects than are accepted", _PICKLE),
    refused("pickle.truncated", "the pickle ends early", _PICKLE),
    refused("pickle.type", "the pickle uses an object of the wrong type", _PICKLE),
    refused("pickle.utf8", "a text of the pickle is not UTF-8", _PICKLE),
    refused(
        "sbs.config", "the file does not describe a Gemma 2", "use a Gemma 2 file: no other architecture is supported"
    ),
    refused("sbs.contents", "the table of contents is incomplete or names a blob that is missing", _DOWNLOAD),
    refused("sbs.duplicate-key", "a blob appears twice", _DOWNLOAD),
    refused("sbs.extent", "a blob does not begin where the one before it ends", _DOWNLOAD),
    refused("sbs.key", "a blob has an impossible name", _DOWNLOAD),
    refused("sbs.magic", "the file does not begin with SBS", _DOWNLOAD),
    refused("sbs.record", "a record is cut off or has impossible values", _DOWNLOAD),
    refused("sbs.tensor", "a blob is unknown, or a tensor is missing or stored twice", _DOWNLOAD),
    refused("sbs.too-large", "a blob is larger than one of its kind may be", _DOWNLOAD),
    refused("sbs.too-many-blobs", "the file claims more blobs than are accepted", _DOWNLOAD),
    refused("sbs.truncated", "the file has no directory at its end, or ends within it", _DOWNLOAD),
    refused(
        "sbs.type", "a tensor has a gemma.cpp type that is not supported", "use a file of type sfp, bf16, f32 or nuq"
    ),
    refused("torch.archive", "the archive is not laid out as torch.save does", _TORCH),
    refused("torch.bounds", "a tensor reaches beyond its storage", _TORCH),
    refused(
        "torch.byteorder", "the file was saved on a big-endian machine", "save it again on a little-endian machine"
    ),
    refused("torch.crc", "the CRC-32 of a member does not match", _TORCH),
    refused(
        "torch.legacy",
        "a pickle without an archive is not what torch wrote before version 1.6, or is damaged",
        "load it with torch.load(path, weights_only=True) and torch.save it again",
    ),
    refused(
        "torch.not-a-dict", "the file holds no dictionary of tensors", "save the model's state_dict with torch.save"
    ),
    refused(
        "torch.not-zip", "torch.save did not write this file", "give a .ckpt, .pt, .pth or .bin file of torch.save"
    ),
    refused("torch.overflow", "the shape of a tensor overflows", _TORCH),
    refused("torch.storage-missing", "the storage of a tensor is not in the file", _TORCH),
    refused("torch.storage-size", "a storage's size differs from what the pickle says", _TORCH),
    refused("torch.stride", "a tensor repeats elements (stride 0)", "save contiguous tensors with torch.save"),
    refused(
        "torch.strides", "a tensor is not stored row after row", "save the state dict again with contiguous tensors"
    ),
    refused(
        "torch.too-large", "a member of the archive, or the nesting of its objects, is larger than is accepted", _TORCH
    ),
    refused("torch.too-many-tensors", "the file has more tensors than are accepted", _TORCH),
    refused("torch.torchscript", "the file is a TorchScript program", "save its state_dict with torch.save"),
    refused("zip.compressed", "a member is compressed", "save it again with torch.save, which does not compress"),
    refused("zip.directory", "the central directory contradicts the archive", _TORCH),
    refused("zip.duplicate-member", "a member appears twice", _TORCH),
    refused("zip.encrypted", "a member is encrypted", _TORCH),
    refused("zip.end", "the archive does not end with its end record: it is truncated, or bytes were appended", _TORCH),
    refused("zip.extra", "a member has broken extra fields", _TORCH),
    refused("zip.gap", "bytes between two members belong to no member", _TORCH),
    refused("zip.local-header", "a local header is missing or contradicts the directory", _TORCH),
    refused("zip.member-name", "a member's name is not plain text", _TORCH),
    refused(
        "zip.multi-disk", "the file is one part of an archive in several parts", "join the parts, or save it again"
    ),
    refused("zip.overlap", "two members overlap", _TORCH),
    refused("zip.past-end", "a member extends past the members' part of the file", _TORCH),
    refused("zip.size", "a member has an impossible size", _TORCH),
    refused("zip.too-many-members", "the archive claims more members than the limit allows", _TORCH),
    refused("zip.truncated", "the file is too short for a zip archive", _TORCH),
    refused("zip.zip64", "the zip64 records are missing or contradict the archive", _TORCH),
)
