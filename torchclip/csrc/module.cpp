// The CPU kernel: norms, scaling and clamping of many tensors at once.
//
// Python hands over parameters; `gradients` walks them and makes a Batch of the gradients that can be read
// directly.  A Batch knows three things to do: measure its norm, scale, clamp.  Tensors are read through DLPack's
// C exchange table, so nothing of torch is needed to compile this file, and one build serves every torch that has
// the table.
//
// Order of the file: DLPack, the number formats, the inner loops, layouts, Batch (chunks and threads), Python.

#define Py_LIMITED_API 0x030a0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#include <unistd.h>
#endif

#if defined(_MSC_VER)
#define INLINE __forceinline
#else
#define INLINE inline __attribute__((always_inline))
#endif

namespace {

// ---------------------------------------------------------------------------------------------------------------
// DLPack: the parts of version 1 that are read here (https://dmlc.github.io/dlpack/latest/c_api.html)
// ---------------------------------------------------------------------------------------------------------------

struct DLTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t* shape;
    int64_t* strides;  // in elements
    uint64_t byte_offset;
};

struct DLManagedTensorVersioned {
    uint32_t major, minor;
    void* manager_context;
    void (*deleter)(DLManagedTensorVersioned* self);
    uint64_t flags;
    DLTensor tensor;
};

struct DLPackExchangeAPI {
    uint32_t major, minor;
    DLPackExchangeAPI* previous;
    void* managed_tensor_allocator;
    void* managed_tensor_from_py_object_no_sync;
    int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned* tensor, void** out);
    int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
    void* current_work_stream;
};

constexpr int32_t kCPU = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4, kComplex = 5;

// ---------------------------------------------------------------------------------------------------------------
// Number formats: every element is widened, worked on, and rounded to nearest even
// ---------------------------------------------------------------------------------------------------------------

struct Half { uint16_t bits; };
struct BFloat { uint16_t bits; };

template <class To, class From> INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// Without a branch, so that loops around it become vector instructions.
INLINE uint32_t choose(bool condition, uint32_t yes, uint32_t no) {
    const uint32_t mask = 0u - uint32_t(condition);
    return (yes & mask) | (no & ~mask);
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(BFloat x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
INLINE float to_float(Half x) {
    const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, exponent = magnitude & (31u << 23);
    const uint32_t normal = magnitude + (112u << 23);
    // A subnormal gets the exponent of its last bit and a leading one, which the subtraction takes away again.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude + (113u << 23)) - 0x1p-14f);
    const uint32_t special = magnitude | 0x7f800000;
    const uint32_t absolute = choose(exponent == 0, subnormal, choose(exponent == (31u << 23), special, normal));
    return bit_cast<float>(absolute | uint32_t(x.bits & 0x8000) << 16);
}

// A nan must be one that was widened from T, or the quiet one: only those are sure to stay nan when they are rounded.
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
    // Cut to a float that still tells on which side of every 16-bit number and every tie x lies: whatever was cut
    // off leaves a one in the last bit kept.  Rounding it then gives what rounding x would give.
    constexpr uint64_t cut = (uint64_t(1) << 40) - 1;
    const uint64_t bits = bit_cast<uint64_t>(x);
    const uint32_t single = bit_cast<uint32_t>(float(bit_cast<double>((bits | ((bits & cut) + cut)) & ~cut)));
    const bool nan = (single & 0x7fffffff) > 0x7f800000;
    return nearest<T>(bit_cast<float>(choose(nan, 0x7fc00000, single)));
}
template <> INLINE double narrow<double>(double x) { return x; }
template <> INLINE float narrow<float>(double x) { return float(x); }

// Without their sign, floating-point numbers are ordered as the integers of the same bits, inf above every number
// and nan above inf.
template <class T> struct Bits;
template <> struct Bits<double> { using type = int64_t; static constexpr type infinity = 0x7ff0000000000000; };
template <> struct Bits<float> { using type = int32_t; static constexpr type infinity = 0x7f800000; };
template <> struct Bits<BFloat> { using type = int16_t; static constexpr type infinity = 0x7f80; };
template <> struct Bits<Half> { using type = int16_t; static constexpr type infinity = 0x7c00; };

template <class T> INLINE typename Bits<T>::type magnitude(T x) {
    using Int = typename Bits<T>::type;
    return Int(bit_cast<Int>(x) & std::numeric_limits<Int>::max());
}

// ---------------------------------------------------------------------------------------------------------------
// Inner loops over n elements without gaps
// ---------------------------------------------------------------------------------------------------------------

// Sums run in this many lanes whatever the instruction set, so that all give the same bits.
constexpr size_t kLanes = 32;

// Calls visit(i, lane) for every element i of x, and has the memory fetched that is needed soon, into the second cache.
// Left alone, processors look ahead as far as their queue of instructions reaches, which is not far where every element
// takes several of them.
constexpr size_t kAhead = 6 * 1024, kCacheLine = 64;  // bytes
template <class T, class Visit> INLINE void for_each(const T* x, size_t n, Visit visit) {
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
#ifdef __GNUC__
        const uintptr_t ahead = reinterpret_cast<uintptr_t>(x + i) + kAhead;
        for (size_t byte = 0; byte < kLanes * sizeof(T); byte += kCacheLine)
            __builtin_prefetch(reinterpret_cast<const void*>(ahead + byte), 0, 2);
#endif
        for (size_t j = 0; j < kLanes; ++j) visit(i + j, j);
    }
    for (size_t j = 0; i < n; ++i, ++j) visit(i, j);
}

