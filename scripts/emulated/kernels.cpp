// Quantizes and dequantizes what stdin has with the kernels of the first instruction set, for emulators. compare.py
// writes stdin and reads stdout.
#include <cstdio>
#include <cstring>
#include <vector>

#include "gguf.hpp"
#include "gguf_grids.hpp"

namespace kernels {
int current_instruction_set() { return 0; }
}  // namespace kernels

namespace {

struct Case {
    char type[16];
    int32_t has_importance, rows, columns, row_bytes, row_blocks;
};

const BlockKernel* kernel(const char* type) {
#define X(id, name) \
    if (!std::strcmp(type, name)) return &gguf_##id::baseline;
    GGUF_BLOCK_TYPES(X)
#undef X
    return nullptr;
}

bool take(void* to, size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }

}  // namespace

int main() {
    for (int grid = 0; grid < GRIDS; ++grid) {
        int32_t shape[2];
        if (!take(shape, sizeof shape)) return 1;
        std::vector<uint8_t> points((size_t)shape[0] * shape[1]);
        if (!take(points.data(), points.size())) return 1;
        set_gguf_grid((GridName)grid, points.data(), shape[0]);
    }
    for (Case c; take(&c, sizeof c);) {
        const BlockKernel* k = kernel(c.type);
        std::vector<float> x((size_t)c.rows * c.columns), importance(c.columns), back(x.size());
        std::vector<uint8_t> codes((size_t)c.rows * c.row_bytes);
        if (!k || !take(x.data(), 4 * x.size())) return 1;
        if (c.has_importance && !take(importance.data(), 4 * importance.size())) return 1;
        k->quantize(x.data(), c.has_importance ? importance.data() : nullptr, c.rows, c.columns, codes.data());
        k->dequantize(codes.data(), (int64_t)c.rows * c.row_blocks, back.data());
        std::fwrite(codes.data(), 1, codes.size(), stdout);
        std::fwrite(back.data(), 4, back.size(), stdout);
    }
    return 0;
}
