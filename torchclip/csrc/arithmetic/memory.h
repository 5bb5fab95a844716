// The memory of some tensors: its norms, changes to it, and how threads share the work.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "array.h"
#include "instruction_sets.h"
#include "layout.h"
#include "threads.h"

namespace {

// The flags of torchclip._core.batch.Facts that tensors of the kernel can have.
constexpr int kDouble = 1, kAnyComplex = 2, kSmall = 4, kShared = 16;

constexpr size_t kSmallElements = size_t(1) << 19;  // of Facts.SMALL
constexpr double kAbsent = -1.0;                    // the norm of no elements at all
constexpr size_t kChunk = 16 * 1024;                // elements; sums are added chunk by chunk, in order
constexpr size_t kChunkCost = 256;                  // what starting a chunk costs, in elements

// Joins the results of two chunks; kAbsent changes nothing.
inline double join(double result, double part, bool take_largest) {
    if (part < 0 || result < 0) return part < 0 ? result : part;
    return take_largest ? larger(part, result) : result + part;
}

// The root of a sum of squares.  Squares of float64 can leave the range of float64, or lose digits at its lower end;
// then they are computed again relative to the largest number, with reduce(loop, unit).
template <class Reduce> double root(double squares, Reduce reduce) {
    if (squares > 1e-280 && squares <= std::numeric_limits<double>::max()) return std::sqrt(squares);
    const double top = reduce(&Loops::largest, 1.0);
    if (top == 0 || !std::isfinite(top)) return top;
    const int exponent = std::max(-1023, std::min(std::ilogb(top), 1023));
    return std::ldexp(std::sqrt(reduce(&Loops::sum_scaled_squares, std::ldexp(1.0, -exponent))), exponent);
}

// As in torchclip._core.scalars.clip_coef.
double clip_coef_of(double max_norm, double norm, double eps) {
    if (max_norm == std::numeric_limits<double>::infinity() || norm < 0 || (eps == 0 && norm <= max_norm)) return 1.0;
    const double coef = max_norm / (norm + eps);
    return coef >= 1.0 ? 1.0 : coef;  // nan for a nan norm
}

// It holds pointers into the tensors' memory, so that nothing may move or free that between `add` and their use.
class Memory {
    struct Place {
        size_t part, start;  // tensor and first element
        size_t chunk;        // among those of all tensors
    };

    Array<Layout, kUsual> parts_;
    Array<double, kUsual> results_;  // by chunk
    Array<bool, kUsual> written_;    // by chunk, too
    size_t elements_ = 0, chunks_ = 0;
    int flags_ = 0, threads_ = 1;
    const Loops* loops_ = nullptr;

  public:
    // Forgets all tensors.
    void clear() {
        parts_.clear();
        elements_ = chunks_ = 0;
        flags_ = 0;
    }

    void reserve(size_t tensors) { parts_.reserve(tensors); }

    // False if the kernel cannot handle the tensor's memory.
    INLINE bool add(const DLTensor& tensor) {
        Layout layout;
        if (!read_layout(tensor, layout)) return false;
        parts_.push_back(layout);
        elements_ += layout.count;
        chunks_ += chunks_of(layout);
        const DtypeFacts& dtype = kDtypes[layout.dtype];
        flags_ |= (dtype.is_double() ? kDouble : 0) | (dtype.is_complex() ? kAnyComplex : 0);
        return true;
    }

    size_t size() const { return parts_.size(); }
    size_t elements() const { return elements_; }
    size_t elements(size_t part) const { return parts_[part].count; }
    int flags() const { return flags_; }
    bool has_complex() const { return (flags_ & kAnyComplex) != 0; }

    // How many threads share the work from now on.
    void use_threads(int threads) { threads_ = threads; }

    // The norm of all tensors as one vector.
    double norm(Read Loops::* loop) {
        prepare();
        return norm_from(reduce(first(), last(), loop, 1.0), first(), last(), loop);
    }

    // The norm of each, in order, into `norms`.
    void norms(Read Loops::* loop, double* norms) {
        prepare();
        reduce(first(), last(), loop, 1.0);
        Place from = first();
        for (size_t i = 0; i < parts_.size(); ++i) {
            const Place to = {i + 1, 0, from.chunk + chunks_of(parts_[i])};
            norms[i] = norm_from(fold(from, to, loop == &Loops::largest), from, to, loop);
            from = to;
        }
    }