// Adds up `n` lanes, halves onto halves; spelled out for the compiler, as a loop over `n` costs more than the sums.
template <size_t n> INLINE double fold_lanes(double* lanes) {
    if constexpr (n > 1) {
        for (size_t j = 0; j < n / 2; ++j) lanes[j] += lanes[j + n / 2];
        return fold_lanes<n / 2>(lanes);
    }
    return lanes[0];
}

template <class T, class Add> INLINE double sum_lanes(const T* x, size_t n, Add add) {
    double lanes[kLanes] = {};
    for_each(x, n, [&](size_t i, size_t lane) { lanes[lane] = add(lanes[lane], widen(x[i])); });
    return fold_lanes<kLanes>(lanes);
}

// The square of a shorter number is exact in double: fusing it with the addition changes nothing but the time.
template <bool kFusedMultiplyAdd, class T> INLINE double sum_squares(const T* x, size_t n) {
    return sum_lanes(x, n, [](double sum, double v) {
        return kFusedMultiplyAdd && sizeof(T) < sizeof v ? std::fma(v, v, sum) : sum + v * v;
    });
}

// `unit`, a power of two, brings numbers whose squares a double cannot hold into its range.
template <class T> INLINE double sum_scaled_squares(const T* x, size_t n, double unit) {
    return sum_lanes(x, n, [unit](double sum, double v) { return sum + (v * unit) * (v * unit); });
}

template <class T> INLINE double sum_magnitudes(const T* x, size_t n) {
    return sum_lanes(x, n, [](double sum, double v) { return sum + std::fabs(v); });
}

template <class T> INLINE double largest(const T* x, size_t n) {
    using Int = typename Bits<T>::type;
    Int lanes[kLanes] = {};
    for_each(x, n, [&](size_t i, size_t lane) { lanes[lane] = std::max(lanes[lane], magnitude(x[i])); });
    for (size_t half = kLanes / 2; half > 0; half /= 2)
        for (size_t j = 0; j < half; ++j) lanes[j] = std::max(lanes[j], lanes[j + half]);
    return widen(bit_cast<T>(lanes[0]));
}

template <class T> INLINE void scale(T* x, size_t n, double factor) {
    const float single = float(factor);
    if constexpr (sizeof(T) < sizeof factor) {
        // In float, as torch multiplies all but double, unless the factor is too small for one.
        if (std::isnormal(single))
            return for_each(x, n, [=](size_t i, size_t) { x[i] = nearest<T>(to_float(x[i]) * single); });
    }
    for_each(x, n, [=](size_t i, size_t) { x[i] = narrow<T>(widen(x[i]) * factor); });
}

template <class T> INLINE void clamp(T* x, size_t n, double limit) {
    using Int = typename Bits<T>::type;
    const Int top = magnitude(narrow<T>(limit));
    constexpr size_t kStretch = 256;
    Int beyond = 0;
    for (size_t start = 0; start < n; start += kStretch) {
        T* const stretch = x + start;
        const size_t length = std::min(kStretch, n - start);
        if (!beyond) {  // memory that is not written costs half as much; but where one is, the next will be
            for (size_t i = 0; i < length; ++i) beyond |= Int(magnitude(stretch[i]) > top);
            if (!beyond) continue;
        }
        beyond = 0;
        for (size_t i = 0; i < length; ++i) {
            const Int bits = bit_cast<Int>(stretch[i]), size = magnitude(stretch[i]);
            const Int clamped = Int((bits ^ size) | top);
            stretch[i] = bit_cast<T>(size > top && size <= Bits<T>::infinity ? clamped : bits);
            beyond |= Int(size > top);
        }
    }
}

// Norms other than 2 need the modulus of each complex number.  Squares of floats fit a double; for doubles, and
// where one part is nan and the other inf, hypot knows what to do.
INLINE double modulus(const float* z) {
    const double real = z[0], imag = z[1], result = std::sqrt(real * real + imag * imag);
    return std::isnan(result) ? std::hypot(real, imag) : result;
}
INLINE double modulus(const double* z) { return std::hypot(z[0], z[1]); }

INLINE double larger(double a, double b) { return a > b || std::isnan(a) ? a : b; }

// The loops over one format, compiled for one instruction set; n counts real numbers, two to a complex one.
using Read = double (*)(const void* x, size_t n, double unit);
using Write = void (*)(void* x, size_t n, double number);
struct Loops {
    Read sum_squares, sum_scaled_squares, sum_magnitudes, largest;
    Write scale, clamp;
};

#define DEFINE_LOOPS(NAME, TARGET, FUSED)                                                                       \
    template <class T> struct NAME {                                                                            \
        using In = const void*;                                                                                 \
        using Out = void*;                                                                                      \
        TARGET static double squares(In x, size_t n, double) { return sum_squares<FUSED>((const T*)x, n); }     \
        TARGET static double scaled(In x, size_t n, double u) { return sum_scaled_squares((const T*)x, n, u); } \
        TARGET static double magnitudes(In x, size_t n, double) { return sum_magnitudes((const T*)x, n); }      \
        TARGET static double top(In x, size_t n, double) { return largest((const T*)x, n); }                    \
        TARGET static void scaling(Out x, size_t n, double factor) { scale((T*)x, n, factor); }                 \
        TARGET static void clamping(Out x, size_t n, double limit) { clamp((T*)x, n, limit); }                  \
        static Loops table() { return {squares, scaled, magnitudes, top, scaling, clamping}; }                  \
    };

DEFINE_LOOPS(Baseline, , false)
#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_X86_TARGETS
DEFINE_LOOPS(Avx2, __attribute__((target("avx2,fma"))), true)
DEFINE_LOOPS(Avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), true)
#endif

template <class T> double sum_moduli(const void* x, size_t n, double) {
    double sum = 0;
    for (const T *z = static_cast<const T*>(x), *end = z + n; z != end; z += 2) sum += modulus(z);
    return sum;
}

