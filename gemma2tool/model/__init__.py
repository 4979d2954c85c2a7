"""The canonical model: config, tensor table, lazily loaded tensors. Knows no file format."""
