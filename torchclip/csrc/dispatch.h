// Which instruction set the loops run in: the best that this machine has, or another one to compare.
#pragma once

#include <cstring>

#include "loops.h"

namespace {

// By row of the table of dtypes: for many elements, and for few.
Loops loops_of[kDtypeCount], loops_of_few[kDtypeCount];
constexpr size_t kFewElements = 64 * 1024;
const char* instruction_set = nullptr;

template <template <class, size_t> class Set, class... Rows> void use_loops(DtypeTable<Rows...>) {
    const Loops loops[] = {Set<typename Rows::Number, Rows::parts>::table()...};
    std::copy(std::begin(loops), std::end(loops), loops_of);
    std::copy(std::begin(loops), std::end(loops), loops_of_few);
}

// Processors slow down for a while after arithmetic on 512 bits of floating-point numbers.  In a training step, a few
// gradients cost more that way, in what comes after them, than they gain.  Integers do no harm.
template <template <class, size_t> class Set, class... Rows> void spare_few(DtypeTable<Rows...>) {
    const Loops loops[] = {Set<typename Rows::Number, Rows::parts>::table()...};
    for (size_t i = 0; i < kDtypeCount; ++i) {
        loops_of_few[i].sum_squares = loops[i].sum_squares;
        loops_of_few[i].scale = loops[i].scale;
    }
}

// Takes the named instruction set everywhere, or what is best for each where there is no name; false if this machine
// has not got it.
bool use_instruction_set(const char* name) {
    const auto wanted = [name](const char* set) { return name == nullptr || std::strcmp(name, set) == 0; };
#ifdef HAVE_X86_TARGETS
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512 && wanted("avx512")) {
        use_loops<Avx512>(Dtypes());
        if (name == nullptr) spare_few<Avx2>(Dtypes());
        instruction_set = "avx512";
        return true;
    }
    if (has_avx2 && wanted("avx2")) {
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

// The loops over so many elements in all, by row of the table of dtypes.
const Loops* loops_for(size_t elements) { return elements <= kFewElements ? loops_of_few : loops_of; }

}  // namespace
