// Thresholds of many parameters at once, which torch's operations would take too long for: one norm for each row.
//
// The state is in tensors of `torchclip.thresholds`, whose memory is read anew in each call.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "batch.h"
#include "heaps.h"

namespace {

// As torchclip.thresholds.Percentile has it.
struct Percentile {
    double fraction, max_norm;
    int64_t window = 0, warmup = 0;  // 0: none

    double position(int64_t count) const { return double(count - 1) * fraction; }
    // How many of so many norms are up to the percentile.
    int64_t left(int64_t count) const { return count == 0 ? 0 : int64_t(position(count)) + 1; }

    // Rounded as in the float form.
    double between(double low, double high, int64_t count) const {
        const double t = position(count) - double(int64_t(position(count)));
        return t < 0.5 ? low + (high - low) * t : high - (high - low) * (1 - t);
    }

    int64_t kept(int64_t seen) const { return window > 0 ? std::min(seen, window) : seen; }

    // Learns from a norm, if it is there and finite; returns the threshold.
    double update(double norm, int64_t& seen, double* values, int32_t* slots, int32_t* places, int64_t capacity) const {
        const bool warming_up = seen < warmup;
        int64_t count = kept(seen);
        Heaps heaps(values, slots, places, capacity, left(count), count - left(count));
        if (norm >= 0 && norm < std::numeric_limits<double>::infinity()) {
            const int64_t slot = window > 0 ? seen % window : 0;
            if (kept(++seen) == count)
                heaps.replace(norm, slot);
            else
                heaps.add(norm, slot, left(++count));
        }
        if (warming_up || count == 0) return max_norm;
        return std::min(between(heaps.low(), heaps.high(), count), max_norm);
    }
};

// As torchclip.thresholds.RollingSigma has it.
struct RollingSigma {
    double sigma;
    int64_t window, warmup;

    // The mean of norms plus so many standard deviations; `parts` has room for each norm.
    double limit(const double* norms, int64_t count, double* parts) const {
        const Loops& loops = loops_of[kDoubles];
        const double mean = loops.sum_magnitudes(norms, size_t(count), 1.0) / double(count);
        for (int64_t i = 0; i < count; ++i) parts[i] = norms[i] - mean;
        const auto reduce = [&](Read Loops::* loop, double unit) { return (loops.*loop)(parts, size_t(count), unit); };
        return mean + sigma * (root(reduce(&Loops::sum_squares, 1.0), reduce) / std::sqrt(double(count - 1)));
    }

    // Judges a norm and learns from it, if it is there and no spike; returns the threshold.
    double update(double norm, int64_t& seen, double* slots, double* parts) const {
        const double infinity = std::numeric_limits<double>::infinity();
        const double max_norm = seen < warmup ? infinity : limit(slots, std::min(seen, window), parts);
        if (norm >= 0 && norm < infinity && norm <= max_norm) slots[seen++ % window] = norm;
        return max_norm;
    }
};

// The memory of a tensor whose numbers are of this type, without gaps.
template <class Number> struct Numbers {
    Number* data;
    int64_t count;

    // False, with an error set, for any other tensor.
    bool read(PyObject* tensor, uint8_t code) {
        DLTensor t;
        bool suits =
            describe(tensor, t) && t.device_type == kCPU && t.dtype.code == code && t.dtype.bits == 8 * sizeof(Number);
        count = 1;
        for (int32_t d = suits ? t.ndim - 1 : -1; d >= 0; --d) {
            suits = suits && (t.shape[d] == 1 || count == 0 || t.strides[d] == count);
            count *= t.shape[d];
        }
        if (suits)
            data = reinterpret_cast<Number*>(static_cast<char*>(t.data) + t.byte_offset);
        else
            PyErr_Format(PyExc_TypeError, "expected a tensor of %zu bits a number in host memory, without gaps, got %R",
                         8 * sizeof(Number), Py_TYPE(tensor));
        return suits;
    }
};

bool read_count(PyObject* object, int64_t& count) {
    count = PyLong_AsLongLong(object);
    return count != -1 || PyErr_Occurred() == nullptr;
}

// The columns that every rule has.
struct Columns {
    Numbers<double> norms, thresholds;
    Numbers<int64_t> seen;

    int64_t rows() const { return norms.count; }

    bool read(PyObject* const* args) {
        return norms.read(args[0], kFloat) && thresholds.read(args[1], kFloat) && seen.read(args[2], kInt);
    }

    // Whether the other columns have as many rows, and none has seen less than nothing.
    bool fit() const {
        return thresholds.count == rows() && seen.count == rows() &&
               std::all_of(seen.data, seen.data + rows(), [](int64_t number) { return number >= 0; });
    }
};

PyObject* refuse_columns() {
    return PyErr_Format(PyExc_ValueError, "the columns are not of one length, or have no room for another norm");
}

// percentiles(norms, thresholds, seen, values, slots, places, fraction, window, warmup, max_norm)
PyObject* percentiles(PyObject*, PyObject* const* args, Py_ssize_t given) {
    if (!count_is(given, 10, 10) || !connected()) return nullptr;
    const bool has_window = args[7] != Py_None;
    Percentile rule;
    if (!read_number(args[6], rule.fraction) || (has_window && !read_count(args[7], rule.window)) ||
        !read_count(args[8], rule.warmup) || !read_number(args[9], rule.max_norm))
        return nullptr;

    // From here on no Python code runs.
    Columns columns;
    Numbers<double> values;
    Numbers<int32_t> slots, places;
    if (!columns.read(args) || !values.read(args[3], kFloat) || !slots.read(args[4], kInt) ||
        !places.read(args[5], kInt))
        return nullptr;
    const int64_t rows = columns.rows(), capacity = rows > 0 ? values.count / rows : 0;
    bool fit = columns.fit() && values.count == rows * capacity && rule.fraction >= 0 && rule.fraction <= 1;
    if (has_window)
        fit = fit && rule.window > 0 && slots.count == values.count && places.count == values.count &&
              capacity <= std::numeric_limits<int32_t>::max();
    for (int64_t row = 0; row < rows && fit; ++row) fit = rule.kept(columns.seen.data[row] + 1) <= capacity;
    if (!fit) return refuse_columns();
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t start = row * capacity;
        columns.thresholds.data[row] = rule.update(columns.norms.data[row], columns.seen.data[row], values.data + start,
                                                   has_window ? slots.data + start : nullptr,
                                                   has_window ? places.data + start : nullptr, capacity);
    }
    return new_reference(Py_None);
}

// rolling_sigmas(norms, thresholds, seen, slots, sigma, warmup)
PyObject* rolling_sigmas(PyObject*, PyObject* const* args, Py_ssize_t given) {
    if (!count_is(given, 6, 6) || !connected()) return nullptr;
    RollingSigma rule;
    if (!read_number(args[4], rule.sigma) || !read_count(args[5], rule.warmup)) return nullptr;

    // From here on no Python code runs.
    Columns columns;
    Numbers<double> slots;
    if (!columns.read(args) || !slots.read(args[3], kFloat)) return nullptr;
    const int64_t rows = columns.rows();
    if (rows == 0) return new_reference(Py_None);
    rule.window = slots.count / rows;
    if (!columns.fit() || rule.window < 2 || rule.warmup < 2 || slots.count != rows * rule.window)
        return refuse_columns();
    try {
        std::vector<double> parts(size_t(rule.window));
        for (int64_t row = 0; row < rows; ++row)
            columns.thresholds.data[row] = rule.update(columns.norms.data[row], columns.seen.data[row],
                                                       slots.data + row * rule.window, parts.data());
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
    return new_reference(Py_None);
}

}  // namespace
