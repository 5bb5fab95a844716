// What the kernel needs from torch, passed to `connect`, and what it reads from a tensor with it.
#pragma once

#include <cstddef>
#include <exception>
#include <vector>

#include "dlpack.h"
#include "ref.h"

namespace {

// A function with no or one argument.  A function written in C is called directly: with cold caches, a call through
// Python costs as much again as the work of torch's functions.
class Function {
    using Fast = PyObject* (*)(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* names);

    PyObject* object_ = nullptr;
    PyObject* argument_ = nullptr;  // that of each call, unless the call has its own
    PyCFunction direct_ = nullptr;  // with one argument or null,
    Fast fast_ = nullptr;           // or with an array of arguments, as pybind11's functions
    PyObject* self_ = nullptr;

  public:
    void connect(PyObject* object, PyObject* argument = nullptr) {
        object_ = new_reference(object);
        Py_XINCREF(argument);
        argument_ = argument;
        if (Py_TYPE(object) != &PyCFunction_Type) return;
        const int flags = PyCFunction_GetFlags(object);
        const PyCFunction function = PyCFunction_GetFunction(object);
        if (flags == METH_NOARGS || flags == METH_O) direct_ = function;
        if (flags == (METH_FASTCALL | METH_KEYWORDS))
            fast_ = reinterpret_cast<Fast>(reinterpret_cast<void (*)()>(function));
        self_ = PyCFunction_GetSelf(object);
    }

    bool is_direct() const { return direct_ != nullptr; }

    PyObject* operator()() const { return (*this)(argument_); }
    PyObject* operator()(PyObject* argument) const {
        if (direct_ != nullptr) return direct_(self_, argument);
        if (fast_ != nullptr) return fast_(self_, &argument, argument != nullptr, nullptr);
        return PyObject_CallFunctionObjArgs(object_, argument, nullptr);
    }
};

// An attribute of every object of a type, with its getter, so that the name is not looked up each time.
class Getter {
    PyObject* descriptor_ = nullptr;
    descrgetfunc get_ = nullptr;

  public:
    // False, with an error set, if there is no such attribute.
    bool connect(PyObject* type, const char* name) { return use(PyObject_GetAttrString(type, name), name); }

    // The same for attributes of classes.
    bool connect_of_types(const char* name) {
        const Ref attributes(PyObject_GetAttrString(reinterpret_cast<PyObject*>(&PyType_Type), "__dict__"));
        return attributes != nullptr && use(PyMapping_GetItemString(attributes, name), name);
    }

    PyObject* operator()(PyObject* object) const {
        return get_(descriptor_, object, reinterpret_cast<PyObject*>(Py_TYPE(object)));
    }

  private:
    bool use(PyObject* descriptor, const char* name) {
        descriptor_ = descriptor;
        if (descriptor == nullptr) return false;
        get_ = reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(descriptor_), Py_tp_descr_get));
        if (get_ == nullptr) PyErr_Format(PyExc_RuntimeError, "the kernel cannot read the attribute %s", name);
        return get_ != nullptr;
    }
};

struct {
    PyTypeObject *tensor, *parameter;
    Function increment_version;  // for each of an iterable of tensors
    PyObject* refuse;
    Function get_num_threads;
    PyObject* other_norms;
    std::vector<Function> watchers;  // each is true if operations may be observed
    PyObject *forward_ad, *current_level;
    Function is_inference_mode_enabled;
    Getter grad, layout, is_cpu, version;
    PyObject* strided;           // the layout of dense tensors
    PyObject *is_neg, *is_conj;  // methods of tensors
    int (*read)(void* py_object, DLTensor* out);
    int (*make)(DLManagedTensorVersioned* tensor, void** out);
    decltype(DLPackExchangeAPI::managed_tensor_allocator) allocate;
} torch;

bool connected() {
    if (torch.read != nullptr) return true;
    PyErr_SetString(PyExc_RuntimeError, "the kernel is not connected to torch; call connect() first");
    return false;
}

