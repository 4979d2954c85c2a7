// Python bindings of the casts: flat, contiguous, native-endian buffers passed by address; shapes are checked by
// casts.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "casts.hpp"

namespace nb = nanobind;

namespace {

void cast(const std::string& from, const std::string& to, uintptr_t in, uintptr_t out, size_t n) {
    const CastKernels& k = cast_kernels::chosen();
    const std::string pair = from + ">" + to;
    auto* f = pair == "f32>f16"    ? k.f32_to_f16
              : pair == "f32>bf16" ? k.f32_to_bf16
              : pair == "f16>f32"  ? k.f16_to_f32
              : pair == "bf16>f32" ? k.bf16_to_f32
              : pair == "bf16>f16" ? k.bf16_to_f16
              : pair == "f16>bf16" ? k.f16_to_bf16
                                   : nullptr;
    if (!f) throw nb::value_error(("unsupported conversion: " + pair).c_str());
    nb::gil_scoped_release release;
    f((const void*)in, (void*)out, n);
}

size_t count_nonfinite(const std::string& type, uintptr_t in, size_t n) {
    const CastKernels& k = cast_kernels::chosen();
    if (type != "f32" && type != "f16" && type != "bf16") throw nb::value_error(("unknown float type: " + type).c_str());
    nb::gil_scoped_release release;
    if (type == "f32") return k.nonfinite_f32((const void*)in, n);
    return k.nonfinite_16((const void*)in, n, type == "f16" ? 0x7c00 : 0x7f80);
}

}  // namespace

void register_casts(nb::module_& m) {
    m.def("cast", &cast, nb::arg("from_type"), nb::arg("to_type"), nb::arg("source"), nb::arg("target"), nb::arg("n"));
    m.def("count_nonfinite", &count_nonfinite, nb::arg("type"), nb::arg("source"), nb::arg("n"));
}
