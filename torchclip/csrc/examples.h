// Gradients of single examples: their norms over all tensors, and their clipped sum, with no copy of any.
#pragma once

#include "rows.h"

namespace {

// The loops of the weighted sum, of one dtype and instruction set.
struct SumLoops {
    // Adds `rows` times n numbers, each multiplied by the row's coefficient.
    void (*add)(double* sums, const void* const* x, const double* clip_coefs, size_t rows, size_t n);
    void (*round)(void* result, const double* sums, size_t n);
};

template <class T>
INLINE void add_rows(double* sums, const void* const* x, const double* clip_coefs, size_t rows, size_t n) {
    size_t i = 0;
    // Four at a time, so that the sums are not read and written for each.
    for (; i + 4 <= rows; i += 4) {
        const T *a = static_cast<const T*>(x[i]), *b = static_cast<const T*>(x[i + 1]);
        const T *c = static_cast<const T*>(x[i + 2]), *d = static_cast<const T*>(x[i + 3]);
        const double p = clip_coefs[i], q = clip_coefs[i + 1], r = clip_coefs[i + 2], s = clip_coefs[i + 3];
        for (size_t j = 0; j < n; ++j)
            sums[j] = (((sums[j] + p * widen(a[j])) + q * widen(b[j])) + r * widen(c[j])) + s * widen(d[j]);
    }
    for (; i < rows; ++i) {
        const T* a = static_cast<const T*>(x[i]);
        const double p = clip_coefs[i];
        for (size_t j = 0; j < n; ++j) sums[j] += p * widen(a[j]);
    }
}

template <class T> INLINE void round_sums(void* result, const double* sums, size_t n) {
    T* const to = static_cast<T*>(result);
    for (size_t j = 0; j < n; ++j) to[j] = narrow<T>(sums[j]);
}

#define DEFINE_SUM_LOOPS(NAME, TARGET)                                                                     \
    template <class T> struct NAME {                                                                       \
        TARGET static void add(double* s, const void* const* x, const double* c, size_t rows, size_t n) {  \
            add_rows<T>(s, x, c, rows, n);                                                                 \
        }                                                                                                  \
        TARGET static void round(void* result, const double* s, size_t n) { round_sums<T>(result, s, n); } \
    };
DEFINE_SUM_LOOPS(BaselineSums, )
#ifdef HAVE_X86_TARGETS
DEFINE_SUM_LOOPS(Avx2Sums, __attribute__((target("avx2"))))
DEFINE_SUM_LOOPS(Avx512Sums, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))
#endif
#undef DEFINE_SUM_LOOPS

template <template <class> class Set, class... Rows> const SumLoops* sum_table(DtypeTable<Rows...>) {
    static const SumLoops table[] = {{Set<typename Rows::Number>::add, Set<typename Rows::Number>::round}...};
    return table;
}

// By row of the table of dtypes, for the instruction set in use.
const SumLoops* sum_loops() {
#ifdef HAVE_X86_TARGETS
    if (std::strcmp(instruction_set, "avx512") == 0) return sum_table<Avx512Sums>(Dtypes());
    if (std::strcmp(instruction_set, "avx2") == 0) return sum_table<Avx2Sums>(Dtypes());
#endif
    return sum_table<BaselineSums>(Dtypes());
}

constexpr size_t kSummed = 2048;  // elements of a row that are summed up together, over all examples

// The tensors of a call, all of which the kernel can work on.
struct Examples {
    std::vector<Rows> grads;
    std::vector<Layout> sums;        // as the rows lie, but without gaps
    std::vector<double> clip_coefs;  // by example
    size_t count = 0, elements = 0;
    Axes axes;

    bool read(PyObject* tensors, PyObject* results) {
        grads.reserve(size_t(PyList_Size(tensors)));
        sums.reserve(size_t(PyList_Size(tensors)));
        for (Py_ssize_t i = 0; i < PyList_Size(tensors); ++i) {
            grads.emplace_back();
            sums.emplace_back();
            Rows& grad = grads.back();
            Layout& sum = sums.back();
            DLTensor t;
            if (!grad.read(PyList_GetItem(tensors, i), true, axes)) return false;
            if (!describe(PyList_GetItem(results, i), t) || !read_layout(t, sum, axes)) return false;
            if (sum.axes > 0 || sum.dtype != grad.row.dtype || (i > 0 && grad.count != count)) return false;
            if (grad.count > 0 && sum.count != grad.row.count) return false;
            count = grad.count;
            elements += grad.elements();
        }
        return true;
    }

