// Whose parameters are meant: those of a list, a tuple, a module, or a generator of `Module.parameters` that was not
// started.  The last two are walked here instead of being run, in the order and under the conditions of torch's code.
#pragma once

#include "connection.h"

#include <algorithm>
#include <cstring>

namespace {

constexpr size_t kMostItems = 1024;

// References to some objects, in an array of its own.
class Items {
    PyObject* items_[kMostItems];
    size_t count_ = 0;

  public:
    Items() = default;
    Items(const Items&) = delete;
    Items& operator=(const Items&) = delete;
    ~Items() { clear(); }

    PyObject* const* begin() const { return items_; }
    PyObject* const* end() const { return items_ + count_; }
    size_t size() const { return count_; }

    // Gives all references back, which can run user code.
    void clear() {
        while (count_ > 0) Py_DECREF(items_[--count_]);
    }

    // False if there is no room for it.  Takes over the reference.
    bool take(PyObject* item) {
        if (count_ == kMostItems) return Py_DECREF(item), false;
        items_[count_++] = item;
        return true;
    }

    // Leaves out what came before.
    void drop_repeated() {
        uint16_t slots[2 * kMostItems];  // places in the array, from 1; 0 is free
        size_t mask = 15;
        while (mask + 1 < 2 * count_) mask = 2 * mask + 1;
        std::memset(slots, 0, (mask + 1) * sizeof *slots);
        const size_t before = count_;
        count_ = 0;
        for (size_t i = 0; i < before; ++i) {
            PyObject* const item = items_[i];
            size_t slot = spread(item) & mask;
            while (slots[slot] != 0 && items_[slots[slot] - 1] != item) slot = (slot + 1) & mask;
            if (slots[slot] != 0) {
                Py_DECREF(item);  // the first of them keeps its reference
                continue;
            }
            items_[count_++] = item;
            slots[slot] = uint16_t(count_);
        }
    }
};

// What `connect_modules` was given, and what it has looked up then.
struct {
    PyTypeObject *module, *parameter_list, *generator;
    PyObject *parameters, *named_parameters, *named_members, *named_modules;  // of Module, as torch wrote them
    PyObject* parameters_code;
    PyObject* get_attribute;  // object.__getattribute__
    traverseproc traverse;    // of generators
    destructor finalize;      // likewise
    struct {
        PyObject *parameters, *named_parameters, *named_members, *named_modules, *get_attribute;
        PyObject *own_parameters, *own_modules;
    } names;
} modules;

bool is_module(PyObject* object) {
    return modules.module != nullptr && PyType_IsSubtype(Py_TYPE(object), modules.module);
}

// An attribute that is there, by the usual lookup; the error is cleared if it is not.
class Attribute {
    PyObject* const value_;

  public:
    Attribute(PyObject* object, PyObject* name) : value_(PyObject_GetAttr(object, name)) {
        if (value_ == nullptr) PyErr_Clear();
    }
    explicit Attribute(PyObject* value) : value_(value) {
        if (value_ == nullptr) PyErr_Clear();
    }
    Attribute(const Attribute&) = delete;
    Attribute& operator=(const Attribute&) = delete;
    ~Attribute() { Py_XDECREF(value_); }
    operator PyObject*() const { return value_; }
};

// Whether a class has a method as torch wrote it.
bool inherits(PyTypeObject* type, PyObject* name, PyObject* wanted) {
    return Attribute(reinterpret_cast<PyObject*>(type), name) == wanted;
}

// A new reference to the dictionary of an object's attributes; null if it has none, or something else in its place.
PyObject* attributes_of(PyObject* object) {
    PyObject* const attributes = PyObject_GenericGetDict(object, nullptr);
    if (attributes == nullptr || PyDict_Check(attributes)) return attributes;
    Py_DECREF(attributes);
    return nullptr;
}

// A new reference to what a module itself has under a name, in the dictionary of its attributes; null if it is not
// there.
PyObject* own_attribute(PyObject* attributes, PyObject* name) {
    PyObject* const value = PyDict_GetItemWithError(attributes, name);
    if (value != nullptr) return new_reference(value);
    PyErr_Clear();
    return nullptr;
}

// Whether a module itself has an attribute in the place of a method.
bool has_own(PyObject* attributes, PyObject* name) {
    const int found = PyDict_Contains(attributes, name);
    if (found < 0) PyErr_Clear();
    return found > 0;
}

// Walks a module and those below it as `Module.parameters` does, where it is sure to give the same; one that is met
// again gives its parameters again.
class ModuleWalk {
    static constexpr int kDeepest = 64, kMostModules = 2048, kMostTypes = 16;
    Items& items_;
    PyTypeObject* types_[kMostTypes];  // looked at, once in each walk
    int type_count_ = 0, module_count_ = 0;

    bool has_looked_at(PyTypeObject* type) const {
        return std::find(types_, types_ + type_count_, type) != types_ + type_count_;
    }

    // Whether modules of a class are told apart, asked for attributes and walked as torch wrote it.
    bool look_at(PyTypeObject* type) {
        if (PyType_GetSlot(type, Py_tp_hash) != PyType_GetSlot(modules.module, Py_tp_hash)) return false;
        if (!inherits(type, modules.names.get_attribute, modules.get_attribute)) return false;
        if (!inherits(type, modules.names.named_modules, modules.named_modules)) return false;
        if (type_count_ < kMostTypes) types_[type_count_++] = type;
        return true;
    }

