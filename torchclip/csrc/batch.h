// The type `Batch`: the distinct tensors of one call, and what can be done with them.
//
// A batch keeps references to its tensors and nothing that depends on their memory.  Each method does first whatever
// can run Python code (numbers, threads), then takes a snapshot of the memory and works on that.
#pragma once

#include <cmath>
#include <limits>

#include "snapshot.h"
#include "walk.h"

namespace {

constexpr size_t kSmallElements = size_t(1) << 19;

struct Batch {
    struct Member {
        PyObject* tensor;
        bool taken;  // whether the kernel works on it
    };
    std::vector<Member> members;               // distinct, in order
    PyObject *all = nullptr, *rest = nullptr;  // lists, once they were asked for
    Py_ssize_t count = 0;       // items seen, counting those without a gradient and those that came before
    size_t found = 0;           // tensors that they had, counting those that came before
    size_t taken = 0;           // members
    size_t elements = 0;        // of taken members when they were gathered
    int facts = 0;              // likewise
    bool has_subclass = false;  // among the items

    ~Batch() {
        for (const Member& member : members) Py_DECREF(member.tensor);
        Py_XDECREF(all);
        Py_XDECREF(rest);
    }

    void add(Seen& seen, PyObject* tensor) {
        ++found;
        if (!seen.add(tensor)) return;
        members.push_back({tensor, false});
        Py_INCREF(tensor);
        DLTensor t;
        Layout layout;
        Axis axes[kMaxAxes];
        if (!is_plain(tensor) || !may_describe(tensor)) return;
        if (!describe(tensor, t) || !read_layout(t, layout, axes)) return;
        members.back().taken = true;
        ++taken;
        elements += layout.count;
        const DtypeFacts& dtype = kDtypes[layout.dtype];
        facts |=
            (dtype.is_double() ? kDouble : 0) | (dtype.is_complex() ? kAnyComplex : 0) | (layout.axes > 0 ? kGaps : 0);
    }

    bool walk(PyObject* iterable, bool take_grad) {
        const size_t expected = PyList_CheckExact(iterable) ? size_t(PyList_Size(iterable)) : 0;
        Seen seen(expected);
        members.reserve(expected);
        const bool walked = for_each_item(iterable, [&](PyObject* item) {
            if (!check_item(item, take_grad ? "parameters" : "tensors", count++, has_subclass)) return false;
            PyObject* const tensor = take_grad ? get_grad(item) : new_reference(item);
            if (tensor == nullptr) return false;
            if (!take_grad || tensor != Py_None) add(seen, tensor);
            Py_DECREF(tensor);
            return true;
        });
        if (taken == members.size() && elements <= kSmallElements) facts |= kSmall;
        if (take_grad && found > members.size()) facts |= kShared;
        return walked;
    }

    // A new list of the members for which wanted(i) holds.
    template <class Wanted> PyObject* list(Wanted wanted) const {
        PyObject* const tensors = PyList_New(0);
        for (size_t i = 0; i < members.size() && tensors != nullptr; ++i)
            if (wanted(i) && PyList_Append(tensors, members[i].tensor) < 0) return Py_DECREF(tensors), nullptr;
        return tensors;
    }

    PyObject* list_taken() const {
        return list([this](size_t i) { return members[i].taken; });
    }

