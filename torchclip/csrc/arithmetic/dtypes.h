// The dtypes: one row each in `Dtypes`, and how their numbers are converted and rounded.
//
// A new dtype is a new row.  A number type that no row has yet also needs `to_float`, `nearest` and `Bits`.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "dlpack.h"

#if defined(_MSC_VER)
#define INLINE __forceinline
#else
#define INLINE inline __attribute__((always_inline))
#endif

namespace {

struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

template <class Number_, uint8_t code_, size_t parts_> struct Dtype {
    using Number = Number_;
    static constexpr uint8_t code = code_;   // DLPack's
    static constexpr size_t parts = parts_;  // real numbers per element
    static constexpr size_t item = sizeof(Number) * parts;
};
template <class... Rows> struct DtypeTable {};

using Dtypes = DtypeTable<      //
    Dtype<float, kFloat, 1>,    //
    Dtype<BFloat, kBfloat, 1>,  //
    Dtype<Half, kFloat, 1>,     //
    Dtype<double, kFloat, 1>,   //
    Dtype<float, kComplex, 2>,  //
    Dtype<double, kComplex, 2>>;

// The same rows for use at run time.
struct DtypeFacts {
    uint8_t code;
    size_t parts, item, alignment;  // real numbers per element; bytes per element; bytes per real number
    constexpr bool is_complex() const { return parts == 2; }
    constexpr bool is_double() const { return alignment == sizeof(double); }
};
template <class Table> struct FactsOf;
template <class... Rows> struct FactsOf<DtypeTable<Rows...>> {
    static constexpr size_t count = sizeof...(Rows);
    static constexpr DtypeFacts rows[] = {{Rows::code, Rows::parts, Rows::item, sizeof(typename Rows::Number)}...};
};
constexpr size_t kDtypeCount = FactsOf<Dtypes>::count;
constexpr const DtypeFacts* kDtypes = FactsOf<Dtypes>::rows;

// The row of double.
constexpr size_t kDoubles = 3;
static_assert(kDtypes[kDoubles].is_double() && !kDtypes[kDoubles].is_complex(), "the row of double");

// The row for a dtype in DLPack's terms; kDtypeCount if there is none.
inline size_t find_dtype(const DLTensor& t) {
    size_t row = 0;
    while (row < kDtypeCount && (kDtypes[row].code != t.dtype.code || kDtypes[row].item * 8 != t.dtype.bits)) ++row;
    return t.dtype.lanes == 1 ? row : kDtypeCount;
}

// ---------------------------------------------------------------------------------------------------------------
// Every number is widened, worked on, and rounded to nearest even
// ---------------------------------------------------------------------------------------------------------------

template <class To, class From> INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// It has no branch, so that loops around it become vector instructions.
INLINE uint32_t choose(bool condition, uint32_t yes, uint32_t no) {
    const uint32_t mask = 0u - uint32_t(condition);
    return (yes & mask) | (no & ~mask);
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(BFloat x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
INLINE float to_float(Half x) {
    const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, exponent = magnitude & (31u << 23);
    const uint32_t normal = magnitude + (112u << 23);
    // A subnormal gets the exponent of its last bit and a leading one, which the subtraction removes.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude + (113u << 23)) - 0x1p-14f);
    const uint32_t special = magnitude | 0x7f800000;
    const uint32_t absolute = choose(exponent == 0, subnormal, choose(exponent == (31u << 23), special, normal));
    return bit_cast<float>(absolute | uint32_t(x.bits & 0x8000) << 16);
}

// A nan must have been converted from T, or be the quiet one: only those are sure to stay nan when rounded.
template <class T> INLINE T nearest(float x);
template <> INLINE float nearest<float>(float x) { return x; }
template <> INLINE BFloat nearest<BFloat>(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <> INLINE Half nearest<Half>(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Adding 0.5 lets the addition itself round a subnormal: its last bit becomes the float's last bit.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
    const uint32_t special = choose(magnitude > 0x7f800000, 0x7e00, 0x7c00);
    const uint32_t finite = choose(magnitude < (113u << 23), subnormal, normal);
    const uint32_t rounded = choose(magnitude < (143u << 23), finite, special);
    return {uint16_t(rounded | ((bits >> 16) & 0x8000))};
}

INLINE double widen(double x) { return x; }
INLINE double widen(float x) { return x; }
template <class T> INLINE double widen(T x) { return to_float(x); }

template <class T> INLINE T narrow(double x) {
    // Truncated to a float that still shows on which side of every 16-bit number and every tie x lies: if any bit was
    // cut off, the last kept bit is one.  Rounding it then gives the same as rounding x.
    constexpr uint64_t cut = (uint64_t(1) << 40) - 1;
    const uint64_t bits = bit_cast<uint64_t>(x);
    const uint32_t single = bit_cast<uint32_t>(float(bit_cast<double>((bits | ((bits & cut) + cut)) & ~cut)));
    const bool nan = (single & 0x7fffffff) > 0x7f800000;
    return nearest<T>(bit_cast<float>(choose(nan, 0x7fc00000, single)));
}
template <> INLINE double narrow<double>(double x) { return x; }
template <> INLINE float narrow<float>(double x) { return float(x); }

// Without their sign, floating-point numbers are ordered like the integers with the same bits, with inf above every
// number and nan above inf.
template <class T> struct Bits;
template <> struct Bits<double> {
    using type = int64_t;
    static constexpr type infinity = 0x7ff0000000000000;
};
template <> struct Bits<float> {
    using type = int32_t;
    static constexpr type infinity = 0x7f800000;
};
template <> struct Bits<BFloat> {
    using type = int16_t;
    static constexpr type infinity = 0x7f80;
};
template <> struct Bits<Half> {
    using type = int16_t;
    static constexpr type infinity = 0x7c00;
};

template <class T> INLINE typename Bits<T>::type magnitude(T x) {
    using Int = typename Bits<T>::type;
    return Int(bit_cast<Int>(x) & std::numeric_limits<Int>::max());
}

// Whether a number, given by its bits in memory, is neither 0 nor infinite nor nan, so that every factor but 1 changes
// it.
inline bool is_telling(uint64_t bits, const DtypeFacts& dtype) {
    const uint64_t infinity = dtype.alignment == 8    ? uint64_t(Bits<double>::infinity)
                              : dtype.alignment == 4  ? uint64_t(Bits<float>::infinity)
                              : dtype.code == kBfloat ? uint64_t(Bits<BFloat>::infinity)
                                                      : uint64_t(Bits<Half>::infinity);
    const uint64_t magnitude = bits & ~(uint64_t(1) << (8 * dtype.alignment - 1));
    return magnitude != 0 && magnitude < infinity;
}

template <class T> INLINE bool is_finite(T x) { return magnitude(x) < Bits<T>::infinity; }

}  // namespace
