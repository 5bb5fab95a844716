// Rows of tensors, their slices along the first axis: clipped unit by unit relative to weights, and example by example.
//
// A row is measured and scaled while it is in the cache, wherever its number depends on nothing else.
#pragma once

#include <memory>

#include <unordered_set>
#include <vector>

#include "batch.h"

namespace {

// A tensor by its rows.
struct Rows {
    Layout row{};                // the first one
    const Axes* axes = nullptr;  // where those of its grid are
    size_t count = 0, bytes = 0;
    int64_t step = 0;  // bytes from one row to the next
    char* data = nullptr;

    // False for a tensor that the kernel cannot work on.  One without a second axis is a single row, unless its
    // elements are meant.
    bool read(PyObject* tensor, bool elements, Axes& all) {
        DLTensor t;
        Layout whole;
        if (!is_plain(tensor) || (has_refused && !is_dense_on_host(tensor))) return false;
        if (!describe(tensor, t) || !read_layout(t, whole, all)) return false;
        axes = &all;
        data = whole.data;
        bytes = span(whole, all.begin() + whole.first_axis);
        row = whole;
        count = 1;
        if (t.ndim > 1 || (elements && t.ndim == 1)) {
            count = size_t(t.shape[0]);
            step = t.strides[0] * int64_t(kDtypes[whole.dtype].item);
            DLTensor first = t;
            --first.ndim;
            ++first.shape;
            ++first.strides;
            return whole.count == 0 || read_layout(first, row, all);
        }
        return !elements;
    }

    const Axis* first_axis() const { return axes->begin() + row.first_axis; }
    size_t elements() const { return count * row.count; }

    Layout at(size_t index) const {
        Layout layout = row;
        layout.data += int64_t(index) * step;
        return layout;
    }

    // Calls inner(x, n) for the real numbers of a row, piece by piece, through a buffer where there are gaps.
    template <bool write, class Inner> void visit(size_t index, Inner inner) const {
        const DtypeFacts& dtype = kDtypes[row.dtype];
        const Layout layout = at(index);
        if (row.axes == 0) {
            for (size_t start = 0; start < row.count; start += kChunk)
                inner(layout.data + start * dtype.item, std::min(kChunk, row.count - start) * dtype.parts);
            return;
        }
        alignas(64) char buffer[4096];
        const size_t room = sizeof buffer / dtype.item;
        for (size_t start = 0; start < row.count; start += room) {
            const size_t n = std::min(room, row.count - start);
            copy_grid(layout, first_axis(), start, n, buffer, true);
            inner(buffer, n * dtype.parts);
            if constexpr (write) copy_grid(layout, first_axis(), start, n, buffer, false);
        }
    }

    // Whether rows lie without gaps and are short enough to be summed in one go: several of them then are, too.
    bool is_simple() const { return row.axes == 0 && row.count > 0 && row.count <= kChunk; }

    // 0 for no elements.
    double norm(size_t index, const Loops* table, Read Loops::* loop) const {
        const Loops& loops = table[row.dtype];
        const auto reduce = [&](Read Loops::* other, double unit) {
            double result = kAbsent;
            visit<false>(index, [&](char* x, size_t n) {
                result = join(result, (loops.*other)(x, n, unit), other == &Loops::largest);
            });
            return result;
        };
        const double reduced = reduce(loop, 1.0);
        if (reduced < 0) return 0;
        return loop == &Loops::sum_squares ? root(reduced, reduce) : reduced;
    }

