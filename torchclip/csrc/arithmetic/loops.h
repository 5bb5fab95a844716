// The inner loops over n numbers without gaps, of one number type.
#pragma once

#include <algorithm>

#include "dtypes.h"

namespace {

// Sums use this many lanes with every instruction set, so that all give the same bits.
constexpr size_t kLanes = 32;

// Left alone, processors look ahead as far as their queue of instructions reaches, which is not far where every element
// takes several of them; so memory that is needed soon is fetched into the second cache.  Some need to be told of each
// line; others follow a page by themselves, once its first lines were asked for.  Set by instruction_sets.h.
bool follows_pages = false;
constexpr size_t kCacheLine = 64, kPage = 4096;  // bytes

// Calls visit(i, lane) for elements of x, and every `kEvery` of them has so many lines fetched that lie `kDistance`
// bytes ahead.  Returns how many elements were visited: none of a short x, which is used up before anything fetched
// could arrive.
template <size_t kEvery, size_t kLines, size_t kDistance, class T, class Visit>
INLINE size_t visit_ahead(const T* x, size_t n, Visit visit) {
    size_t i = 0;
#ifdef __GNUC__
    for (; n * sizeof(T) > kDistance && i + kEvery <= n;) {
        const uintptr_t ahead = reinterpret_cast<uintptr_t>(x + i) + kDistance;
        for (size_t line = 0; line < kLines; ++line)
            __builtin_prefetch(reinterpret_cast<const void*>(ahead + line * kCacheLine), 0, 2);
        for (const size_t end = i + kEvery; i < end; i += kLanes)
            for (size_t j = 0; j < kLanes; ++j) visit(i + j, j);
    }
#endif
    return i;
}

// Calls visit(i, lane) for every element i of x.
template <class T, class Visit> INLINE void for_each(const T* x, size_t n, bool by_page, Visit visit) {
    size_t i = by_page ? visit_ahead<kPage / sizeof(T), 2, 2 * kPage>(x, n, visit)
                       : visit_ahead<kLanes, kLanes * sizeof(T) / kCacheLine, 6 * 1024>(x, n, visit);
    for (; i + kLanes <= n; i += kLanes)
        for (size_t j = 0; j < kLanes; ++j) visit(i + j, j);
    for (size_t j = 0; i < n; ++i, ++j) visit(i, j);
}

// Adds up `n` lanes, halves onto halves; written out for the compiler, as a loop over `n` costs more than the sums.
template <size_t n> INLINE double fold_lanes(double* lanes) {
    if constexpr (n > 1) {
        for (size_t j = 0; j < n / 2; ++j) lanes[j] += lanes[j + n / 2];
        return fold_lanes<n / 2>(lanes);
    }
    return lanes[0];
}

template <class T, class Add> INLINE double sum_lanes(const T* x, size_t n, Add add) {
    double lanes[kLanes];
    // Half by half, as for all at once compilers choose an instruction that takes longer to start than a short sum.
    for (size_t j = 0; j < kLanes / 2; ++j) lanes[j] = 0;
    for (size_t j = kLanes / 2; j < kLanes; ++j) lanes[j] = 0;
    for_each(x, n, follows_pages, [&](size_t i, size_t lane) { lanes[lane] = add(lanes[lane], widen(x[i])); });
    return fold_lanes<kLanes>(lanes);
}

// The square of a shorter number is exact in double, so fusing it with the addition changes only the time.
template <bool kFusedMultiplyAdd, class T> INLINE double sum_squares(const T* x, size_t n) {
    return sum_lanes(x, n, [](double sum, double v) {
        return kFusedMultiplyAdd && sizeof(T) < sizeof v ? std::fma(v, v, sum) : sum + v * v;
    });
}

// `unit`, a power of two, scales numbers so that their squares fit into a double.
template <class T> INLINE double sum_scaled_squares(const T* x, size_t n, double unit) {
    return sum_lanes(x, n, [unit](double sum, double v) { return sum + (v * unit) * (v * unit); });
}

template <class T> INLINE double sum_magnitudes(const T* x, size_t n) {
    return sum_lanes(x, n, [](double sum, double v) { return sum + std::fabs(v); });
}

template <class T> INLINE double largest(const T* x, size_t n) {
    using Int = typename Bits<T>::type;
    Int lanes[kLanes] = {};
    for_each(x, n, follows_pages, [&](size_t i, size_t lane) { lanes[lane] = std::max(lanes[lane], magnitude(x[i])); });
    for (size_t half = kLanes / 2; half > 0; half /= 2)
        for (size_t j = 0; j < half; ++j) lanes[j] = std::max(lanes[j], lanes[j + half]);
    return widen(bit_cast<T>(lanes[0]));
}

// Where memory is written, too, to fetch each line is faster everywhere.
template <class T> INLINE void scale(T* x, size_t n, double clip_coef) {
    const float single = float(clip_coef);
    if constexpr (sizeof(T) < sizeof clip_coef) {
        // In float, as in torch for all dtypes but double, unless the coefficient is too small for a float.
        if (std::isnormal(single))
            return for_each(x, n, false, [=](size_t i, size_t) { x[i] = nearest<T>(to_float(x[i]) * single); });
    }
    for_each(x, n, false, [=](size_t i, size_t) { x[i] = narrow<T>(widen(x[i]) * clip_coef); });
}

// Rows of n numbers, `step` bytes apart: for short rows, a call for each would double the cost.
template <bool kFusedMultiplyAdd, class T>
INLINE void sum_squares_of_rows(double* sums, const char* x, size_t rows, size_t n, int64_t step) {
    for (size_t i = 0; i < rows; ++i, x += step)
        sums[i] = sum_squares<kFusedMultiplyAdd>(reinterpret_cast<const T*>(x), n);
}

// Multiplies each row by its own coefficient.
template <class T> INLINE void scale_rows(char* x, size_t rows, size_t n, int64_t step, const double* clip_coefs) {
    for (size_t i = 0; i < rows; ++i, x += step)
        if (clip_coefs[i] != 1.0) scale(reinterpret_cast<T*>(x), n, clip_coefs[i]);
}

// Adds rows to sums, each multiplied by its coefficient; four at a time, so that the sums are read and written less
// often.
constexpr size_t kRowsAtOnce = 4;
template <class T>
INLINE void add_rows(double* sums, const void* const* x, const double* clip_coefs, size_t rows, size_t n) {
    const auto row = [x](size_t i) { return static_cast<const T*>(x[i]); };
    const double* p = clip_coefs;
    size_t i = 0;
    for (; i + kRowsAtOnce <= rows; i += kRowsAtOnce, p += kRowsAtOnce) {
        const T *a = row(i), *b = row(i + 1), *c = row(i + 2), *d = row(i + 3);
        for (size_t j = 0; j < n; ++j)
            sums[j] = (((sums[j] + p[0] * widen(a[j])) + p[1] * widen(b[j])) + p[2] * widen(c[j])) + p[3] * widen(d[j]);
    }
    for (; i < rows; ++i, ++p)
        for (size_t j = 0; j < n; ++j) sums[j] += *p * widen(row(i)[j]);
}

template <class T> INLINE void round_sums(void* result, const double* sums, size_t n) {
    for (size_t j = 0; j < n; ++j) static_cast<T*>(result)[j] = narrow<T>(sums[j]);
}

// Memory that is only read costs half as much, so these loops check this many numbers before they write any, and return
// whether they wrote.
constexpr size_t kBlock = 256;

// A number limited to [-top, top]; nan keeps its bits, and 0 its sign.  Written in this way, each of the two
// comparisons is one instruction.
template <class T> INLINE T limited(T x, T top) {
    const T above = -top > x ? -top : x;
    return top < above ? top : above;
}
template <class T> INLINE T limited_by_bits(T x, T top) {
    using Int = typename Bits<T>::type;
    const Int bits = bit_cast<Int>(x), limit = bit_cast<Int>(top), size = magnitude(x);
    return bit_cast<T>(size > limit && size <= Bits<T>::infinity ? Int((bits ^ size) | limit) : bits);
}

template <bool kByBits, class T> INLINE bool clamp(T* x, size_t n, double limit) {
    using Int = typename Bits<T>::type;
    // A limit beyond the largest number limits nothing, even if it would be rounded to that number.
    const Int largest = Bits<T>::infinity - 1;
    const Int top = limit > widen(bit_cast<T>(largest)) ? Bits<T>::infinity : magnitude(narrow<T>(limit));
    Int beyond = 0;
    bool written = false;
    for (size_t start = 0; start < n; start += kBlock) {
        T* const block = x + start;
        const size_t length = std::min(kBlock, n - start);
        if (!beyond) {  // after a block that was written, the next probably will be
            for (size_t i = 0; i < length; ++i) beyond |= Int(magnitude(block[i]) > top);
            if (!beyond) continue;
        }
        written = true;
        beyond = 0;
        for (size_t i = 0; i < length; ++i) {
            beyond |= Int(magnitude(block[i]) > top);
            if constexpr (kByBits || sizeof(T) < sizeof(float))
                block[i] = limited_by_bits(block[i], bit_cast<T>(top));
            else
                block[i] = limited(block[i], bit_cast<T>(top));
        }
    }
    return written;
}

INLINE double larger(double a, double b) { return a > b || std::isnan(a) ? a : b; }

// Sets each element that is not finite to 0.
template <size_t parts, class T> INLINE bool zero_nonfinite(T* x, size_t n) {
    const auto is_element_finite = [](const T* element) {
        return is_finite(element[0]) && is_finite(element[parts - 1]);
    };
    bool written = false;
    for (size_t i = 0; i < n; i += kBlock) {
        T *const block = x + i, *const end = block + std::min(kBlock, n - i);
        size_t beyond = 0;
        for (const T* element = block; element < end; element += parts) beyond += !is_element_finite(element);
        written |= beyond > 0;
        for (T* element = block; beyond > 0 && element < end; element += parts)
            if (!is_element_finite(element)) std::memset(static_cast<void*>(element), 0, parts * sizeof(T));
    }
    return written;
}

// The loops over one dtype, compiled for one instruction set; n counts real numbers, two to a complex one.
using Read = double (*)(const void* x, size_t n, double unit);
using Write = bool (*)(void* x, size_t n, double number);  // false if there was nothing to write
struct Loops {
    Read sum_squares, sum_scaled_squares, sum_magnitudes, largest;
    Write scale, clamp, zero_nonfinite;
    void (*sum_squares_of_rows)(double* sums, const char* x, size_t rows, size_t n, int64_t step);
    void (*scale_rows)(char* x, size_t rows, size_t n, int64_t step, const double* clip_coefs);
    void (*add_rows)(double* sums, const void* const* x, const double* clip_coefs, size_t rows, size_t n);
    void (*round_sums)(void* result, const double* sums, size_t n);
};

// `table<Dtype>()` gives the loops over a dtype.
#define DEFINE_LOOPS(NAME, TARGET, FUSED, BY_BITS)                                                                 \
    template <class T, size_t parts> struct NAME {                                                                 \
        using In = const void*;                                                                                    \
        using Out = void*;                                                                                         \
        TARGET static double squares(In x, size_t n, double) { return sum_squares<FUSED>((const T*)x, n); }        \
        TARGET static double scaled(In x, size_t n, double u) { return sum_scaled_squares((const T*)x, n, u); }    \
        TARGET static double magnitudes(In x, size_t n, double) { return sum_magnitudes((const T*)x, n); }         \
        TARGET static double top(In x, size_t n, double) { return largest((const T*)x, n); }                       \
        TARGET static bool scaling(Out x, size_t n, double clip_coef) { return scale((T*)x, n, clip_coef), true; } \
        TARGET static bool clamping(Out x, size_t n, double limit) { return clamp<BY_BITS>((T*)x, n, limit); }     \
        TARGET static bool zeroing(Out x, size_t n, double) { return zero_nonfinite<parts>((T*)x, n); }            \
        TARGET static void rows(double* sums, const char* x, size_t rows, size_t n, int64_t step) {                \
            sum_squares_of_rows<FUSED, T>(sums, x, rows, n, step);                                                 \
        }                                                                                                          \
        TARGET static void scaling_rows(char* x, size_t rows, size_t n, int64_t step, const double* clip_coefs) {  \
            scale_rows<T>(x, rows, n, step, clip_coefs);                                                           \
        }                                                                                                          \
        TARGET static void adding(double* sums, const In* x, const double* clip_coefs, size_t rows, size_t n) {    \
            add_rows<T>(sums, x, clip_coefs, rows, n);                                                             \
        }                                                                                                          \
        TARGET static void rounding(Out result, const double* sums, size_t n) { round_sums<T>(result, sums, n); }  \
        static Loops table() {                                                                                     \
            return Loops{squares, scaled, magnitudes,   top,    scaling, clamping,                                 \
                         zeroing, rows,   scaling_rows, adding, rounding};                                         \
        }                                                                                                          \
    };

// The last two: whether there are fused multiply-adds, and whether to compare floats as integers, as on 512 bits (see
// instruction_sets.h).
DEFINE_LOOPS(Baseline, , false, false)
#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_X86_TARGETS
DEFINE_LOOPS(Avx2, __attribute__((target("avx2,fma"))), true, false)
DEFINE_LOOPS(Avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), true, true)
#endif
#undef DEFINE_LOOPS

}  // namespace
