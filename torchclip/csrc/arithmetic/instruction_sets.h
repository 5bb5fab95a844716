// The instruction set of the loops: the best that this machine has, or another one for comparison.
#pragma once

#include <cstring>
#include <initializer_list>

#include "loops.h"

#ifdef HAVE_X86_TARGETS
#include <cpuid.h>
#endif

namespace {

#ifdef HAVE_X86_TARGETS
// The instruction sets of the processor whose registers the operating system saves.  CPUID is read directly, as in some
// toolchains __builtin_cpu_supports is always false.
struct Processor {
    bool has_avx2 = false, has_avx512 = false, is_amd = false;

    Processor() {
        unsigned a, b, c, d;
        is_amd = __get_cpuid(0, &a, &b, &c, &d) && b == 0x68747541;  // "Auth" of "AuthenticAMD"
        if (!__get_cpuid(1, &a, &b, &c, &d)) return;
        const bool has_fma = c >> 12 & 1, has_xgetbv = c >> 27 & 1, has_avx = c >> 28 & 1;
        if (!has_fma || !has_xgetbv || !has_avx || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        const auto has = [b](std::initializer_list<int> bits) {
            return std::all_of(bits.begin(), bits.end(), [b](int bit) { return (b >> bit & 1) != 0; });
        };
        unsigned saved, upper;
        __asm__("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
        has_avx2 = (saved & 0x06) == 0x06 && has({5});                             // SSE and AVX registers; AVX2
        has_avx512 = has_avx2 && (saved & 0xe0) == 0xe0 && has({16, 17, 30, 31});  // F, DQ, BW, VL
    }
};
#endif

// By row of the table of dtypes, for many elements and for few.
Loops loops_of[kDtypeCount], loops_of_few[kDtypeCount];
constexpr size_t kFewElements = 64 * 1024;
const char* instruction_set = nullptr;

template <template <class, size_t> class Set, class... Rows> void use_loops(DtypeTable<Rows...>, Loops* table) {
    const Loops loops[] = {Set<typename Rows::Number, Rows::parts>::table()...};
    std::copy(std::begin(loops), std::end(loops), table);
}
template <template <class, size_t> class Set> void use_loops(const char* name) {
    use_loops<Set>(Dtypes(), loops_of);
    use_loops<Set>(Dtypes(), loops_of_few);
    instruction_set = name;
}

// Uses the named instruction set everywhere, or the best for each without a name; false if this machine lacks it.
bool use_instruction_set(const char* name) {
    const auto wanted = [name](const char* set) { return name == nullptr || std::strcmp(name, set) == 0; };
#ifdef HAVE_X86_TARGETS
    static const Processor processor;
    // So a norm of 600 MB takes 15 % less time on an EPYC with Zen 5; on a Xeon, fetching each line is at the floor.
    follows_pages = processor.is_amd;
    if (processor.has_avx512 && wanted("avx512")) {
        use_loops<Avx512>("avx512");
        // Intel's processors slow down for a while after floating-point arithmetic on 512 bits.  With few gradients, a
        // training step loses more afterwards than the loops gain.
        if (name == nullptr && !processor.is_amd) use_loops<Avx2>(Dtypes(), loops_of_few);
        return true;
    }
    if (processor.has_avx2 && wanted("avx2")) {
        use_loops<Avx2>("avx2");
        return true;
    }
#endif
    if (!wanted("baseline")) return false;
    use_loops<Baseline>("baseline");
    return true;
}

// The loops for a total number of elements, by row of the table of dtypes.
const Loops* loops_for(size_t elements) { return elements <= kFewElements ? loops_of_few : loops_of; }

}  // namespace