    // Of several rows.
    void norms(size_t first, size_t rows, double* result, size_t elements_in_all, Read Loops::* loop) const;
    void scale(size_t first, size_t rows, const double* clip_coefs, size_t elements_in_all) const;
};

// Loops over several rows without gaps, of one dtype and instruction set: a call for each would cost as much again.
struct RowLoops {
    void (*squares)(double* sums, const char* x, size_t rows, size_t n, int64_t step);
    void (*scale)(char* x, size_t rows, size_t n, int64_t step, const double* clip_coefs);  // but for those of 1
};

template <bool kFused, class T>
INLINE void sum_row_squares(double* sums, const char* x, size_t rows, size_t n, int64_t step) {
    for (size_t i = 0; i < rows; ++i, x += step) sums[i] = sum_squares<kFused>(reinterpret_cast<const T*>(x), n);
}
template <class T> INLINE void scale_rows(char* x, size_t rows, size_t n, int64_t step, const double* clip_coefs) {
    for (size_t i = 0; i < rows; ++i, x += step)
        if (clip_coefs[i] != 1.0) scale(reinterpret_cast<T*>(x), n, clip_coefs[i]);
}

#define DEFINE_ROW_LOOPS(NAME, TARGET, FUSED)                                                          \
    template <class T> struct NAME {                                                                   \
        TARGET static void squares(double* sums, const char* x, size_t rows, size_t n, int64_t step) { \
            sum_row_squares<FUSED, T>(sums, x, rows, n, step);                                         \
        }                                                                                              \
        TARGET static void scaling(char* x, size_t rows, size_t n, int64_t step, const double* c) {    \
            scale_rows<T>(x, rows, n, step, c);                                                        \
        }                                                                                              \
    };
DEFINE_ROW_LOOPS(BaselineRows, , false)
#ifdef HAVE_X86_TARGETS
DEFINE_ROW_LOOPS(Avx2Rows, __attribute__((target("avx2,fma"))), true)
DEFINE_ROW_LOOPS(Avx512Rows, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), true)
#endif
#undef DEFINE_ROW_LOOPS

template <template <class> class Set, class... Dtypes_> const RowLoops* row_table(DtypeTable<Dtypes_...>) {
    static const RowLoops table[] = {
        {Set<typename Dtypes_::Number>::squares, Set<typename Dtypes_::Number>::scaling}...};
    return table;
}

// By row of the table of dtypes, for the instruction set in use.
const RowLoops* row_loops(size_t elements) {
#ifdef HAVE_X86_TARGETS
    const bool wide = std::strcmp(instruction_set, "avx512") == 0;
    if (wide && elements > kFewElements) return row_table<Avx512Rows>(Dtypes());
    if (wide || std::strcmp(instruction_set, "avx2") == 0) return row_table<Avx2Rows>(Dtypes());
#endif
    return row_table<BaselineRows>(Dtypes());
}

constexpr size_t kTogether = 64, kTogetherElements = 2048;  // rows worked on in one go, and elements of them

void Rows::norms(size_t first, size_t rows, double* result, size_t elements_in_all, Read Loops::* loop) const {
    const Loops* const table = loops_for(elements_in_all);
    if (loop != &Loops::sum_squares || !is_simple()) {
        for (size_t i = 0; i < rows; ++i) result[i] = norm(first + i, table, loop);
        return;
    }
    row_loops(elements_in_all)[row.dtype].squares(result, at(first).data, rows, row.count * kDtypes[row.dtype].parts,
                                                  step);
    for (size_t i = 0; i < rows; ++i) {
        const bool is_regular = result[i] > 1e-280 && result[i] <= std::numeric_limits<double>::max();
        result[i] = is_regular ? std::sqrt(result[i]) : norm(first + i, table, loop);
    }
}

void Rows::scale(size_t first, size_t rows, const double* clip_coefs, size_t elements_in_all) const {
    if (is_simple()) {
        const size_t n = row.count * kDtypes[row.dtype].parts;
        return row_loops(elements_in_all)[row.dtype].scale(at(first).data, rows, n, step, clip_coefs);
    }
    const Write inner = loops_for(elements_in_all)[row.dtype].scale;
    for (size_t i = 0; i < rows; ++i)
        if (clip_coefs[i] != 1.0) visit<true>(first + i, [&](char* x, size_t n) { inner(x, n, clip_coefs[i]); });
}

// So many pieces of work that cost as much each.
struct Pieces {
    size_t count, cost;
};
constexpr size_t kRowCost = 64;  // what starting a row costs, in elements

// Calls work(i, j) for piece j of every work[i], shared among threads at about the same cost.
template <class Work> void share(const std::vector<Pieces>& all, int threads, Work work) {
    size_t total = 0;
    for (const Pieces& pieces : all) total += pieces.count * pieces.cost;
    const auto take = [&](size_t share, size_t shares) {
        const size_t low = total / shares * share, high = share + 1 == shares ? total : total / shares * (share + 1);
        size_t before = 0;
        for (size_t i = 0; i < all.size(); ++i) {
            const size_t cost = all[i].cost;
            const auto first_from = [&](size_t limit) {
                return limit <= before ? 0 : std::min(all[i].count, (limit - before + cost - 1) / cost);
            };
            for (size_t j = first_from(low), end = first_from(high); j < end; ++j) work(i, j);
            before += all[i].count * cost;
        }
    };
    if (threads > 1) return in_parallel(threads, take);
    take(0, 1);
}