template <class T> double largest_modulus(const void* x, size_t n, double) {
    double top = 0;
    for (const T *z = static_cast<const T*>(x), *end = z + n; z != end; z += 2) top = larger(modulus(z), top);
    return top;
}

template <class T> Loops complex_loops(Loops real) {
    return {real.sum_squares, real.sum_scaled_squares, sum_moduli<T>, largest_modulus<T>, real.scale, nullptr};
}

// A format is what torch calls a dtype.
struct Format {
    uint8_t code, bits;
    size_t parts;      // real numbers an element
    size_t alignment;  // bytes a real number
};
constexpr Format kFormats[] = {
    {kFloat, 32, 1, 4}, {kBfloat, 16, 1, 2},  {kFloat, 16, 1, 2},
    {kFloat, 64, 1, 8}, {kComplex, 64, 2, 4}, {kComplex, 128, 2, 8},
};
constexpr size_t kFormatCount = sizeof kFormats / sizeof *kFormats;

Loops loops_of[kFormatCount];  // by format, for the instruction set in use
const char* instruction_set = nullptr;

template <template <class> class Set> void use(const char* name) {
    const Loops single = Set<float>::table(), twice = Set<double>::table();
    const Loops loops[] = {single, Set<BFloat>::table(), Set<Half>::table(), twice,
                           complex_loops<float>(single), complex_loops<double>(twice)};
    std::copy(std::begin(loops), std::end(loops), loops_of);
    instruction_set = name;
}

