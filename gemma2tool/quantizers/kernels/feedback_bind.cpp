// Python bindings of the error feedback kernels: buffers passed by address; shapes are checked by
// calibration/block_rounding.py.
#include <nanobind/nanobind.h>

#include "feedback.hpp"

namespace nb = nanobind;

void register_feedback(nb::module_& m) {
    using Address = uintptr_t;
    m.def(
        "feedback_round_scalars",
        [](Address x, size_t rows, size_t stride, Address upper, size_t upper_stride, Address levels, size_t level_count,
           bool uniform, size_t width, size_t groups, Address scales, size_t scale_count, Address offsets, size_t offset_count,
           bool scaled_offsets, Address codes, Address scale_choices, Address offset_choices, Address errors, Address losses) {
            const FeedbackBlock block{(const float*)x, rows, stride, (const float*)upper, upper_stride};
            const ScalarGrid grid{(const float*)levels, level_count, uniform, width, groups,
                                  (const float*)scales, scale_count, (const float*)offsets, offset_count, scaled_offsets};
            const FeedbackResult result{(uint8_t*)codes, (uint8_t*)scale_choices, (uint8_t*)offset_choices, (float*)errors,
                                        (float*)losses};
            feedback_kernels::chosen().round_scalars(block, grid, result);
        },
        nb::arg("x"), nb::arg("rows"), nb::arg("stride"), nb::arg("upper"), nb::arg("upper_stride"), nb::arg("levels"),
        nb::arg("level_count"), nb::arg("uniform"), nb::arg("width"), nb::arg("groups"), nb::arg("scales"),
        nb::arg("scale_count"), nb::arg("offsets"), nb::arg("offset_count"), nb::arg("scaled_offsets") = false,
        nb::arg("codes"), nb::arg("scale_choices"),
        nb::arg("offset_choices"), nb::arg("errors"), nb::arg("losses"), nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "feedback_round_vectors",
        [](Address x, size_t rows, size_t stride, Address upper, size_t upper_stride, Address entries, size_t entry_count,
           size_t size, bool even_signs, size_t width, size_t groups, Address scales, size_t scale_count, Address codes,
           Address signs, Address scale_choices, Address errors, Address losses) {
            const FeedbackBlock block{(const float*)x, rows, stride, (const float*)upper, upper_stride};
            const VectorGrid grid{(const float*)entries, entry_count, size, even_signs, width, groups, (const float*)scales,
                                  scale_count};
            const VectorResult result{(uint16_t*)codes, (uint8_t*)signs, (uint8_t*)scale_choices, (float*)errors,
                                      (float*)losses};
            feedback_kernels::chosen().round_vectors(block, grid, result);
        },
        nb::arg("x"), nb::arg("rows"), nb::arg("stride"), nb::arg("upper"), nb::arg("upper_stride"), nb::arg("entries"),
        nb::arg("entry_count"), nb::arg("size"), nb::arg("even_signs"), nb::arg("width"), nb::arg("groups"), nb::arg("scales"),
        nb::arg("scale_count"), nb::arg("codes"), nb::arg("signs"), nb::arg("scale_choices"), nb::arg("errors"),
        nb::arg("losses"), nb::call_guard<nb::gil_scoped_release>());
}