// ---------------------------------------------------------------------------------------------------------------
// Units: rows of gradients, clipped relative to the same rows of the weights
// ---------------------------------------------------------------------------------------------------------------

// The distinct parameters of one call that have a gradient.
struct Units {
    struct Member {
        Ref weight, grad;
        bool taken;
    };
    std::vector<Member> members;
    size_t elements = 0;

    bool collect(PyObject* iterable) {
        Batch checked;
        std::unordered_set<PyObject*> items, grads;
        bool shared = false;
        const bool collected = collect_any(iterable, [&](Ref item) {
            if (!checked.check(item, "parameters")) return false;
            if (!items.insert(item).second) return true;
            Ref grad = get_grad(item);
            if (grad == nullptr) return false;
            if (grad == Py_None && is_plain(item)) return true;
            shared |= grad != Py_None && !grads.insert(grad).second;
            const bool plain = is_plain(item) && is_plain(grad);
            members.push_back({std::move(item), std::move(grad), plain});
            return true;
        });
        if (!collected) return false;
        Axes axes;
        for (Member& member : members) {
            Rows weight, grad;
            member.taken = member.taken && !shared && read(member, weight, grad, axes);
            if (member.taken) elements += grad.elements();
        }
        return true;
    }

    static bool read(const Member& member, Rows& weight, Rows& grad, Axes& axes) {
        return weight.read(member.weight, false, axes) && grad.read(member.grad, false, axes) &&
               weight.count == grad.count && weight.row.count == grad.row.count;
    }
};

struct UnitsObject {
    PyObject_HEAD Units units;
};
PyTypeObject* units_type = nullptr;
Units& units_of(PyObject* self) { return reinterpret_cast<UnitsObject*>(self)->units; }

PyObject* new_units(PyObject*, PyObject* parameters) {
    if (!connected()) return nullptr;
    return guarded([&]() -> PyObject* {
        UnitsObject* const made = PyObject_New(UnitsObject, units_type);
        if (made == nullptr) return nullptr;
        Units* const units = new (&made->units) Units;
        Ref self(reinterpret_cast<PyObject*>(made));
        return units->collect(parameters) ? self.release() : nullptr;
    });
}

void units_dealloc(PyObject* self) {
    PyTypeObject* const type = Py_TYPE(self);
    units_of(self).~Units();
    PyObject_Free(self);
    Py_DECREF(type);
}

// Whether what is written lies over anything else.
bool written_overlaps(const std::vector<Rows>& written, const std::vector<Rows>& others) {
    struct Range {
        const char *begin, *end;
        bool is_written;
    };
    std::vector<Range> ranges;
    ranges.reserve(written.size() + others.size());
    for (const Rows& rows : written)
        if (rows.bytes > 0) ranges.push_back({rows.data, rows.data + rows.bytes, true});
    for (const Rows& rows : others)
        if (rows.bytes > 0) ranges.push_back({rows.data, rows.data + rows.bytes, false});
    std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    const char *end = nullptr, *end_of_written = nullptr;
    for (const Range& range : ranges) {
        if (range.begin < (range.is_written ? end : end_of_written)) return true;
        end = std::max(end, range.end);
        if (range.is_written) end_of_written = std::max(end_of_written, range.end);
    }
    return false;
}

// How many rows are worked on in one go: those that stay in the first cache.
size_t rows_together(const Rows& weight, const Rows& grad, Read Loops::* loop) {
    if (loop != &Loops::sum_squares || !weight.is_simple() || !grad.is_simple()) return 1;
    return std::max(size_t(1), std::min(kTogether, kTogetherElements / grad.row.count));
}

// The number for a unit with these norms; as torchclip.clip_grad.adaptive has it.
double unit_coef(double of_weight, double of_grad, double clip_factor, double eps, double grad_scale) {
    const double limit = clip_factor * (of_weight < eps ? eps : of_weight) * grad_scale;
    return of_grad <= limit ? 1.0 : limit / of_grad;  // nan compares false, and spreads through its unit
}

