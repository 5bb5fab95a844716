// The parameters of a call: a list or a tuple, a single parameter, a module, or an unstarted generator of
// `Module.parameters`.  Modules are walked here without running their code, in the order and under the
// conditions of torch's code; so is a generator of their parameters.
#pragma once

#include <algorithm>
#include <memory>

#include "torch.h"

namespace {

// A method: its name, and the function that modules have under it if no class overrides it.
struct Method {
    PyObject *name, *function;
};

// What a walk needs of torch's modules: the arguments of `connect_modules`, and what they hold.
struct Modules {
    PyTypeObject *module, *parameter_list, *generator;
    Method parameters, named_parameters, named_members, named_modules, get_attribute;
    PyObject *own_parameters, *own_modules;  // names of dictionaries
    PyObject* parameters_code;
    Getter mro, class_attributes;  // of classes: their bases, and their own attributes
    traverseproc traverse;         // of generators,
    destructor finalize;           // which are closed by it
};

// Null if nothing is to be walked; what it points to does not change.
const Modules* walked = nullptr;
const Modules& modules() { return *walked; }

bool is_module(PyObject* object) { return walked != nullptr && PyType_IsSubtype(Py_TYPE(object), modules().module); }

// Items are passed to take(item), with a reference to each.  User code can run when an item's gradient is read, and
// when the reference is released.  A walk is unusual if only running user code can show what the items are, and then an
// error of a look-up may still be set; `collect_plain` clears it.

// Whether a class has torch's own version of a method.
bool inherits(PyTypeObject* type, const Method& method) {
    return Ref(PyObject_GetAttr(reinterpret_cast<PyObject*>(type), method.name)) == method.function;
}

// The dictionary of an object's attributes; null if it has none, or another object instead.
Ref attributes_of(PyObject* object) {
    Ref attributes(PyObject_GenericGetDict(object, nullptr));
    return attributes == nullptr || PyDict_Check(attributes) ? std::move(attributes) : Ref();
}

// The object's own attribute with a name, in its dictionary; null if there is none.
Ref own_attribute(PyObject* attributes, PyObject* name) { return Ref::to(PyDict_GetItemWithError(attributes, name)); }

// Whether an object has no attribute of its own with a method's name.
bool lacks(PyObject* attributes, const Method& method) { return PyDict_Contains(attributes, method.name) == 0; }

// Whether a class or a base of it, below nn.Module, overrides attributes that every module has, for example by a
// property, which takes precedence and can return something else each time.
bool replaces_attributes(PyTypeObject* type) {
    const Ref mro(modules().mro(reinterpret_cast<PyObject*>(type)));
    if (mro == nullptr || !PyTuple_CheckExact(mro)) return true;
    for (Py_ssize_t i = 0; i < PyTuple_Size(mro); ++i) {
        PyObject* const base = PyTuple_GetItem(mro, i);
        if (base == reinterpret_cast<PyObject*>(modules().module) ||
            base == reinterpret_cast<PyObject*>(&PyBaseObject_Type))
            continue;
        const Ref attributes(modules().class_attributes(base));
        if (attributes == nullptr || PySequence_Contains(attributes, modules().own_parameters) != 0 ||
            PySequence_Contains(attributes, modules().own_modules) != 0)
            return true;
    }
    return false;
}

// Walks a module and its submodules as `Module.parameters` does, if the result is sure to be the same; a module that
// occurs again yields its parameters again.
template <class Take> class ModuleWalk {
    // Torch's code ends at a cycle of modules, and visits modules that are shared on many levels only once.
    static constexpr size_t kDeepest = 64, kMostModules = 1 << 16, kMostTypes = 16;
    Take take_;
    PyTypeObject* types_[kMostTypes];  // checked in this walk
    size_t type_count_ = 0, module_count_ = 0;
    // On each level, a dictionary of modules, and the place in it.  Recursion would need more of the stack.
    References children_;
    Array<Py_ssize_t, kDeepest> places_;

    bool has_looked_at(PyTypeObject* type) const {
        return std::find(types_, types_ + type_count_, type) != types_ + type_count_;
    }

    // Whether modules of a class are compared, asked for attributes and walked by torch's own methods.
    bool look_at(PyTypeObject* type) {
        if (PyType_GetSlot(type, Py_tp_hash) != PyType_GetSlot(modules().module, Py_tp_hash)) return false;
        if (!inherits(type, modules().get_attribute)) return false;
        if (!inherits(type, modules().named_modules)) return false;
        if (replaces_attributes(type)) return false;
        if (type_count_ < kMostTypes) types_[type_count_++] = type;
        return true;
    }

    // The dictionaries of a module with its own parameters and with the modules below it; null if it is unusual.
    struct Members {
        Ref parameters, children;
    };
    Members members_of(PyObject* module) {
        const bool is_first = ++module_count_ == 1;
        if (places_.size() == kDeepest || module_count_ > kMostModules) return {};
        if (!has_looked_at(Py_TYPE(module)) && !(is_module(module) && look_at(Py_TYPE(module)))) return {};
        const Ref attributes = attributes_of(module);
        if (attributes == nullptr || !lacks(attributes, modules().named_modules)) return {};
        if (is_first && !has_torchs_members(module, attributes)) return {};
        Ref parameters = own_attribute(attributes, modules().own_parameters);
        Ref children = own_attribute(attributes, modules().own_modules);
        if (parameters == nullptr || !PyDict_CheckExact(parameters)) return {};
        if (children == nullptr || !PyDict_CheckExact(children)) return {};
        return {std::move(parameters), std::move(children)};
    }

    // Takes the parameters of a module itself, and takes note of the modules below it.
    Outcome enter(PyObject* module) {
        auto [parameters, children] = members_of(module);
        if (parameters == nullptr) return kUnusual;
        Py_ssize_t place = 0;
        PyObject* value;
        while (PyDict_Next(parameters, &place, nullptr, &value)) {
            const Outcome outcome = value == Py_None ? kDone : take_(Ref::to(value));
            if (outcome != kDone) return outcome;
        }
        if (PyDict_Size(children) == 0) return kDone;
        children_.take(std::move(children));
        places_.push_back(0);
        return kDone;
    }

    // For the module with which the walk begins, as only its methods are called.
    static bool has_torchs_members(PyObject* module, PyObject* attributes) {
        PyTypeObject* const type = Py_TYPE(module);
        return inherits(type, modules().named_parameters) && inherits(type, modules().named_members) &&
               lacks(attributes, modules().named_parameters) && lacks(attributes, modules().named_members);
    }

  public:
    explicit ModuleWalk(Take take) : take_(take) {}

    Outcome collect(PyObject* module) {
        Outcome outcome = enter(module);
        while (outcome == kDone && places_.size() > 0) {
            const size_t level = places_.size() - 1;
            PyObject* child;
            if (!PyDict_Next(children_[level], &places_[level], nullptr, &child)) {
                places_.pop_back();
                children_.drop_last();
            } else if (child != Py_None) {
                outcome = enter(Ref::to(child));
            }
        }
        return outcome;
    }
};

// Whether an object is a module with torch's own `parameters()`.  Lists of parameters count as lists.
bool has_own_parameters(PyObject* object) {
    PyTypeObject* const type = Py_TYPE(object);
    if (!is_module(object) || PyType_IsSubtype(type, modules().parameter_list)) return false;
    if (!inherits(type, modules().parameters)) return false;
    const Ref attributes = attributes_of(object);
    return attributes != nullptr && lacks(attributes, modules().parameters);
}

// The objects to which a function's generator refers, apart from its names.
struct Referents {
    PyObject* module = nullptr;
    bool of_parameters = false, recurses = false, has_others = false;