    // A new reference to the list of all members, which is made once.
    PyObject* list_all() {
        if (all == nullptr) all = list([](size_t) { return true; });
        return all != nullptr ? new_reference(all) : nullptr;
    }
};

struct BatchObject {
    PyObject_HEAD Batch batch;
};
PyTypeObject* batch_type = nullptr;

Batch& batch_of(PyObject* self) { return reinterpret_cast<BatchObject*>(self)->batch; }

// A batch of what the iterable gives: parameters whose gradients are meant, or tensors.
PyObject* gather(PyObject* iterable, bool take_grad) {
    if (!connected()) return nullptr;
    BatchObject* const self = PyObject_New(BatchObject, batch_type);
    if (self == nullptr) return nullptr;
    Batch* const batch = new (&self->batch) Batch;
    bool done = false;
    try {
        done = batch->walk(iterable, take_grad);
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    }
    if (done) return reinterpret_cast<PyObject*>(self);
    Py_DECREF(self);
    return nullptr;
}

void batch_dealloc(PyObject* self) {
    PyTypeObject* const type = Py_TYPE(self);
    batch_of(self).~Batch();
    PyObject_Free(self);
    Py_DECREF(type);
}

// ---------------------------------------------------------------------------------------------------------------
// Arguments
// ---------------------------------------------------------------------------------------------------------------

bool read_number(PyObject* object, double& number) {
    number = PyFloat_AsDouble(object);
    return number != -1.0 || PyErr_Occurred() == nullptr;
}

// An iterable of as many numbers as are wanted.
bool read_numbers(PyObject* iterable, size_t wanted, std::vector<double>& numbers) {
    PyObject* const list = PyList_CheckExact(iterable) ? new_reference(iterable) : PySequence_List(iterable);
    if (list == nullptr) return false;
    const Py_ssize_t given = PyList_Size(list);
    bool read = size_t(given) == wanted;
    if (!read) PyErr_Format(PyExc_ValueError, "expected one number for each of %zu tensors, got %zd", wanted, given);
    numbers.resize(wanted);
    for (size_t i = 0; i < wanted && read; ++i) {
        PyObject* const number = PyList_GetItem(list, Py_ssize_t(i));
        Py_XINCREF(number);  // as user code can change the list
        read = number != nullptr && read_number(number, numbers[i]);
        Py_XDECREF(number);
    }
    Py_DECREF(list);
    return read;
}

// What `norm` and `norms` take: an order, and whether only finite elements count.
struct Measure {
    double p;
    bool finite = false;

    bool read(PyObject* const* args, Py_ssize_t count) {
        if (!count_is(count, 1, 2) || !read_number(args[0], p)) return false;
        const int truth = count == 2 ? PyObject_IsTrue(args[1]) : 0;
        finite = truth > 0;
        return truth >= 0;
    }

    // The loop that reduces elements to a norm of this order; null if there is none.
    Read Loops::* loop() const {
        return p == 2                                         ? &Loops::sum_squares
               : p == 1                                       ? &Loops::sum_magnitudes
               : p == std::numeric_limits<double>::infinity() ? &Loops::largest
                                                              : nullptr;
    }