    // A number for each tensor that shows whether it is still the same one with the same contents: it depends on the
    // address, the version, the size and a sample.
    void fingerprints(const Array<int64_t, kUsual>& versions, Array<uint64_t, kUsual>& found) {
        loops_ = loops_for(elements_);
        for (size_t i = 0; i < parts_.size(); ++i) {
            uint64_t hash = 0;
            const auto mix = [&hash](uint64_t value) {
                hash = (hash ^ value) * 0x9e3779b97f4a7c15;
                hash ^= hash >> 32;
            };
            mix(reinterpret_cast<uintptr_t>(parts_[i].data));
            mix(uint64_t(versions[i]));
            mix(parts_[i].count);
            if (parts_[i].count > 0) mix(sample(parts_[i]));
            found.push_back(hash);
        }
    }

    // Changes all tensors by one number, or each by its own; returns whether anything changed.
    bool write(Write Loops::* loop, const double* numbers, bool each) {
        prepare();
        if (threads_ > 1 && overlaps()) threads_ = 1;
        written_.resize(chunks_);
        run(first(), last(), [&](Place place, size_t n) {
            const Layout& layout = parts_[place.part];
            const Write inner = loops_[layout.dtype].*loop;
            const double number = numbers[each ? place.part : 0];
            bool any = false;
            if (number != 1.0 || loop != &Loops::scale)
                any = inner(number_at(layout, place.start), n * kDtypes[layout.dtype].parts, number);
            written_[place.chunk] = any;
        });
        return std::find(written_.begin(), written_.end(), true) != written_.end();
    }

    // Which tensors the last `write` has changed, or had nothing to change in.
    void find_written(Array<bool, kUsual>& written) const {
        written.resize(parts_.size());
        const bool* chunk = written_.begin();
        for (size_t i = 0; i < parts_.size(); ++i) {
            const bool* const end = chunk + chunks_of(parts_[i]);
            written[i] = chunk == end || std::find(chunk, end, true) != end;
            chunk = end;
        }
    }

    // Measures each tensor and scales it to its own limit, while it is in the cache.  If several threads would share a
    // tensor, or tensors overlap, all are measured before any is scaled.
    //
    // Args:
    //     limits: receives the clip coefficients.
    //     eps: as for scalars.clip_coef.
    void clip_each(Read Loops::* loop, double* limits, double eps, double* norms) {
        prepare();
        const auto measure = [&](size_t i, Place from, Place to) {
            norms[i] = norm_from(fold(from, to, loop == &Loops::largest), from, to, loop);
            limits[i] = clip_coef_of(limits[i], norms[i], eps);
        };
        size_t most = 0;
        for (const Layout& layout : parts_) most = std::max(most, layout.count);
        const bool is_apart = !overlaps();
        if (is_apart && most <= std::max(elements_, size_t(1)) / size_t(threads_)) {
            const auto clip = [&](size_t i, Place from, Place to) {
                reduce(from, to, loop, 1.0);
                measure(i, from, to);
                scale_backwards(i, limits[i]);
            };
            const auto work = [&](size_t share, size_t shares) { for_each_tensor(share, shares, clip); };
            return threads_ == 1 ? work(0, 1) : in_parallel(threads_, work);
        }
        reduce(first(), last(), loop, 1.0);
        for_each_tensor(0, 1, measure);
        if (!is_apart) threads_ = 1;
        run(first(), last(),
            [&](Place place, size_t n) { scale(parts_[place.part], place.start, n, limits[place.part]); });
    }

  private:
    void scale(const Layout& layout, size_t start, size_t n, double clip_coef) const {
        if (clip_coef == 1.0) return;
        loops_[layout.dtype].scale(number_at(layout, start), n * kDtypes[layout.dtype].parts, clip_coef);
    }

    static uint64_t bits_at(const char* number, size_t size) {
        uint64_t bits = 0;
        std::memcpy(&bits, number, size);
        return bits;
    }

    // The bits of the first number that is neither 0 nor infinite nor nan; of the first one if there is none.
    uint64_t sample(const Layout& layout) const {
        const DtypeFacts& dtype = kDtypes[layout.dtype];
        const uint64_t first = bits_at(layout.data, dtype.alignment);
        uint64_t found = first;
        const char* x = layout.data;
        for (size_t start = 0; start < layout.count && !is_telling(found, dtype); start += kChunk) {
            const size_t n = std::min(kChunk, layout.count - start) * dtype.parts;
            // Most numbers that are looked at here are zeros, which the loop passes over many times as fast.
            if (loops_[layout.dtype].largest(x, n, 1.0) != 0)
                for (size_t i = 0; i < n && !is_telling(found, dtype); ++i)
                    found = bits_at(x + i * dtype.alignment, dtype.alignment);
            x += n * dtype.alignment;
        }
        return is_telling(found, dtype) ? found : first;
    }

