// Gradients of single examples: their norms over all tensors, and their clipped sum, with no copy of any.
#pragma once

#include "results.h"
#include "rows.h"

namespace {

constexpr size_t kSummed = 2048;  // elements of a row that are summed together, over all examples

// The tensors of a call, if the kernel can work on all of them.
class Examples {
    std::vector<Rows> grads_;
    std::vector<size_t> lengths_;  // elements of each sum
    Axes axes_;
    std::vector<Result> sums_;  // like those of the rows, but without gaps
    size_t count_ = 0, elements_ = 0;

  public:
    size_t elements() const { return elements_; }

    // False for a tensor that the kernel does not handle.
    bool read(const References& tensors) {
        if (tensors.size() == 0 || !are_dense_on_host(tensors) || !stand_for_their_memory(tensors)) return false;
        grads_.resize(tensors.size());
        for (size_t i = 0; i < tensors.size(); ++i) {
            DLTensor t;
            Rows& grad = grads_[i];
            if (!describe(tensors[i], t) || !grad.read(t, true, axes_)) return false;
            if (i > 0 && grad.count != count_) return false;
            count_ = grad.count;
            elements_ += grad.elements();
            sums_.emplace_back(t.dtype, t.ndim - 1, t.shape + 1, t.strides + 1);
            size_t length = 1;
            for (int32_t axis = 1; axis < t.ndim; ++axis) length *= size_t(t.shape[axis]);
            lengths_.push_back(length);
        }
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

    void add_up(const std::vector<double>& clip_coefs, int threads) const {
        // On the heap, as the stack of a thread may be small; used only for rows with gaps.
        bool has_gaps = false;
        for (const Rows& grad : grads_) has_gaps = has_gaps || grad.row.axes > 0;
        std::vector<double> scratch(size_t(threads) * kSumRoom);
        std::vector<char> rows(has_gaps ? size_t(threads) * kRowRoom : 0);
        std::vector<Pieces> pieces;
        // Backwards, as the last measured ones may still be in the cache.
        for (size_t i = grads_.size(); i-- > 0;)
            pieces.push_back({(lengths_[i] + kSummed - 1) / kSummed, kSummed * (count_ + 1)});
        share(pieces, threads, [&](size_t i, size_t block) {
            const size_t thread = threads > 1 ? size_t(openmp.get_thread_num()) : 0;
            char* const buffer = has_gaps ? &rows[thread * kRowRoom] : nullptr;
            add_block(grads_.size() - 1 - i, block * kSummed, clip_coefs, &scratch[thread * kSumRoom], buffer);
        });
    }

    // The sums in a list; null, with an error set, after an error.
    Ref sums() {
        Ref list(PyList_New(Py_ssize_t(grads_.size())));
        for (size_t i = 0; i < grads_.size() && list != nullptr; ++i) {
            Ref sum = sums_[i].take();
            if (sum == nullptr) return sum;
            PyList_SetItem(list, Py_ssize_t(i), sum.release());
        }
        return list;
    }

  private:
    static constexpr size_t kSumRoom = 2 * kSummed, kOneRow = 16 * kSummed, kRowRoom = kRowsAtOnce * kOneRow;

    // Not for views that torch conjugates or negates lazily.
    static bool stand_for_their_memory(const References& tensors) {
        for (PyObject* tensor : tensors)
            for (PyObject* name : {torch.is_neg, torch.is_conj}) {
                const Ref answer(PyObject_CallFunctionObjArgs(name, tensor, nullptr));
                if (answer != Py_False) return PyErr_Clear(), false;
            }
        return true;
    }

    void add_block(size_t i, size_t start, const std::vector<double>& clip_coefs, double* sum, char* buffer) const {
        const Rows& grad = grads_[i];
        const DtypeFacts& dtype = kDtypes[grad.row.dtype];
        const Loops& loops = loops_for(elements_)[grad.row.dtype];
        const size_t n = std::min(kSummed, lengths_[i] - start);
        const void* x[kRowsAtOnce];
        std::fill(sum, sum + n * dtype.parts, 0.0);
        for (size_t row = 0; row < count_; row += kRowsAtOnce) {
            const size_t rows = std::min(kRowsAtOnce, count_ - row);
            for (size_t k = 0; k < rows; ++k) {
                const Layout layout = grad.at(row + k);
                x[k] = layout.data + start * dtype.item;
                if (grad.row.axes == 0) continue;
                copy_grid(layout, grad.first_axis(), start, n, buffer + k * kOneRow, true);
                x[k] = buffer + k * kOneRow;
            }
            loops.add_rows(sum, x, clip_coefs.data() + row, rows, n * dtype.parts);
        }
        loops.round_sums(sums_[i].data() + start * dtype.item, sum, n * dtype.parts);
    }
};

// clip_per_example(grads, max_norm)
PyObject* clip_per_example(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!count_is(count, 2, 2)) return nullptr;
    const double max_norm = read_threshold(args[1]);
    if (!(max_norm >= 0) || !PyList_CheckExact(args[0])) return unusual();
    References tensors;
    Examples examples;
    collect_list(args[0], [&](Ref item) { return tensors.take(std::move(item)), true; });
    if (!is_usable() || !examples.read(tensors)) return unusual();
    const int threads = usable_threads(examples.elements());
    double clipped = 0;
    {
        const WithoutGil unlocked(examples.elements());
        std::vector<double> clip_coefs = examples.norms(threads);
        for (double& coef : clip_coefs) {
            coef = clip_coef_of(max_norm, coef);
            clipped += !(coef >= 1);
        }
        examples.add_up(clip_coefs, threads);
    }
    const Ref sums = examples.sums(), number(new_tensor<int64_t>(kInt, &clipped, 1, 0));
    if (sums == nullptr || number == nullptr) return nullptr;
    return PyTuple_Pack(2, static_cast<PyObject*>(sums), static_cast<PyObject*>(number));
}

}  // namespace