// Takes the named instruction set, or the best one where there is no name; false if this machine has not got it.
bool use_instruction_set(const char* name) {
    const auto wanted = [name](const char* set) { return name == nullptr || std::strcmp(name, set) == 0; };
#ifdef HAVE_X86_TARGETS
    __builtin_cpu_init();
    if (wanted("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return use<Avx512>("avx512"), true;
    if (wanted("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return use<Avx2>("avx2"), true;
#endif
    if (wanted("baseline")) return use<Baseline>("baseline"), true;
    return false;
}

// ---------------------------------------------------------------------------------------------------------------
// Layouts: where the elements of a tensor lie
// ---------------------------------------------------------------------------------------------------------------

struct Axis {
    int64_t size, stride;
};

// One tensor: a flat run of elements, or (where `axes` is not 0) a grid with gaps, its axes sorted from the
// narrowest stride to the widest.
struct Strip {
    PyObject* tensor;
    char* data;
    size_t count;        // elements
    size_t span;         // bytes from the first element to the end of the last
    size_t item;         // bytes an element
    uint32_t format, axes;
    size_t first_axis;   // in the batch's list
    size_t first_chunk;  // likewise
    size_t position;     // among all tensors of the batch
    double factor;       // for `scale_each`,
    bool has_factor;     // if it has one
};

// Works out how `t` lies, appending its axes to the list if it has gaps.  False if elements may overlap.
bool lay_out(const DLTensor& t, Strip& strip, std::vector<Axis>& axes) {
    strip.axes = 0;
    strip.count = 1;
    bool contiguous = true;
    for (int32_t d = t.ndim - 1; d >= 0; --d) {
        contiguous &= t.shape[d] == 1 || t.strides[d] == int64_t(strip.count);
        strip.count *= size_t(t.shape[d]);
    }
    strip.span = strip.count * strip.item;
    if (contiguous || strip.count == 0) return true;

    const size_t first = axes.size();
    for (int32_t d = 0; d < t.ndim; ++d)
        if (t.shape[d] != 1) axes.push_back({t.shape[d], t.strides[d]});
    std::sort(axes.begin() + first, axes.end(), [](Axis a, Axis b) { return a.stride < b.stride; });

    int64_t reach = 0;  // offset of the last element of the axes so far
    size_t last = first;
    for (size_t i = first; i < axes.size(); ++i) {
        const Axis axis = axes[i];
        if (axis.stride <= reach) return axes.resize(first), false;
        reach += (axis.size - 1) * axis.stride;
        if (i == first) continue;
        if (axis.stride == axes[last].size * axes[last].stride)
            axes[last].size *= axis.size;
        else
            axes[++last] = axis;
    }
    strip.span = size_t(reach + 1) * strip.item;
    if (last == first && axes[first].stride == 1) return axes.resize(first), true;
    axes.resize(last + 1);
    strip.first_axis = first;
    strip.axes = uint32_t(last + 1 - first);
    return true;
}

// Copies `n` elements between a gap-less buffer and memory `stride` elements apart.
template <class Item> void copy_strided(char* grid, char* buffer, size_t n, int64_t stride, bool gather) {
    for (size_t i = 0; i < n; ++i) {
        char* const there = grid + int64_t(i) * stride * int64_t(sizeof(Item));
        char* const here = buffer + i * sizeof(Item);
        gather ? std::memcpy(here, there, sizeof(Item)) : std::memcpy(there, here, sizeof(Item));
    }
}

void copy_run(char* grid, char* buffer, size_t n, int64_t stride, size_t item, bool gather) {
    if (stride == 1) {
        gather ? std::memcpy(buffer, grid, n * item) : std::memcpy(grid, buffer, n * item);
        return;
    }
    switch (item) {
        case 2: return copy_strided<uint16_t>(grid, buffer, n, stride, gather);
        case 4: return copy_strided<uint32_t>(grid, buffer, n, stride, gather);
        case 8: return copy_strided<uint64_t>(grid, buffer, n, stride, gather);
        default: return copy_strided<uint64_t[2]>(grid, buffer, n, stride, gather);
    }
}

// Copies elements [start, start + n) of a grid into the buffer, or back.
void copy_grid(const Strip& strip, const Axis* axes, size_t start, size_t n, char* buffer, bool gather) {
    while (n > 0) {
        int64_t offset = 0;
        size_t index = start;
        for (uint32_t d = 0; d < strip.axes; ++d) {
            offset += int64_t(index % size_t(axes[d].size)) * axes[d].stride;
            index /= size_t(axes[d].size);
        }
        const size_t run = std::min(n, size_t(axes[0].size) - start % size_t(axes[0].size));
        copy_run(strip.data + offset * int64_t(strip.item), buffer, run, axes[0].stride, strip.item, gather);
        buffer += run * strip.item;
        start += run;
        n -= run;
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Batch: tensors cut into chunks, and the threads that work on them
// ---------------------------------------------------------------------------------------------------------------

constexpr size_t kChunk = 16 * 1024;           // elements; sums are added chunk by chunk, in order
constexpr size_t kChunkCost = 256;             // what starting a chunk costs, in elements
constexpr size_t kWorthReleasing = 32 * 1024;  // cost in all below which holding the GIL is cheaper
#ifdef _OPENMP
constexpr size_t kWorthThreads = 64 * 1024;  // elements in all below which one thread is faster
const pid_t loaded_in = getpid();
#endif

struct Chunk {
    size_t strip, start, count;
    size_t cost_before;  // of all chunks before this one
};

struct Batch {
    PyObject* all = nullptr;   // list of distinct tensors, in order
    PyObject* rest = nullptr;  // list of those that are not in `strips`, once there is one
    Py_ssize_t count = 0;      // items seen, counting those without a gradient and those that came before
    size_t distinct = 0, cost = 0;  // cost: as if in elements
    bool has_double = false, has_complex = false;  // among the strips
    bool has_subclass = false;                     // among the items
    std::vector<Strip> strips;
    std::vector<Axis> axes;
    std::vector<Chunk> chunks;
    std::vector<double> results;  // by chunk

    ~Batch() {
        for (Strip& strip : strips) Py_DECREF(strip.tensor);
        Py_XDECREF(all);
        Py_XDECREF(rest);
    }

    // Takes a tensor if its memory can be worked on directly.
    bool take(PyObject* tensor, const DLTensor& t) {
        Strip strip{};
        while (kFormats[strip.format].code != t.dtype.code || kFormats[strip.format].bits != t.dtype.bits)
            if (++strip.format == kFormatCount) return false;
        const Format& format = kFormats[strip.format];
        if (t.device_type != kCPU || t.dtype.lanes != 1 || (t.strides == nullptr && t.ndim > 0)) return false;
        strip.item = format.bits / 8;
        strip.data = static_cast<char*>(t.data) + t.byte_offset;
        if (!lay_out(t, strip, axes)) return false;
        const bool nowhere = t.data == nullptr || reinterpret_cast<uintptr_t>(strip.data) % format.alignment != 0;
        if (nowhere && strip.count > 0) return false;
        strip.first_chunk = chunks.size();
        strip.position = distinct - 1;
        for (size_t start = 0; start < strip.count; start += kChunk) {
            chunks.push_back({strips.size(), start, std::min(kChunk, strip.count - start), cost});
            cost += chunks.back().count + kChunkCost;
        }
        has_double |= format.alignment == sizeof(double);
        has_complex |= format.code == kComplex;
        strip.tensor = tensor;
        strips.push_back(strip);
        Py_INCREF(tensor);
        return true;
    }

    size_t elements() const { return cost - chunks.size() * kChunkCost; }

    // Many small tensors are left to one thread too: two would find each other's half in the wrong cache, and to find
    // out whether tensors overlap takes longer than to scale them.
    // GNU's OpenMP has no threads in a forked child and waits for them for ever; so a child works alone.
    int usable_threads(long threads) const {
#ifdef _OPENMP
        const bool many = threads > 1 && elements() >= kWorthThreads && getpid() == loaded_in;
        return many ? int(std::min(threads, 1024L)) : 1;
#else
        return (void)threads, 1;
#endif
    }

    // Cuts chunks [first, last) into parts that cost about the same; gives where one of them begins.
    size_t begin_of_part(size_t first, size_t last, size_t part, size_t parts) const {
        if (part == parts) return last;
        const size_t before = chunks[first].cost_before;
        const size_t after = last < chunks.size() ? chunks[last].cost_before : cost;
        const size_t limit = before + (after - before) / parts * part;
        const auto cheaper = [](const Chunk& chunk, size_t cost) { return chunk.cost_before < cost; };
        const Chunk* const all = chunks.data();
        return size_t(std::lower_bound(all + first, all + last, limit, cheaper) - all);
    }

    // Calls work(i) for chunks [first, last), without the GIL if there is much to do.
    template <class Work> void run(size_t first, size_t last, int threads, Work work) {
        PyThreadState* const state = cost >= kWorthReleasing ? PyEval_SaveThread() : nullptr;
#ifdef _OPENMP
        if (threads > 1 && first < last) {
#pragma omp parallel num_threads(threads)
            {
                const size_t part = size_t(omp_get_thread_num()), parts = size_t(omp_get_num_threads());
                const size_t end = begin_of_part(first, last, part + 1, parts);
                for (size_t i = begin_of_part(first, last, part, parts); i < end; ++i) work(i);
            }
            first = last;
        }
#else
        (void)threads;
#endif
        for (size_t i = first; i < last; ++i) work(i);
        if (state != nullptr) PyEval_RestoreThread(state);
    }

    // Calls inner(x, n) for the real numbers of a chunk, through a buffer where there are gaps between them.
    template <class Inner> void visit(const Chunk& chunk, bool write, Inner inner) const {
        const Strip& strip = strips[chunk.strip];
        const size_t parts = kFormats[strip.format].parts;
        if (strip.axes == 0) return inner(strip.data + chunk.start * strip.item, chunk.count * parts);
        alignas(64) char buffer[8192];
        const Axis* const grid = &axes[strip.first_axis];
        const size_t room = sizeof buffer / strip.item, end = chunk.start + chunk.count;
        for (size_t start = chunk.start; start < end; start += room) {
            const size_t n = std::min(room, end - start);
            copy_grid(strip, grid, start, n, buffer, true);
            inner(buffer, n * parts);
            if (write) copy_grid(strip, grid, start, n, buffer, false);
        }
    }

    // Reduces chunks [first, last), each on its own, then together in order.
    double reduce(size_t first, size_t last, Read Loops::*loop, double unit, int threads) {
        const bool take_largest = loop == &Loops::largest;
        run(first, last, threads, [=](size_t i) {
            double result = 0;
            visit(chunks[i], false, [&](char* x, size_t n) {
                const double part = (loops_of[strips[chunks[i].strip].format].*loop)(x, n, unit);
                result = take_largest ? larger(part, result) : result + part;
            });
            results[i] = result;
        });
        return fold(first, last, take_largest);
    }

    double fold(size_t first, size_t last, bool take_largest) const {
        double result = 0;
        for (size_t i = first; i < last; ++i)
            result = take_largest ? larger(results[i], result) : result + results[i];
        return result;
    }

    // The norm of chunks [first, last), given what `reduce` made of them.  Squares of float64 can leave the range
    // of numbers; then they are taken again relative to the largest.
    double norm_from(double reduced, size_t first, size_t last, Read Loops::*loop, int threads) {
        if (loop != &Loops::sum_squares) return reduced;
        if (reduced > 1e-280 && reduced <= std::numeric_limits<double>::max()) return std::sqrt(reduced);
        const double top = reduce(first, last, &Loops::largest, 1.0, threads);
        if (top == 0 || !std::isfinite(top)) return top;
        const int exponent = std::max(-1023, std::min(std::ilogb(top), 1023));
        const double sum = reduce(first, last, &Loops::sum_scaled_squares, std::ldexp(1.0, -exponent), threads);
        return std::ldexp(std::sqrt(sum), exponent);
    }

    double norm(Read Loops::*loop, int threads) {
        return norm_from(reduce(0, chunks.size(), loop, 1.0, threads), 0, chunks.size(), loop, threads);
    }

    // Of one strip, after `reduce` of all chunks.
    double norm_of(size_t strip, Read Loops::*loop, int threads) {
        const size_t first = strips[strip].first_chunk;
        const size_t last = strip + 1 < strips.size() ? strips[strip + 1].first_chunk : chunks.size();
        return norm_from(fold(first, last, loop == &Loops::largest), first, last, loop, threads);
    }

    // True if two threads might write to the same memory.
    bool overlaps() const {
        std::vector<std::pair<const char*, const char*>> ranges;
        for (const Strip& strip : strips)
            if (strip.count > 0) ranges.emplace_back(strip.data, strip.data + strip.span);
        std::sort(ranges.begin(), ranges.end());
        for (size_t i = 1; i < ranges.size(); ++i)
            if (ranges[i].first < ranges[i - 1].second) return true;
        return false;
    }

    // Changes the strips for which `number(strip, value)` sets a value.
    template <class Number> void write(Write Loops::*loop, int threads, Number number) {
        if (threads > 1 && overlaps()) threads = 1;
        run(0, chunks.size(), threads, [=](size_t i) {
            double value = 0;
            if (!number(chunks[i].strip, value)) return;
            const Write inner = loops_of[strips[chunks[i].strip].format].*loop;
            visit(chunks[i], true, [=](char* x, size_t n) { inner(x, n, value); });
        });
    }
};

// ---------------------------------------------------------------------------------------------------------------
// Python: walking the parameters
// ---------------------------------------------------------------------------------------------------------------

// What `connect` was given.
struct {
    PyTypeObject *tensor, *parameter;
    PyObject *increment_version, *refuse;
    PyObject* grad;    // Tensor.grad, a descriptor,
    descrgetfunc get;  // and what reads it from a tensor, without looking the name up each time
    int (*read)(void* py_object, DLTensor* out);
    int (*make)(DLManagedTensorVersioned* tensor, void** out);
} torch;

struct BatchObject {
    PyObject_HEAD
    Batch batch;
};
PyTypeObject* batch_type = nullptr;

// The objects seen so far, by identity: open addressing, at most half full.
class Seen {
    std::vector<PyObject*> slots_;
    size_t used_ = 0;

    bool place(PyObject* object) {
        const size_t mask = slots_.size() - 1;
        size_t i = (reinterpret_cast<uintptr_t>(object) >> 4) * 0x9e3779b97f4a7c15ull >> 32 & mask;
        while (slots_[i] != nullptr && slots_[i] != object) i = (i + 1) & mask;
        return slots_[i] == object ? false : (slots_[i] = object, true);
    }

  public:
    explicit Seen(size_t expected) {
        size_t slots = 16;
        while (slots < 2 * expected) slots *= 2;
        slots_.resize(slots);
    }

    // False if the object was there before.
    bool add(PyObject* object) {
        if (2 * used_ >= slots_.size()) {
            std::vector<PyObject*> old(2 * slots_.size());
            old.swap(slots_);
            for (PyObject* each : old)
                if (each != nullptr) place(each);
        }
        return place(object) ? ++used_, true : false;
    }
};

bool is_plain(PyObject* object) { return Py_TYPE(object) == torch.tensor || Py_TYPE(object) == torch.parameter; }

// Adds one distinct tensor to the batch, to the strips if it can be read and else to the rest.
bool add_tensor(Batch& batch, Seen& seen, PyObject* tensor) {
    if (!seen.add(tensor)) return true;
    if (PyList_Append(batch.all, tensor) < 0) return false;
    ++batch.distinct;
    DLTensor t;
    if (is_plain(tensor)) {
        if (torch.read(tensor, &t) != 0)
            PyErr_Clear();  // no memory of its own (sparse, meta, inside vmap): the rest
        else if (batch.take(tensor, t))
            return true;
    }
    if (batch.rest == nullptr) batch.rest = PyList_New(0);
    return batch.rest != nullptr && PyList_Append(batch.rest, tensor) == 0;
}

// One item of the iterable: itself, or its gradient if it has one.
bool add_item(Batch& batch, Seen& seen, PyObject* item, bool take_gradient) {
    const Py_ssize_t index = batch.count++;
    const bool plain = is_plain(item);
    batch.has_subclass |= !plain;
    if (!plain) {
        const int known = PyObject_IsInstance(item, reinterpret_cast<PyObject*>(torch.tensor));
        if (known < 0) return false;
        if (known == 0) {
            const char* const name = take_gradient ? "parameters" : "tensors";
            PyObject* const none = PyObject_CallFunction(torch.refuse, "snO", name, index, item);
            Py_XDECREF(none);
            if (none != nullptr) PyErr_Format(PyExc_TypeError, "item %zd is not a Tensor", index);
            return false;
        }
    }
    if (!take_gradient) return add_tensor(batch, seen, item);
    PyObject* const gradient = plain ? torch.get(torch.grad, item, reinterpret_cast<PyObject*>(Py_TYPE(item)))
                                     : PyObject_GetAttrString(item, "grad");
    if (gradient == nullptr) return false;
    const bool added = gradient == Py_None || add_tensor(batch, seen, gradient);
    Py_DECREF(gradient);
    return added;
}

bool walk(Batch& batch, PyObject* iterable, bool take_gradient) {
    const bool is_list = PyList_CheckExact(iterable);
    const size_t expected = is_list ? size_t(PyList_Size(iterable)) : 0;
    Seen seen(expected);
    batch.strips.reserve(expected);
    batch.chunks.reserve(expected);
    if (is_list) {
        for (Py_ssize_t i = 0; i < PyList_Size(iterable); ++i) {
            PyObject* const item = PyList_GetItem(iterable, i);
            Py_INCREF(item);  // reading a gradient can run Python code that changes the list
            const bool added = add_item(batch, seen, item, take_gradient);
            Py_DECREF(item);
            if (!added) return false;
        }
        return true;
    }
    PyObject* const iterator = PyObject_GetIter(iterable);
    if (iterator == nullptr) return false;
    bool added = true;
    while (PyObject* const item = added ? PyIter_Next(iterator) : nullptr) {
        added = add_item(batch, seen, item, take_gradient);
        Py_DECREF(item);
    }
    Py_DECREF(iterator);
    return added && PyErr_Occurred() == nullptr;
}

bool connected() {
    if (torch.read != nullptr) return true;
    PyErr_SetString(PyExc_RuntimeError, "the kernel is not connected to torch; call connect() first");
    return false;
}

// Also of None: Py_RETURN_NONE of Python 3.12.1's headers takes it for immortal, which it is not in 3.10 and 3.11.
PyObject* new_reference(PyObject* object) {
    Py_INCREF(object);
    return object;
}

PyObject* gather(PyObject* iterable, bool take_gradient) {
    if (!connected()) return nullptr;
    BatchObject* const self = PyObject_New(BatchObject, batch_type);
    if (self == nullptr) return nullptr;
    Batch* const batch = new (&self->batch) Batch;
    batch->all = PyList_New(0);
    bool done = batch->all != nullptr;
    try {
        done = done && walk(*batch, iterable, take_gradient);
        batch->results.resize(batch->chunks.size());
    } catch (const std::bad_alloc&) {
        done = false;
        PyErr_NoMemory();
    }
    if (done) return reinterpret_cast<PyObject*>(self);
    Py_DECREF(self);
    return nullptr;
}

// ---------------------------------------------------------------------------------------------------------------
// Python: Batch's methods
// ---------------------------------------------------------------------------------------------------------------

Batch& batch_of(PyObject* self) { return reinterpret_cast<BatchObject*>(self)->batch; }

bool count_is(Py_ssize_t given, Py_ssize_t wanted) {
    if (given == wanted) return true;
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", wanted, given);
    return false;
}

bool read_number(PyObject* object, double& number) {
    number = PyFloat_AsDouble(object);
    return number != -1.0 || PyErr_Occurred() == nullptr;
}

// Every method takes a number (or a sequence of them) and the most threads to use.
bool read_threads(PyObject* const* args, Py_ssize_t count, const Batch& batch, int& threads) {
    if (!count_is(count, 2)) return false;
    const long wanted = PyLong_AsLong(args[1]);
    if (wanted == -1 && PyErr_Occurred() != nullptr) return false;
    threads = batch.usable_threads(wanted);
    return true;
}

bool read_order(PyObject* object, Read Loops::*&loop) {
    double p;
    if (!read_number(object, p)) return false;
    if (p == 2 || p == 1 || p == std::numeric_limits<double>::infinity()) {
        loop = p == 2 ? &Loops::sum_squares : p == 1 ? &Loops::sum_magnitudes : &Loops::largest;
        return true;
    }
    PyErr_SetString(PyExc_ValueError, "the kernel knows the norms of order 1, 2 and inf");
    return false;
}

PyObject* batch_norm(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Batch& batch = batch_of(self);
    Read Loops::*loop;
    int threads;
    if (!read_threads(args, count, batch, threads) || !read_order(args[0], loop)) return nullptr;
    return PyFloat_FromDouble(batch.norm(loop, threads));
}

PyObject* batch_norms(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Batch& batch = batch_of(self);
    Read Loops::*loop;
    int threads;
    if (!read_threads(args, count, batch, threads) || !read_order(args[0], loop)) return nullptr;
    PyObject* const norms = PyList_New(Py_ssize_t(batch.distinct));
    if (norms == nullptr) return nullptr;
    batch.reduce(0, batch.chunks.size(), loop, 1.0, threads);
    size_t strip = 0;
    for (size_t i = 0; i < batch.distinct; ++i) {
        const bool taken = strip < batch.strips.size() && batch.strips[strip].position == i;
        PyObject* const norm =
            taken ? PyFloat_FromDouble(batch.norm_of(strip++, loop, threads)) : new_reference(Py_None);
        if (norm == nullptr) return Py_DECREF(norms), nullptr;
        PyList_SetItem(norms, Py_ssize_t(i), norm);
    }
    return norms;
}

// Changes the strips for which `number(strip, value)` sets a value (`every`: all there are), and tells autograd.
template <class Number>
PyObject* change(Batch& batch, Write Loops::*loop, int threads, bool every, Number number) {
    PyObject* const changed = every ? new_reference(batch.all) : PyList_New(0);
    bool done = changed != nullptr;
    double ignored;
    for (size_t i = 0; i < batch.strips.size() && done && !every; ++i)
        if (number(i, ignored)) done = PyList_Append(changed, batch.strips[i].tensor) == 0;
    if (done && PyList_Size(changed) > 0) {
        PyObject* const none = PyObject_CallFunctionObjArgs(torch.increment_version, changed, nullptr);
        done = none != nullptr;
        Py_XDECREF(none);
    }
    Py_XDECREF(changed);
    if (!done) return nullptr;
    try {
        batch.write(loop, threads, number);
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
    return new_reference(Py_None);
}

PyObject* change_all(Batch& batch, Write Loops::*loop, int threads, double number) {
    return change(batch, loop, threads, batch.rest == nullptr,
                  [number](size_t, double& value) { return value = number, true; });
}

PyObject* batch_scale(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Batch& batch = batch_of(self);
    double factor;
    int threads;
    if (!read_threads(args, count, batch, threads) || !read_number(args[0], factor)) return nullptr;
    return change_all(batch, &Loops::scale, threads, factor);
}

PyObject* batch_clamp(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Batch& batch = batch_of(self);
    double limit;
    int threads;
    if (!read_threads(args, count, batch, threads) || !read_number(args[0], limit)) return nullptr;
    if (batch.has_complex)
        return PyErr_Format(PyExc_ValueError, "complex numbers have no order, so they cannot be clamped");
    if (!(limit >= 0)) return PyErr_Format(PyExc_ValueError, "the limit must be at least 0, got %R", args[0]);
    return change_all(batch, &Loops::clamp, threads, limit);
}

PyObject* batch_scale_each(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Batch& batch = batch_of(self);
    int threads;
    if (!read_threads(args, count, batch, threads)) return nullptr;
    const Py_ssize_t given = PySequence_Size(args[0]);
    if (given < 0) return nullptr;
    if (size_t(given) != batch.distinct)
        return PyErr_Format(PyExc_ValueError, "expected one factor for each tensor, got %zd", given);
    for (Strip& strip : batch.strips) {
        PyObject* const factor = PySequence_GetItem(args[0], Py_ssize_t(strip.position));
        if (factor == nullptr) return nullptr;
        strip.has_factor = factor != Py_None;
        const bool read = !strip.has_factor || read_number(factor, strip.factor);
        Py_DECREF(factor);
        if (!read) return nullptr;
    }
    return change(batch, &Loops::scale, threads, false, [&batch](size_t i, double& value) {
        return value = batch.strips[i].factor, batch.strips[i].has_factor;
    });
}

void batch_dealloc(PyObject* self) {
    PyTypeObject* const type = Py_TYPE(self);
    batch_of(self).~Batch();
    PyObject_Free(self);
    Py_DECREF(type);
}

PyObject* batch_all(PyObject* self, void*) { return new_reference(batch_of(self).all); }
PyObject* batch_rest(PyObject* self, void*) {
    PyObject* const rest = batch_of(self).rest;
    return rest != nullptr ? new_reference(rest) : PyTuple_New(0);
}
PyObject* batch_count(PyObject* self, void*) { return PyLong_FromSsize_t(batch_of(self).count); }
PyObject* batch_subclassed(PyObject* self, void*) { return PyBool_FromLong(batch_of(self).has_subclass); }
PyObject* batch_double(PyObject* self, void*) { return PyBool_FromLong(batch_of(self).has_double); }
PyObject* batch_complex(PyObject* self, void*) { return PyBool_FromLong(batch_of(self).has_complex); }

using Fast = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
PyCFunction function(Fast fast) { return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fast)); }

PyMethodDef batch_methods[] = {
    {"norm", function(batch_norm), METH_FASTCALL, "norm(order, threads): of all taken tensors as one vector"},
    {"norms", function(batch_norms), METH_FASTCALL, "norms(order, threads): of each, None for the rest"},
    {"scale", function(batch_scale), METH_FASTCALL, "scale(factor, threads): multiply in place"},
    {"scale_each", function(batch_scale_each), METH_FASTCALL, "scale_each(factors, threads): None for no change"},
    {"clamp", function(batch_clamp), METH_FASTCALL, "clamp(limit, threads): to [-limit, limit], in place"},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef batch_attributes[] = {
    {"all", batch_all, nullptr, "the distinct tensors, in order", nullptr},
    {"rest", batch_rest, nullptr, "those that the kernel does not take", nullptr},
    {"count", batch_count, nullptr, "the number of items seen", nullptr},
    {"subclassed", batch_subclassed, nullptr, "whether an item is neither plain Tensor nor Parameter", nullptr},
    {"double", batch_double, nullptr, "whether a taken tensor is of float64 or complex128", nullptr},
    {"complex", batch_complex, nullptr, "whether a taken tensor is complex", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyType_Slot batch_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(batch_dealloc)},
    {Py_tp_methods, batch_methods},
    {Py_tp_getset, batch_attributes},
    {Py_tp_doc, const_cast<char*>("Tensors that the kernel works on together.")},
    {0, nullptr},
};

PyType_Spec batch_spec = {"torchclip._kernel.Batch", sizeof(BatchObject), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, batch_slots};

// ---------------------------------------------------------------------------------------------------------------
// Python: the module
// ---------------------------------------------------------------------------------------------------------------

PyObject* connect(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!count_is(count, 5)) return nullptr;
    auto* api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(args[2], "dlpack_exchange_api"));
    if (api == nullptr) return nullptr;
    while (api != nullptr && api->major != 1) api = api->previous;
    if (api == nullptr || api->dltensor_from_py_object_no_sync == nullptr) {
        PyErr_SetString(PyExc_RuntimeError, "torch offers no DLPack exchange table of version 1");
        return nullptr;
    }
    if (!PyType_Check(args[0]) || !PyType_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "the first two arguments must be the Tensor and Parameter types");
        return nullptr;
    }
    PyObject* const grad = PyObject_GetAttrString(args[0], "grad");
    if (grad == nullptr) return nullptr;
    torch.get = reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(grad), Py_tp_descr_get));
    if (torch.get == nullptr) {
        Py_DECREF(grad);
        return PyErr_Format(PyExc_RuntimeError, "Tensor.grad is not an attribute that the kernel can read");
    }
    torch.grad = grad;
    torch.tensor = reinterpret_cast<PyTypeObject*>(new_reference(args[0]));
    torch.parameter = reinterpret_cast<PyTypeObject*>(new_reference(args[1]));
    torch.increment_version = new_reference(args[3]);
    torch.refuse = new_reference(args[4]);
    torch.read = api->dltensor_from_py_object_no_sync;
    torch.make = api->managed_tensor_to_py_object_no_sync;
    return new_reference(Py_None);
}

PyObject* gradients(PyObject*, PyObject* parameters) { return gather(parameters, true); }
PyObject* tensors(PyObject*, PyObject* iterable) { return gather(iterable, false); }

// A 0-dim tensor in memory of its own, which torch frees.
struct Scalar {
    DLManagedTensorVersioned managed;
    union {
        float single;
        double twice;
    };
};

PyObject* scalar(PyObject*, PyObject* const* args, Py_ssize_t count) {
    double value;
    if (!count_is(count, 2) || !connected() || !read_number(args[0], value)) return nullptr;
    const int is_double = PyObject_IsTrue(args[1]);
    if (is_double < 0) return nullptr;
    Scalar* const made = new (std::nothrow) Scalar{};
    if (made == nullptr) return PyErr_NoMemory();
    if (is_double)
        made->twice = value;
    else
        made->single = float(value);
    DLManagedTensorVersioned& managed = made->managed;
    managed.major = 1;
    managed.manager_context = made;
    managed.deleter = [](DLManagedTensorVersioned* self) { delete static_cast<Scalar*>(self->manager_context); };
    managed.tensor.data = &made->twice;
    managed.tensor.device_type = kCPU;
    managed.tensor.dtype = {kFloat, uint8_t(is_double ? 64 : 32), 1};
    void* tensor = nullptr;
    if (torch.make(&managed, &tensor) == 0) return static_cast<PyObject*>(tensor);
    delete made;
    return nullptr;
}

PyObject* get_instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString(instruction_set); }