    // The norm of a list of tensors, or a list of the norm of each, if there is no loop.  Takes over the list.
    PyObject* ask(PyObject* tensors, bool each) const {
        if (tensors == nullptr) return nullptr;
        PyObject* const norms = PyObject_CallFunction(torch.other_norms, "OdOO", tensors, p,
                                                      finite ? Py_True : Py_False, each ? Py_True : Py_False);
        Py_DECREF(tensors);
        return norms;
    }
};

// ---------------------------------------------------------------------------------------------------------------
// Methods
// ---------------------------------------------------------------------------------------------------------------

// Adds the taken members for which number(i, value) holds, having set their number.  False, with an error set, if one
// of them can no longer be taken.
template <class Number> bool fill(Snapshot& snapshot, const Batch& batch, Number number) {
    double value = 0;
    for (size_t i = 0; i < batch.members.size(); ++i) {
        if (!batch.members[i].taken || !number(i, value) || snapshot.add(batch.members[i].tensor, value)) continue;
        PyErr_Format(PyExc_RuntimeError,
                     "gradient %zu changed during the call: it has no memory any more that can be measured or changed "
                     "directly, as its device, dtype or layout is another one, or its elements overlap. Nothing was "
                     "changed. Replace gradients before or after clipping, not meanwhile.",
                     i);
        return false;
    }
    return true;
}

bool any_number(size_t, double&) { return true; }

PyObject* batch_norm(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    const Batch& batch = batch_of(self);
    Measure measure;
    if (!measure.read(args, count)) return nullptr;
    const auto loop = measure.loop();
    if (loop == nullptr) return measure.ask(batch.list_taken(), false);
    const int threads = usable_threads(batch.elements);
    if (threads < 0) return nullptr;
    try {
        Snapshot snapshot(batch.taken, threads);
        if (!fill(snapshot, batch, any_number)) return nullptr;
        return PyFloat_FromDouble(snapshot.norm(loop, measure.finite));
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
}

// The norms of the taken members, in order; false with an error set.
bool measure_each(const Batch& batch, const Measure& measure, std::vector<double>& norms) {
    if (measure.loop() == nullptr) {
        PyObject* const answer = measure.ask(batch.list_taken(), true);
        const bool read = answer != nullptr && read_numbers(answer, batch.taken, norms);
        Py_XDECREF(answer);
        return read;
    }
    const int threads = usable_threads(batch.elements);
    if (threads < 0) return false;
    Snapshot snapshot(batch.taken, threads);
    if (!fill(snapshot, batch, any_number)) return false;
    norms = snapshot.norms(measure.loop(), measure.finite);
    return true;
}

PyObject* batch_norms(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    const Batch& batch = batch_of(self);
    Measure measure;
    std::vector<double> of_taken;
    try {
        if (!measure.read(args, count) || !measure_each(batch, measure, of_taken)) return nullptr;
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
    PyObject* const norms = PyList_New(Py_ssize_t(batch.members.size()));
    size_t next = 0;
    for (size_t i = 0; i < batch.members.size() && norms != nullptr; ++i) {
        PyObject* const norm = PyFloat_FromDouble(batch.members[i].taken ? of_taken[next++] : kAbsent);
        if (norm == nullptr) return Py_DECREF(norms), nullptr;
        PyList_SetItem(norms, Py_ssize_t(i), norm);
    }
    return norms;
}

// Changes the taken members for which number(i, value) holds, each by the value set.
template <class Number> PyObject* change(Batch& batch, Write Loops::* loop, bool every, Number number) {
    const int threads = usable_threads(batch.elements);
    if (threads < 0) return nullptr;
    try {
        Snapshot snapshot(batch.taken, threads);
        if (!fill(snapshot, batch, number)) return nullptr;
        if (loop == &Loops::clamp && snapshot.has_complex())
            return PyErr_Format(PyExc_RuntimeError, "a gradient became complex during the call; nothing was changed");
        if (!snapshot.write(loop)) return new_reference(Py_None);
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
    double ignored;
    const auto wanted = [&](size_t i) { return batch.members[i].taken && number(i, ignored); };
    const bool is_all = every && batch.taken == batch.members.size();
    return tell_autograd(is_all ? batch.list_all() : batch.list(wanted)) ? new_reference(Py_None) : nullptr;
}

PyObject* change_all(Batch& batch, Write Loops::* loop, double number) {
    return change(batch, loop, true, [number](size_t, double& value) {
        value = number;
        return true;
    });
}

PyObject* batch_scale(PyObject* self, PyObject* argument) {
    double clip_coef;
    if (!read_number(argument, clip_coef)) return nullptr;
    if (clip_coef == 1.0) return new_reference(Py_None);
    return change_all(batch_of(self), &Loops::scale, clip_coef);
}

PyObject* batch_scale_each(PyObject* self, PyObject* argument) {
    Batch& batch = batch_of(self);
    try {
        std::vector<double> clip_coefs;
        if (!read_numbers(argument, batch.members.size(), clip_coefs)) return nullptr;
        return change(batch, &Loops::scale, false, [&](size_t i, double& value) {
            value = clip_coefs[i];
            return value != 1.0;
        });
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
}

PyObject* batch_clamp(PyObject* self, PyObject* argument) {
    Batch& batch = batch_of(self);
    double limit;
    if (!read_number(argument, limit)) return nullptr;
    if (batch.facts & kAnyComplex)
        return PyErr_Format(PyExc_ValueError, "complex numbers have no order, so they cannot be clamped");
    if (!(limit >= 0)) return PyErr_Format(PyExc_ValueError, "the limit must be at least 0, got %R", argument);
    return change_all(batch, &Loops::clamp, limit);
}

PyObject* batch_zero_nonfinite(PyObject* self, PyObject*) {
    return change_all(batch_of(self), &Loops::zero_nonfinite, 0);
}

// Those that the kernel takes, as a batch of their own.
PyObject* batch_taken(PyObject* self, void*) {
    const Batch& batch = batch_of(self);
    BatchObject* const made = PyObject_New(BatchObject, batch_type);
    if (made == nullptr) return nullptr;
    Batch* const part = new (&made->batch) Batch;
    try {
        for (const Batch::Member& member : batch.members) {
            if (!member.taken) continue;
            part->members.push_back(member);
            Py_INCREF(member.tensor);
        }
    } catch (const std::bad_alloc&) {
        Py_DECREF(reinterpret_cast<PyObject*>(made));
        return PyErr_NoMemory();
    }
    part->count = Py_ssize_t(batch.taken);
    part->found = part->taken = batch.taken;
    part->elements = batch.elements;
    part->facts = batch.facts | (batch.elements <= kSmallElements ? kSmall : 0);
    return reinterpret_cast<PyObject*>(made);
}

PyObject* batch_all(PyObject* self, void*) { return batch_of(self).list_all(); }
PyObject* batch_facts(PyObject* self, void*) { return PyLong_FromLong(batch_of(self).facts); }
PyObject* batch_count(PyObject* self, void*) { return PyLong_FromSsize_t(batch_of(self).count); }
PyObject* batch_subclassed(PyObject* self, void*) { return PyBool_FromLong(batch_of(self).has_subclass); }
PyObject* batch_rest(PyObject* self, void*) {
    Batch& batch = batch_of(self);
    if (batch.taken == batch.members.size()) return PyTuple_New(0);
    if (batch.rest == nullptr) batch.rest = batch.list([&](size_t i) { return !batch.members[i].taken; });
    return batch.rest != nullptr ? new_reference(batch.rest) : nullptr;
}

PyMethodDef batch_methods[] = {
    {"norm", function(batch_norm), METH_FASTCALL, "norm(p, finite=False): of all elements as one vector"},
    {"norms", function(batch_norms), METH_FASTCALL, "norms(p, finite=False): of each tensor"},
    {"scale_", batch_scale, METH_O, "scale_(clip_coef): multiply in place"},
    {"scale_each_", batch_scale_each, METH_O, "scale_each_(clip_coefs): multiply each by its own number"},
    {"clamp_", batch_clamp, METH_O, "clamp_(limit): to [-limit, limit], in place"},
    {"zero_nonfinite_", batch_zero_nonfinite, METH_NOARGS, "zero_nonfinite_(): 0 for what is infinite or nan"},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef batch_attributes[] = {
    {"all", batch_all, nullptr, "the distinct tensors, in order", nullptr},
    {"facts", batch_facts, nullptr, "what callers need to know of them", nullptr},
    {"taken", batch_taken, nullptr, "those that the kernel takes, as a batch", nullptr},
    {"rest", batch_rest, nullptr, "those that the kernel does not take", nullptr},
    {"count", batch_count, nullptr, "the number of items seen", nullptr},
    {"subclassed", batch_subclassed, nullptr, "whether an item is neither plain Tensor nor Parameter", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyType_Slot batch_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(batch_dealloc)},
    {Py_tp_methods, batch_methods},
    {Py_tp_getset, batch_attributes},
    {Py_tp_doc, const_cast<char*>("Tensors that the kernel works on together.")},
    {0, nullptr},
};

PyType_Spec batch_spec = {"torchclip._kernel.Batch", sizeof(BatchObject), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, batch_slots};

}  // namespace
