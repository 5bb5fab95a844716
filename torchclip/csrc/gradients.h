// The distinct gradients of one call: every caller collects, measures and changes them in the same way.
//
// User code can run when a gradient is read from its parameter, when a reference to a parameter is released,
// and whenever Python allocates (finalizers).  So references to all gradients are collected first, and those
// to the parameters released; then the memory is read, measured and changed without Python; autograd is told
// last.
#pragma once

#include "memory.h"
#include "parameters.h"

namespace {

// A tuple of those for which wanted(i) holds; null, with an error set, after an error.
template <class Wanted> Ref tuple_of(const References& all, Wanted wanted) {
    size_t count = 0;
    for (size_t i = 0; i < all.size(); ++i) count += wanted(i);
    Ref tuple(PyTuple_New(Py_ssize_t(count)));
    for (size_t i = 0, next = 0; i < all.size() && tuple != nullptr; ++i)
        if (wanted(i)) PyTuple_SetItem(tuple, Py_ssize_t(next++), new_reference(all[i]));
    return tuple;
}

// Distinct tensors, in order, and which of them the kernel works on.
class Tensors {
    References all_;
    Room<bool, kUsual> taken_;
    size_t found_ = 0, taken_count_ = 0;

  public:
    const References& all() const { return all_; }
    bool is_taken(size_t i) const { return taken_[i]; }
    size_t taken_count() const { return taken_count_; }
    bool are_all_taken() const { return taken_count_ == all_.size(); }

    // Whether one occurs several times, from several parameters or from one that is repeated.
    bool has_repeated() const { return found_ > all_.size(); }

    // The number of items of the list that they come from, if it is one.
    void expect(PyObject* given) {
        if (PyList_CheckExact(given)) all_.reserve(size_t(PyList_Size(given)));
    }

    // Adds a tensor, or a parameter's gradient if it has one.  False, with an error set, if that cannot be read.
    void take(Ref tensor) { all_.take(std::move(tensor)); }
    bool take_gradient(PyObject* parameter) {
        Ref grad = get_grad(parameter);
        if (grad == nullptr) return false;
        if (grad != Py_None) all_.take(std::move(grad));
        return true;
    }

    void drop_repeated() {
        found_ = all_.size();
        all_.drop_repeated();
    }

    // Adds the taken ones of others.
    void take_taken(const Tensors& others) {
        for (size_t i = 0; i < others.all_.size(); ++i)
            if (others.taken_[i]) all_.take(Ref::to(others.all_[i]));
        taken_count_ = all_.size();
        taken_.resize(taken_count_);
        std::memset(taken_.begin(), true, taken_count_);
    }

    // Decides which of them the kernel handles, and reads their memory.  No Python code runs after that.
    void read(Memory& memory) {
        taken_.resize(all_.size());
        std::memset(taken_.begin(), true, all_.size());
        if (has_refused)
            for (size_t i = 0; i < all_.size(); ++i) taken_[i] = is_plain(all_[i]) && is_dense_on_host(all_[i]);
        taken_count_ = 0;
        memory.reserve(all_.size());
        for (size_t i = 0; i < all_.size(); ++i) {
            taken_[i] = taken_[i] && memory.add(all_[i]);
            taken_count_ += taken_[i];
        }
    }

    // Reads the memory of the taken ones for which wanted(i) holds.  False, with an error set, if the kernel can no
    // longer handle one of them.
    template <class Wanted> bool read_again(Memory& memory, Wanted wanted) const {
        memory.clear();
        memory.reserve(taken_count_);
        for (size_t i = 0; i < all_.size(); ++i) {
            if (!taken_[i] || !wanted(i) || memory.add(all_[i])) continue;
            PyErr_Format(PyExc_RuntimeError,
                         "gradient %zu changed during the call: it has no memory any more that can be measured or "
                         "changed directly, as its device, dtype or layout is another one, or its elements overlap. "
                         "Replace gradients before or after clipping, not meanwhile.",
                         i);
            return false;
        }
        return true;
    }

    // Tells autograd that the taken ones for which wanted(i) holds were written.  False, with an error set, after an
    // error.
    template <class Wanted> bool bump_versions(Wanted wanted) const {
        const Ref written = tuple_of(all_, [&](size_t i) { return taken_[i] && wanted(i); });
        return written != nullptr && PyTuple_Size(written) == 0 ? true : ::bump_versions(written);
    }

