// The two hooks of a Clipper on each of its optimizers: a usual step takes no Python frame and no look-up by
// name.
//
// Their state is in a `RoundState`, and in a `Member` for each optimizer.  Two Python functions handle unusual steps.
#pragma once

#include <structmember.h>

#include "functions.h"
#include "marks.h"
#include "step_ways.h"

namespace {

constexpr size_t kMostRows = 512;

// One of the optimizers that step together.
struct Member {
    PyObject_HEAD PyObject* optimizer;        // a weak reference
    char running, nested, is_short, stepped;  // as in torchclip.clipper.step.Member
    Marks* marks;
};

struct Row {
    long long number;
    Clipped clipped;
    PyObject* loss;
};

// The state that all of them share.
struct RoundState {
    PyObject_HEAD PyObject* clip_to;   // the threshold of a usual round,
    Way way;                           // and the way of clipping
    PyObject* members;                 // a tuple
    PyObject* loss;                    // for the record of the next round,
    PyObject* round_loss;              // and for that of the open one
    PyObject* pending;                 // the history's list for rows,
    PyObject* full;                    // and what to call when there are many
    long long number;                  // of the open or next round
    long long next_sample;             // of a round whose end Python handles
    int opener;                        // the optimizer that opened it
    char is_open, is_short, are_weak;  // whether it is open; recorded here; its gradients too large to keep
    Clipped clipped;                   // with this
    size_t count;                      // rows, kept until the history is read or the buffer is full
    Row rows[kMostRows];
};

// The functions around the steps of one optimizer, here and in Python.
struct Hooks {
    PyObject_HEAD RoundState* state;
    Py_ssize_t index;
    PyObject *before, *after;  // null if garbage collection has cleared them while a finalizer still steps
};

PyTypeObject *member_type = nullptr, *round_type = nullptr, *hooks_type = nullptr;

Member* member(const RoundState* state, Py_ssize_t index) {
    return reinterpret_cast<Member*>(PyTuple_GetItem(state->members, index));
}

PyObject* optimizer_of(const Member* member) { return PyWeakref_GetObject(member->optimizer); }  // borrowed, or None

// Passes the kept rows to the history.  A finalizer that runs in between may do the same, or take a step.
bool flush(RoundState* state) {
    while (state->count > 0 && state->pending != nullptr) {
        const size_t count = state->count;
        const Ref rows(PyList_New(0));
        for (size_t i = 0; i < count && rows != nullptr; ++i) {
            const auto [number, clipped, loss] = state->rows[i];
            const Ref kept = Ref::to(loss);
            const Ref row(
                Py_BuildValue("(LdddOO)", number, clipped.norm, clipped.max_norm, clipped.coef, Py_False, loss));
            if (row == nullptr || PyList_Append(rows, row) < 0) return PyErr_NoMemory(), false;
        }
        if (rows == nullptr) return PyErr_NoMemory(), false;
        if (state->count != count) continue;
        if (PyList_SetSlice(state->pending, PY_SSIZE_T_MAX, PY_SSIZE_T_MAX, rows) < 0) return false;
        state->count = 0;
        for (size_t i = 0; i < count; ++i) Py_CLEAR(state->rows[i].loss);
    }
    return true;
}

// Records a round that was clipped here, and ends it.  False, with an error set, after an error.
bool record(RoundState* state) {
    state->is_open = state->is_short = 0;
    for (Py_ssize_t i = 0; i < PyTuple_Size(state->members); ++i) member(state, i)->stepped = 0;
    if (state->count == kMostRows && !flush(state)) return false;  // because reading has failed before
    if (state->count == kMostRows) return PyErr_NoMemory(), false;
    state->rows[state->count++] = {state->number++, state->clipped, state->round_loss};
    state->round_loss = new_reference(Py_None);
    for (Py_ssize_t i = 0; i < PyTuple_Size(state->members); ++i) member(state, i)->marks->clear();
    if (state->count < kMostRows || state->full == nullptr) return true;
    if (!flush(state)) return false;
    PyObject* const none = PyObject_CallFunctionObjArgs(state->full, nullptr);
    Py_XDECREF(none);
    return none != nullptr;
}

// Clips each unit of them relative to its weights; likewise.
bool clip_units(RoundState* state, Gradients& gradients, double clip_factor) {
    const double eps = number_of(state->clip_to, 3);
    if (!(eps >= 0)) return false;
    Units units;
    for (Py_ssize_t i = 0; i < PyTuple_Size(state->members); ++i)
        if (!units.add(Ref::to(optimizer_of(member(state, i))), true)) return false;
    return gradients.read_again() && clip_adaptively(gradients, units, clip_factor, eps, state->clipped);
}

// Clips the gradients of all optimizers together, before one of them steps, and notes those of the others.  False if
// that is not usual, or with an error set.
bool clip_all(RoundState* state, Py_ssize_t index) {
    const Py_ssize_t count = PyTuple_Size(state->members);
    const double limit = limit_of(state->way, state->clip_to);
    if (!(limit >= 0) || !is_usable()) return false;
    Gradients gradients;
    Room<size_t, kUsual> ends;
    for (Py_ssize_t i = 0; i < count; ++i) {
        if (!gradients.add_optimizer(Ref::to(optimizer_of(member(state, i))))) return false;
        ends.push_back(gradients.all().size());
    }
    // For many elements, a fused step scales faster.
    if (!gradients.take() || !gradients.is_small() || (count > 1 && gradients.all().size() < ends[count - 1]))
        return false;
    if (state->way == Way::kAdaptive ? !clip_units(state, gradients, limit)
                                     : !clip_in_way(gradients, state->way, state->clip_to, limit, state->clipped))
        return false;
    PyObject* const* const all = gradients.all().begin();
    state->are_weak = !gradients.is_tiny();
    for (Py_ssize_t i = 0; i < count; ++i)
        if (i != index &&
            !member(state, i)->marks->take(all + (i > 0 ? ends[i - 1] : 0), all + ends[i], state->are_weak))
            return false;
    return true;
}

// Whether an optimizer may step with gradients that were clipped before, because none has changed since.
bool goes_on(const RoundState* state, Py_ssize_t index) {
    if (!member(state, state->opener)->stepped) return false;  // its step has failed
    const Ref attributes = attributes_of(optimizer_of(member(state, index)));
    bool are_same = attributes != nullptr && is_unscaled(attributes);
    for (Py_ssize_t i = 0; are_same && i < PyTuple_Size(state->members); ++i) {
        const Member* const each = member(state, i);
        if (i == index || each->stepped) are_same = each->marks->are_same(Ref::to(optimizer_of(each)));
    }
    PyErr_Clear();  // it will be met again
    return are_same;
}

bool begin_usual_step(const Hooks* hooks, PyObject* args, PyObject* kwargs) {
    RoundState* const state = hooks->state;
    if (state->way == Way::kNone || !PyTuple_Check(args) || PyTuple_Size(args) != 1 || !PyDict_Check(kwargs) ||
        PyDict_Size(kwargs) != 0)
        return false;
    const Py_ssize_t count = PyTuple_Size(state->members);
    for (Py_ssize_t i = 0; i < count; ++i)
        if (member(state, i)->running) return false;
    if (count > 1 && in_backward()) return false;
    Member* const own = member(state, hooks->index);
    if (state->is_open && !(state->is_short && (own->stepped || goes_on(state, hooks->index)))) return false;
    if (state->is_open && own->stepped && !record(state)) return false;
    if (!state->is_open) {
        if (!clip_all(state, hooks->index)) return false;
        // Another loss may be assigned before the round ends.  Releasing a reference can run user code.
        const Ref before(std::exchange(state->round_loss, std::exchange(state->loss, new_reference(Py_None))));
        state->is_open = state->is_short = 1;
        state->opener = int(hooks->index);
    }
    own->is_short = own->running = 1;
    own->nested = 0;
    return true;
}

// before_step(optimizer, args, kwargs)
PyObject* before_step(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    if (!count_is(count, 3, 3)) return nullptr;
    auto* const hooks = reinterpret_cast<Hooks*>(self);
    if (hooks->before == nullptr || begin_usual_step(hooks, args[1], args[2])) return new_reference(Py_None);
    if (PyErr_Occurred() != nullptr) return nullptr;
    return PyObject_CallFunctionObjArgs(hooks->before, args[0], args[1], args[2], nullptr);
}

// after_step(optimizer, args, kwargs)
PyObject* after_step(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    if (!count_is(count, 3, 3)) return nullptr;
    auto* const hooks = reinterpret_cast<Hooks*>(self);
    if (hooks->after == nullptr) return new_reference(Py_None);
    RoundState* const state = hooks->state;
    Member* const own = member(state, hooks->index);
    if (!(state->is_open && own->is_short && own->running && !own->nested) || state->number >= state->next_sample)
        return PyObject_CallFunctionObjArgs(hooks->after, args[0], args[1], args[2], nullptr);
    own->running = own->is_short = 0;
    own->stepped = 1;
    bool all = true;  // those that still exist
    for (Py_ssize_t i = 0; i < PyTuple_Size(state->members); ++i)
        all = all && (member(state, i)->stepped || optimizer_of(member(state, i)) == Py_None);
    return (all ? record(state) : own->marks->take(args[0], false, state->are_weak)) ? new_reference(Py_None) : nullptr;
}

// Types

PyObject* new_member(PyObject* optimizer) {
    Ref made(PyType_GenericAlloc(member_type, 0));
    if (made == nullptr) return nullptr;
    auto* const member = reinterpret_cast<Member*>(static_cast<PyObject*>(made));
    member->optimizer = new_reference(optimizer);
    member->marks = new Marks;
    return made.release();
}

void free_member(PyObject* self) {
    PyTypeObject* const type = Py_TYPE(self);
    Py_XDECREF(reinterpret_cast<Member*>(self)->optimizer);
    delete reinterpret_cast<Member*>(self)->marks;
    reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

// mark(sample)
PyObject* member_mark(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    if (!count_is(count, 1, 1)) return nullptr;
    auto* const own = reinterpret_cast<Member*>(self);
    const Ref optimizer = Ref::to(optimizer_of(own));
    return own->marks->take(optimizer, args[0] == Py_True, true) ? new_reference(Py_None) : nullptr;
}

PyObject* member_changed(PyObject* self, PyObject*) {
    auto* const own = reinterpret_cast<Member*>(self);
    const Ref optimizer = Ref::to(optimizer_of(own));
    return own->marks->changed(optimizer);
}

PyObject* new_round(PyTypeObject* type, PyObject* args, PyObject*) {
    PyObject *clip_to, *optimizers;
    if (!PyArg_ParseTuple(args, "OO!", &clip_to, &PyTuple_Type, &optimizers)) return nullptr;
    Ref members(PyTuple_New(PyTuple_Size(optimizers)));
    for (Py_ssize_t i = 0; members != nullptr && i < PyTuple_Size(optimizers); ++i) {
        PyObject* const made = new_member(PyTuple_GetItem(optimizers, i));
        if (made == nullptr) return nullptr;
        PyTuple_SetItem(members, i, made);
    }
    PyObject* const made = members == nullptr ? nullptr : PyType_GenericAlloc(type, 0);
    if (made == nullptr) return nullptr;
    auto* const state = reinterpret_cast<RoundState*>(made);
    state->clip_to = new_reference(clip_to);
    state->way = way_of(clip_to);
    state->members = members.release();
    state->loss = new_reference(Py_None);
    state->round_loss = new_reference(Py_None);
    return made;
}

void free_round(PyObject* self) {
    PyTypeObject* const type = Py_TYPE(self);
    auto* const state = reinterpret_cast<RoundState*>(self);
    for (size_t i = 0; i < state->count; ++i) Py_XDECREF(state->rows[i].loss);
    for (PyObject* each : {state->clip_to, state->members, state->loss, state->round_loss, state->pending, state->full})
        Py_XDECREF(each);
    reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

template <bool (*act)(RoundState*)> PyObject* round_does(PyObject* self, PyObject*) {
    return act(reinterpret_cast<RoundState*>(self)) ? new_reference(Py_None) : nullptr;
}

// keep_records(rows, full)
PyObject* round_keep_records(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    if (!count_is(count, 2, 2)) return nullptr;
    if (!PyList_CheckExact(args[0])) return PyErr_Format(PyExc_TypeError, "rows must be a list");
    auto* const state = reinterpret_cast<RoundState*>(self);
    // Giving a reference back can run user code, which must find the new ones.
    const Ref before[] = {Ref(std::exchange(state->pending, new_reference(args[0]))),
                          Ref(std::exchange(state->full, new_reference(args[1])))};
    return new_reference(Py_None);
}

// hooks(index, before, after): the two functions to call around each step of an optimizer
PyObject* round_hooks(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    static PyMethodDef before = {"before_step", function<before_step>(), METH_FASTCALL, nullptr};
    static PyMethodDef after = {"after_step", function<after_step>(), METH_FASTCALL, nullptr};
    if (!count_is(count, 3, 3)) return nullptr;
    const Py_ssize_t index = PyLong_AsSsize_t(args[0]);
    auto* const state = reinterpret_cast<RoundState*>(self);
    if (index < 0 || index >= PyTuple_Size(state->members))
        return PyErr_Occurred() ? nullptr : PyErr_Format(PyExc_IndexError, "there is no optimizer %zd", index);
    const Ref made(PyType_GenericAlloc(hooks_type, 0));
    if (made == nullptr) return PyErr_NoMemory();
    auto* const hooks = reinterpret_cast<Hooks*>(static_cast<PyObject*>(made));
    hooks->state = reinterpret_cast<RoundState*>(new_reference(self));
    hooks->index = index;
    hooks->before = new_reference(args[1]);
    hooks->after = new_reference(args[2]);
    const Ref first(PyCFunction_New(&before, made)), second(PyCFunction_New(&after, made));
    if (first == nullptr || second == nullptr) return PyErr_NoMemory();
    return PyTuple_Pack(2, static_cast<PyObject*>(first), static_cast<PyObject*>(second));
}

int traverse_hooks(PyObject* self, visitproc visit, void* arg) {
    auto* const hooks = reinterpret_cast<Hooks*>(self);
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(reinterpret_cast<PyObject*>(hooks->state));
    Py_VISIT(hooks->before);
    Py_VISIT(hooks->after);
    return 0;
}

int clear_hooks(PyObject* self) {
    auto* const hooks = reinterpret_cast<Hooks*>(self);
    Py_CLEAR(hooks->before);
    Py_CLEAR(hooks->after);
    return 0;
}

void free_hooks(PyObject* self) {
    PyTypeObject* const type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear_hooks(self);
    Py_XDECREF(reinterpret_cast<PyObject*>(reinterpret_cast<Hooks*>(self)->state));
    reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

PyMemberDef member_members[] = {
    {"running", T_BOOL, offsetof(Member, running), 0, nullptr},
    {"nested", T_BOOL, offsetof(Member, nested), 0, nullptr},
    {"short", T_BOOL, offsetof(Member, is_short), 0, nullptr},
    {"stepped", T_BOOL, offsetof(Member, stepped), 0, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};
PyMethodDef member_methods[] = {
    {"mark", function<member_mark>(), METH_FASTCALL, "mark(sample): take note of the gradients as they are"},
    {"changed", function<member_changed>(), METH_NOARGS, "changed(): the gradients that are not the same any more"},
    {nullptr, nullptr, 0, nullptr},
};
PyType_Slot member_slots[] = {
    {Py_tp_members, member_members},
    {Py_tp_methods, member_methods},
    {Py_tp_dealloc, reinterpret_cast<void*>(free_member)},
    {0, nullptr},
};
PyType_Spec member_spec = {"torchclip._kernel.Member", sizeof(Member), 0, Py_TPFLAGS_DEFAULT, member_slots};

PyMemberDef round_members[] = {
    {"members", T_OBJECT_EX, offsetof(RoundState, members), READONLY, nullptr},
    {"loss", T_OBJECT_EX, offsetof(RoundState, loss), 0, nullptr},
    {"number", T_LONGLONG, offsetof(RoundState, number), 0, nullptr},
    {"next_sample", T_LONGLONG, offsetof(RoundState, next_sample), 0, nullptr},
    {"opener", T_INT, offsetof(RoundState, opener), 0, nullptr},
    {"open", T_BOOL, offsetof(RoundState, is_open), 0, nullptr},
    {"went_short", T_BOOL, offsetof(RoundState, is_short), 0, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};
PyMethodDef round_methods[] = {
    {"hooks", function<round_hooks>(), METH_FASTCALL,
     "hooks(index, before, after): the two functions to call around each step of an optimizer"},
    {"record", function<round_does<record>>(), METH_NOARGS,
     "record(): record the round that was clipped here, and end it"},
    {"keep_records", function<round_keep_records>(), METH_FASTCALL,
     "keep_records(rows, full): where to put records, and what to call when there are many"},
    {"flush", function<round_does<flush>>(), METH_NOARGS, "flush(): put the records there now"},
    {nullptr, nullptr, 0, nullptr},
};
PyType_Slot round_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(Guarded<new_round>::call)},
    {Py_tp_members, round_members},
    {Py_tp_methods, round_methods},
    {Py_tp_dealloc, reinterpret_cast<void*>(free_round)},
    {0, nullptr},
};
PyType_Spec round_spec = {"torchclip._kernel.RoundState", sizeof(RoundState), 0, Py_TPFLAGS_DEFAULT, round_slots};

PyType_Slot hooks_slots[] = {
    {Py_tp_traverse, reinterpret_cast<void*>(traverse_hooks)},
    {Py_tp_clear, reinterpret_cast<void*>(clear_hooks)},
    {Py_tp_dealloc, reinterpret_cast<void*>(free_hooks)},
    {0, nullptr},
};
PyType_Spec hooks_spec = {"torchclip._kernel.Hooks", sizeof(Hooks), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
                          hooks_slots};

// connect_steps(tensor, graph_task_id)
PyObject* connect_steps(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!count_is(count, 2, 2)) return nullptr;
    graph_task_id.connect(args[1]);
    return new_reference(Py_None);
}

// Makes the types, and adds the one that Python uses to the module.
bool add_step_types(PyObject* module) {
    const std::pair<PyTypeObject**, PyType_Spec*> wanted[] = {
        {&member_type, &member_spec}, {&round_type, &round_spec}, {&hooks_type, &hooks_spec}};
    for (const auto& [type, spec] : wanted) {
        *type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(spec));
        if (*type == nullptr) return false;
    }
    Py_INCREF(round_type);
    return PyModule_AddObject(module, "RoundState", reinterpret_cast<PyObject*>(round_type)) == 0;
}

}  // namespace
