// The two hooks of a Clipper on its optimizer: no Python frame in the usual step, and no look-up by name.
//
// What they need to know is in a `StepState`, which the Clipper's own `_before_step` and `_after_step` use as well; any
// step that is not usual is left to these.  Below are the two hooks of `torchclip run`, on all optimizers.
#pragma once

#include <structmember.h>

#include <chrono>

#include "short_way.h"

namespace {

constexpr size_t kMostRows = 512;

struct StepState {
    PyObject_HEAD PyObject* clipper;  // whose steps these are
    PyObject* max_norm;               // of a usual step, or None
    PyObject* history;
    long long number;      // of the step that is running, or comes next
    long long until;       // the first step that `torchclip run` leaves to Python
    char running, nested;  // as torchclip.clipper.step.State has them
    char went_short;       // whether the step that is running is to be recorded here,
    Clipped clipped;       // with this
    size_t count;          // rows kept until somebody reads the history, or there is no room for more
    struct {
        long long number;
        Clipped clipped;
    } rows[kMostRows];
};

struct {
    PyObject *before_step, *after_step, *pending;
} step_names;

// Whether garbage collection has taken the Clipper, and a finalizer still calls its optimizer.
bool is_gone(const StepState* state) { return state->clipper == nullptr; }

bool begin_usual_step(StepState* state, PyObject* optimizer, PyObject* args, PyObject* kwargs) {
    if (state->running || state->max_norm == Py_None) return false;
    if (!PyTuple_Check(args) || PyTuple_Size(args) != 1 || !PyDict_Check(kwargs) || PyDict_Size(kwargs) != 0)
        return false;
    if (!clip_optimizer(optimizer, read_threshold(state->max_norm), state->clipped)) return false;
    state->went_short = state->running = 1;
    state->nested = 0;
    return true;
}

// Calls a method of the Clipper.
template <class... Arguments> PyObject* call_clipper(StepState* state, PyObject* name, Arguments... arguments) {
    PyObject* const method = PyObject_GetAttr(state->clipper, name);
    if (method == nullptr) return nullptr;
    PyObject* const result = PyObject_CallFunctionObjArgs(method, arguments..., nullptr);
    Py_DECREF(method);
    return result;
}

// before_step(optimizer, args, kwargs)
PyObject* before_step(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    if (!count_is(count, 3, 3)) return nullptr;
    auto* const state = reinterpret_cast<StepState*>(self);
    if (is_gone(state) || begin_usual_step(state, args[0], args[1], args[2])) return new_reference(Py_None);
    if (PyErr_Occurred() != nullptr) return nullptr;
    return call_clipper(state, step_names.before_step, args[0], args[1], args[2]);
}

// A new list of what History.append takes of the rows kept.
PyObject* new_rows(const StepState* state) {
    PyObject* const rows = PyList_New(0);
    for (size_t i = 0; i < state->count && rows != nullptr; ++i) {
        const auto& [number, clipped] = state->rows[i];
        const Attribute row(Py_BuildValue("(LdOdO)", number, clipped.norm, state->max_norm, clipped.coef, Py_False));
        if (row == nullptr || PyList_Append(rows, row) < 0) return Py_DECREF(rows), PyErr_NoMemory();
    }
    return rows;
}

// Hands the rows kept to the history.  A finalizer that runs meanwhile may do the same, or take a step.
bool flush(StepState* state) {
    while (state->count > 0) {
        PyObject* const rows = new_rows(state);
        PyObject* const pending = rows == nullptr ? nullptr : PyObject_GetAttr(state->history, step_names.pending);
        const bool current = pending != nullptr && PyList_Check(pending) && size_t(PyList_Size(rows)) == state->count;
        const bool handed_on = current && PyList_SetSlice(pending, PY_SSIZE_T_MAX, PY_SSIZE_T_MAX, rows) == 0;
        if (handed_on) state->count = 0;
        Py_XDECREF(rows);
        Py_XDECREF(pending);
        if (PyErr_Occurred() != nullptr) return false;
    }
    return true;
}

// Records a step that went the short way and is over now.  False with an error set for an error.
bool record(StepState* state) {
    state->went_short = state->running = 0;
    if (state->count == kMostRows && !flush(state)) return false;  // as reading has failed before
    state->rows[state->count++] = {state->number++, state->clipped};
    return state->count < kMostRows || PyObject_Size(state->history) >= 0;  // which reads, and so empties this
}

// after_step(optimizer, args, kwargs)
PyObject* after_step(PyObject* self, PyObject* const*, Py_ssize_t) {
    auto* const state = reinterpret_cast<StepState*>(self);
    if (is_gone(state)) return new_reference(Py_None);
    if (state->went_short && state->running && !state->nested) return record(state) ? new_reference(Py_None) : nullptr;
    return call_clipper(state, step_names.after_step);
}

PyObject* state_record(PyObject* self, PyObject*) {
    return record(reinterpret_cast<StepState*>(self)) ? new_reference(Py_None) : nullptr;
}
PyObject* state_flush(PyObject* self, PyObject*) {
    return flush(reinterpret_cast<StepState*>(self)) ? new_reference(Py_None) : nullptr;
}

// hooks(): the two functions to call around each step
PyObject* state_hooks(PyObject* self, PyObject*) {
    static PyMethodDef before = {"before_step", function(before_step), METH_FASTCALL, nullptr};
    static PyMethodDef after = {"after_step", function(after_step), METH_FASTCALL, nullptr};
    const Attribute first(PyCFunction_New(&before, self)), second(PyCFunction_New(&after, self));
    if (first == nullptr || second == nullptr) return PyErr_NoMemory();
    return PyTuple_Pack(2, static_cast<PyObject*>(first), static_cast<PyObject*>(second));
}

PyObject* new_state(PyTypeObject* type, PyObject* args, PyObject*) {
    PyObject *clipper, *max_norm, *history;
    if (!PyArg_ParseTuple(args, "OOO", &clipper, &max_norm, &history)) return nullptr;
    PyObject* const made = PyType_GenericAlloc(type, 0);
    if (made == nullptr) return nullptr;
    auto* const state = reinterpret_cast<StepState*>(made);
    state->clipper = new_reference(clipper);
    state->max_norm = new_reference(max_norm);
    state->history = new_reference(history);
    return made;
}

int traverse_state(PyObject* self, visitproc visit, void* arg) {
    auto* const state = reinterpret_cast<StepState*>(self);
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(state->clipper);
    Py_VISIT(state->max_norm);
    Py_VISIT(state->history);
    return 0;
}

int clear_state(PyObject* self) {
    auto* const state = reinterpret_cast<StepState*>(self);
    Py_CLEAR(state->clipper);
    Py_CLEAR(state->max_norm);
    Py_CLEAR(state->history);
    return 0;
}

void free_state(PyObject* self) {
    PyTypeObject* const type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear_state(self);
    reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

PyMemberDef state_members[] = {
    {"history", T_OBJECT_EX, offsetof(StepState, history), 0, nullptr},
    {"number", T_LONGLONG, offsetof(StepState, number), 0, nullptr},
    {"until", T_LONGLONG, offsetof(StepState, until), 0, nullptr},
    {"running", T_BOOL, offsetof(StepState, running), 0, nullptr},
    {"nested", T_BOOL, offsetof(StepState, nested), 0, nullptr},
    {"went_short", T_BOOL, offsetof(StepState, went_short), 0, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};
PyMethodDef state_methods[] = {
    {"hooks", state_hooks, METH_NOARGS, "hooks(): the two functions to call around each step"},
    {"record", state_record, METH_NOARGS, "record(): the step that went the short way"},
    {"flush", state_flush, METH_NOARGS, "flush(): hand the records kept to the history"},
    {nullptr, nullptr, 0, nullptr},
};
PyType_Slot state_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(new_state)},
    {Py_tp_members, state_members},
    {Py_tp_methods, state_methods},
    {Py_tp_traverse, reinterpret_cast<void*>(traverse_state)},
    {Py_tp_clear, reinterpret_cast<void*>(clear_state)},
    {Py_tp_dealloc, reinterpret_cast<void*>(free_state)},
    {0, nullptr},
};
PyType_Spec state_spec = {"torchclip._kernel.StepState", sizeof(StepState), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
                          state_slots};

PyTypeObject* state_type = nullptr;

// What the hooks on all optimizers take is measured in some of the steps: those of torchclip.cli.run.watch._is_timed.
using Clock = std::chrono::steady_clock;
constexpr long long kEveryTimed = 16, kTimed = 10;
double seconds_before_step = 0;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }
bool is_timed(long long step) { return step % kEveryTimed == kTimed; }

