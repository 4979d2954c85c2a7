#include "instruction_sets.hpp"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace kernels {
namespace {

constexpr const char* names[] = {"baseline", "avx2", "avx512"};

int widest() {
#if defined(KERNELS_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? 2 : avx2 ? 1 : 0;
#else
    return 0;
#endif
}

int index_of(const char* name) {
    for (int i = 0; i < instruction_set_count(); ++i)
        if (std::strcmp(names[i], name) == 0) return i;
    return -1;
}

std::atomic<int>& current() {
    static std::atomic<int> isa = [] {
        const char* wanted = std::getenv("GEMMA2TOOL_INSTRUCTION_SET");
        const int i = wanted ? index_of(wanted) : -1;
        return i < 0 ? instruction_set_count() - 1 : i;
    }();
    return isa;
}

}  // namespace

int current_instruction_set() { return current().load(std::memory_order_relaxed); }

int instruction_set_count() {
    static const int count = widest() + 1;
    return count;
}

const char* instruction_set_name(int isa) { return names[isa]; }

bool use_instruction_set(const char* name) {
    const int i = index_of(name);
    if (i >= 0) current().store(i, std::memory_order_relaxed);
    return i >= 0;
}

}  // namespace kernels
