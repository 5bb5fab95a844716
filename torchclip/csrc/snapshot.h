// The memory of some tensors as it lies now, cut into chunks, and the threads that work on them.
#pragma once

#include <atomic>
#include <new>
#include <utility>
#include <vector>

#include "connection.h"
#include "dispatch.h"
#include "layout.h"

#ifdef _OPENMP
#include <omp.h>
#include <unistd.h>
#endif

namespace {

// The bits of torchclip._core.batch.Facts.
constexpr int kDouble = 1, kAnyComplex = 2, kSmall = 4, kGaps = 8, kShared = 16;

constexpr double kAbsent = -1.0;               // the norm of no elements at all
constexpr size_t kChunk = 16 * 1024;           // elements; sums are added chunk by chunk, in order
constexpr size_t kChunkCost = 256;             // what starting a chunk costs, in elements
constexpr size_t kWorthReleasing = 32 * 1024;  // cost in all below which holding the GIL is cheaper
constexpr size_t kWorthThreads = 64 * 1024;    // elements in all below which one thread is faster

// Joins what two chunks gave; kAbsent changes nothing.
inline double join(double result, double part, bool take_largest) {
    if (part < 0 || result < 0) return part < 0 ? result : part;
    return take_largest ? larger(part, result) : result + part;
}

// Whether a sum of squares stayed so far from both ends of the range of numbers that it has lost nothing.
inline bool is_regular(double sum) { return sum > 1e-280 && sum <= std::numeric_limits<double>::max(); }

// The root of a sum of squares.  Those of float64 can leave the range of numbers; then they are taken again relative to
// the largest, with the loops that reduce(loop, unit) runs.
template <class Reduce> double root(double squares, Reduce reduce) {
    if (is_regular(squares)) return std::sqrt(squares);
    const double top = reduce(&Loops::largest, 1.0);
    if (top == 0 || !std::isfinite(top)) return top;
    const int exponent = std::max(-1023, std::min(std::ilogb(top), 1023));
    return std::ldexp(std::sqrt(reduce(&Loops::sum_scaled_squares, std::ldexp(1.0, -exponent))), exponent);
}

// Several threads, where they pay, ask torch how many; -1 for an error.  Results do not depend on it.
// Many small tensors are left to one thread too: two would find each other's half in the wrong cache, and to find out
// whether tensors overlap takes longer than to scale them.
// GNU's OpenMP has no threads in a forked child and waits for them for ever; so a child works alone.
#ifdef _OPENMP
const pid_t loaded_in = getpid();
int usable_threads(size_t elements) {
    if (elements < kWorthThreads || getpid() != loaded_in) return 1;
    PyObject* const number = torch.get_num_threads();
    if (number == nullptr) return -1;
    const long threads = PyLong_AsLong(number);
    Py_DECREF(number);
    if (threads == -1 && PyErr_Occurred() != nullptr) return -1;
    return int(std::max(1L, std::min(threads, 1024L)));
}
#else
int usable_threads(size_t) { return 1; }
#endif

// Holds pointers into the tensors' memory, so no Python code may run between its making and its end; nothing here runs
// any.
class Snapshot {
    struct Part {  // one tensor
        Layout layout;
        size_t first_axis, first_chunk;
        double number;  // what `write` shall do with it
    };
    struct Chunk {
        size_t part, start, count;
        size_t cost_before;  // of all chunks before this one
    };
    std::vector<Part> parts_;
    std::vector<Axis> axes_;
    std::vector<Chunk> chunks_;
    std::vector<double> results_;  // by chunk
    size_t cost_ = 0;              // as if in elements
    int threads_;

  public:
    Snapshot(size_t expected, int threads) : threads_(threads) {
        parts_.reserve(expected);
        chunks_.reserve(expected);
    }