    // The norm of each example over all tensors.
    std::vector<double> norms(int threads) const {
        std::vector<double> of_rows(grads.size() * count), result(count, 0.0);
        std::vector<Pieces> pieces;
        std::vector<size_t> together;
        for (const Rows& grad : grads) {
            together.push_back(rows_together(grad, grad, &Loops::sum_squares));
            pieces.push_back(
                {(count + together.back() - 1) / together.back(), together.back() * (grad.row.count + kRowCost)});
        }
        share(pieces, threads, [&](size_t i, size_t piece) {
            const size_t first = piece * together[i], rows = std::min(together[i], count - first);
            grads[i].norms(first, rows, &of_rows[i * count + first], elements, &Loops::sum_squares);
        });
        for (size_t row = 0; row < count; ++row) {
            double top = 0, sum = 0;
            for (size_t i = 0; i < grads.size(); ++i) top = larger(of_rows[i * count + row], top);
            if (top == 0 || !std::isfinite(top)) {
                result[row] = top;
                continue;
            }
            for (size_t i = 0; i < grads.size(); ++i) {
                const double part = of_rows[i * count + row] / top;
                sum += part * part;
            }
            result[row] = std::sqrt(sum) * top;
        }
        return result;
    }

    void add_up(int threads) const {
        // On the heap, as the stack of a thread may be small; what gathers rows only where they have gaps.
        bool has_gaps = false;
        for (const Rows& grad : grads) has_gaps = has_gaps || grad.row.axes > 0;
        std::vector<double> scratch(size_t(threads) * kSumRoom);
        std::vector<char> rows(has_gaps ? size_t(threads) * kRowRoom : 0);
        std::vector<Pieces> pieces;
        // What was measured last comes first, as it may still be in the cache.
        for (size_t i = grads.size(); i-- > 0;)
            pieces.push_back({(sums[i].count + kSummed - 1) / kSummed, kSummed * (count + 1)});
        const SumLoops* const table = sum_loops();
        share(pieces, threads, [&](size_t i, size_t block) {
            const size_t thread = threads > 1 ? size_t(openmp.get_thread_num()) : 0;
            char* const buffer = has_gaps ? &rows[thread * kRowRoom] : nullptr;
            add_block(grads.size() - 1 - i, block * kSummed, table, &scratch[thread * kSumRoom], buffer);
        });
    }

  private:
    static constexpr size_t kAtOnce = 4, kSumRoom = 2 * kSummed, kOneRow = 16 * kSummed, kRowRoom = kAtOnce * kOneRow;

    void add_block(size_t i, size_t start, const SumLoops* table, double* sum, char* buffer) const {
        const Rows& grad = grads[i];
        const DtypeFacts& dtype = kDtypes[grad.row.dtype];
        const SumLoops& loops = table[grad.row.dtype];
        const size_t n = std::min(kSummed, sums[i].count - start);
        std::fill(sum, sum + n * dtype.parts, 0.0);
        for (size_t row = 0; row < count; row += kAtOnce) {
            const size_t rows = std::min(kAtOnce, count - row);
            const void* x[kAtOnce];
            for (size_t k = 0; k < rows; ++k) {
                const Layout layout = grad.at(row + k);
                x[k] = layout.data + start * dtype.item;
                if (grad.row.axes == 0) continue;
                copy_grid(layout, grad.first_axis(), start, n, buffer + k * kOneRow, true);
                x[k] = buffer + k * kOneRow;
            }
            loops.add(sum, x, clip_coefs.data() + row, rows, n * dtype.parts);
        }
        loops.round(sums[i].data + start * dtype.item, sum, n * dtype.parts);
    }
};

// clip_examples(grads, sums, max_norm)
PyObject* clip_examples(PyObject*, PyObject* const* args, Py_ssize_t count) {
    double max_norm;
    if (!count_is(count, 3, 3) || !read_number(args[2], max_norm)) return nullptr;
    if (!PyList_Check(args[0]) || !PyList_Check(args[1]) || PyList_Size(args[0]) != PyList_Size(args[1]))
        return PyErr_Format(PyExc_TypeError, "the first two arguments must be lists of the same length");
    return guarded([&]() -> PyObject* {
        Examples examples;
        if (!is_usable() || !examples.read(args[0], args[1])) return new_reference(Py_None);
        const int threads = usable_threads(examples.elements);
        long long clipped = 0;
        {
            const WithoutGil unlocked(examples.elements);
            for (const double norm : examples.norms(threads)) {
                examples.clip_coefs.push_back(clip_coef_of(max_norm, norm));
                clipped += !(examples.clip_coefs.back() >= 1);
            }
            examples.add_up(threads);
        }
        return PyLong_FromLongLong(clipped);
    });
}

}  // namespace
