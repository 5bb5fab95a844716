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

// Distinct tensors, in order, all of which the kernel takes.
class Tensors {
    References all_;
    size_t found_ = 0;
    bool is_complex_ = false;  // whether any of them is

  public:
    const References& all() const { return all_; }
    size_t size() const { return all_.size(); }

    // Whether one occurs several times, from several parameters or from one that is repeated.
    bool has_repeated() const { return found_ > size(); }

    // Collects plain tensors, or the gradients of parameters that have one.
    Outcome collect(PyObject* given, bool take_grad) {
        if (PyList_CheckExact(given)) all_.reserve(size_t(PyList_Size(given)));
        const Outcome outcome = collect_plain(given, [&](PyObject* item) {
            Ref tensor = take_grad ? get_grad(item) : Ref::to(item);
            if (tensor == nullptr) return kFailed;
            if (tensor != Py_None) all_.take(std::move(tensor));
            return kDone;
        });
        found_ = size();
        if (outcome == kDone) all_.drop_repeated();
        return outcome;
    }

    // Reads their memory; unusual if the kernel cannot take one.  No Python code runs after that.
    Outcome read(Memory& memory) {
        for (size_t i = 0; i < size() && has_refused; ++i)
            if (!is_plain(all_[i]) || !is_dense_on_host(all_[i])) return kUnusual;
        if (add_to(memory, true) < size()) return kUnusual;
        is_complex_ = memory.has_complex();
        return kDone;
    }

    // Reads their memory again.
    Outcome read_again(Memory& memory) const {
        memory.clear();
        const size_t place = add_to(memory, is_complex_);
        if (place == size()) return kDone;
        return fail(PyExc_RuntimeError,
                    "gradient %zu changed during the call: it has no memory any more that can be measured or changed "
                    "directly, as its device, dtype or layout is another one, or its elements overlap. Replace "
                    "gradients before or after clipping, not meanwhile.",
                    place);
    }

    // Tells autograd that those were written for which wanted(i) holds.
    template <class Wanted> Outcome bump_versions(Wanted wanted) const {
        const Ref written(PyList_New(0));
        for (size_t i = 0; i < size() && written != nullptr; ++i)
            if (wanted(i) && PyList_Append(written, all_[i]) < 0) return kFailed;
        return written != nullptr && PyList_Size(written) == 0 ? kDone : ::bump_versions(written);
    }

  private:
    // Returns the position of the first one that cannot be taken.  Not all work is done on complex numbers.
    INLINE size_t add_to(Memory& memory, bool may_be_complex) const {
        memory.reserve(size());
        size_t i = 0;
        DLTensor t;
        while (i < size() && describe(all_[i], t) && memory.add(t) && (may_be_complex || !memory.has_complex())) ++i;
        return i;
    }
};

// Access to the memory of tensors.  Python code that may have changed it can run between two operations, and
// other threads during one on many elements; then memory is read again before the next one, which fails if the kernel
// can no longer take a tensor.
class Access {
    Tensors& tensors_;
    Memory memory_;
    bool is_fresh_ = false;

  public:
    explicit Access(Tensors& tensors) : tensors_(tensors) {}

    const Memory& memory() const { return memory_; }

    // Collects the distinct tensors of a call, or the gradients of its parameters, and reads their memory.
    Outcome gather(PyObject* given, bool take_grad) {
        Outcome outcome = begin();
        if (outcome == kDone) outcome = tensors_.collect(given, take_grad);
        if (outcome == kDone) outcome = tensors_.read(memory_);
        is_fresh_ = outcome == kDone;
        return outcome;
    }

    // Reads the memory unless nothing can have changed it.
    Outcome refresh() {
        const bool was_fresh = std::exchange(is_fresh_, true);
        return was_fresh ? kDone : tensors_.read_again(memory_);
    }

    // The norm of all as one vector.
    Outcome norm(Read Loops::* loop, double& norm) {
        return run([&] { norm = memory_.norm(loop); });
    }

    // The norm of each.
    Outcome norms(Read Loops::* loop, Numbers& norms) {
        return run([&] {
            norms.resize(memory_.size());
            memory_.norms(loop, norms.begin());
        });
    }

    // Changes all by one number, or each by its own.
    Outcome write(Write Loops::* loop, const double* numbers, bool each) {
        bool any = false;
        const Outcome outcome = run([&] { any = memory_.write(loop, numbers, each); });
        if (outcome != kDone || !any) return outcome;
        Array<bool, kUsual> written;
        memory_.find_written(written);
        return tensors_.bump_versions(
            [&](size_t i) { return written[i] && (!each || loop != &Loops::scale || numbers[i] != 1.0); });
    }
    Outcome scale(double clip_coef) { return clip_coef == 1.0 ? kDone : write(&Loops::scale, &clip_coef, false); }

    // Scales each to its own limit, which its clip coefficient replaces; `norms` receives the norms before.
    Outcome clip_each(Read Loops::* loop, Numbers& limits, double eps, Numbers& norms) {
        norms.resize(limits.size());
        const Outcome outcome = run([&] { memory_.clip_each(loop, limits.begin(), eps, norms.begin()); });
        return outcome == kDone ? tensors_.bump_versions([&](size_t i) { return limits[i] != 1.0; }) : outcome;
    }

    // A number that shows whether they are still the same, unchanged.
    Outcome fingerprints(Array<uint64_t, kUsual>& found) {
        Array<int64_t, kUsual> versions;
        for (PyObject* tensor : tensors_.all()) versions.push_back(version_of(tensor));
        is_fresh_ = false;  // where a tensor has no version, Python code may have run
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
};

}  // namespace
