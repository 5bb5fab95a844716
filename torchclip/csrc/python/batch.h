// The type `Batch`: the distinct tensors of one call, and operations on them.
//
// A batch keeps references to its tensors and nothing that depends on their memory.  Each method first does
// everything that can run Python code (converting numbers), then reads where the memory is and works on it.
#pragma once

#include "functions.h"

namespace {

struct Batch {
    Tensors tensors;
    Ref all, rest;              // lists, made on first use
    Py_ssize_t count = 0;       // the number of items, including those without a gradient and repeated ones
    int flags = 0;              // when the tensors were gathered
    bool has_subclass = false;  // among the items

    // It fails for anything but a tensor.
    Outcome check(PyObject* item, const char* argument) {
        const Py_ssize_t index = count++;
        if (::is_plain(item)) return kDone;
        has_subclass = true;
        const int is_tensor = PyObject_IsInstance(item, reinterpret_cast<PyObject*>(torch().tensor));
        if (is_tensor != 0) return is_tensor > 0 ? kDone : kFailed;
        const Ref none(PyObject_CallFunction(torch().check_tensor, "snO", argument, index, item));
        return none == nullptr ? kFailed : fail(PyExc_TypeError, "item %zd is not a Tensor", index);
    }

    bool is_plain() const { return tensors.are_all_taken() && !has_subclass; }

    Outcome gather(PyObject* iterable, bool take_grad) {
        Access access(tensors);
        return gather(iterable, take_grad, access);
    }

    // The same, with access to their memory right afterwards.
    Outcome gather(PyObject* iterable, bool take_grad, Access& access) {
        tensors.expect(iterable);
        const Outcome outcome = collect_any(iterable, [&](Ref item) {
            if (check(item, take_grad ? "parameters" : "tensors") != kDone) return kFailed;
            return take_grad ? tensors.take_gradient(item) : tensors.take(std::move(item));
        });
        if (outcome != kDone) return outcome;
        tensors.drop_repeated();
        access.read();
        const bool is_small = tensors.are_all_taken() && access.memory().elements() <= kSmallElements;
        const bool is_shared = take_grad && tensors.has_repeated();
        flags = access.memory().flags() | (is_small ? kSmall : 0) | (is_shared ? kShared : 0);
        return kDone;
    }

    Ref list_taken() const {
        return tensors.list([this](size_t i) { return tensors.is_taken(i); });
    }
};

struct BatchObject {
    PyObject_HEAD Batch batch;
};
PyTypeObject* batch_type = nullptr;

Batch& batch_of(PyObject* self) { return reinterpret_cast<BatchObject*>(self)->batch; }

// A new batch that fill(batch) fills; null, with an error set, if that fails.
template <class Fill> PyObject* make_batch(Fill fill) {
    BatchObject* const made = PyObject_New(BatchObject, batch_type);
    if (made == nullptr) return nullptr;
    Batch* const batch = new (&made->batch) Batch;
    Ref self(reinterpret_cast<PyObject*>(made));
    return fill(*batch) == kDone ? self.release() : nullptr;
}

// None if all operations must be torch's.
PyObject* gather(PyObject* iterable, bool take_grad) {
    return finish(begin(), [&] { return make_batch([&](Batch& batch) { return batch.gather(iterable, take_grad); }); });
}
PyObject* gradients(PyObject*, PyObject* parameters) { return gather(parameters, true); }
PyObject* tensors(PyObject*, PyObject* iterable) { return gather(iterable, false); }

void batch_dealloc(PyObject* self) {
    PyTypeObject* const type = Py_TYPE(self);
    batch_of(self).~Batch();
    PyObject_Free(self);
    Py_DECREF(type);
}

// ---------------------------------------------------------------------------------------------------------------
// Arguments
// ---------------------------------------------------------------------------------------------------------------

// An iterable with the expected number of numbers.
Outcome read_numbers(PyObject* iterable, size_t wanted, Numbers& numbers) {
    const Outcome outcome = collect_any(iterable, [&](const Ref& item) {
        double number;
        if (read_number(item, number) != kDone) return kFailed;
        numbers.push_back(number);
        return kDone;
    });
    if (outcome != kDone || numbers.size() == wanted) return outcome;
    return fail(PyExc_ValueError, "expected one number for each of %zu tensors, got %zu", wanted, numbers.size());
}

// An iterable with a number for each tensor: those of the taken ones.
Outcome read_of_taken(PyObject* iterable, const Tensors& tensors, Numbers& of_taken) {
    Numbers all;
    if (read_numbers(iterable, tensors.size(), all) != kDone) return kFailed;
    for (size_t i = 0; i < tensors.size(); ++i)
        if (tensors.is_taken(i)) of_taken.push_back(all[i]);
    return kDone;
}

// The same, or a float for all tensors.
Outcome read_limits(PyObject* given, const Tensors& tensors, Numbers& of_taken) {
    if (!PyFloat_Check(given)) return read_of_taken(given, tensors, of_taken);
    for (size_t i = 0; i < tensors.taken_count(); ++i) of_taken.push_back(PyFloat_AsDouble(given));
    return kDone;
}

// The arguments of `norm` and `norms`: the order, and whether only finite elements count.
struct Measure {
    double norm_type;
    bool finite = false;

