// The walk over the items of a call: parameters whose gradients are meant, or tensors.
#pragma once

#include <cstdint>
#include <vector>

#include "connection.h"

namespace {

// The objects seen so far, by identity: open addressing, at most half full.
class Seen {
    std::vector<PyObject*> slots_;
    size_t used_ = 0;

    bool place(PyObject* object) {
        const size_t mask = slots_.size() - 1;
        size_t i = spread(object) & mask;
        while (slots_[i] != nullptr && slots_[i] != object) i = (i + 1) & mask;
        if (slots_[i] == object) return false;
        slots_[i] = object;
        return true;
    }

  public:
    explicit Seen(size_t expected) {
        size_t slots = 16;
        while (slots < 2 * expected) slots *= 2;
        slots_.resize(slots);
    }

    // False if the object was there before.
    bool add(PyObject* object) {
        if (2 * used_ >= slots_.size()) {
            std::vector<PyObject*> old(2 * slots_.size());
            old.swap(slots_);
            for (PyObject* each : old)
                if (each != nullptr) place(each);
        }
        if (!place(object)) return false;
        ++used_;
        return true;
    }
};

// Calls add(item) for each item until it returns false, with an error set; false then, or if the iterable fails.
template <class Add> bool for_each_item(PyObject* iterable, Add add) {
    if (PyList_CheckExact(iterable)) {
        for (Py_ssize_t i = 0; i < PyList_Size(iterable); ++i) {
            PyObject* const item = new_reference(PyList_GetItem(iterable, i));  // as user code can change the list
            const bool added = add(item);
            Py_DECREF(item);
            if (!added) return false;
        }
        return true;
    }
    PyObject* const iterator = PyObject_GetIter(iterable);
    if (iterator == nullptr) return false;
    bool added = true;
    while (PyObject* const item = added ? PyIter_Next(iterator) : nullptr) {
        added = add(item);
        Py_DECREF(item);
    }
    Py_DECREF(iterator);
    return added && PyErr_Occurred() == nullptr;
}

// False, with an error set, for something that is no tensor; `subclassed` is set where it is no plain one.
bool check_item(PyObject* item, const char* argument, Py_ssize_t index, bool& subclassed) {
    if (is_plain(item)) return true;
    subclassed = true;
    const int known = PyObject_IsInstance(item, reinterpret_cast<PyObject*>(torch.tensor));
    if (known != 0) return known > 0;
    PyObject* const none = PyObject_CallFunction(torch.refuse, "snO", argument, index, item);
    Py_XDECREF(none);
    if (none != nullptr) PyErr_Format(PyExc_TypeError, "item %zd is not a Tensor", index);
    return false;
}

}  // namespace
