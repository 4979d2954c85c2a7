// Python bindings of the comparison of values: flat, contiguous buffers passed by address; shapes and dtypes are checked
// by comparison.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "comparison.hpp"

namespace nb = nanobind;

namespace {

using Sums = std::tuple<double, double, double, float, size_t, size_t, int64_t>;

Sums compare_blocks(uintptr_t source, bool source_bf16, uintptr_t actual, bool actual_bf16, size_t n, size_t block,
                    uintptr_t absmax, uintptr_t worst, uintptr_t anchor) {
    const ComparisonKernels& k = comparison_kernels::chosen();
    const Compared in = {(const void*)source, (const void*)actual, source_bf16, actual_bf16, n, block};
    ErrorSums sums;
    {
        nb::gil_scoped_release release;
        sums = k.compare(in, (float*)absmax, (float*)worst, (float*)anchor);
    }
    const int64_t first = sums.nonfinite ? (int64_t)sums.first_nonfinite : -1;
    return {sums.signal, sums.noise, sums.bias, sums.largest, sums.nonfinite, sums.source_nonfinite, first};
}

std::tuple<size_t, size_t> count_differing(uintptr_t a, uintptr_t b, int size, size_t n) {
    const ComparisonKernels& k = comparison_kernels::chosen();
    nb::gil_scoped_release release;
    size_t first;
    const size_t count = k.differing((const void*)a, (const void*)b, size, n, &first);
    return {count, first};
}

}  // namespace

void register_comparison(nb::module_& m) {
    m.def("compare_blocks", &compare_blocks, nb::arg("source"), nb::arg("source_bf16"), nb::arg("actual"),
          nb::arg("actual_bf16"), nb::arg("n"), nb::arg("block"), nb::arg("absmax"), nb::arg("worst"), nb::arg("anchor"));
    m.def("count_differing", &count_differing, nb::arg("a"), nb::arg("b"), nb::arg("size"), nb::arg("n"));
}
