# Types of the native module. Buffers are passed by address (``array.ctypes.data``; 0 where one is absent); the callers
# own them, and check shapes, dtypes and contiguity. The names of the parameters are those of the *_bind.cpp files.

def available_instruction_sets() -> list[str]: ...
def current_instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...

# casts_bind.cpp
def cast(from_type: str, to_type: str, source: int, target: int, n: int) -> None: ...
def count_nonfinite(type: str, source: int, n: int) -> int: ...

# comparison_bind.cpp
def compare_blocks(
    source: int,
    source_bf16: bool,
    actual: int,
    actual_bf16: bool,
    n: int,
    block: int,
    absmax: int,
    worst: int,
    anchor: int,
) -> tuple[float, float, float, float, int, int, int]: ...
def count_differing(a: int, b: int, size: int, n: int) -> tuple[int, int]: ...

# gguf_bind.cpp
def gguf_set_grid(name: str, coordinates: bytes) -> None: ...
def gguf_quantize(type: str, rows_of_floats: int, importance: int, rows: int, cols: int, codes: int) -> None: ...
def gguf_dequantize(type: str, codes: int, blocks: int, floats: int) -> None: ...

# bnb_bind.cpp
def bnb_quantize_4bit(midpoints: int, ascending: int, x: int, bf16: bool, n: int, packed: int, absmax: int) -> None: ...
def bnb_dequantize_4bit(
    numbers: int, packed: int, absmax: int, blocksize: int, n: int, out: int, bf16: bool
) -> None: ...
def bnb_quantize_8bit(x: int, n: int, bins: int, codes: int, absmax: int) -> None: ...
def bnb_quantize_int8(x: int, bf16: bool, rows: int, columns: int, codes: int, absmax: int) -> None: ...
def bnb_dequantize_int8(codes: int, absmax: int, rows: int, columns: int, out: int) -> None: ...

# groups_bind.cpp
def group_ranges(x: int, bf16: bool, rows: int, columns: int, width: int, low: int, high: int) -> None: ...
def group_codes(
    x: int,
    bf16: bool,
    rows: int,
    columns: int,
    width: int,
    rule: int,
    arithmetic: int,
    scales: int,
    offsets: int,
    low: float,
    high: float,
    out: int,
) -> None: ...
def group_values(
    codes: int, is_signed: bool, rows: int, columns: int, width: int, scales: int, offsets: int, out: int
) -> None: ...
def pack_nibbles(codes: int, bytes: int, out: int) -> None: ...
def unpack_nibbles(packed: int, bytes: int, out: int) -> None: ...

# feedback_bind.cpp
def feedback_round_scalars(
    x: int,
    rows: int,
    stride: int,
    upper: int,
    upper_stride: int,
    levels: int,
    level_count: int,
    uniform: bool,
    width: int,
    groups: int,
    scales: int,
    scale_count: int,
    offsets: int,
    offset_count: int,
    scaled_offsets: bool = False,
    *,
    codes: int,
    scale_choices: int,
    offset_choices: int,
    errors: int,
    losses: int,
) -> None: ...
def feedback_round_vectors(
    x: int,
    rows: int,
    stride: int,
    upper: int,
    upper_stride: int,
    entries: int,
    entry_count: int,
    size: int,
    even_signs: bool,
    width: int,
    groups: int,
    scales: int,
    scale_count: int,
    codes: int,
    signs: int,
    scale_choices: int,
    errors: int,
    losses: int,
) -> None: ...
