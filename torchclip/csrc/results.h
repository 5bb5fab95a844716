// Tensors that a call returns, in memory of torch's allocator.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "connection.h"
#include "dtypes.h"

namespace {

// A tensor without gaps whose axes have a given order.  It has memory at once; torch sees it when it is taken.
class Result {
    struct Release {
        void operator()(DLManagedTensorVersioned* memory) const { memory->deleter(memory); }
    };
    struct Held {
        DLManagedTensorVersioned managed{};
        std::unique_ptr<DLManagedTensorVersioned, Release> memory;
        std::vector<int64_t> axes;  // sizes, then strides
    };
    std::unique_ptr<Held> held_;

  public:
    // The strides only say in which order the axes lie.  Throws std::bad_alloc.
    Result(decltype(DLTensor::dtype) dtype, int32_t axes, const int64_t* sizes, const int64_t* strides)
        : held_(new Held) {
        held_->axes.assign(sizes, sizes + axes);
        held_->axes.resize(2 * size_t(axes));
        int64_t* const own = held_->axes.data() + axes;
        std::vector<int32_t> order;  // from the narrowest
        for (int32_t axis = axes; axis-- > 0;) order.push_back(axis);
        std::stable_sort(order.begin(), order.end(), [=](int32_t a, int32_t b) { return strides[a] < strides[b]; });
        int64_t count = 1;
        for (const int32_t axis : order) {
            own[axis] = std::max<int64_t>(count, 1);
            count *= sizes[axis];
        }
        DLTensor& tensor = held_->managed.tensor;
        tensor.device_type = kCPU;
        tensor.ndim = 1;
        tensor.dtype = dtype;
        tensor.shape = &count;
        DLManagedTensorVersioned* memory = nullptr;
        if (torch.allocate(&tensor, &memory, nullptr, [](void*, const char*, const char*) {}) != 0)
            throw std::bad_alloc();
        held_->memory.reset(memory);
        tensor.data = static_cast<char*>(memory->tensor.data) + memory->tensor.byte_offset;
        tensor.ndim = axes;
        tensor.shape = held_->axes.data();
        tensor.strides = own;
        held_->managed.major = 1;
        held_->managed.manager_context = held_.get();
        held_->managed.deleter = [](DLManagedTensorVersioned* self) {
            delete static_cast<Held*>(self->manager_context);
        };
    }

    char* data() const { return static_cast<char*>(held_->managed.tensor.data); }

    // The tensor; null, with an error set, after an error.  Call it once.
    Ref take() {
        void* tensor = nullptr;
        if (torch.make(&held_->managed, &tensor) != 0) return Ref();
        held_.release();
        return Ref(static_cast<PyObject*>(tensor));
    }
};

// A tensor with these numbers and one axis, or (without axes) with a single number.
template <class T> PyObject* new_tensor(uint8_t code, const double* numbers, int64_t size, int32_t axes) {
    const int64_t stride = 1;
    Result result({code, uint8_t(8 * sizeof(T)), 1}, axes, &size, &stride);
    std::transform(numbers, numbers + size, reinterpret_cast<T*>(result.data()), [](double x) { return T(x); });
    return result.take().release();
}

}  // namespace
