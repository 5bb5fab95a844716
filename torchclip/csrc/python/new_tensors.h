// Tensors that a call returns.
#pragma once

#include <algorithm>
#include <memory>

#include "../arithmetic/dtypes.h"
#include "torch.h"

namespace {

// A contiguous tensor in memory of torch's allocator.  No Python code runs before it is taken.
class Result {
    struct Release {
        void operator()(DLManagedTensorVersioned* memory) const { memory->deleter(memory); }
    };
    std::unique_ptr<DLManagedTensorVersioned, Release> memory_;

  public:
    // Throws std::bad_alloc.
    Result(decltype(DLTensor::dtype) dtype, int32_t axes, int64_t* sizes) {
        DLTensor prototype{};
        prototype.device_type = kCPU;
        prototype.ndim = axes;
        prototype.dtype = dtype;
        prototype.shape = sizes;
        DLManagedTensorVersioned* memory = nullptr;
        if (torch().exchange->managed_tensor_allocator(&prototype, &memory, nullptr,
                                                       [](void*, const char*, const char*) {}) != 0)
            throw std::bad_alloc();
        memory_.reset(memory);
    }

    char* data() const { return static_cast<char*>(memory_->tensor.data) + memory_->tensor.byte_offset; }

    // The tensor; null, with an error set, after an error.  Call it once.
    Ref take() {
        void* tensor = nullptr;
        if (torch().exchange->managed_tensor_to_py_object_no_sync(memory_.get(), &tensor) != 0) return Ref();
        memory_.release();
        return Ref(static_cast<PyObject*>(tensor));
    }
};

// A tensor with these numbers and one axis, or (without axes) with a single number.
template <class T> Ref new_tensor(uint8_t code, const double* numbers, int64_t size, int32_t axes) {
    Result result({code, uint8_t(8 * sizeof(T)), 1}, axes, &size);
    std::transform(numbers, numbers + size, reinterpret_cast<T*>(result.data()), [](double x) { return T(x); });
    return result.take();
}

// ---------------------------------------------------------------------------------------------------------------
// 0-dim tensors with their own memory, which torch frees
// ---------------------------------------------------------------------------------------------------------------

struct Scalar {
    DLManagedTensorVersioned managed;
    union {
        float single;
        double twice;
    };

    void set(double value, bool is_double) {
        if (is_double)
            twice = value;
        else
            single = float(value);
    }
};

// A float64 or float32 tensor; `made` receives the address of its number.
PyObject* make_scalar(bool is_double, Scalar*& made) {
    made = new (std::nothrow) Scalar{};
    if (made == nullptr) return PyErr_NoMemory();
    DLManagedTensorVersioned& managed = made->managed;
    managed.major = 1;
    managed.manager_context = made;
    managed.deleter = [](DLManagedTensorVersioned* self) { delete static_cast<Scalar*>(self->manager_context); };
    managed.tensor.data = &made->twice;
    managed.tensor.device_type = kCPU;
    managed.tensor.dtype = {kFloat, uint8_t(is_double ? 64 : 32), 1};
    void* tensor = nullptr;
    if (torch().exchange->managed_tensor_to_py_object_no_sync(&managed, &tensor) == 0)
        return static_cast<PyObject*>(tensor);
    delete made;
    return nullptr;
}

// A stock of new tensors of one dtype.  Made one after the other, each takes a fraction of the time that it would take
// in the middle of a training step, where torch's code for it is not in the caches.
class Spare {
    static constexpr int kMost = 32;
    const bool is_double_;
    PyObject* tensors_[kMost];
    Scalar* numbers_[kMost];
    int count_ = 0;

    // False if none can be made: tensors made in inference mode cannot be used elsewhere.
    bool refill() {
        PyObject* const inference = torch().is_inference_mode_enabled();
        const bool is_usual = inference == Py_False;
        Py_XDECREF(inference);
        while (is_usual && count_ < kMost) {
            Scalar* number;
            PyObject* const tensor = make_scalar(is_double_, number);
            if (tensor == nullptr) break;
            if (count_ == kMost) {  // a finalizer that ran in between has used some, too
                Py_DECREF(tensor);
                break;
            }
            tensors_[count_] = tensor;
            numbers_[count_++] = number;
        }
        PyErr_Clear();  // the caller makes one, or fails
        return count_ > 0;
    }

  public:
    explicit Spare(bool is_double) : is_double_(is_double) {}

    PyObject* take(double value) {
        if (count_ == 0 && !refill()) return nullptr;
        numbers_[--count_]->set(value, is_double_);
        return tensors_[count_];
    }
};
Spare spare_floats(false), spare_doubles(true);

// Of float64 or float32.
PyObject* new_scalar(double value, bool is_double) {
    PyObject* const ready = (is_double ? spare_doubles : spare_floats).take(value);
    if (ready != nullptr) return ready;
    Scalar* number;
    PyObject* const made = make_scalar(is_double, number);
    if (made != nullptr) number->set(value, is_double);
    return made;
}

}  // namespace
