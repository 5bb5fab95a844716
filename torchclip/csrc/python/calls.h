// What all functions and methods that Python calls have in common.
#pragma once

#include <exception>

#include "references.h"

namespace {

// How something ended that may fail.
enum Outcome {
    kDone,
    kUnusual,  // nothing was changed, and no error is set: code in Python does the work
    kFailed,   // a Python error is set
};

// What a function returns: what make() makes, None if it leaves the work to Python, or null with an error set.
template <class Make> PyObject* finish(Outcome outcome, Make make) {
    if (outcome == kDone) return make();
    return outcome == kUnusual ? new_reference(Py_None) : nullptr;
}
PyObject* finish(Outcome outcome) {
    return finish(outcome, [] { return new_reference(Py_None); });
}

// Sets an error.
template <class... Args> Outcome fail(PyObject* type, const char* format, Args... args) {
    PyErr_Format(type, format, args...);
    return kFailed;
}

Outcome expect_count(Py_ssize_t given, Py_ssize_t wanted) {
    if (given == wanted) return kDone;
    return fail(PyExc_TypeError, "expected %zd argument%s, got %zd", wanted, wanted == 1 ? "" : "s", given);
}

Outcome read_number(PyObject* object, double& number) {
    number = PyFloat_AsDouble(object);
    return number != -1.0 || PyErr_Occurred() == nullptr ? kDone : kFailed;
}

// A threshold that is a float or an int; -1 for anything else.
double read_threshold(PyObject* object) {
    if (PyFloat_CheckExact(object)) return PyFloat_AsDouble(object);
    if (!PyLong_CheckExact(object)) return -1;
    const double value = PyLong_AsDouble(object);
    PyErr_Clear();
    return value;
}

// What Python calls goes through here: C++ that runs out of memory would end the process otherwise.
template <auto work> struct Guarded;
template <class... Args, PyObject* (*work)(Args...)> struct Guarded<work> {
    static PyObject* call(Args... args) {
        try {
            return work(args...);
        } catch (const std::exception&) {  // std::bad_alloc, or std::length_error for more than any memory
            return PyErr_NoMemory();
        }
    }
};
template <auto work> PyCFunction function() {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Guarded<work>::call));
}

}  // namespace
