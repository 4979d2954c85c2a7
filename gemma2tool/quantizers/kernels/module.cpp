// The extension module: the selection of the instruction set, and the registration of every family.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "instruction_sets.hpp"

namespace nb = nanobind;

#define F(family) void register_##family(nb::module_&);
KERNEL_FAMILIES
#undef F

NB_MODULE(_native, m) {
    m.def("available_instruction_sets", [] {
        std::vector<std::string> names;
        for (int i = 0; i < kernels::instruction_set_count(); ++i) names.push_back(kernels::instruction_set_name(i));
        return names;
    });
    m.def("current_instruction_set",
          [] { return std::string(kernels::instruction_set_name(kernels::current_instruction_set())); });
    m.def(
        "use_instruction_set",
        [](const std::string& name) {
            if (!kernels::use_instruction_set(name.c_str()))
                throw nb::value_error(("unsupported instruction set '" + name + "'").c_str());
        },
        nb::arg("name"));
#define F(family) register_##family(m);
    KERNEL_FAMILIES
#undef F
}
