// The two hooks of a Clipper on its optimizer: no Python frame in the usual step.
//
// They use the Clipper's attributes, and leave any other step to its own `_before_step` and `_after_step`.
#pragma once

#include "short_way.h"

namespace {

struct {
    PyObject *usual_max_norm, *step, *steps, *row, *running, *nested, *history, *pending, *append, *clip_step;
    PyObject *before_step_method, *after_step_method;
} clipper_names;

bool set_clipper_names() {
    const auto intern = PyUnicode_InternFromString;
    clipper_names = {intern("_usual_max_norm"), intern("_step"),     intern("_steps"),       intern("_row"),
                     intern("running"),         intern("nested"),    intern("history"),      intern("_pending"),
                     intern("append"),          intern("clip_step"), intern("_before_step"), intern("_after_step")};
    return PyErr_Occurred() == nullptr;
}

// The namespace of torchclip._core.native, where `clip_step` is what is in use at the moment.
PyObject* native_names = nullptr;

// What to record of a step that is usual and begins now.  Null if it is not; with an error set for an error.
PyObject* begin_usual_step(PyObject* clipper, PyObject* optimizer, PyObject* args, PyObject* kwargs) {
    const Attribute own(PyObject_GenericGetDict(clipper, nullptr));
    if (own == nullptr || !PyTuple_Check(args) || PyTuple_Size(args) != 1) return nullptr;
    if (!PyDict_Check(kwargs) || PyDict_Size(kwargs) != 0) return nullptr;
    const Attribute max_norm(own_attribute(own, clipper_names.usual_max_norm));
    const Attribute steps(own_attribute(own, clipper_names.steps)), step(own_attribute(own, clipper_names.step));
    if (max_norm == nullptr || max_norm == Py_None || steps == nullptr || step == nullptr) return nullptr;
    if (Attribute(PyObject_GetAttr(step, clipper_names.running)) != Py_False) return nullptr;
    const Attribute clip(own_attribute(native_names, clipper_names.clip_step));
    if (clip == nullptr) return nullptr;
    PyObject* const row = PyObject_CallFunctionObjArgs(clip, optimizer, static_cast<PyObject*>(steps),
                                                       static_cast<PyObject*>(max_norm), nullptr);
    if (row == nullptr || row == Py_None) {
        Py_XDECREF(row);
        return nullptr;
    }
    if (PyDict_SetItem(own, clipper_names.row, row) == 0 &&
        PyObject_SetAttr(step, clipper_names.running, Py_True) == 0 &&
        PyObject_SetAttr(step, clipper_names.nested, Py_False) == 0)
        return row;
    Py_DECREF(row);
    return nullptr;
}

// before_step(optimizer, args, kwargs)
PyObject* before_step(PyObject* clipper, PyObject* const* args, Py_ssize_t count) {
    if (!count_is(count, 3, 3)) return nullptr;
    PyObject* const row = begin_usual_step(clipper, args[0], args[1], args[2]);
    Py_XDECREF(row);
    if (row != nullptr) return new_reference(Py_None);
    if (PyErr_Occurred() != nullptr) return nullptr;
    PyObject* const method = PyObject_GetAttr(clipper, clipper_names.before_step_method);
    if (method == nullptr) return nullptr;
    PyObject* const result = PyObject_CallFunctionObjArgs(method, args[0], args[1], args[2], nullptr);
    Py_DECREF(method);
    return result;
}

// As History.append does, but for its reading of what is pending where that has become much.
bool append_row(PyObject* history, PyObject* row) {
    constexpr Py_ssize_t kFewPending = 1000;
    const Attribute own(PyObject_GenericGetDict(history, nullptr));
    const Attribute pending(own == nullptr ? nullptr : own_attribute(own, clipper_names.pending));
    if (pending != nullptr && PyList_CheckExact(pending) && PyList_Size(pending) < kFewPending)
        return PyList_Append(pending, row) == 0;
    PyObject* const append = PyObject_GetAttr(history, clipper_names.append);
    PyObject* const none = append != nullptr ? PyObject_CallObject(append, row) : nullptr;
    Py_XDECREF(append);
    Py_XDECREF(none);
    return none != nullptr;
}

// Records a step that went the short way and is over now.  False if it did not; with an error set for an error.
bool end_usual_step(PyObject* clipper) {
    const Attribute own(PyObject_GenericGetDict(clipper, nullptr));
    if (own == nullptr) return false;
    const Attribute row(own_attribute(own, clipper_names.row)), step(own_attribute(own, clipper_names.step));
    if (row == nullptr || !PyTuple_CheckExact(row) || step == nullptr) return false;
    if (Attribute(PyObject_GetAttr(step, clipper_names.nested)) != Py_False) return false;
    const Attribute history(own_attribute(own, clipper_names.history)), steps(own_attribute(own, clipper_names.steps));
    if (history == nullptr || steps == nullptr) return false;
    if (PyDict_SetItem(own, clipper_names.row, Py_None) < 0) return false;
    if (PyObject_SetAttr(step, clipper_names.running, Py_False) < 0) return false;
    const long long number = PyLong_AsLongLong(steps);
    if (PyErr_Occurred() != nullptr) return false;
    const Attribute next(PyLong_FromLongLong(number + 1));
    return append_row(history, row) && next != nullptr && PyDict_SetItem(own, clipper_names.steps, next) == 0;
}

// after_step(optimizer, args, kwargs)
PyObject* after_step(PyObject* clipper, PyObject* const*, Py_ssize_t) {
    if (end_usual_step(clipper)) return new_reference(Py_None);
    if (PyErr_Occurred() != nullptr) return nullptr;
    PyObject* const method = PyObject_GetAttr(clipper, clipper_names.after_step_method);
    if (method == nullptr) return nullptr;
    PyObject* const result = PyObject_CallFunctionObjArgs(method, nullptr);
    Py_DECREF(method);
    return result;
}

PyMethodDef before_definition = {"before_step", function(before_step), METH_FASTCALL, nullptr};
PyMethodDef after_definition = {"after_step", function(after_step), METH_FASTCALL, nullptr};

// step_hooks(clipper, native_names)
PyObject* step_hooks(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!count_is(count, 2, 2) || !set_clipper_names()) return nullptr;
    if (!PyDict_CheckExact(args[1])) return PyErr_Format(PyExc_TypeError, "a namespace must be a dictionary");
    PyObject* const old = native_names;
    native_names = new_reference(args[1]);
    Py_XDECREF(old);
    PyObject* const before = PyCFunction_New(&before_definition, args[0]);
    PyObject* const after = PyCFunction_New(&after_definition, args[0]);
    PyObject* const both = before != nullptr && after != nullptr ? PyTuple_Pack(2, before, after) : nullptr;
    Py_XDECREF(before);
    Py_XDECREF(after);
    return both;
}

}  // namespace
