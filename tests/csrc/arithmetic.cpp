// The kernel's arithmetic without Python: ends with the number of the first line whose promise does not hold.
#include "arithmetic/examples.h"

#define CHECK(holds) \
    if (!(holds)) return __LINE__

static DLTensor tensor_of(float* data, int64_t* shape, int64_t* strides, int32_t axes) {
    DLTensor tensor{};
    tensor.data = data;
    tensor.device_type = kCPU;
    tensor.ndim = axes;
    tensor.dtype = {kFloat, 32, 1};
    tensor.shape = shape;
    tensor.strides = strides;
    return tensor;
}

int main() {
    float numbers[] = {3, 9, 4, 9, 0, 9};  // every second one belongs to the tensor
    int64_t shape[] = {3}, strides[] = {2};
    for (const char* set : {"baseline", "avx2", "avx512"}) {
        if (!use_instruction_set(set)) continue;
        numbers[0] = 3, numbers[2] = 4;
        Memory memory;
        CHECK(memory.add(tensor_of(numbers, shape, strides, 1)));
        CHECK(memory.norm(&Loops::sum_squares, false) == 5.0);
        CHECK(memory.norm(&Loops::largest, false) == 4.0);
        const double half = 0.5;
        CHECK(memory.write(&Loops::scale, &half, false));
        CHECK(numbers[0] == 1.5f && numbers[1] == 9.0f && numbers[2] == 2.0f);
    }
    CHECK(!use_instruction_set("abacus"));
    int64_t overlapping[] = {0};
    Memory memory;
    CHECK(!memory.add(tensor_of(numbers, shape, overlapping, 1)));
    return 0;
}
