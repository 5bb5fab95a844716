// The functions with torch's names, in one call, if nothing is unusual.
#pragma once

#include "gradients.h"
#include "results.h"
#include "scalar.h"

namespace {

// Without an error it returns None, so that a `Batch` is made.
PyObject* unusual() { return PyErr_Occurred() == nullptr ? new_reference(Py_None) : nullptr; }

// A threshold that is a float or an int; -1 for anything else.
double read_threshold(PyObject* object) {
    if (PyFloat_CheckExact(object)) return PyFloat_AsDouble(object);
    if (!PyLong_CheckExact(object)) return -1;
    const double value = PyLong_AsDouble(object);
    PyErr_Clear();
    return value;
}

// The loop for a norm of some order; null if there is none.
Read Loops::* loop_of(double p) {
    return p == 2                                         ? &Loops::sum_squares
           : p == 1                                       ? &Loops::sum_magnitudes
           : p == std::numeric_limits<double>::infinity() ? &Loops::largest
                                                          : nullptr;
}

// clip_grad_norm(parameters, max_norm, norm_type, error_if_nonfinite, group)
PyObject* clip_grad_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!count_is(count, 5, 5)) return nullptr;
    const double max_norm = read_threshold(args[1]), p = read_threshold(args[2]);
    const bool is_flag = args[3] == Py_False || args[3] == Py_True;  // a norm that is not finite is unusual
    if (!(max_norm >= 0) || p != 2 || !is_flag || args[4] != Py_None) return unusual();
    Gradients gradients;
    double norm;
    if (!is_usable() || !gradients.add(args[0]) || !gradients.take() || !gradients.measure(norm)) return unusual();
    if (!gradients.scale(clip_coef_of(max_norm, norm))) return nullptr;
    use_up(args[0]);
    return new_scalar(norm, gradients.is_double());
}

// clip_grad_value(parameters, clip_value)
PyObject* clip_grad_value(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!count_is(count, 2, 2)) return nullptr;
    const double clip_value = read_threshold(args[1]);
    if (!(clip_value >= 0)) return unusual();
    Gradients gradients;
    if (!is_usable() || !gradients.add(args[0]) || !gradients.take() || gradients.is_complex()) return unusual();
    if (!gradients.clamp(clip_value)) return nullptr;
    use_up(args[0]);
    return new_reference(Py_True);
}

// clip_grad_each(parameters, limit, norm_type, is_rms): limits each norm, or each root mean square
PyObject* clip_grad_each(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!count_is(count, 4, 4)) return nullptr;
    const double limit = read_threshold(args[1]);
    const auto loop = loop_of(read_threshold(args[2]));
    const bool is_rms = args[3] == Py_True;
    if (!(limit >= 0) || loop == nullptr) return unusual();
    Gradients gradients;
    if (!is_usable() || !gradients.add(args[0]) || !gradients.take()) return unusual();
    Numbers before, clip_coefs;
    if (!gradients.clip_each(loop, limit, is_rms, before, clip_coefs)) return nullptr;
    use_up(args[0]);
    const auto make = gradients.is_double() ? new_tensor<double> : new_tensor<float>;
    return make(kFloat, before.begin(), int64_t(before.size()), 1);
}

}  // namespace