    // Likewise for those in which `memory.write` found something to write; they were read where wanted(i) holds.
    template <class Wanted> bool bump_written(const Memory& memory, Wanted wanted) const {
        Room<bool, kUsual> of_memory, written;
        memory.find_written(of_memory);
        written.resize(all_.size());
        for (size_t i = 0, next = 0; i < all_.size(); ++i) written[i] = taken_[i] && wanted(i) && of_memory[next++];
        return bump_versions([&](size_t i) { return written[i]; });
    }
};

using Numbers = Room<double, kUsual>;

constexpr auto kEach = [](size_t) { return true; };

// Whether torch can describe all of them quickly.
bool are_dense_on_host(const References& all) {
    return std::all_of(all.begin(), all.end(),
                       [](PyObject* tensor) { return is_plain(tensor) && (!has_refused || is_dense_on_host(tensor)); });
}

// Passes each parameter of a call to take(parameter), if all are plain.  False if they are not; with an error set if
// take(parameter) is false, for example because user code raised it.
template <class Take> bool take_plain(PyObject* given, Take take) {
    bool has_raised = false;
    const bool done = collect(given, [&](const Ref& item) {
        if (!is_plain(item)) return false;
        has_raised = !take(item);
        return !has_raised;
    });
    // An error of a walk is raised again where torch's own code does the walk.
    if (!done && !has_raised) PyErr_Clear();
    return done;
}

// A call that the kernel carries out alone, from collecting the gradients to the last change.  If something is unusual,
// its functions return false with no error set, and nothing has changed: then Python makes a `Batch`.
class Gradients {
    Tensors tensors_;
    Memory memory_;
    bool is_stale_ = false;

  public:
    // Adds the gradients of a call's argument.  An error is set if user code raised it when a gradient was read.
    bool add(PyObject* parameters) {
        tensors_.expect(parameters);
        return take_plain(parameters, [this](PyObject* item) { return tensors_.take_gradient(item); });
    }

    // Reads the memory of what was added; no Python code runs after that.
    bool take() {
        tensors_.drop_repeated();
        if (tensors_.all().size() == 0) return false;
        tensors_.read(memory_);
        return tensors_.are_all_taken();
    }

    bool is_double() const { return (memory_.facts() & kDouble) != 0; }
    bool is_complex() const { return (memory_.facts() & kAnyComplex) != 0; }

    // The norm of order 2 of all of them as one vector.
    bool measure(double& norm) {
        if (!is_fresh()) return false;
        norm = memory_.norm(&Loops::sum_squares, false);
        is_stale_ = memory_.releases_gil();
        return norm >= 0 && std::isfinite(norm);
    }

    // Scales each to its own limit for its norm, or for its root mean square.  `before` receives these, and
    // `clip_coefs` the clip coefficients.
    bool clip_each(Read Loops::* loop, double limit, bool is_rms, Numbers& before, Numbers& clip_coefs) {
        if (!is_fresh()) return false;
        is_stale_ = true;
        const auto root_of_count = [&](size_t i) {
            return is_rms ? std::sqrt(double(std::max(size_t(1), elements(i)))) : 1.0;
        };
        before.resize(size());
        clip_coefs.resize(size());
        for (size_t i = 0; i < size(); ++i) clip_coefs[i] = limit * root_of_count(i);
        // For a rule that torch does not have, nothing is added to the norm.
        memory_.clip_each(loop, clip_coefs.begin(), is_rms ? 0.0 : 1e-6, before.begin());
        for (size_t i = 0; i < size(); ++i) before[i] = before[i] < 0 ? 0 : before[i] / root_of_count(i);
        return tensors_.bump_versions([&](size_t i) { return clip_coefs[i] != 1.0; });
    }

    size_t size() const { return memory_.size(); }
    size_t elements(size_t i) const { return memory_.elements(i); }

    // Call it between two others if Python code may have run in between.  False, with an error set, if the kernel can
    // no longer handle one of them.
    bool read_again() {
        is_stale_ = false;
        return tensors_.read_again(memory_, kEach);
    }

    // Changes all of them.  False, with an error set, after an error.
    bool scale(double clip_coef) { return clip_coef == 1.0 || change(&Loops::scale, clip_coef); }
    bool clamp(double limit) { return change(&Loops::clamp, limit); }

  private:
    // Whether no Python code has run since memory was read, be it another thread's; else it is read again.  False, with
    // an error set, for an error.
    bool is_fresh() { return !is_stale_ || read_again(); }

    bool change(Write Loops::* loop, double number) {
        if (!is_fresh()) return false;
        is_stale_ = true;
        if (!memory_.write(loop, &number, false)) return true;
        return tensors_.bump_written(memory_, kEach);
    }
};

// The same, with the number that torch adds to the norm.
double clip_coef_of(double max_norm, double norm) { return clip_coef_of(max_norm, norm, 1e-6); }

}  // namespace
