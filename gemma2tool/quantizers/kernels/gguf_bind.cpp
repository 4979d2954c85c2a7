// Python bindings of the GGUF block types: buffers passed by address; shapes and alignment are checked by
// gguf_types.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "gguf.hpp"
#include "gguf_grids.hpp"

namespace nb = nanobind;

namespace {

const BlockKernel& kernel(const std::string& type) {
#define X(id, name) \
    if (type == name) return gguf_##id::chosen();
    GGUF_BLOCK_TYPES(X)
#undef X
    throw nb::value_error(("unknown GGUF type: " + type).c_str());
}

void quantize(const std::string& type, uintptr_t x, uintptr_t importance, int64_t rows, int64_t cols, uintptr_t out) {
    const BlockKernel& k = kernel(type);
    nb::gil_scoped_release release;
    k.quantize((const float*)x, (const float*)importance, rows, cols, (uint8_t*)out);
}

void dequantize(const std::string& type, uintptr_t codes, int64_t blocks, uintptr_t out) {
    const BlockKernel& k = kernel(type);
    nb::gil_scoped_release release;
    k.dequantize((const uint8_t*)codes, blocks, (float*)out);
}

void set_grid(const std::string& name, nb::bytes coordinates) {
    const std::string names[GRIDS] = {"IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1", "IQ3_XXS", "IQ3_S"};
    const int sizes[GRIDS] = {256, 512, 1024, 2048, 256, 512}, dims[GRIDS] = {8, 8, 8, 8, 4, 4};
    for (int g = 0; g < GRIDS; ++g) {
        if (name != names[g]) continue;
        const uint8_t* c = (const uint8_t*)coordinates.c_str();
        if (coordinates.size() != (size_t)sizes[g] * dims[g])
            throw nb::value_error(("wrong grid size for " + name).c_str());
        for (size_t i = 0; i < coordinates.size(); ++i)
            if (c[i] >= (dims[g] == 8 ? 3 : 8))
                throw nb::value_error(("grid coordinate out of range for " + name).c_str());
        set_gguf_grid((GridName)g, c, sizes[g]);
        return;
    }
    throw nb::value_error(("unknown grid: " + name).c_str());
}

}  // namespace

void register_gguf(nb::module_& m) {
    m.def("gguf_set_grid", &set_grid, nb::arg("name"), nb::arg("coordinates"));
    m.def("gguf_quantize", &quantize, nb::arg("type"), nb::arg("rows_of_floats"), nb::arg("importance"),
          nb::arg("rows"), nb::arg("cols"), nb::arg("codes"));
    m.def("gguf_dequantize", &dequantize, nb::arg("type"), nb::arg("codes"), nb::arg("blocks"), nb::arg("floats"));
}