    // False if the tensor's memory cannot be worked on.
    bool add(PyObject* tensor, double number) {
        DLTensor t;
        Part part;
        Axis axes[kMaxAxes];
        if (!describe(tensor, t) || !read_layout(t, part.layout, axes)) return false;
        part.first_axis = axes_.size();
        part.first_chunk = chunks_.size();
        part.number = number;
        axes_.insert(axes_.end(), axes, axes + part.layout.axes);
        for (size_t start = 0; start < part.layout.count; start += kChunk) {
            chunks_.push_back({parts_.size(), start, std::min(kChunk, part.layout.count - start), cost_});
            cost_ += chunks_.back().count + kChunkCost;
        }
        parts_.push_back(part);
        return true;
    }

    bool has_complex() const {
        return std::any_of(parts_.begin(), parts_.end(),
                           [](const Part& part) { return kDtypes[part.layout.dtype].is_complex(); });
    }

    // The norm of all tensors as one vector; of their finite elements only, if so wished.
    double norm(Read Loops::* loop, bool finite) {
        results_.resize(chunks_.size());
        const WithoutGil unlocked(cost_);
        return norm_from(reduce(0, chunks_.size(), loop, finite, 1.0), 0, chunks_.size(), loop, finite);
    }

    // The norm of each, in order.
    std::vector<double> norms(Read Loops::* loop, bool finite) {
        results_.resize(chunks_.size());
        std::vector<double> norms(parts_.size());
        const WithoutGil unlocked(cost_);
        reduce(0, chunks_.size(), loop, finite, 1.0);
        for (size_t i = 0; i < parts_.size(); ++i) {
            const size_t first = parts_[i].first_chunk;
            const size_t last = i + 1 < parts_.size() ? parts_[i + 1].first_chunk : chunks_.size();
            norms[i] = norm_from(fold(first, last, loop == &Loops::largest), first, last, loop, finite);
        }
        return norms;
    }

    // Changes each tensor by its own number; returns whether there was anything to change.
    bool write(Write Loops::* loop) {
        if (threads_ > 1 && overlaps()) threads_ = 1;
        std::atomic<bool> written{false};
        const WithoutGil unlocked(cost_);
        run(0, chunks_.size(), [&](size_t i) {
            const Part& part = parts_[chunks_[i].part];
            const Write inner = loops_of[part.layout.dtype].*loop;
            visit<true>(chunks_[i], [&](char* x, size_t n) {
                const bool changed = inner(x, n, part.number);
                if (changed) written.store(true, std::memory_order_relaxed);
                return changed;
            });
        });
        return written;
    }

  private:
    // Other Python threads may run meanwhile, if there is much to do.
    class WithoutGil {
        PyThreadState* const state_;

      public:
        explicit WithoutGil(size_t cost) : state_(cost >= kWorthReleasing ? PyEval_SaveThread() : nullptr) {}
        ~WithoutGil() {
            if (state_ != nullptr) PyEval_RestoreThread(state_);
        }
        WithoutGil(const WithoutGil&) = delete;
        WithoutGil& operator=(const WithoutGil&) = delete;
    };

    // Cuts chunks [first, last) into shares that cost about the same; gives where one of them begins.
    size_t begin_of_share(size_t first, size_t last, size_t share, size_t shares) const {
        if (share == shares) return last;
        const size_t before = chunks_[first].cost_before;
        const size_t after = last < chunks_.size() ? chunks_[last].cost_before : cost_;
        const size_t limit = before + (after - before) / shares * share;
        const auto cheaper = [](const Chunk& chunk, size_t cost) { return chunk.cost_before < cost; };
        const Chunk* const all = chunks_.data();
        return size_t(std::lower_bound(all + first, all + last, limit, cheaper) - all);
    }

