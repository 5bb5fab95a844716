// 0-dim tensors, in memory of their own, which torch frees.
#pragma once

#include <new>

#include "connection.h"

namespace {

struct Scalar {
    DLManagedTensorVersioned managed;
    union {
        float single;
        double twice;
    };
};

// Of float64 or float32.
PyObject* new_scalar(double value, bool is_double) {
    Scalar* const made = new (std::nothrow) Scalar{};
    if (made == nullptr) return PyErr_NoMemory();
    if (is_double)
        made->twice = value;
    else
        made->single = float(value);
    DLManagedTensorVersioned& managed = made->managed;
    managed.major = 1;
    managed.manager_context = made;
    managed.deleter = [](DLManagedTensorVersioned* self) { delete static_cast<Scalar*>(self->manager_context); };
    managed.tensor.data = &made->twice;
    managed.tensor.device_type = kCPU;
    managed.tensor.dtype = {kFloat, uint8_t(is_double ? 64 : 32), 1};
    void* tensor = nullptr;
    if (torch.make(&managed, &tensor) == 0) return static_cast<PyObject*>(tensor);
    delete made;
    return nullptr;
}

}  // namespace
