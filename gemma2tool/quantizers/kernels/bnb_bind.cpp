// Python bindings of bitsandbytes' types: flat, contiguous buffers passed by address; shapes are checked by bnb.py.
#include <nanobind/nanobind.h>

#include "bnb.hpp"

namespace nb = nanobind;

void register_bnb(nb::module_& m) {
    using Address = uintptr_t;
    using NoGil = nb::call_guard<nb::gil_scoped_release>;
    m.def(
        "bnb_quantize_4bit",
        [](Address midpoints, Address ascending, Address x, bool bf16, size_t n, Address packed, Address absmax) {
            FourBitSteps steps;
            for (int i = 0; i < 15; ++i) steps.midpoints[i] = ((const float*)midpoints)[i];
            for (int i = 0; i < 16; ++i) steps.ascending[i] = ((const uint8_t*)ascending)[i];
            bnb_kernels::chosen().quantize_4bit(steps, (const void*)x, bf16, n, (uint8_t*)packed, (float*)absmax);
        },
        nb::arg("midpoints"), nb::arg("ascending"), nb::arg("x"), nb::arg("bf16"), nb::arg("n"), nb::arg("packed"),
        nb::arg("absmax"), NoGil());
    m.def(
        "bnb_dequantize_4bit",
        [](Address numbers, Address packed, Address absmax, size_t blocksize, size_t n, Address out, bool bf16) {
            bnb_kernels::chosen().dequantize_4bit((const float*)numbers, (const uint8_t*)packed, (const float*)absmax, blocksize,
                                                  n, (void*)out, bf16);
        },
        nb::arg("numbers"), nb::arg("packed"), nb::arg("absmax"), nb::arg("blocksize"), nb::arg("n"), nb::arg("out"),
        nb::arg("bf16"), NoGil());
    m.def(
        "bnb_quantize_8bit",
        [](Address x, size_t n, Address bins, Address codes, Address absmax) {
            bnb_kernels::chosen().quantize_8bit((const float*)x, n, (const uint8_t*)bins, (uint8_t*)codes, (float*)absmax);
        },
        nb::arg("x"), nb::arg("n"), nb::arg("bins"), nb::arg("codes"), nb::arg("absmax"), NoGil());
    m.def(
        "bnb_quantize_int8",
        [](Address x, bool bf16, size_t rows, size_t columns, Address codes, Address absmax) {
            bnb_kernels::chosen().quantize_int8((const void*)x, bf16, rows, columns, (int8_t*)codes, (float*)absmax);
        },
        nb::arg("x"), nb::arg("bf16"), nb::arg("rows"), nb::arg("columns"), nb::arg("codes"), nb::arg("absmax"), NoGil());
    m.def(
        "bnb_dequantize_int8",
        [](Address codes, Address absmax, size_t rows, size_t columns, Address out) {
            bnb_kernels::chosen().dequantize_int8((const int8_t*)codes, (const float*)absmax, rows, columns, (float*)out);
        },
        nb::arg("codes"), nb::arg("absmax"), nb::arg("rows"), nb::arg("columns"), nb::arg("out"), NoGil());
}