    Outcome read(PyObject* const* args, Py_ssize_t count) {
        if (expect_count(count, 1, 2) != kDone || read_number(args[0], norm_type) != kDone) return kFailed;
        const int truth = count == 2 ? PyObject_IsTrue(args[1]) : 0;
        finite = truth > 0;
        return truth >= 0 ? kDone : kFailed;
    }

    Read Loops::* loop() const { return loop_of(norm_type); }

    // The norm of a list of tensors, or the norm of each, for orders without a loop.
    Ref ask(const Ref& tensors, bool each) const {
        if (tensors == nullptr) return Ref();
        return Ref(PyObject_CallFunction(torch().other_norms, "OdOO", static_cast<PyObject*>(tensors), norm_type,
                                         finite ? Py_True : Py_False, each ? Py_True : Py_False));
    }
};

// ---------------------------------------------------------------------------------------------------------------
// Methods
// ---------------------------------------------------------------------------------------------------------------

PyObject* batch_norm(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Batch& batch = batch_of(self);
    Measure measure;
    if (measure.read(args, count) != kDone) return nullptr;
    if (measure.loop() == nullptr) return measure.ask(batch.list_taken(), false).release();
    double norm = 0;
    const Outcome outcome = Access(batch.tensors).norm(measure.loop(), measure.finite, norm);
    return finish(outcome, [&] { return PyFloat_FromDouble(norm); });
}

// The norms of the taken members, in order.
Outcome measure_each(Batch& batch, const Measure& measure, Numbers& norms) {
    if (measure.loop() != nullptr) return Access(batch.tensors).norms(measure.loop(), measure.finite, norms);
    const Ref answer = measure.ask(batch.list_taken(), true);
    return answer == nullptr ? kFailed : read_numbers(answer, batch.tensors.taken_count(), norms);
}

// The norms of all members, given the norms of the taken ones.
PyObject* new_list(const Tensors& tensors, const Numbers& of_taken) {
    Ref norms(PyList_New(Py_ssize_t(tensors.size())));
    size_t next = 0;
    for (size_t i = 0; i < tensors.size() && norms != nullptr; ++i) {
        PyObject* const norm = PyFloat_FromDouble(tensors.is_taken(i) ? of_taken[next++] : kAbsent);
        if (norm == nullptr) return nullptr;
        PyList_SetItem(norms, Py_ssize_t(i), norm);
    }
    return norms.release();
}

// measured(parameters, norm_type, each): a batch of their gradients with its norm, or the list of theirs.  Their memory
// is looked up once for both.  None if all operations must be torch's, the batch is not plain, or there is no loop.
PyObject* measured(PyObject*, PyObject* const* args, Py_ssize_t count) {
    double norm_type, norm = 0;
    if (expect_count(count, 3, 3) != kDone || read_number(args[1], norm_type) != kDone) return nullptr;
    const int each = PyObject_IsTrue(args[2]);
    if (each < 0) return nullptr;
    Read Loops::* const loop = loop_of(norm_type);
    Ref norms;
    const auto fill = [&](Batch& batch) {
        Access access(batch.tensors);
        if (batch.gather(args[0], true, access) != kDone) return kFailed;
        if (!batch.is_plain()) return kDone;
        Numbers of_each;
        const Outcome outcome = each ? access.norms(loop, false, of_each) : access.norm(loop, false, norm);
        if (outcome == kDone) norms.reset(Ref(each ? new_list(batch.tensors, of_each) : PyFloat_FromDouble(norm)));
        return outcome == kDone && norms == nullptr ? kFailed : outcome;
    };
    return finish(loop == nullptr ? kUnusual : begin(), [&]() -> PyObject* {
        const Ref batch(make_batch(fill));
        if (batch == nullptr) return nullptr;
        if (norms == nullptr) return new_reference(Py_None);
        return PyTuple_Pack(2, static_cast<PyObject*>(batch), static_cast<PyObject*>(norms));
    });
}

PyObject* batch_norms(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Measure measure;
    Numbers norms;
    if (measure.read(args, count) != kDone) return nullptr;
    return finish(measure_each(batch_of(self), measure, norms),
                  [&] { return new_list(batch_of(self).tensors, norms); });
}

PyObject* batch_scale(PyObject* self, PyObject* argument) {
    double clip_coef;
    if (read_number(argument, clip_coef) != kDone) return nullptr;
    return finish(Access(batch_of(self).tensors).scale(clip_coef));
}

PyObject* batch_scale_each(PyObject* self, PyObject* argument) {
    Tensors& tensors = batch_of(self).tensors;
    Numbers clip_coefs;
    if (read_of_taken(argument, tensors, clip_coefs) != kDone) return nullptr;
    return finish(Access(tensors).write(&Loops::scale, clip_coefs.begin(), true));
}

// clip_each_(limits, p, eps)
PyObject* batch_clip_each(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Batch& batch = batch_of(self);
    double eps;
    Measure measure;
    Numbers limits, norms;
    if (expect_count(count, 3, 3) != kDone || measure.read(args + 1, 1) != kDone ||
        read_number(args[2], eps) != kDone || read_limits(args[0], batch.tensors, limits) != kDone)
        return nullptr;
    Access access(batch.tensors);
    Outcome outcome;
    if (measure.loop() != nullptr) {
        outcome = access.clip_each(measure.loop(), limits, eps, norms);
    } else {
        outcome = measure_each(batch, measure, norms);
        if (outcome != kDone) return nullptr;
        for (size_t i = 0; i < norms.size(); ++i) limits[i] = clip_coef_of(limits[i], norms[i], eps);
        outcome = access.write(&Loops::scale, limits.begin(), true);
    }
    return finish(outcome, [&] { return new_list(batch.tensors, norms); });
}

PyObject* batch_clamp(PyObject* self, PyObject* argument) {
    double limit;
    if (read_number(argument, limit) != kDone) return nullptr;
    if (batch_of(self).flags & kAnyComplex)
        return PyErr_Format(PyExc_ValueError, "complex numbers have no order, so they cannot be clamped");
    if (!(limit >= 0)) return PyErr_Format(PyExc_ValueError, "the limit must be at least 0, got %R", argument);
    Access access(batch_of(self).tensors);
    if (access.refresh() != kDone) return nullptr;
    if (access.memory().flags() & kAnyComplex)
        return PyErr_Format(PyExc_RuntimeError, "a gradient became complex during the call; nothing was changed");
    return finish(access.write(&Loops::clamp, &limit, false));
}

PyObject* batch_zero_nonfinite(PyObject* self, PyObject*) {
    const double unused = 0;
    return finish(Access(batch_of(self).tensors).write(&Loops::zero_nonfinite, &unused, false));
}

PyObject* batch_fingerprint(PyObject* self, PyObject*) {
    Array<uint64_t, kUsual> found;
    return finish(Access(batch_of(self).tensors).fingerprints(found), [&] {
        const char* const bytes = reinterpret_cast<const char*>(found.begin());
        return PyBytes_FromStringAndSize(bytes, Py_ssize_t(found.size() * sizeof(uint64_t)));
    });
}

// A new reference to a list of members, which is made only once.
template <class Wanted> PyObject* listed(const Batch& batch, Ref& list, Wanted wanted) {
    if (list == nullptr) list.reset(batch.tensors.list(wanted));
    return list != nullptr ? new_reference(list) : nullptr;
}

PyObject* batch_all(PyObject* self, void*) { return listed(batch_of(self), batch_of(self).all, kEach); }
PyObject* batch_rest(PyObject* self, void*) {
    Batch& batch = batch_of(self);
    if (batch.tensors.are_all_taken()) return PyTuple_New(0);
    return listed(batch, batch.rest, [&](size_t i) { return !batch.tensors.is_taken(i); });
}
PyObject* batch_taken(PyObject* self, void*) {
    const Batch& batch = batch_of(self);
    return make_batch([&](Batch& part) {
        part.tensors.take_taken(batch.tensors);
        part.count = Py_ssize_t(part.tensors.size());
        part.flags = batch.flags;
        return kDone;
    });
}
PyObject* batch_facts(PyObject* self, void*) { return PyLong_FromLong(batch_of(self).flags); }
PyObject* batch_count(PyObject* self, void*) { return PyLong_FromSsize_t(batch_of(self).count); }
PyObject* batch_subclassed(PyObject* self, void*) { return PyBool_FromLong(batch_of(self).has_subclass); }
PyObject* batch_plain(PyObject* self, void*) { return PyBool_FromLong(batch_of(self).is_plain()); }

PyMethodDef batch_methods[] = {
    {"norm", function<batch_norm>(), METH_FASTCALL, "norm(p, finite=False): of all elements as one vector"},
    {"norms", function<batch_norms>(), METH_FASTCALL, "norms(p, finite=False): of each tensor"},
    {"scale_", function<batch_scale>(), METH_O, "scale_(clip_coef): multiply in place"},
    {"scale_each_", function<batch_scale_each>(), METH_O, "scale_each_(clip_coefs): multiply each by its own number"},
    {"clip_each_", function<batch_clip_each>(), METH_FASTCALL,
     "clip_each_(limits, p, eps): scale each to its own limit, a number for all or one for each; the norms before"},
    {"clamp_", function<batch_clamp>(), METH_O, "clamp_(limit): to [-limit, limit], in place"},
    {"zero_nonfinite_", function<batch_zero_nonfinite>(), METH_NOARGS,
     "zero_nonfinite_(): 0 for what is infinite or nan"},
    {"fingerprint", function<batch_fingerprint>(), METH_NOARGS,
     "fingerprint(): to see later whether they are the same"},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef batch_attributes[] = {
    {"all", Guarded<batch_all>::call, nullptr, "the distinct tensors, in order", nullptr},
    {"facts", Guarded<batch_facts>::call, nullptr, "what callers need to know of them", nullptr},
    {"taken", Guarded<batch_taken>::call, nullptr, "those that the kernel takes, as a batch", nullptr},
    {"rest", Guarded<batch_rest>::call, nullptr, "those that the kernel does not take", nullptr},
    {"count", Guarded<batch_count>::call, nullptr, "the number of items seen", nullptr},
    {"plain", Guarded<batch_plain>::call, nullptr, "whether all are taken, and no item is of a subclass", nullptr},
    {"subclassed", Guarded<batch_subclassed>::call, nullptr, "whether an item is neither plain Tensor nor Parameter",
     nullptr},
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
