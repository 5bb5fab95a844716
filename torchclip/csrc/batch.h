// The type `Batch`: the distinct tensors of one call, and operations on them.
//
// A batch keeps references to its tensors and nothing that depends on their memory.  Each method first does
// everything that can run Python code (converting numbers), then reads where the memory is and works on it.
#pragma once

#include <cmath>
#include <limits>

#include "functions.h"

namespace {

struct Batch {
    Tensors tensors;
    Ref all, rest;              // lists, made on first use
    Py_ssize_t count = 0;       // the number of items, including those without a gradient and repeated ones
    int facts = 0;              // when the tensors were gathered
    bool has_subclass = false;  // among the items

    // False, with an error set, for anything but a tensor.
    bool check(PyObject* item, const char* argument) {
        const Py_ssize_t index = count++;
        if (is_plain(item)) return true;
        has_subclass = true;
        const int is_tensor = PyObject_IsInstance(item, reinterpret_cast<PyObject*>(torch.tensor));
        if (is_tensor != 0) return is_tensor > 0;
        const Ref none(PyObject_CallFunction(torch.refuse, "snO", argument, index, item));
        if (none != nullptr) PyErr_Format(PyExc_TypeError, "item %zd is not a Tensor", index);
        return false;
    }

    bool gather(PyObject* iterable, bool take_grad) {
        tensors.expect(iterable);
        const bool gathered = collect_any(iterable, [&](Ref item) {
            if (!check(item, take_grad ? "parameters" : "tensors")) return false;
            if (take_grad) return tensors.take_gradient(item);
            tensors.take(std::move(item));
            return true;
        });
        if (!gathered) return false;
        tensors.drop_repeated();
        Memory memory;
        tensors.read(memory);
        const bool is_small = tensors.are_all_taken() && memory.elements() <= kSmallElements;
        const bool is_tied = take_grad && tensors.has_repeated();
        facts = memory.facts() | (is_small ? kSmall : 0) | (is_tied ? kTied : 0);
        return true;
    }

    // The list of the tensors for which wanted(i) holds; null with an error set.
    template <class Wanted> Ref list(Wanted wanted) const {
        Ref list(PyList_New(0));
        for (size_t i = 0; i < tensors.all().size() && list != nullptr; ++i)
            if (wanted(i) && PyList_Append(list, tensors.all()[i]) < 0) return Ref();
        return list;
    }

