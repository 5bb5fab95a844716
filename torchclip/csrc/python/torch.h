// What the kernel needs of torch, and what it reads from a tensor with it.
#pragma once

#include <algorithm>
#include <vector>

#include "../arithmetic/dlpack.h"
#include "../arithmetic/threads.h"
#include "calls.h"

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
        const int flags = PyCFunction_GetFlags(object) & ~METH_COEXIST;
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
    // It fails if there is no such attribute.
    Outcome connect(PyObject* type, const char* name) { return use(PyObject_GetAttrString(type, name), name); }

    // The same for attributes of classes.
    Outcome connect_of_types(const char* name) {
        const Ref attributes(PyObject_GetAttrString(reinterpret_cast<PyObject*>(&PyType_Type), "__dict__"));
        return attributes == nullptr ? kFailed : use(PyMapping_GetItemString(attributes, name), name);
    }

    PyObject* operator()(PyObject* object) const {
        return get_(descriptor_, object, reinterpret_cast<PyObject*>(Py_TYPE(object)));
    }

  private:
    Outcome use(PyObject* descriptor, const char* name) {
        descriptor_ = descriptor;
        if (descriptor == nullptr) return kFailed;
        get_ = reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(descriptor_), Py_tp_descr_get));
        return get_ != nullptr ? kDone : fail(PyExc_RuntimeError, "the kernel cannot read the attribute %s", name);
    }
};

// One of torchclip._core.memory.CHECKS.
struct Check {
    Function function;
    PyObject* idle;       // its answer while operations are neither recorded nor transformed
    PyObject* otherwise;  // called after another answer, says whether they really are; or None
};

struct Torch {
    PyTypeObject *tensor, *parameter;
    Function increment_version;  // for each of an iterable of tensors
    Function get_num_threads;
    PyObject* other_norms;
    std::vector<Check> checks;
    Function is_inference_mode_enabled;
    Getter grad, layout, is_cpu, version;
    PyObject* strided;           // the layout of dense tensors
    PyObject *is_neg, *is_conj;  // methods of tensors
    const DLPackExchangeAPI* exchange;
};

// Null until `connect` has succeeded; what it points to does not change.
const Torch* connection = nullptr;
const Torch& torch() { return *connection; }

// The number of open `torchclip.kernel.disabled()` blocks in all threads.
long disabled_count = 0;

// Whether a check says that operations may be recorded or transformed, so that all must be torch's.
Outcome pass(const Check& check) {
    const Ref answer(check.function());
    if (answer == nullptr) return kFailed;
    if (answer == check.idle) return kDone;
    const int is_idle = PyObject_RichCompareBool(answer, check.idle, Py_EQ);
    if (is_idle != 0) return is_idle > 0 ? kDone : kFailed;
    if (check.otherwise == Py_None) return kUnusual;
    const Ref found(PyObject_CallNoArgs(check.otherwise));
    const int is_found = found == nullptr ? -1 : PyObject_IsTrue(found);
    return is_found < 0 ? kFailed : is_found > 0 ? kUnusual : kDone;
}

// Whether the kernel may work: it is connected and not disabled, and all checks pass.
Outcome begin() {
    if (connection == nullptr)
        return fail(PyExc_RuntimeError, "the kernel is not connected to torch; call connect() first");
    Outcome outcome = disabled_count == 0 ? kDone : kUnusual;
    for (size_t i = 0; i < torch().checks.size() && outcome == kDone; ++i) outcome = pass(torch().checks[i]);
    return outcome;
}

bool is_plain(PyObject* object) { return Py_TYPE(object) == torch().tensor || Py_TYPE(object) == torch().parameter; }

// Tells autograd that the tensors of a list or tuple, which may be null after an error, were written.
Outcome bump_versions(const Ref& tensors) {
    return tensors != nullptr && Ref(torch().increment_version(tensors)) != nullptr ? kDone : kFailed;
}

// Whether torch has refused to describe a tensor in this process.  A refusal takes half a millisecond, so afterwards
// every tensor is first checked for being dense and in host memory.
bool has_refused = false;

// The check can run Python code (a function mode).
bool is_dense_on_host(PyObject* tensor) {
    const Ref is_cpu(torch().is_cpu(tensor)), layout(is_cpu == Py_True ? torch().layout(tensor) : nullptr);
    PyErr_Clear();  // torch's operations will fail in the same way
    return layout == torch().strided;
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
    if (torch().exchange->dltensor_from_py_object_no_sync(tensor, &t) == 0) return has_memory(tensor, t);
    PyErr_Clear();
    has_refused = true;
    return false;
}

// The gradient of a plain parameter, or None; null with an error set.
Ref get_grad(PyObject* parameter) { return Ref(torch().grad(parameter)); }

// The number of changes that autograd knows of; -1 for a tensor without a counter, as those of inference mode.
int64_t version_of(PyObject* tensor) {
    const Ref version(torch().version(tensor));
    const int64_t number = version == nullptr ? -1 : PyLong_AsLongLong(version);
    PyErr_Clear();
    return number;
}

// The number of threads for a number of elements.  No Python code runs here.
int usable_threads(size_t elements) {
    if (elements < kWorthThreads || !has_threads() || !torch().get_num_threads.is_direct()) return 1;
    const Ref number(torch().get_num_threads());
    const long threads = number == nullptr ? -1 : PyLong_AsLong(number);
    PyErr_Clear();
    return int(std::max(1L, std::min(threads, 1024L)));
}

constexpr size_t kWorthReleasing = size_t(1) << 19;  // the number of elements below which the GIL is not released

// Releases the GIL if there is much to do.
class WithoutGil {
    PyThreadState* const state_;

  public:
    explicit WithoutGil(size_t elements) : state_(elements >= kWorthReleasing ? PyEval_SaveThread() : nullptr) {}
    ~WithoutGil() {
        if (state_ != nullptr) PyEval_RestoreThread(state_);
    }
    WithoutGil(const WithoutGil&) = delete;
    WithoutGil& operator=(const WithoutGil&) = delete;
};

}  // namespace
