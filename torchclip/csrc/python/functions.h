// The functions with torch's names, in one call, if nothing is unusual; else Python makes a `Batch`.
#pragma once

#include "../arithmetic/examples.h"
#include "new_tensors.h"
#include "tensors.h"

namespace {

// The loop for a norm of some order; null if there is none.
Read Loops::* loop_of(double norm_type, bool is_complex) {
    if (norm_type == 2) return &Loops::sum_squares;
    if (is_complex) return nullptr;
    return norm_type == 1                                         ? &Loops::sum_magnitudes
           : norm_type == std::numeric_limits<double>::infinity() ? &Loops::largest
                                                                  : nullptr;
}

// The number that torch adds to a norm.
constexpr double kEps = 1e-6;

// The distinct gradients of a call, if there are any and the kernel takes all of them.
struct Gradients {
    Tensors tensors;
    Access access{tensors};

    Outcome take(PyObject* parameters) {
        const Outcome outcome = access.gather(parameters, true);
        return outcome == kDone && tensors.size() == 0 ? kUnusual : outcome;
    }

    bool has(int flags) const { return (access.memory().flags() & flags) != 0; }
};

// clip_grad_norm(parameters, max_norm, norm_type, error_if_nonfinite, group)
PyObject* clip_grad_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (expect_count(count, 5) != kDone) return nullptr;
    const double max_norm = read_threshold(args[1]), norm_type = read_threshold(args[2]);
    const bool is_flag = args[3] == Py_False || args[3] == Py_True;  // a norm that is not finite is unusual
    if (!(max_norm >= 0) || norm_type != 2 || !is_flag || args[4] != Py_None) return finish(kUnusual);
    Gradients gradients;
    double norm = 0;
    Outcome outcome = gradients.take(args[0]);
    if (outcome == kDone) outcome = gradients.access.norm(&Loops::sum_squares, norm);
    if (outcome == kDone && !(norm >= 0 && std::isfinite(norm))) outcome = kUnusual;
    if (outcome == kDone) outcome = gradients.access.scale(clip_coef_of(max_norm, norm, kEps));
    return finish(outcome, [&] {
        use_up(args[0]);
        return new_scalar(norm, gradients.has(kDouble));
    });
}

// clip_grad_value(parameters, clip_value)
PyObject* clip_grad_value(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (expect_count(count, 2) != kDone) return nullptr;
    const double clip_value = read_threshold(args[1]);
    if (!(clip_value >= 0)) return finish(kUnusual);
    Gradients gradients;
    Outcome outcome = gradients.take(args[0]);
    if (outcome == kDone && gradients.has(kAnyComplex)) outcome = kUnusual;
    if (outcome == kDone) outcome = gradients.access.write(&Loops::clamp, &clip_value, false);
    return finish(outcome, [&] {
        use_up(args[0]);
        return new_reference(Py_True);
    });
}

// clip_grad_each(parameters, limit, norm_type, is_rms): limits each norm, or each root mean square
PyObject* clip_grad_each(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (expect_count(count, 4) != kDone) return nullptr;
    const double limit = read_threshold(args[1]);
    const double norm_type = read_threshold(args[2]);
    const bool is_rms = args[3] == Py_True;
    if (!(limit >= 0)) return finish(kUnusual);
    Gradients gradients;
    Numbers roots, limits, before;  // roots of the numbers of elements, if those count
    Outcome outcome = gradients.take(args[0]);
    const auto loop = loop_of(norm_type, gradients.has(kAnyComplex));
    if (outcome == kDone && loop == nullptr) outcome = kUnusual;
    // A root mean square may fit into a double where the norm does not.
    if (outcome == kDone && is_rms && gradients.has(kDouble)) outcome = kUnusual;
    if (outcome == kDone) {
        const Memory& memory = gradients.access.memory();
        for (size_t i = 0; i < memory.size(); ++i) {
            roots.push_back(is_rms ? std::sqrt(double(std::max(size_t(1), memory.elements(i)))) : 1.0);
            limits.push_back(limit * roots[i]);
        }
        // For a rule that torch does not have, nothing is added to the norm.
        outcome = gradients.access.clip_each(loop, limits, is_rms ? 0.0 : kEps, before);
    }
    return finish(outcome, [&] {
        for (size_t i = 0; i < before.size(); ++i) before[i] = before[i] < 0 ? 0 : before[i] / roots[i];
        use_up(args[0]);
        const auto make = gradients.has(kDouble) ? new_tensor<double> : new_tensor<float>;
        return make(kFloat, before.begin(), int64_t(before.size()), 1).release();
    });
}

// fingerprint(parameters): eight bytes for each gradient
PyObject* fingerprint(PyObject*, PyObject* parameters) {
    Tensors tensors;
    Access access(tensors);
    Array<uint64_t, kUsual> found;
    Outcome outcome = access.gather(parameters, true);
    if (outcome == kDone) outcome = access.fingerprints(found);
    return finish(outcome, [&] {
        const char* const bytes = reinterpret_cast<const char*>(found.begin());
        return PyBytes_FromStringAndSize(bytes, Py_ssize_t(found.size() * sizeof(uint64_t)));
    });
}