    Ref list_taken() const {
        return list([this](size_t i) { return tensors.is_taken(i); });
    }
};

struct BatchObject {
    PyObject_HEAD Batch batch;
};
PyTypeObject* batch_type = nullptr;

Batch& batch_of(PyObject* self) { return reinterpret_cast<BatchObject*>(self)->batch; }

// A new batch that fill(batch) fills; null, with an error set, if that returns false.
template <class Fill> PyObject* make_batch(Fill fill) {
    BatchObject* const made = PyObject_New(BatchObject, batch_type);
    if (made == nullptr) return nullptr;
    Batch* const batch = new (&made->batch) Batch;
    Ref self(reinterpret_cast<PyObject*>(made));
    return fill(*batch) ? self.release() : nullptr;
}

// None if all operations must be torch's.
PyObject* gather(PyObject* iterable, bool take_grad) {
    if (!connected()) return nullptr;
    if (!is_usable()) return unusual();
    return make_batch([&](Batch& batch) { return batch.gather(iterable, take_grad); });
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

// An iterable with the expected number of numbers.
bool read_numbers(PyObject* iterable, size_t wanted, Numbers& numbers) {
    const bool read = collect_any(iterable, [&](const Ref& item) {
        double number;
        if (!read_number(item, number)) return false;
        numbers.push_back(number);
        return true;
    });
    if (read && numbers.size() != wanted)
        PyErr_Format(PyExc_ValueError, "expected one number for each of %zu tensors, got %zu", wanted, numbers.size());
    return read && numbers.size() == wanted;
}

// The arguments of `norm` and `norms`: an order, and whether only finite elements count.
struct Measure {
    double p;
    bool finite = false;

    bool read(PyObject* const* args, Py_ssize_t count) {
        if (!count_is(count, 1, 2) || !read_number(args[0], p)) return false;
        const int truth = count == 2 ? PyObject_IsTrue(args[1]) : 0;
        finite = truth > 0;
        return truth >= 0;
    }

    Read Loops::* loop() const { return loop_of(p); }

    // The norm of a list of tensors, or the norm of each, for orders without a loop.
    Ref ask(const Ref& tensors, bool each) const {
        if (tensors == nullptr) return Ref();
        return Ref(PyObject_CallFunction(torch.other_norms, "OdOO", static_cast<PyObject*>(tensors), p,
                                         finite ? Py_True : Py_False, each ? Py_True : Py_False));
    }
};

// ---------------------------------------------------------------------------------------------------------------
// Methods
// ---------------------------------------------------------------------------------------------------------------

PyObject* batch_norm(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    const Batch& batch = batch_of(self);
    Measure measure;
    if (!measure.read(args, count)) return nullptr;
    if (measure.loop() == nullptr) return measure.ask(batch.list_taken(), false).release();
    Memory memory;
    if (!batch.tensors.read_again(memory, kEach)) return nullptr;
    return PyFloat_FromDouble(memory.norm(measure.loop(), measure.finite));
}

// The norms of the taken members, in order; false with an error set.
bool measure_each(const Batch& batch, const Measure& measure, Memory& memory, Numbers& norms) {
    if (measure.loop() == nullptr) {
        const Ref answer = measure.ask(batch.list_taken(), true);
        return answer != nullptr && read_numbers(answer, batch.tensors.taken_count(), norms);
    }
    if (!batch.tensors.read_again(memory, kEach)) return false;
    norms.resize(memory.size());
    memory.norms(measure.loop(), measure.finite, norms.begin());
    return true;
}

// The norms of all members, given the norms of the taken ones.
PyObject* new_list(const Tensors& tensors, const Numbers& of_taken) {
    Ref norms(PyList_New(Py_ssize_t(tensors.all().size())));
    size_t next = 0;
    for (size_t i = 0; i < tensors.all().size() && norms != nullptr; ++i) {
        PyObject* const norm = PyFloat_FromDouble(tensors.is_taken(i) ? of_taken[next++] : kAbsent);
        if (norm == nullptr) return nullptr;
        PyList_SetItem(norms, Py_ssize_t(i), norm);
    }
    return norms.release();
}

PyObject* batch_norms(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Measure measure;
    Numbers of_taken;
    Memory memory;
    if (!measure.read(args, count) || !measure_each(batch_of(self), measure, memory, of_taken)) return nullptr;
    return new_list(batch_of(self).tensors, of_taken);
}

// Changes the taken members for which wanted(i) holds, by one number or each by its own.
template <class Wanted>
PyObject* change(const Batch& batch, Write Loops::* loop, const double* numbers, bool each, Wanted wanted) {
    Memory memory;
    if (!batch.tensors.read_again(memory, wanted)) return nullptr;
    if (loop == &Loops::clamp && (memory.facts() & kAnyComplex) != 0)
        return PyErr_Format(PyExc_RuntimeError, "a gradient became complex during the call; nothing was changed");
    const bool done = !memory.write(loop, numbers, each) || batch.tensors.bump_written(memory, wanted);
    return done ? new_reference(Py_None) : nullptr;
}

PyObject* change_all(PyObject* self, Write Loops::* loop, double number) {
    return change(batch_of(self), loop, &number, false, kEach);
}

PyObject* batch_scale(PyObject* self, PyObject* argument) {
    double clip_coef;
    if (!read_number(argument, clip_coef)) return nullptr;
    if (clip_coef == 1.0) return new_reference(Py_None);
    return change_all(self, &Loops::scale, clip_coef);
}

PyObject* batch_scale_each(PyObject* self, PyObject* argument) {
    const Tensors& tensors = batch_of(self).tensors;
    Numbers given, of_wanted;
    if (!read_numbers(argument, tensors.all().size(), given)) return nullptr;
    const auto wanted = [&](size_t i) { return given[i] != 1.0; };
    for (size_t i = 0; i < tensors.all().size(); ++i)
        if (tensors.is_taken(i) && wanted(i)) of_wanted.push_back(given[i]);
    return change(batch_of(self), &Loops::scale, of_wanted.begin(), true, wanted);
}

// clip_each_(limits, p, eps)
PyObject* batch_clip_each(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    const Batch& batch = batch_of(self);
    const Tensors& tensors = batch.tensors;
    double eps;
    Measure measure;
    if (!count_is(count, 3, 3) || !measure.read(args + 1, 1) || !read_number(args[2], eps)) return nullptr;
    Numbers given, coefs, norms;  // the last two for the taken members; the first of them starts as the limits
    const bool one = PyFloat_Check(args[0]);
    if (!one && !read_numbers(args[0], tensors.all().size(), given)) return nullptr;
    for (size_t i = 0; i < tensors.all().size(); ++i)
        if (tensors.is_taken(i)) coefs.push_back(one ? PyFloat_AsDouble(args[0]) : given[i]);
    norms.resize(coefs.size());
    Memory memory;
    if (measure.loop() == nullptr) {
        norms.clear();
        if (!measure_each(batch, measure, memory, norms)) return nullptr;
        for (size_t i = 0; i < norms.size(); ++i) coefs[i] = clip_coef_of(coefs[i], norms[i], eps);
        if (!tensors.read_again(memory, kEach)) return nullptr;
        memory.write(&Loops::scale, coefs.begin(), true);
    } else {
        if (!tensors.read_again(memory, kEach)) return nullptr;
        memory.clip_each(measure.loop(), coefs.begin(), eps, norms.begin());
    }
    size_t next = 0;
    const auto changed = [&](size_t i) { return tensors.is_taken(i) && coefs[next++] != 1.0; };
    Ref list = batch.list(changed);
    return bump_versions(list) ? new_list(tensors, norms) : nullptr;
}

PyObject* batch_clamp(PyObject* self, PyObject* argument) {
    double limit;
    if (!read_number(argument, limit)) return nullptr;
    if (batch_of(self).facts & kAnyComplex)
        return PyErr_Format(PyExc_ValueError, "complex numbers have no order, so they cannot be clamped");
    if (!(limit >= 0)) return PyErr_Format(PyExc_ValueError, "the limit must be at least 0, got %R", argument);
    return change_all(self, &Loops::clamp, limit);
}

PyObject* batch_zero_nonfinite(PyObject* self, PyObject*) { return change_all(self, &Loops::zero_nonfinite, 0); }

// Eight bytes for each taken member, which show whether it is still the same, unchanged.
PyObject* batch_fingerprint(PyObject* self, PyObject*) {
    const Tensors& tensors = batch_of(self).tensors;
    Room<int64_t, kUsual> versions;
    for (size_t i = 0; i < tensors.all().size(); ++i)
        if (tensors.is_taken(i)) versions.push_back(version_of(tensors.all()[i]));
    Memory memory;
    if (!tensors.read_again(memory, kEach)) return nullptr;
    Room<uint64_t, kUsual> found;
    memory.fingerprints(versions, found);
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(found.begin()),
                                     Py_ssize_t(found.size() * sizeof(uint64_t)));
}

// A new reference to a list of members, which is made only once.
template <class Wanted> PyObject* listed(const Batch& batch, Ref& list, Wanted wanted) {
    if (list == nullptr) list.reset(batch.list(wanted));
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
        part.count = Py_ssize_t(part.tensors.all().size());
        part.facts = batch.facts;
        return true;
    });
}
PyObject* batch_facts(PyObject* self, void*) { return PyLong_FromLong(batch_of(self).facts); }
PyObject* batch_count(PyObject* self, void*) { return PyLong_FromSsize_t(batch_of(self).count); }
PyObject* batch_plain(PyObject* self, void*) {
    return PyBool_FromLong(batch_of(self).tensors.are_all_taken() && !batch_of(self).has_subclass);
}
PyObject* batch_subclassed(PyObject* self, void*) { return PyBool_FromLong(batch_of(self).has_subclass); }

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
