// The distinct tensors of one call, and access to their memory.
//
// User code can run when a gradient is read from its parameter, when a reference to a parameter is released, and
// whenever Python allocates (finalizers).  So references to all gradients are collected first, and those to the
// parameters released; then the memory is read, measured and changed without Python; autograd is told last.
#pragma once

#include "../arithmetic/memory.h"
#include "parameters.h"

namespace {

using Numbers = Array<double, kUsual>;

constexpr auto kEach = [](size_t) { return true; };

// Distinct tensors, in order, and which of them the kernel works on.
class Tensors {
    References all_;
    Array<bool, kUsual> taken_;
    size_t found_ = 0, taken_count_ = 0;

  public:
    const References& all() const { return all_; }
    size_t size() const { return all_.size(); }
    bool is_taken(size_t i) const { return taken_[i]; }
    size_t taken_count() const { return taken_count_; }
    bool are_all_taken() const { return taken_count_ == size(); }

    // Whether one occurs several times, from several parameters or from one that is repeated.
    bool has_repeated() const { return found_ > size(); }

    // The number of items of the list that they come from, if it is one.
    void expect(PyObject* given) {
        if (PyList_CheckExact(given)) all_.reserve(size_t(PyList_Size(given)));
    }

    // Adds a tensor, or a parameter's gradient if it has one.
    Outcome take(Ref tensor) {
        all_.take(std::move(tensor));
        return kDone;
    }
    Outcome take_gradient(PyObject* parameter) {
        Ref grad = get_grad(parameter);
        if (grad == nullptr) return kFailed;
        return grad == Py_None ? kDone : take(std::move(grad));
    }

    void drop_repeated() {
        found_ = size();
        all_.drop_repeated();
    }

    // Adds the taken ones of others.
    void take_taken(const Tensors& others) {
        for (size_t i = 0; i < others.size(); ++i)
            if (others.taken_[i]) all_.take(Ref::to(others.all_[i]));
        taken_count_ = size();
        taken_.resize(taken_count_);
        std::memset(taken_.begin(), true, taken_count_);
    }

    // Decides which of them the kernel takes, and reads their memory.  No Python code runs after that.
    void read(Memory& memory) {
        taken_.resize(size());
        std::memset(taken_.begin(), true, size());
        if (has_refused)
            for (size_t i = 0; i < size(); ++i) taken_[i] = is_plain(all_[i]) && is_dense_on_host(all_[i]);
        taken_count_ = 0;
        memory.reserve(size());
        for (size_t i = 0; i < size(); ++i) {
            taken_[i] = taken_[i] && add_to(memory, i);
            taken_count_ += taken_[i];
        }
    }

    // Reads the memory of the taken ones again.
    Outcome read_again(Memory& memory) const {
        memory.clear();
        memory.reserve(taken_count_);
        for (size_t i = 0; i < size(); ++i) {
            if (!taken_[i] || add_to(memory, i)) continue;
            return fail(
                PyExc_RuntimeError,
                "gradient %zu changed during the call: it has no memory any more that can be measured or changed "
                "directly, as its device, dtype or layout is another one, or its elements overlap. Replace gradients "
                "before or after clipping, not meanwhile.",
                i);
        }
        return kDone;
    }

    // The list of those for which wanted(i) holds; null with an error set.
    template <class Wanted> Ref list(Wanted wanted) const {
        Ref list(PyList_New(0));
        for (size_t i = 0; i < size() && list != nullptr; ++i)
            if (wanted(i) && PyList_Append(list, all_[i]) < 0) return Ref();
        return list;
    }

    // Tells autograd that the taken ones for which wanted(i) holds were written.
    template <class Wanted> Outcome bump_versions(Wanted wanted) const {
        const Ref written = list([&](size_t i) { return taken_[i] && wanted(i); });
        return written != nullptr && PyList_Size(written) == 0 ? kDone : ::bump_versions(written);
    }

  private:
    INLINE bool add_to(Memory& memory, size_t i) const {
        DLTensor t;
        return describe(all_[i], t) && memory.add(t);
    }
};

// Access to the memory of the taken ones.  Python code that may have changed it can run between two operations, and
// other threads during one on many elements; then memory is read again before the next one, which fails if the kernel
// can no longer take a tensor.
class Access {
    Tensors& tensors_;
    Memory memory_;
    bool is_fresh_ = false;

  public:
    explicit Access(Tensors& tensors) : tensors_(tensors) {}

    const Memory& memory() const { return memory_; }

    // Decides which tensors are taken.
    void read() {
        tensors_.read(memory_);
        is_fresh_ = true;
    }

    // Reads the memory unless nothing can have changed it.
    Outcome refresh() {
        const bool was_fresh = std::exchange(is_fresh_, true);
        return was_fresh ? kDone : tensors_.read_again(memory_);
    }

    // The norm of all as one vector; on request, of their finite elements only.
    Outcome norm(Read Loops::* loop, bool finite, double& norm) {
        return run([&] { norm = memory_.norm(loop, finite); });
    }

    // The norm of each.
    Outcome norms(Read Loops::* loop, bool finite, Numbers& norms) {
        return run([&] {
            norms.resize(memory_.size());
            memory_.norms(loop, finite, norms.begin());
        });
    }

    // Changes all by one number, or each by its own.
    Outcome write(Write Loops::* loop, const double* numbers, bool each) {
        bool any = false;
        const Outcome outcome = run([&] { any = memory_.write(loop, numbers, each); });
        if (outcome != kDone || !any) return outcome;
        Array<bool, kUsual> written;
        memory_.find_written(written);
        return bump([&](size_t i) { return written[i] && (!each || loop != &Loops::scale || numbers[i] != 1.0); });
    }
    Outcome scale(double clip_coef) { return clip_coef == 1.0 ? kDone : write(&Loops::scale, &clip_coef, false); }

    // Scales each to its own limit, which its clip coefficient replaces; `norms` receives the norms before.
    Outcome clip_each(Read Loops::* loop, Numbers& limits, double eps, Numbers& norms) {
        norms.resize(limits.size());
        const Outcome outcome = run([&] { memory_.clip_each(loop, limits.begin(), eps, norms.begin()); });
        return outcome == kDone ? bump([&](size_t i) { return limits[i] != 1.0; }) : outcome;
    }

    // A number that shows whether they are still the same, unchanged.
    Outcome fingerprints(Array<uint64_t, kUsual>& found) {
        Array<int64_t, kUsual> versions;
        for (size_t i = 0; i < tensors_.size(); ++i)
            if (tensors_.is_taken(i)) versions.push_back(version_of(tensors_.all()[i]));
        return run([&] { memory_.fingerprints(versions, found); });
    }

  private:
    // Works on memory as it is now, with as many threads as torch uses.
    template <class Work> Outcome run(Work work) {
        if (refresh() != kDone) return kFailed;
        const size_t elements = memory_.elements();
        memory_.use_threads(usable_threads(elements));
        const WithoutGil unlocked(elements);
        is_fresh_ = elements < kWorthReleasing;
        work();
        return kDone;
    }

    // Tells autograd that those were written for which written(i) holds, counted among the taken ones.
    template <class Written> Outcome bump(Written written) {
        is_fresh_ = false;
        size_t next = 0;
        return tensors_.bump_versions([&](size_t) { return written(next++); });
    }
};

}  // namespace
