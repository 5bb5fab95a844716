// The type `Batch`: the distinct tensors of one call, and operations on them.
//
// A batch keeps references to its tensors and nothing that depends on their memory.  Each method first does
// everything that can run Python code (converting numbers), then reads where the memory is and works on it.
#pragma once

#include "functions.h"

namespace {

struct Batch {
    Tensors tensors;
    Ref all;        // a list, made on first use
    int flags = 0;  // when the tensors were gathered

    // Makes access to their memory, and finds the flags.
    Outcome gather(PyObject* given, bool take_grad, Access& access) {
        const Outcome outcome = access.gather(given, take_grad);
        const bool is_small = access.memory().elements() <= kSmallElements;
        const bool is_shared = take_grad && tensors.has_repeated();
        flags = access.memory().flags() | (is_small ? kSmall : 0) | (is_shared ? kShared : 0);
        return outcome;
    }
};

struct BatchObject {
    PyObject_HEAD Batch batch;
};
PyTypeObject* batch_type = nullptr;

Batch& batch_of(PyObject* self) { return reinterpret_cast<BatchObject*>(self)->batch; }

// A new batch that fill(batch, access) fills; None if that is unusual, null with an error set if it fails.
template <class Fill> PyObject* make_batch(Fill fill) {
    BatchObject* const made = PyObject_New(BatchObject, batch_type);
    if (made == nullptr) return nullptr;
    Batch* const batch = new (&made->batch) Batch;
    Ref self(reinterpret_cast<PyObject*>(made));
    Access access(batch->tensors);
    return finish(fill(*batch, access), [&] { return self.release(); });
}
PyObject* gather(PyObject* given, bool take_grad) {
    return make_batch([&](Batch& batch, Access& access) { return batch.gather(given, take_grad, access); });
}
PyObject* gradients(PyObject*, PyObject* parameters) { return gather(parameters, true); }
PyObject* tensors(PyObject*, PyObject* list) { return gather(list, false); }

void batch_dealloc(PyObject* self) {
    PyTypeObject* const type = Py_TYPE(self);
    batch_of(self).~Batch();
    PyObject_Free(self);
    Py_DECREF(type);
}

PyObject* batch_all(PyObject* self, void*) {
    Batch& batch = batch_of(self);
    if (batch.all == nullptr) {
        Ref list(PyList_New(0));
        for (PyObject* tensor : batch.tensors.all())
            if (list == nullptr || PyList_Append(list, tensor) < 0) return nullptr;
        batch.all.reset(std::move(list));
    }
    return batch.all == nullptr ? nullptr : new_reference(batch.all);
}

PyObject* new_list(const Numbers& numbers) {
    Ref list(PyList_New(Py_ssize_t(numbers.size())));
    for (size_t i = 0; i < numbers.size() && list != nullptr; ++i) {
        PyObject* const number = PyFloat_FromDouble(numbers[i]);
        if (number == nullptr) return nullptr;
        PyList_SetItem(list, Py_ssize_t(i), number);
    }
    return list.release();
}

// The norm of all tensors, or with `each` a list with the norm of each; null with an error set.
PyObject* measure(Access& access, Read Loops::* loop, bool each) {
    double norm = 0;
    Numbers norms;
    const Outcome outcome = each ? access.norms(loop, norms) : access.norm(loop, norm);
    return finish(outcome, [&] { return each ? new_list(norms) : PyFloat_FromDouble(norm); });
}

template <bool each> PyObject* batch_norms(PyObject* self, PyObject* argument) {
    Batch& batch = batch_of(self);
    double norm_type;
    if (read_number(argument, norm_type) != kDone) return nullptr;
    Read Loops::* const loop = loop_of(norm_type, batch.flags & kAnyComplex);
    Access access(batch.tensors);
    if (loop != nullptr) return measure(access, loop, each);
    const Ref all(batch_all(self, nullptr));
    if (all == nullptr) return nullptr;
    return PyObject_CallFunction(torch().other_norms, "OdO", static_cast<PyObject*>(all), norm_type,
                                 each ? Py_True : Py_False);
}

// measured(parameters, norm_type, each): a batch of their gradients with its norm, or the list of theirs.  Their memory
// is looked up once for both.  None where there is no batch, or no loop for the order.
PyObject* measured(PyObject*, PyObject* const* args, Py_ssize_t count) {
    double norm_type;
    if (expect_count(count, 3) != kDone || read_number(args[1], norm_type) != kDone) return nullptr;
    const int each = PyObject_IsTrue(args[2]);
    if (each < 0) return nullptr;
    Ref norms;
    Ref batch(make_batch([&](Batch& batch, Access& access) {
        const Outcome outcome = batch.gather(args[0], true, access);
        if (outcome != kDone) return outcome;
        Read Loops::* const loop = loop_of(norm_type, batch.flags & kAnyComplex);
        if (loop == nullptr) return kUnusual;
        norms.reset(Ref(measure(access, loop, each)));
        return norms == nullptr ? kFailed : kDone;
    }));
    if (norms == nullptr) return batch.release();
    return PyTuple_Pack(2, static_cast<PyObject*>(batch), static_cast<PyObject*>(norms));
}

PyObject* batch_scale(PyObject* self, PyObject* argument) {
    double clip_coef;
    if (read_number(argument, clip_coef) != kDone) return nullptr;
    return finish(Access(batch_of(self).tensors).scale(clip_coef));
}

// An iterable with a number for each tensor.
Outcome read_numbers(PyObject* iterable, size_t wanted, Numbers& numbers) {
    const Ref list(PyList_CheckExact(iterable) ? new_reference(iterable) : PySequence_List(iterable));
    if (list == nullptr) return kFailed;
    const Outcome outcome = collect_list(list, [&](const Ref& item) {
        double number;
        if (read_number(item, number) != kDone) return kFailed;
        numbers.push_back(number);
        return kDone;
    });
    if (outcome != kDone || numbers.size() == wanted) return outcome;
    return fail(PyExc_ValueError, "expected one number for each of %zu tensors, got %zu", wanted, numbers.size());
}

PyObject* batch_scale_each(PyObject* self, PyObject* argument) {
    Tensors& tensors = batch_of(self).tensors;
    Numbers clip_coefs;
    if (read_numbers(argument, tensors.size(), clip_coefs) != kDone) return nullptr;
    return finish(Access(tensors).write(&Loops::scale, clip_coefs.begin(), true));
}

PyObject* batch_clamp(PyObject* self, PyObject* argument) {
    double limit;
    if (read_number(argument, limit) != kDone) return nullptr;
    if (batch_of(self).flags & kAnyComplex)
        return PyErr_Format(PyExc_ValueError, "complex numbers have no order, so they cannot be clamped");
    if (!(limit >= 0)) return PyErr_Format(PyExc_ValueError, "the limit must be at least 0, got %R", argument);
    return finish(Access(batch_of(self).tensors).write(&Loops::clamp, &limit, false));
}

PyObject* batch_zero_nonfinite(PyObject* self, PyObject*) {
    const double unused = 0;
    return finish(Access(batch_of(self).tensors).write(&Loops::zero_nonfinite, &unused, false));
}

PyObject* batch_facts(PyObject* self, void*) { return PyLong_FromLong(batch_of(self).flags); }
PyObject* batch_rest(PyObject*, void*) { return PyTuple_New(0); }

PyMethodDef batch_methods[] = {
    {"norm", function<batch_norms<false>>(), METH_O, "norm(p): of all elements as one vector"},
    {"norms", function<batch_norms<true>>(), METH_O, "norms(p): of each tensor"},
    {"scale_", function<batch_scale>(), METH_O, "scale_(clip_coef): multiply in place"},
    {"scale_each_", function<batch_scale_each>(), METH_O, "scale_each_(clip_coefs): multiply each by its own number"},
    {"clamp_", function<batch_clamp>(), METH_O, "clamp_(limit): to [-limit, limit], in place"},
    {"zero_nonfinite_", function<batch_zero_nonfinite>(), METH_NOARGS,
     "zero_nonfinite_(): 0 for what is infinite or nan"},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef batch_attributes[] = {
    {"all", Guarded<batch_all>::call, nullptr, "the distinct tensors, in order", nullptr},
    {"facts", Guarded<batch_facts>::call, nullptr, "what callers need to know of them", nullptr},
    {"rest", Guarded<batch_rest>::call, nullptr, "those that the kernel does not take: none", nullptr},
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
