// Python bindings of the group kernels: flat, contiguous buffers passed by address; shapes are checked by groups.py.
#include <nanobind/nanobind.h>

#include "groups.hpp"

namespace nb = nanobind;

void register_groups(nb::module_& m) {
    using Address = uintptr_t;
    using NoGil = nb::call_guard<nb::gil_scoped_release>;
    m.def(
        "group_ranges",
        [](Address x, bool bf16, size_t rows, size_t columns, size_t width, Address low, Address high) {
            group_kernels::chosen().ranges({(const void*)x, bf16, rows, columns, width}, (float*)low, (float*)high);
        },
        nb::arg("x"), nb::arg("bf16"), nb::arg("rows"), nb::arg("columns"), nb::arg("width"), nb::arg("low"), nb::arg("high"),
        NoGil());
    m.def(
        "group_codes",
        [](Address x, bool bf16, size_t rows, size_t columns, size_t width, int rule, int arithmetic, Address scales,
           Address offsets, float low, float high, Address out) {
            group_kernels::chosen().codes({(const void*)x, bf16, rows, columns, width}, (CodeRule)rule, (Arithmetic)arithmetic,
                                          (const float*)scales, (const float*)offsets, low, high, (uint8_t*)out);
        },
        nb::arg("x"), nb::arg("bf16"), nb::arg("rows"), nb::arg("columns"), nb::arg("width"), nb::arg("rule"),
        nb::arg("arithmetic"), nb::arg("scales"), nb::arg("offsets"), nb::arg("low"), nb::arg("high"), nb::arg("out"), NoGil());
    m.def(
        "group_values",
        [](Address codes, bool is_signed, size_t rows, size_t columns, size_t width, Address scales, Address offsets, Address out) {
            group_kernels::chosen().values({nullptr, false, rows, columns, width}, (const uint8_t*)codes, is_signed,
                                           (const float*)scales, (const float*)offsets, (float*)out);
        },
        nb::arg("codes"), nb::arg("is_signed"), nb::arg("rows"), nb::arg("columns"), nb::arg("width"), nb::arg("scales"),
        nb::arg("offsets"), nb::arg("out"), NoGil());
    m.def(
        "pack_nibbles",
        [](Address codes, size_t bytes, Address out) {
            group_kernels::chosen().pack_nibbles((const uint8_t*)codes, bytes, (uint8_t*)out);
        },
        nb::arg("codes"), nb::arg("bytes"), nb::arg("out"), NoGil());
    m.def(
        "unpack_nibbles",
        [](Address packed, size_t bytes, Address out) {
            group_kernels::chosen().unpack_nibbles((const uint8_t*)packed, bytes, (uint8_t*)out);
        },
        nb::arg("packed"), nb::arg("bytes"), nb::arg("out"), NoGil());
}
