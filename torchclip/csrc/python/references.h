// References to Python objects, released with the object that holds them.
#pragma once

#define Py_LIMITED_API 0x030a0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <utility>

#include "../arithmetic/array.h"

namespace {

// Also None: Py_RETURN_NONE in Python 3.12.1's headers assumes that it is immortal, which it is not in 3.10 and 3.11.
PyObject* new_reference(PyObject* object) {
    Py_INCREF(object);
    return object;
}

// One reference, or null, which most functions of Python return with an error set.
class Ref {
    PyObject* object_;

  public:
    Ref() : object_(nullptr) {}
    explicit Ref(PyObject* owned) : object_(owned) {}
    Ref(Ref&& other) noexcept : object_(other.release()) {}
    Ref& operator=(Ref&&) = delete;
    ~Ref() { Py_XDECREF(object_); }

    // A new reference to a borrowed object; none for null.
    static Ref to(PyObject* borrowed) {
        Py_XINCREF(borrowed);
        return Ref(borrowed);
    }

    operator PyObject*() const { return object_; }
    PyObject* release() { return std::exchange(object_, nullptr); }
    void reset(Ref other) { std::swap(object_, other.object_); }
};

// The first place for an object in a table of addresses, whose last bits are all equal.
size_t hash_pointer(const PyObject* object) {
    return size_t((reinterpret_cast<uintptr_t>(object) >> 4) * 0x9e3779b97f4a7c15ull >> 32);
}

// References to several objects.
class References {
    Array<PyObject*, kUsual> objects_;

  public:
    ~References() { clear(); }

    PyObject* const* begin() const { return objects_.begin(); }
    PyObject* const* end() const { return objects_.end(); }
    PyObject* operator[](size_t i) const { return objects_[i]; }
    size_t size() const { return objects_.size(); }
    void reserve(size_t count) { objects_.reserve(count); }

    void take(Ref object) {
        objects_.push_back(object);
        object.release();
    }

    void drop_last() { Py_DECREF(objects_.pop_back()); }

    // Releases all references, which can run user code.
    void clear() {
        while (objects_.size() > 0) Py_DECREF(objects_.pop_back());
    }

    // Releases repeated references.  They are found with a table of open addressing that is at most half full.
    void drop_repeated() {
        Array<uint32_t, 2 * kUsual> slots;  // positions among those that are kept, from 1; 0 is free
        size_t mask = 15;
        while (mask + 1 < 2 * objects_.size()) mask = 2 * mask + 1;
        slots.resize(mask + 1);
        std::memset(slots.begin(), 0, (mask + 1) * sizeof(uint32_t));
        size_t kept = 0;
        for (PyObject* object : objects_) {
            size_t slot = hash_pointer(object) & mask;
            while (slots[slot] != 0 && objects_[slots[slot] - 1] != object) slot = (slot + 1) & mask;
            if (slots[slot] != 0) {
                Py_DECREF(object);  // the first one keeps its reference
                continue;
            }
            objects_[kept++] = object;
            slots[slot] = uint32_t(kept);
        }
        objects_.resize(kept);
    }
};

}  // namespace