    // Calls work(i, begin, end) for each tensor whose middle lies in this one of so many equal shares of all elements.
    template <class Work> void for_each_tensor(size_t share, size_t shares, const Work& work) const {
        Place from = first();
        size_t before = 0;
        for (size_t i = 0; i < parts_.size(); ++i) {
            const Place to = {i + 1, 0, from.chunk + chunks_of(parts_[i])};
            const size_t middle = before + parts_[i].count / 2;
            if (std::min(middle / (elements_ / shares + 1), shares - 1) == share) work(i, from, to);
            before += parts_[i].count;
            from = to;
        }
    }

    // From the last chunk to the first, as the last ones may still be in the cache.
    void scale_backwards(size_t part, double clip_coef) const {
        const Layout& layout = parts_[part];
        for (size_t chunk = chunks_of(layout); chunk-- > 0;)
            scale(layout, chunk * kChunk, std::min(kChunk, layout.count - chunk * kChunk), clip_coef);
    }

    static size_t chunks_of(const Layout& layout) { return (layout.count + kChunk - 1) / kChunk; }

    // Chooses the loops by the number of elements.
    void prepare() {
        results_.resize(chunks_);
        loops_ = loops_for(elements_);
    }

    Place first() const { return {0, 0, 0}; }
    Place last() const { return {parts_.size(), 0, chunks_}; }

    // Calls work(place, n) for each chunk of n elements between two places.
    template <class Work> void run_here(Place place, Place end, const Work& work) const {
        for (; place.part < end.part || (place.part == end.part && place.start < end.start); ++place.part) {
            const size_t count = place.part == end.part ? end.start : parts_[place.part].count;
            for (; place.start < count; place.start += kChunk, ++place.chunk)
                work(place, std::min(kChunk, count - place.start));
            place.start = 0;
        }
    }

    // The same, in several threads if that is faster.
    template <class Work> void run(Place from, Place to, const Work& work) const {
        if (threads_ == 1 || to.chunk - from.chunk < chunks_) return run_here(from, to, work);
        Array<Place, 33> begins;
        cut(size_t(threads_), begins);
        in_parallel(threads_, [&](size_t thread, size_t threads) {
            for (size_t i = thread; i + 1 < begins.size(); i += threads) run_here(begins[i], begins[i + 1], work);
        });
    }

    // Divides all chunks into shares of about the same cost: the beginning of each share, and the end of the last.
    void cut(size_t shares, Array<Place, 33>& begins) const {
        const size_t cost = elements_ + chunks_ * kChunkCost;
        size_t before = 0;
        run_here(first(), last(), [&](Place place, size_t n) {
            if (before >= cost / shares * begins.size() && begins.size() < shares) begins.push_back(place);
            before += n + kChunkCost;
        });
        begins.push_back(last());
    }

    static char* number_at(const Layout& layout, size_t element) {
        return layout.data + element * kDtypes[layout.dtype].item;
    }

    // Reduces the chunks between two places one by one, then joins them in order.
    double reduce(Place from, Place to, Read Loops::* loop, double unit) {
        run(from, to, [&](Place place, size_t n) {
            const Layout& layout = parts_[place.part];
            const Read inner = loops_[layout.dtype].*loop;
            results_[place.chunk] = inner(number_at(layout, place.start), n * kDtypes[layout.dtype].parts, unit);
        });
        return fold(from, to, loop == &Loops::largest);
    }

    double fold(Place from, Place to, bool take_largest) const {
        double result = kAbsent;
        for (size_t i = from.chunk; i < to.chunk; ++i) result = join(result, results_[i], take_largest);
        return result;
    }

    // The norm of the elements between two places, given the result of `reduce`.
    double norm_from(double reduced, Place from, Place to, Read Loops::* loop) {
        if (loop != &Loops::sum_squares || reduced < 0) return reduced;
        return root(reduced, [&](Read Loops::* other, double unit) { return reduce(from, to, other, unit); });
    }

    // True if two threads might write to the same memory.
    bool overlaps() const {
        std::vector<Range> ranges;
        ranges.reserve(parts_.size());
        for (const Layout& layout : parts_) ranges.push_back({layout.data, layout.data + layout.bytes(), true});
        return written_overlap(ranges);
    }
};

}  // namespace
