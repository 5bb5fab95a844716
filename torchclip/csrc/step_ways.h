// How the gradients of a usual round are clipped, as a `RoundState` was given it:
//
//     a number              all together, by their norm
//     a callable            likewise, to the threshold that it answers with when it is told the norm
//     ("each", number)      each gradient by its own norm
//     ("rms", rule, name)   each by its root mean square, to the number that is this attribute of the rule
//     ("value", rule, name) each element by its value, likewise
//     ("adaptive", rule, name, other)  each unit relative to its weights, by clip_factor and eps of these names
//     None                  no round is usual
#pragma once

#include "gradients.h"
#include "rows.h"

namespace {

enum class Way : char { kNone, kNumber, kAsked, kEach, kRms, kValue, kAdaptive };

Way way_of(PyObject* given) {
    if (given == Py_None) return Way::kNone;
    if (!PyTuple_Check(given)) return PyCallable_Check(given) ? Way::kAsked : Way::kNumber;
    PyObject* const name = PyTuple_GetItem(given, 0);
    const auto is = [name](const char* other) { return PyUnicode_CompareWithASCIIString(name, other) == 0; };
    if (is("each")) return Way::kEach;
    return is("rms") ? Way::kRms : is("value") ? Way::kValue : is("adaptive") ? Way::kAdaptive : Way::kNone;
}

// A rule's number, whose name is at this position; below 0 for none.
double number_of(PyObject* given, Py_ssize_t place) {
    const Ref number(PyObject_GetAttr(PyTuple_GetItem(given, 1), PyTuple_GetItem(given, place)));
    if (number == nullptr) PyErr_Clear();
    return number == nullptr ? -1 : read_threshold(number);
}

// The number to clip to; below 0 for none.
double limit_of(Way way, PyObject* given) {
    if (way == Way::kAsked) return std::numeric_limits<double>::infinity();
    if (way == Way::kNone) return -1;
    if (way == Way::kNumber) return read_threshold(given);
    if (way == Way::kEach) return read_threshold(PyTuple_GetItem(given, 1));
    return number_of(given, 2);
}

// The functions below scale or clamp taken gradients.  They return false for something unusual, with nothing changed,
// or with an error set.

// All together, to a threshold that a callable computes from their norm.
bool clip_as_asked(Gradients& gradients, PyObject* ask, Clipped& clipped) {
    if (!gradients.measure(clipped.norm)) return false;
    const Ref norm(PyFloat_FromDouble(clipped.norm));
    const Ref answer(norm == nullptr ? nullptr
                                     : PyObject_CallFunctionObjArgs(ask, static_cast<PyObject*>(norm), nullptr));
    if (answer == nullptr) return false;
    clipped.max_norm = PyFloat_AsDouble(answer);
    if (PyErr_Occurred() != nullptr) return false;
    clipped.coef = clip_coef_of(clipped.max_norm, clipped.norm, 0.0);
    return clipped.coef == 1.0 || (gradients.read_again() && gradients.scale(clipped.coef));
}

// The factor by which a norm changed, as in torchclip.clipper.rules.ratio: NaN if the norm is now, as weights may be.
bool set_ratio(Clipped& clipped, double after) {
    const bool is_same = after == clipped.norm || clipped.norm == 0 || after > clipped.norm;
    clipped.coef = is_same ? 1.0 : after / clipped.norm;
    clipped.max_norm = std::numeric_limits<double>::infinity();
    return true;
}

// Likewise once autograd was told of the change: that may have run Python code, so memory is read again.
bool measure_again(Gradients& gradients, Clipped& clipped) {
    double after = 0;
    if (!gradients.read_again()) return false;
    gradients.measure(after);
    return set_ratio(clipped, after);
}

// Each by its own norm, or by its root mean square.
bool clip_each(Gradients& gradients, Way way, double limit, Clipped& clipped) {
    if (!gradients.measure(clipped.norm)) return false;
    Numbers before, clip_coefs;
    if (!gradients.clip_each(&Loops::sum_squares, limit, way == Way::kRms, before, clip_coefs)) return false;
    clipped.coef = 1.0;
    for (const double coef : clip_coefs) clipped.coef = std::min(clipped.coef, coef);
    clipped.max_norm = limit;
    return way == Way::kEach || measure_again(gradients, clipped);
}

// Each element by its value.
bool clip_value(Gradients& gradients, double limit, Clipped& clipped) {
    if (gradients.is_complex() || !gradients.measure(clipped.norm)) return false;
    double after = clipped.norm;
    return gradients.clamp(limit, &after) && set_ratio(clipped, after);
}

// Each unit relative to its weights.
bool clip_adaptively(Gradients& gradients, Units& units, double clip_factor, double eps, Clipped& clipped) {
    return units.take(&Loops::sum_squares) && gradients.measure(clipped.norm) &&
           units.clip(&Loops::sum_squares, clip_factor, eps, 1.0) && measure_again(gradients, clipped);
}

bool clip_in_way(Gradients& gradients, Way way, PyObject* given, double limit, Clipped& clipped) {
    switch (way) {
        case Way::kAsked: return clip_as_asked(gradients, given, clipped);
        case Way::kEach:
        case Way::kRms: return clip_each(gradients, way, limit, clipped);
        case Way::kValue: return clip_value(gradients, limit, clipped);
        default: clipped.max_norm = limit; return clip(gradients, limit, clipped);
    }
}

Function graph_task_id;  // torch's id of the running backward pass; -1 for none

// Whether a step is taken during a backward pass, or may be.
bool in_backward() {
    const Ref task(graph_task_id());
    if (task == nullptr) PyErr_Clear();
    return task == nullptr || PyLong_AsLong(task) != -1;
}

}  // namespace
