"""The libraries that define safetensors, GGUF and bitsandbytes' types read a checkpoint, and what they find is compared
with what gemma2tool's own reader finds.

A mistake that gemma2tool's reader and writer share (both transpose, both swap the two codes of a byte) cancels out in
every other comparison. Here the values come from the library, by its own dequantization, and under the names of its own
table.
"""
