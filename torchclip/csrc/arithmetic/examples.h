// Gradients of single examples: their norms over all tensors, and their clipped sum, with no copy of any.
#pragma once

#include "rows.h"

namespace {

constexpr size_t kSummed = 2048;  // elements of a row that are summed together, over all examples

class Examples {
    std::vector<Rows> grads_;
    std::vector<size_t> lengths_;  // elements of each sum
    size_t count_ = 0, elements_ = 0;

  public:
    size_t elements() const { return elements_; }

    // Adds a tensor.  False if it has another number of examples, or its memory cannot be handled; rows must be
    // contiguous, as their sums are.
    bool add(const DLTensor& tensor) {
        Rows grad;
        if (!grad.read(tensor, true) || (!grads_.empty() && grad.count != count_)) return false;
        int64_t length = 1;
        for (int32_t axis = tensor.ndim - 1; axis > 0; --axis) {
            if (tensor.shape[axis] != 1 && tensor.strides[axis] != length) return false;
            length *= tensor.shape[axis];
        }
        count_ = grad.count;
        elements_ += grad.elements();
        lengths_.push_back(size_t(length));
        grads_.push_back(grad);
        return true;
    }

    // The norm of each example over all tensors.
    std::vector<double> norms(int threads) const {
        const Loops* const table = loops_for(elements_);
        std::vector<double> of_rows(grads_.size() * count_), result(count_);
        std::vector<Pieces> pieces;
        std::vector<size_t> together;
        for (const Rows& grad : grads_) {
            together.push_back(rows_together(grad, grad, &Loops::sum_squares));
            pieces.push_back(pieces_of(grad, together.back()));
        }
        share(pieces, threads, [&](size_t i, size_t piece) {
            const size_t first = piece * together[i], rows = std::min(together[i], count_ - first);
            grads_[i].norms(first, rows, &of_rows[i * count_ + first], table, &Loops::sum_squares);
        });
        for (size_t row = 0; row < count_; ++row) {
            double top = 0, sum = 0;
            for (size_t i = 0; i < grads_.size(); ++i) top = larger(of_rows[i * count_ + row], top);
            const bool is_usable = top > 0 && std::isfinite(top);
            for (size_t i = 0; i < grads_.size() && is_usable; ++i) {
                const double part = of_rows[i * count_ + row] / top;
                sum += part * part;
            }
            result[row] = is_usable ? std::sqrt(sum) * top : top;
        }
        return result;
    }

    // Adds the examples, each multiplied by its coefficient, into memory like that of a row.
    void add_up(const std::vector<double>& clip_coefs, const std::vector<char*>& sums, int threads) const {
        std::vector<double> scratch(size_t(threads) * kSumRoom);  // the stack of a thread may be small
        std::vector<Pieces> pieces;
        // Backwards, as the last measured ones may still be in the cache.
        for (size_t i = grads_.size(); i-- > 0;)
            pieces.push_back({(lengths_[i] + kSummed - 1) / kSummed, kSummed * (count_ + 1)});
        share(pieces, threads, [&](size_t i, size_t block) {
            const size_t thread = threads > 1 ? size_t(openmp.get_thread_num()) : 0;
            const size_t from = grads_.size() - 1 - i;
            add_block(from, block * kSummed, clip_coefs, &scratch[thread * kSumRoom], sums[from]);
        });
    }

  private:
    static constexpr size_t kSumRoom = 2 * kSummed;  // numbers, of which a complex element has two

    void add_block(size_t i, size_t start, const std::vector<double>& clip_coefs, double* sum, char* result) const {
        const Rows& grad = grads_[i];
        const DtypeFacts& dtype = kDtypes[grad.row.dtype];
        const Loops& loops = loops_for(elements_)[grad.row.dtype];
        const size_t n = std::min(kSummed, lengths_[i] - start);
        const void* x[kRowsAtOnce];
        std::fill(sum, sum + n * dtype.parts, 0.0);
        for (size_t row = 0; row < count_; row += kRowsAtOnce) {
            const size_t rows = std::min(kRowsAtOnce, count_ - row);
            for (size_t k = 0; k < rows; ++k) x[k] = grad.at(row + k) + start * dtype.item;
            loops.add_rows(sum, x, clip_coefs.data() + row, rows, n * dtype.parts);
        }
        loops.round_sums(result + start * dtype.item, sum, n * dtype.parts);
    }
};

}  // namespace
