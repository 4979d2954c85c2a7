// Python's view of the GGUF block types: buffers given by address; shapes and alignment are checked in gguf_types.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "gguf.hpp"

namespace nb = nanobind;

namespace {

const BlockKernel& kernel(const std::string& type) {
#define X(id, name) \
    if (type == name) return gguf_##id::chosen();
    GGUF_BLOCK_TYPES(X)
#undef X
    throw nb::value_error(("no kernel for " + type).c_str());
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

}  // namespace

void register_gguf(nb::module_& m) {
    m.def("gguf_quantize", &quantize, nb::arg("type"), nb::arg("rows_of_floats"), nb::arg("importance"), nb::arg("rows"),
          nb::arg("cols"), nb::arg("codes"));
    m.def("gguf_dequantize", &dequantize, nb::arg("type"), nb::arg("codes"), nb::arg("blocks"), nb::arg("floats"));
}
