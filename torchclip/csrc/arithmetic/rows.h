// Rows of tensors, their slices along the first axis: norms and products, and clipping relative to weights.
//
// A row is measured and scaled while it is in the cache, if its number depends on nothing else.
#pragma once

#include <vector>

#include "memory.h"

namespace {

// A tensor by its rows.
struct Rows {
    Layout row{};  // the first one
    size_t count = 0;
    int64_t step = 0;  // bytes from one row to the next

    // False for a tensor that the kernel cannot handle, also if its rows are not apart.  A tensor without a second axis
    // is a single row, unless its elements are meant.
    bool read(const DLTensor& t, bool elements) {
        count = 1;
        DLTensor first = t;
        if (t.ndim > 1 || (elements && t.ndim == 1)) {
            if (t.strides == nullptr) return false;
            count = size_t(t.shape[0]);
            --first.ndim;
            ++first.shape;
            ++first.strides;
        } else if (elements) {
            return false;
        }
        if (!read_layout(first, row)) return false;
        if (count > 1) step = t.strides[0] * int64_t(kDtypes[row.dtype].item);
        return count <= 1 || step >= int64_t(row.bytes());
    }

    size_t elements() const { return count * row.count; }
    size_t numbers() const { return row.count * kDtypes[row.dtype].parts; }  // real numbers in a row
    Range range(bool is_written) const {
        const size_t bytes = count == 0 ? 0 : size_t(step) * (count - 1) + row.bytes();
        return {row.data, row.data + bytes, is_written};
    }
    char* at(size_t index) const { return row.data + int64_t(index) * step; }

    // Whether rows are short enough to be summed in one call, so that several of them are, too.
    bool is_simple() const { return row.count > 0 && row.count <= kChunk; }

    // The norms of some rows; 0 for no elements.
    void norms(size_t first, size_t rows, double* result, const Loops* table, Read Loops::* loop) const {
        const bool in_one_go = loop == &Loops::sum_squares && is_simple();
        if (in_one_go) table[row.dtype].sum_squares_of_rows(result, at(first), rows, numbers(), step);
        for (size_t i = 0; i < rows; ++i) {
            const bool is_regular = in_one_go && result[i] > 1e-280 && result[i] <= std::numeric_limits<double>::max();
            result[i] = is_regular ? std::sqrt(result[i]) : norm(first + i, table, loop);
        }
    }

    // Multiplies each row by its own number; not by 1.
    void scale(size_t first, size_t rows, const double* clip_coefs, const Loops* table) const {
        table[row.dtype].scale_rows(at(first), rows, numbers(), step, clip_coefs);
    }

  private:
    double norm(size_t index, const Loops* table, Read Loops::* loop) const {
        const DtypeFacts& dtype = kDtypes[row.dtype];
        const auto reduce = [&](Read Loops::* other, double unit) {
            double result = kAbsent;
            for (size_t start = 0; start < row.count; start += kChunk) {
                const size_t n = std::min(kChunk, row.count - start) * dtype.parts;
                const double part = (table[row.dtype].*other)(at(index) + start * dtype.item, n, unit);
                result = join(result, part, other == &Loops::largest);
            }
            return result;
        };
        const double reduced = reduce(loop, 1.0);
        if (reduced < 0) return 0;
        return loop == &Loops::sum_squares ? root(reduced, reduce) : reduced;
    }
};

constexpr size_t kTogether = 64, kTogetherElements = 8192;  // rows that are processed together, and their elements

// The number of rows that are processed together: those that stay in the first-level cache.
size_t rows_together(const Rows& some, const Rows& others, Read Loops::* loop) {
    if (loop != &Loops::sum_squares || !some.is_simple() || !others.is_simple()) return 1;
    return std::max(size_t(1), std::min(kTogether, kTogetherElements / some.row.count));
}

// A number of pieces of work with the same cost.
struct Pieces {
    size_t count, cost;
};
constexpr size_t kRowCost = 64;  // what starting a row costs, in elements

// The work on rows in groups of a given size.
Pieces pieces_of(const Rows& rows, size_t together) {
    return {(rows.count + together - 1) / together, together * (rows.row.count + kRowCost)};
}

// Calls work(i, j) for piece j of every work[i], divided among threads with about the same cost.
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

class Units {
    struct Unit {
        Rows weight, grad;
        size_t together;  // rows that are processed together
    };
    std::vector<Unit> units_;
    std::vector<Pieces> pieces_;
    size_t elements_ = 0;

  public:
    size_t elements() const { return elements_; }

    // False if they differ in their rows, or in memory that cannot be handled, or are doubles, whose norms may exceed
    // the range of doubles, or complex, of which there are loops for order 2 only.
    bool add(const DLTensor& of_weight, const DLTensor& of_grad, Read Loops::* loop) {
        Rows weight, grad;
        if (!weight.read(of_weight, false) || !grad.read(of_grad, false)) return false;
        if (weight.count != grad.count || weight.row.count != grad.row.count) return false;
        for (const size_t row : {weight.row.dtype, grad.row.dtype})
            if (kDtypes[row].is_double() || (kDtypes[row].is_complex() && loop != &Loops::sum_squares)) return false;
        const size_t together = rows_together(grad, weight, loop);
        units_.push_back({weight, grad, together});
        pieces_.push_back(pieces_of(grad, together));
        elements_ += grad.elements();
        return true;
    }

    // Whether no gradient overlaps anything else.
    bool are_apart() const {
        std::vector<Range> ranges;
        ranges.reserve(2 * units_.size());
        for (const Unit& unit : units_) {
            ranges.push_back(unit.weight.range(false));
            ranges.push_back(unit.grad.range(true));
        }
        return !written_overlap(ranges);
    }

    // Scales each unit's gradient as torchclip.clip_grad.adaptive does; returns which gradients were changed.
    std::vector<std::atomic<bool>> clip(Read Loops::* loop, double clip_factor, double eps, double grad_scale,
                                        int threads) const {
        const Loops* const table = loops_for(elements_);
        std::vector<std::atomic<bool>> changed(units_.size());
        share(pieces_, threads, [&](size_t i, size_t piece) {
            const auto& [weight, grad, together] = units_[i];
            const size_t first = piece * together, rows = std::min(together, grad.count - first);
            double of_weights[kTogether], of_grads[kTogether], clip_coefs[kTogether];
            weight.norms(first, rows, of_weights, table, loop);
            grad.norms(first, rows, of_grads, table, loop);
            bool scaled = false;
            for (size_t j = 0; j < rows; ++j) {
                const double limit = clip_factor * (of_weights[j] < eps ? eps : of_weights[j]) * grad_scale;
                clip_coefs[j] = of_grads[j] <= limit ? 1.0 : limit / of_grads[j];  // nan spreads through its unit
                scaled |= clip_coefs[j] != 1.0;
            }
            if (!scaled) return;
            grad.scale(first, rows, clip_coefs, table);
            changed[i].store(true, std::memory_order_relaxed);
        });
        return changed;
    }
};

}  // namespace