    static int see(PyObject* object, void* self) {
        auto& seen = *static_cast<Referents*>(self);
        if (object == modules().parameters_code)
            seen.of_parameters = true;
        else if (object == Py_True)
            seen.recurses = true;
        else if (object == modules().parameters.function || PyUnicode_CheckExact(object))
            return 0;
        else if (seen.module == nullptr && is_module(object))
            seen.module = object;
        else
            seen.has_others = true;
        return 0;
    }
};

// The module all of whose parameters an unstarted generator of `Module.parameters` would yield; null for anything else,
// and before Python 3.11, whose generators do not show it.  It is read out of the generator because listing the
// parameters of 24 layers takes 36 µs, twice as long as the whole call.  An unstarted generator refers to its function,
// the code and the arguments: the module, and True for `recurse`.  A started one also refers to the generator from
// which it gets its items, and a finished one to nothing.
Ref module_behind(PyObject* generator) {
    Referents seen;
    modules().traverse(generator, &Referents::see, &seen);
    return seen.of_parameters && seen.recurses && !seen.has_others ? Ref::to(seen.module) : Ref();
}

// Ends a generator as if all its items had been taken; does nothing to other objects.  Finalizing closes it, with code
// that Python runs anyway when it frees a generator.  An error is reported like those of finalizers, as nothing can be
// undone.
void use_up(PyObject* given) {
    if (walked != nullptr && Py_TYPE(given) == modules().generator) modules().finalize(given);
}

// The items of a list or a tuple, which user code can change in between.
template <class Take> Outcome collect_list(PyObject* list, Take take) {
    Outcome outcome = kDone;
    for (Py_ssize_t i = 0; i < PyList_Size(list) && outcome == kDone; ++i)
        outcome = take(Ref::to(PyList_GetItem(list, i)));
    return outcome;
}
template <class Take> Outcome collect_tuple(PyObject* tuple, Take take) {
    Outcome outcome = kDone;
    for (Py_ssize_t i = 0, count = PyTuple_Size(tuple); i < count && outcome == kDone; ++i)
        outcome = take(Ref::to(PyTuple_GetItem(tuple, i)));
    return outcome;
}

// The items of a list, a tuple, a parameter, a module or an unstarted generator.
template <class Take> Outcome collect(PyObject* given, Take take) {
    if (PyList_CheckExact(given)) return collect_list(given, take);
    if (PyTuple_CheckExact(given)) return collect_tuple(given, take);
    if (is_plain(given)) return take(Ref::to(given));
    if (walked == nullptr) return kUnusual;
    const Ref module = Py_TYPE(given) == modules().generator ? module_behind(given)
                       : has_own_parameters(given)           ? Ref::to(given)
                                                             : Ref();
    return module == nullptr ? kUnusual : ModuleWalk<Take>(take).collect(module);
}

// The same, if all items are plain.
template <class Take> Outcome collect_plain(PyObject* given, Take take) {
    const Outcome outcome = collect(given, [&](const Ref& item) { return is_plain(item) ? take(item) : kUnusual; });
    // What failed in a walk fails again where torch's own code does the walk.
    if (outcome == kUnusual) PyErr_Clear();
    return outcome;
}

// connect_modules(module, parameter_list, generator, names)
PyObject* connect_modules(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (expect_count(count, 4) != kDone) return nullptr;
    for (Py_ssize_t i = 0; i < 3; ++i)
        if (!PyType_Check(args[i])) return PyErr_Format(PyExc_TypeError, "argument %zd must be a type", i);
    auto made = std::make_unique<Modules>();
    Method* const methods[] = {&made->parameters, &made->named_parameters, &made->named_members, &made->named_modules,
                               &made->get_attribute};
    PyObject** const names[] = {&methods[0]->name, &methods[1]->name,     &methods[2]->name, &methods[3]->name,
                                &methods[4]->name, &made->own_parameters, &made->own_modules};
    Py_ssize_t next = 0;
    for (PyObject** name : names) {
        PyObject* const given = PyTuple_GetItem(args[3], next++);
        if (given == nullptr) return nullptr;
        *name = new_reference(given);
        PyUnicode_InternInPlace(name);
    }
    for (Method* method : methods)
        if ((method->function = PyObject_GetAttr(args[0], method->name)) == nullptr) return nullptr;
    made->parameters_code = PyObject_GetAttrString(made->parameters.function, "__code__");
    if (made->parameters_code == nullptr) return nullptr;
    if (made->mro.connect_of_types("__mro__") != kDone || made->class_attributes.connect_of_types("__dict__") != kDone)
        return nullptr;
    made->module = reinterpret_cast<PyTypeObject*>(new_reference(args[0]));
    made->parameter_list = reinterpret_cast<PyTypeObject*>(new_reference(args[1]));
    made->generator = reinterpret_cast<PyTypeObject*>(new_reference(args[2]));
    made->traverse = reinterpret_cast<traverseproc>(PyType_GetSlot(made->generator, Py_tp_traverse));
    made->finalize = reinterpret_cast<destructor>(PyType_GetSlot(made->generator, Py_tp_finalize));
    if (made->traverse == nullptr || made->finalize == nullptr)
        return PyErr_Format(PyExc_RuntimeError, "generators are not what the kernel takes them for");
    walked = made.release();
    return new_reference(Py_None);
}

}  // namespace