// clip_(clip_factor, eps, p, grad_scale)
PyObject* units_clip(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    const Units& units = units_of(self);
    double clip_factor, eps, grad_scale;
    Measure measure;
    if (!count_is(count, 4, 4) || !read_number(args[0], clip_factor) || !read_number(args[1], eps) ||
        !measure.read(args + 2, 1) || !read_number(args[3], grad_scale))
        return nullptr;
    const auto loop = measure.loop();
    if (loop == nullptr) return new_reference(Py_False);
    return guarded([&]() -> PyObject* {
        std::vector<Rows> weights, grads;
        std::vector<Pieces> pieces;
        std::vector<size_t> together;  // rows of each that are worked on in one go
        Axes axes;
        for (const Units::Member& member : units.members) {
            if (!member.taken) continue;
            weights.emplace_back();
            grads.emplace_back();
            if (!Units::read(member, weights.back(), grads.back(), axes)) return new_reference(Py_False);
            const size_t rows = rows_together(weights.back(), grads.back(), loop);
            together.push_back(rows);
            pieces.push_back({(grads.back().count + rows - 1) / rows, rows * (grads.back().row.count + kRowCost)});
        }
        if (written_overlaps(grads, weights)) return new_reference(Py_False);
        const std::unique_ptr<std::atomic<bool>[]> changed(new std::atomic<bool>[grads.size()]());
        const auto clip = [&](size_t i, size_t piece) {
            const Rows &weight = weights[i], &grad = grads[i];
            const size_t first = piece * together[i], rows = std::min(together[i], grad.count - first);
            double of_weights[kTogether], of_grads[kTogether], clip_coefs[kTogether];
            weight.norms(first, rows, of_weights, units.elements, loop);
            grad.norms(first, rows, of_grads, units.elements, loop);
            bool scaled = false;
            for (size_t j = 0; j < rows; ++j) {
                clip_coefs[j] = unit_coef(of_weights[j], of_grads[j], clip_factor, eps, grad_scale);
                scaled |= clip_coefs[j] != 1.0;
            }
            if (!scaled) return;
            grad.scale(first, rows, clip_coefs, units.elements);
            changed[i].store(true, std::memory_order_relaxed);
        };
        const int threads = usable_threads(units.elements);
        {
            const WithoutGil unlocked(units.elements);
            share(pieces, threads, clip);
        }
        Ref changed_grads(PyList_New(0));
        size_t i = 0;
        for (const Units::Member& member : units.members)
            if (member.taken && changed[i++] && changed_grads != nullptr &&
                PyList_Append(changed_grads, member.grad) < 0)
                return nullptr;
        return bump_versions(changed_grads) ? new_reference(Py_True) : nullptr;
    });
}

PyObject* list_weights(PyObject* self, bool taken) {
    PyObject* const weights = PyList_New(0);
    for (const Units::Member& member : units_of(self).members)
        if (member.taken == taken && weights != nullptr && PyList_Append(weights, member.weight) < 0)
            return Py_DECREF(weights), nullptr;
    return weights;
}
PyObject* units_rest(PyObject* self, void*) { return list_weights(self, false); }
PyObject* units_taken(PyObject* self, void*) { return list_weights(self, true); }

PyMethodDef units_methods[] = {
    {"clip_", function(units_clip), METH_FASTCALL,
     "clip_(clip_factor, eps, p, grad_scale): limit the norm of each unit; False, and nothing was changed, if unusual"},
    {nullptr, nullptr, 0, nullptr},
};
PyGetSetDef units_attributes[] = {
    {"rest", units_rest, nullptr, "the parameters that the kernel does not take", nullptr},
    {"taken", units_taken, nullptr, "those that it takes", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};
PyType_Slot units_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(units_dealloc)},
    {Py_tp_methods, units_methods},
    {Py_tp_getset, units_attributes},
    {Py_tp_doc, const_cast<char*>("Parameters whose gradients are clipped unit by unit.")},
    {0, nullptr},
};
PyType_Spec units_spec = {"torchclip._kernel.Units", sizeof(UnitsObject), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, units_slots};

}  // namespace