PyObject* select_instruction_set(PyObject*, PyObject* name) {
    const char* const text = PyUnicode_AsUTF8AndSize(name, nullptr);
    if (text == nullptr) return nullptr;
    if (use_instruction_set(text)) return new_reference(Py_None);
    return PyErr_Format(PyExc_ValueError, "this machine has no instruction set %R", name);
}

PyMethodDef module_methods[] = {
    {"connect", function(connect), METH_FASTCALL,
     "connect(tensor, parameter, exchange_api, increment_version, refuse): what the kernel needs of torch"},
    {"gradients", gradients, METH_O, "gradients(parameters): a Batch of their gradients"},
    {"tensors", tensors, METH_O, "tensors(tensors): a Batch of the tensors themselves"},
    {"scalar", function(scalar), METH_FASTCALL, "scalar(value, double): a 0-dim tensor of float64 or float32"},
    {"instruction_set", get_instruction_set, METH_NOARGS, "instruction_set(): the one in use"},
    {"select", select_instruction_set, METH_O, "select(instruction_set): use another one, to compare"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "_kernel", "Norms, scaling and clamping of many tensors at once.", -1,
    module_methods,        nullptr,   nullptr,                                               nullptr,
    nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__kernel() {
    use_instruction_set(nullptr);
    batch_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&batch_spec));
    PyObject* const module = PyModule_Create(&module_definition);
    if (batch_type == nullptr || module == nullptr) return nullptr;
#ifdef _OPENMP
    PyObject* const openmp = Py_True;
#else
    PyObject* const openmp = Py_False;
#endif
    Py_INCREF(openmp);
    if (PyModule_AddObject(module, "openmp", openmp) < 0) return nullptr;
    Py_INCREF(batch_type);
    if (PyModule_AddObject(module, "Batch", reinterpret_cast<PyObject*>(batch_type)) < 0) return nullptr;
    return module;
}