    bool visit(PyObject* module, int depth) {
        if (depth == kDeepest || ++module_count_ > kMostModules) return false;
        const bool is_known = has_looked_at(Py_TYPE(module));
        if (!is_known && !is_module(module)) return false;
        if (!is_known && !look_at(Py_TYPE(module))) return false;
        const Attribute attributes(attributes_of(module));
        if (attributes == nullptr) return false;
        if (depth == 0 && !has_torchs_members(module, attributes)) return false;
        // As torch's own code reads them: a class can have a property in their place.
        const Attribute parameters(PyObject_GenericGetAttr(module, modules.names.own_parameters));
        const Attribute children(PyObject_GenericGetAttr(module, modules.names.own_modules));
        if (parameters == nullptr || !PyDict_CheckExact(parameters)) return false;
        if (children == nullptr || !PyDict_CheckExact(children)) return false;
        if (has_own(attributes, modules.names.named_modules)) return false;
        Py_ssize_t place = 0;
        PyObject* value;
        while (PyDict_Next(parameters, &place, nullptr, &value)) {
            if (value == Py_None) continue;
            if (!is_plain(value) || !items_.take(new_reference(value))) return false;
        }
        if (PyDict_Size(children) == 0) return true;
        place = 0;
        while (PyDict_Next(children, &place, nullptr, &value)) {
            if (value == Py_None) continue;
            const Attribute child(new_reference(value));
            if (!visit(child, depth + 1)) return false;
        }
        return true;
    }

    // Of the module that the walk begins with: only its methods are called.
    static bool has_torchs_members(PyObject* module, PyObject* attributes) {
        PyTypeObject* const type = Py_TYPE(module);
        return inherits(type, modules.names.named_parameters, modules.named_parameters) &&
               inherits(type, modules.names.named_members, modules.named_members) &&
               !has_own(attributes, modules.names.named_parameters) &&
               !has_own(attributes, modules.names.named_members);
    }

  public:
    explicit ModuleWalk(Items& items) : items_(items) {}

    // False where only the module's own methods can tell; nothing can be said of the items then.
    bool collect(PyObject* module) { return visit(module, 0); }
};

// Whether an object is a module whose `parameters()` is torch's own.  Lists of parameters are taken as lists.
bool has_own_parameters(PyObject* object) {
    PyTypeObject* const type = Py_TYPE(object);
    if (!is_module(object) || PyType_IsSubtype(type, modules.parameter_list)) return false;
    if (!inherits(type, modules.names.parameters, modules.parameters)) return false;
    const Attribute attributes(attributes_of(object));
    return attributes != nullptr && !has_own(attributes, modules.names.parameters);
}

// What a generator of a function refers to, apart from its names.
struct Referents {
    PyObject* module = nullptr;
    bool of_parameters = false, recurses = false, has_others = false;

    static int see(PyObject* object, void* self) {
        auto& seen = *static_cast<Referents*>(self);
        if (object == modules.parameters_code)
            seen.of_parameters = true;
        else if (object == Py_True)
            seen.recurses = true;
        else if (object == modules.parameters || PyUnicode_CheckExact(object))
            return 0;
        else if (seen.module == nullptr && is_module(object))
            seen.module = object;
        else
            seen.has_others = true;
        return 0;
    }
};

// A new reference to the module whose parameters an unstarted generator of `Module.parameters` would give, all of them;
// null if it is anything else, and before Python 3.11, whose generators do not tell.  Until it is started, a generator
// refers to its function, the code and the arguments: the module, and for `recurse` True.  As soon as it is, also to
// the generator that it gets its items from; and to nothing when it has ended.
PyObject* module_behind(PyObject* generator) {
    Referents seen;
    modules.traverse(generator, &Referents::see, &seen);
    const bool fresh = seen.of_parameters && seen.recurses && !seen.has_others;
    return fresh && seen.module != nullptr ? new_reference(seen.module) : nullptr;
}

// Has a generator end as if all its items had been taken; anything else stays as it is.  Finalizing it closes it, by
// code that Python runs anyway when it frees a generator.  An error goes where those of finalizers go: nothing can be
// undone.
void use_up(PyObject* given) {
    if (Py_TYPE(given) == modules.generator) modules.finalize(given);
}

// The items that a call was given as its parameters, some perhaps twice.  False where only running it can tell, and for
// anything but plain tensors.
bool collect(PyObject* given, Items& items) {
    if (PyList_CheckExact(given)) {
        for (Py_ssize_t i = 0, count = PyList_Size(given); i < count; ++i) {
            PyObject* const item = PyList_GetItem(given, i);
            if (!is_plain(item) || !items.take(new_reference(item))) return false;
        }
        return true;
    }
    if (PyTuple_CheckExact(given)) {
        for (Py_ssize_t i = 0, count = PyTuple_Size(given); i < count; ++i) {
            PyObject* const item = PyTuple_GetItem(given, i);
            if (!is_plain(item) || !items.take(new_reference(item))) return false;
        }
        return true;
    }
    if (is_plain(given)) return items.take(new_reference(given));
    const Attribute module(Py_TYPE(given) == modules.generator ? module_behind(given)
                           : has_own_parameters(given)         ? new_reference(given)
                                                               : nullptr);
    return module != nullptr && ModuleWalk(items).collect(module);
}

}  // namespace
