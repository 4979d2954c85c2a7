// The build of the kernels that runs: selected by the processor's instruction sets, or by the caller.
#pragma once

// A family declares its table of function pointers with KERNEL_TABLE(Type, name): one extern constant per instruction
// set, `name::baseline`, `name::avx2`..., each defined by the sources compiled for it as KERNEL_TABLE_HERE(Type, name)
// = {...};
#if defined(KERNELS_X86)
#define KERNEL_TABLE(Type, name)                               \
    namespace name {                                           \
    extern const Type baseline, avx2, avx512;                  \
    inline const Type& chosen() {                              \
        const int isa = kernels::current_instruction_set();    \
        return isa == 2 ? avx512 : isa == 1 ? avx2 : baseline; \
    }                                                          \
    }
#else
#define KERNEL_TABLE(Type, name)                     \
    namespace name {                                 \
    extern const Type baseline;                      \
    inline const Type& chosen() { return baseline; } \
    }
#endif
#define KERNEL_TABLE_HERE(Type, name) extern const Type name::KERNELS_ISA

namespace kernels {

// Index into the names below. Initially the widest set of the machine, or GEMMA2TOOL_INSTRUCTION_SET.
int current_instruction_set();
// Number of instruction sets that this machine supports: the first ones of instruction_set_name.
int instruction_set_count();
const char* instruction_set_name(int isa);
// False if this machine or build does not have the instruction set.
bool use_instruction_set(const char* name);

}  // namespace kernels