// The hooks' own object: what they were made of.
enum { kBefore, kAfter, kStates, kAddSeconds, kHookParts };

// Of an optimizer, from the dictionary of all of them; null if it is not there.  A new reference.
PyObject* state_of(PyObject* self, PyObject* optimizer) {
    const Attribute key(PyLong_FromVoidPtr(optimizer));
    PyObject* const state = key == nullptr ? nullptr : PyDict_GetItemWithError(PyTuple_GetItem(self, kStates), key);
    return state != nullptr && Py_TYPE(state) == state_type ? new_reference(state) : nullptr;
}

PyObject* leave_to_python(PyObject* function, PyObject* const* args) {
    PyErr_Clear();  // what went wrong in the short way goes wrong again in Python, which makes a note of it
    return PyObject_CallFunctionObjArgs(function, args[0], args[1], args[2], nullptr);
}

// before_any_step(optimizer, args, kwargs)
PyObject* before_any_step(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    const auto start = Clock::now();
    if (!count_is(count, 3, 3)) return nullptr;
    const Attribute found(state_of(self, args[0]));
    auto* const state = reinterpret_cast<StepState*>(static_cast<PyObject*>(found));
    if (state == nullptr || state->number >= state->until || !begin_usual_step(state, args[0], args[1], args[2]))
        return leave_to_python(PyTuple_GetItem(self, kBefore), args);
    if (is_timed(state->number)) seconds_before_step = seconds_since(start);
    return new_reference(Py_None);
}