// Whether torch can describe all of them quickly.
bool are_dense_on_host(const References& all) {
    return std::all_of(all.begin(), all.end(),
                       [](PyObject* tensor) { return is_plain(tensor) && (!has_refused || is_dense_on_host(tensor)); });
}

// The distinct parameters of a call that have a gradient, and these, if the kernel takes all of them.  It does not if a
// gradient belongs to several parameters, or overlaps anything else.
struct WithWeights {
    References weights, grads;
    Units units;

    Outcome take(PyObject* parameters, Read Loops::* loop) {
        Outcome outcome = begin();
        if (outcome == kDone) outcome = collect_plain(parameters, [this](PyObject* item) { return take_one(item); });
        if (outcome != kDone) return outcome;
        weights.drop_repeated();
        grads.drop_repeated();
        if (weights.size() == 0 || weights.size() != grads.size()) return kUnusual;
        if (!are_dense_on_host(weights) || !are_dense_on_host(grads)) return kUnusual;
        for (size_t i = 0; i < grads.size(); ++i) {
            DLTensor weight, grad;
            const bool is_described = describe(weights[i], weight) && describe(grads[i], grad);
            if (!is_described || !units.add(weight, grad, loop)) return kUnusual;
        }
        return units.are_apart() ? kDone : kUnusual;
    }

  private:
    Outcome take_one(PyObject* parameter) {
        Ref grad = get_grad(parameter);
        if (grad == nullptr) return kFailed;
        if (grad == Py_None) return kDone;
        weights.take(Ref::to(parameter));
        grads.take(std::move(grad));
        return kDone;
    }
};

// clip_grad_adaptive(parameters, clip_factor, eps, norm_type, grad_scale)
PyObject* clip_grad_adaptive(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (expect_count(count, 5) != kDone) return nullptr;
    const double clip_factor = read_threshold(args[1]), eps = read_threshold(args[2]);
    const double grad_scale = read_threshold(args[4]);
    const auto loop = loop_of(read_threshold(args[3]), false);
    if (!(clip_factor >= 0) || !(eps >= 0) || !(grad_scale >= 0) || loop == nullptr) return finish(kUnusual);
    WithWeights given;
    Outcome outcome = given.take(args[0], loop);
    if (outcome != kDone) return finish(outcome);
    std::vector<std::atomic<bool>> changed;
    const size_t elements = given.units.elements();
    const int threads = usable_threads(elements);
    {
        const WithoutGil unlocked(elements);
        changed = given.units.clip(loop, clip_factor, eps, grad_scale, threads);
    }
    Ref written(PyList_New(0));
    for (size_t i = 0; i < changed.size() && written != nullptr; ++i)
        if (changed[i] && PyList_Append(written, given.grads[i]) < 0) return nullptr;
    return finish(bump_versions(written), [&] {
        use_up(args[0]);
        return new_reference(Py_True);
    });
}

// Not for views that torch conjugates or negates lazily.
bool stand_for_their_memory(const References& tensors) {
    for (PyObject* tensor : tensors)
        for (PyObject* name : {torch().is_neg, torch().is_conj}) {
            const Ref answer(PyObject_CallFunctionObjArgs(name, tensor, nullptr));
            PyErr_Clear();
            if (answer != Py_False) return false;
        }
    return true;
}

// clip_per_example(grads, max_norm)
PyObject* clip_per_example(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (expect_count(count, 2) != kDone) return nullptr;
    const double max_norm = read_threshold(args[1]);
    if (!(max_norm >= 0) || !PyList_CheckExact(args[0])) return finish(kUnusual);
    const Outcome outcome = begin();
    if (outcome != kDone) return finish(outcome);
    References tensors;
    for (Py_ssize_t i = 0; i < PyList_Size(args[0]); ++i) tensors.take(Ref::to(PyList_GetItem(args[0], i)));
    if (tensors.size() == 0 || !are_dense_on_host(tensors) || !stand_for_their_memory(tensors)) return finish(kUnusual);
    Examples examples;
    std::vector<Result> sums;
    std::vector<char*> memory;
    for (PyObject* tensor : tensors) {
        DLTensor t;
        if (!describe(tensor, t) || !examples.add(t)) return finish(kUnusual);
        sums.emplace_back(t.dtype, t.ndim - 1, t.shape + 1);
        memory.push_back(sums.back().data());
    }
    const int threads = usable_threads(examples.elements());
    double clipped = 0;
    {
        const WithoutGil unlocked(examples.elements());
        std::vector<double> clip_coefs = examples.norms(threads);
        for (double& coef : clip_coefs) {
            coef = clip_coef_of(max_norm, coef, kEps);
            clipped += !(coef >= 1);
        }
        examples.add_up(clip_coefs, memory, threads);
    }
    const Ref list(PyList_New(0)), number = new_tensor<int64_t>(kInt, &clipped, 1, 0);
    if (list == nullptr || number == nullptr) return nullptr;
    for (Result& sum : sums) {
        const Ref tensor = sum.take();
        if (tensor == nullptr || PyList_Append(list, tensor) < 0) return nullptr;
    }
    return PyTuple_Pack(2, static_cast<PyObject*>(list), static_cast<PyObject*>(number));
}

}  // namespace
