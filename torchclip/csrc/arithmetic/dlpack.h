// The parts of DLPack, version 1, that the kernel reads (https://dmlc.github.io/dlpack/latest/c_api.html).
#pragma once

#include <cstdint>

namespace {

struct DLTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t* shape;
    int64_t* strides;  // in elements
    uint64_t byte_offset;
};

struct DLManagedTensorVersioned {
    uint32_t major, minor;
    void* manager_context;
    void (*deleter)(DLManagedTensorVersioned* self);
    uint64_t flags;
    DLTensor tensor;
};

struct DLPackExchangeAPI {
    uint32_t major, minor;
    DLPackExchangeAPI* previous;
    int (*managed_tensor_allocator)(DLTensor* prototype, DLManagedTensorVersioned** out, void* context,
                                    void (*set_error)(void* context, const char* kind, const char* message));
    void* managed_tensor_from_py_object_no_sync;
    int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned* tensor, void** out);
    int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
    void* current_work_stream;
};

constexpr int32_t kCPU = 1;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4, kComplex = 5;

}  // namespace