// Tells autograd that the tensors of a list or tuple were written.  False, with an error set, if autograd raises, or
// for null.
bool bump_versions(const Ref& tensors) {
    if (tensors == nullptr) return false;
    return Ref(torch.increment_version(tensors)) != nullptr;
}

bool is_plain(PyObject* object) { return Py_TYPE(object) == torch.tensor || Py_TYPE(object) == torch.parameter; }

// Whether torch has refused to describe a tensor in this process.  A refusal takes half a millisecond, so afterwards
// every tensor is first checked for being dense and in host memory.
bool has_refused = false;

// The check can run Python code (a function mode).
bool is_dense_on_host(PyObject* tensor) {
    const Ref is_cpu(torch.is_cpu(tensor)), layout(is_cpu == Py_True ? torch.layout(tensor) : nullptr);
    PyErr_Clear();  // torch's operations will fail in the same way
    return layout == torch.strided;
}

// False for a view of a storage that was resized to nothing: torch then gives its offset as the address.  Only for such
// low addresses is torch asked.
bool has_memory(PyObject* tensor, const DLTensor& t) {
    const uint64_t address = reinterpret_cast<uintptr_t>(t.data) + t.byte_offset;
    if (address == 0 || address >= uint64_t(1) << 40) return true;
    const Ref answer(PyObject_CallMethod(tensor, "storage_offset", nullptr));
    const long long offset = answer != nullptr ? PyLong_AsLongLong(answer) : 0;
    PyErr_Clear();
    return uint64_t(offset) * t.dtype.bits / 8 != address;
}

// Describes a plain tensor's memory; false if it has none of its own (sparse, meta, inside vmap).  No Python code runs
// if it returns true.
bool describe(PyObject* tensor, DLTensor& t) {
    if (!is_plain(tensor)) return false;
    if (torch.read(tensor, &t) == 0) return has_memory(tensor, t);
    PyErr_Clear();
    has_refused = true;
    return false;
}

// The gradient, or None.
Ref get_grad(PyObject* parameter) {
    return Ref(is_plain(parameter) ? torch.grad(parameter) : PyObject_GetAttrString(parameter, "grad"));
}

// The number of changes that autograd knows of; -1 for a tensor without a counter, as those of inference mode.
int64_t version_of(PyObject* tensor) {
    const Ref version(torch.version(tensor));
    const int64_t number = version == nullptr ? -1 : PyLong_AsLongLong(version);
    PyErr_Clear();
    return number;
}

// The number of open `torchclip.kernel.disabled()` blocks in all threads.
long disabled_count = 0;

// Whether operations may be recorded or transformed, so that all must be torch's; torchclip._core.memory decides.
bool is_intercepted() {
    PyObject* const level = PyDict_GetItemWithError(torch.forward_ad, torch.current_level);
    bool intercepted = level == nullptr || PyLong_AsLong(level) >= 0;
    for (const Function& watcher : torch.watchers) {
        if (intercepted) break;
        const Ref answer(watcher());
        intercepted = answer == nullptr || PyObject_IsTrue(answer) != 0;
    }
    return intercepted;
}

bool is_usable() { return disabled_count == 0 && !is_intercepted(); }

bool count_is(Py_ssize_t given, Py_ssize_t least, Py_ssize_t most) {
    if (given >= least && given <= most) return true;
    const Py_ssize_t wanted = given < least ? least : most;
    PyErr_Format(PyExc_TypeError, "expected %zd argument%s, got %zd", wanted, wanted == 1 ? "" : "s", given);
    return false;
}

// What Python calls goes through here: C++ that runs out of memory would end the process otherwise.
template <auto work> struct Guarded;
template <class... Args, PyObject* (*work)(Args...)> struct Guarded<work> {
    static PyObject* call(Args... args) {
        try {
            return work(args...);
        } catch (const std::exception&) {  // std::bad_alloc, or std::length_error for more than any memory
            return PyErr_NoMemory();
        }
    }
};
template <auto work> PyCFunction function() {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Guarded<work>::call));
}

}  // namespace
