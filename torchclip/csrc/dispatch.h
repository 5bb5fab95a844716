// Which instruction set the loops run in: the best that this machine has, or another one to compare.
#pragma once

#include <cstring>

#include "loops.h"

namespace {

Loops loops_of[kDtypeCount];  // by row of the table of dtypes
const char* instruction_set = nullptr;

template <template <class, size_t> class Set, class... Rows> void use_loops(DtypeTable<Rows...>) {
    const Loops loops[] = {Set<typename Rows::Number, Rows::parts>::table()...};
    std::copy(std::begin(loops), std::end(loops), loops_of);
}

// Takes the named instruction set, or the best one where there is no name; false if this machine has not got it.
bool use_instruction_set(const char* name) {
    const auto wanted = [name](const char* set) { return name == nullptr || std::strcmp(name, set) == 0; };
#ifdef HAVE_X86_TARGETS
    __builtin_cpu_init();
    if (wanted("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        use_loops<Avx512>(Dtypes());
        instruction_set = "avx512";
        return true;
    }
    if (wanted("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        use_loops<Avx2>(Dtypes());
        instruction_set = "avx2";
        return true;
    }
#endif
    if (!wanted("baseline")) return false;
    use_loops<Baseline>(Dtypes());
    instruction_set = "baseline";
    return true;
}

}  // namespace