// after_any_step(optimizer, args, kwargs)
PyObject* after_any_step(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    const auto start = Clock::now();
    if (!count_is(count, 3, 3)) return nullptr;
    const Attribute found(state_of(self, args[0]));
    auto* const state = reinterpret_cast<StepState*>(static_cast<PyObject*>(found));
    if (state == nullptr || !state->went_short || !state->running || state->nested)
        return leave_to_python(PyTuple_GetItem(self, kAfter), args);
    const bool timed = is_timed(state->number);
    if (!record(state)) return nullptr;
    if (!timed) return new_reference(Py_None);
    const Attribute seconds(PyFloat_FromDouble(seconds_before_step + seconds_since(start)));
    return PyObject_CallFunctionObjArgs(PyTuple_GetItem(self, kAddSeconds), static_cast<PyObject*>(seconds), nullptr);
}

// watch_hooks(before, after, states, add_seconds)
PyObject* watch_hooks(PyObject*, PyObject* const* args, Py_ssize_t count) {
    static PyMethodDef before = {"before_any_step", function(before_any_step), METH_FASTCALL, nullptr};
    static PyMethodDef after = {"after_any_step", function(after_any_step), METH_FASTCALL, nullptr};
    if (!count_is(count, kHookParts, kHookParts)) return nullptr;
    if (!PyDict_CheckExact(args[kStates])) return PyErr_Format(PyExc_TypeError, "the states must be in a dictionary");
    const Attribute self(PyTuple_Pack(kHookParts, args[0], args[1], args[2], args[3]));
    if (self == nullptr) return PyErr_NoMemory();
    const Attribute first(PyCFunction_New(&before, self)), second(PyCFunction_New(&after, self));
    if (first == nullptr || second == nullptr) return PyErr_NoMemory();
    return PyTuple_Pack(2, static_cast<PyObject*>(first), static_cast<PyObject*>(second));
}

bool make_step_names() {
    const auto intern = PyUnicode_InternFromString;
    step_names = {intern("_before_step"), intern("_after_step"), intern("_pending")};
    return PyErr_Occurred() == nullptr;
}

}  // namespace