    // Calls work(i) for chunks [first, last).
    template <class Work> void run(size_t first, size_t last, Work work) const {
#ifdef _OPENMP
        if (threads_ > 1 && first < last) {
#pragma omp parallel num_threads(threads_)
            {
                const size_t share = size_t(omp_get_thread_num()), shares = size_t(omp_get_num_threads());
                const size_t end = begin_of_share(first, last, share + 1, shares);
                for (size_t i = begin_of_share(first, last, share, shares); i < end; ++i) work(i);
            }
            return;
        }
#endif
        for (size_t i = first; i < last; ++i) work(i);
    }

    // Calls inner(x, n) for the real numbers of a chunk, through a buffer where there are gaps between them.
    template <bool write, class Inner> void visit(const Chunk& chunk, Inner inner) const {
        const Layout& layout = parts_[chunk.part].layout;
        const size_t item = kDtypes[layout.dtype].item, numbers = kDtypes[layout.dtype].parts;
        if (layout.axes == 0)
            inner(layout.data + chunk.start * item, chunk.count * numbers);
        else
            buffered<write>(chunk, inner);
    }

    template <bool write, class Inner> void buffered(const Chunk& chunk, Inner inner) const {
        const Part& part = parts_[chunk.part];
        const DtypeFacts& dtype = kDtypes[part.layout.dtype];
        alignas(64) char buffer[8192];
        const size_t room = sizeof buffer / dtype.item, end = chunk.start + chunk.count;
        for (size_t start = chunk.start; start < end; start += room) {
            const size_t n = std::min(room, end - start);
            copy(part, start, n, buffer, true);
            if constexpr (!write)
                inner(buffer, n * dtype.parts);
            else if (inner(buffer, n * dtype.parts))
                copy(part, start, n, buffer, false);
        }
    }

    void copy(const Part& part, size_t start, size_t n, char* buffer, bool gather) const {
        const size_t item = kDtypes[part.layout.dtype].item;
        if (part.layout.axes == 0)
            copy_run(part.layout.data + start * item, buffer, n, 1, item, gather);
        else
            copy_grid(part.layout, axes_.data() + part.first_axis, start, n, buffer, gather);
    }

    // Reduces chunks [first, last), each on its own, then together in order.
    double reduce(size_t first, size_t last, Read Loops::* loop, bool finite, double unit) {
        const bool take_largest = loop == &Loops::largest;
        run(first, last, [=](size_t i) {
            const Loops& loops = loops_of[parts_[chunks_[i].part].layout.dtype];
            double result = kAbsent;
            const auto reduce_one = [&](char* x, size_t n) {
                result = join(result, (loops.*loop)(x, n, unit), take_largest);
            };
            if (!finite)
                visit<false>(chunks_[i], reduce_one);
            else
                buffered<false>(chunks_[i], [&](char* x, size_t n) {
                    if (loops.count_finite(x, n, 0) == 0) return;
                    loops.zero_nonfinite(x, n, 0);
                    reduce_one(x, n);
                });
            results_[i] = result;
        });
        return fold(first, last, take_largest);
    }

    double fold(size_t first, size_t last, bool take_largest) const {
        double result = kAbsent;
        for (size_t i = first; i < last; ++i) result = join(result, results_[i], take_largest);
        return result;
    }

    // The norm of chunks [first, last), given what `reduce` made of them.
    double norm_from(double reduced, size_t first, size_t last, Read Loops::* loop, bool finite) {
        if (loop != &Loops::sum_squares || reduced < 0) return reduced;
        return root(reduced,
                    [&](Read Loops::* other, double unit) { return reduce(first, last, other, finite, unit); });
    }

    // True if two threads might write to the same memory.
    bool overlaps() const {
        std::vector<std::pair<const char*, const char*>> ranges;
        for (const Part& part : parts_)
            if (part.layout.count > 0) ranges.emplace_back(part.layout.data, part.layout.data + part.layout.span);
        std::sort(ranges.begin(), ranges.end());
        for (size_t i = 1; i < ranges.size(); ++i)
            if (ranges[i].first < ranges[i - 1].second) return true;
        return false;
    }
};

}  // namespace
