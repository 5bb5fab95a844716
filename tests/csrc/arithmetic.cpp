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
    float numbers[] = {9, 3, 0,
                       4, 0, 9};  // those in the middle belong to the tensor, whose first axis is the narrow one
    int64_t shape[] = {2, 2}, strides[] = {1, 2};
    for (const char* set : {"baseline", "avx2", "avx512"}) {
        if (!use_instruction_set(set)) continue;
        numbers[1] = 3, numbers[3] = 4;
        Memory memory;
        CHECK(memory.add(tensor_of(numbers + 1, shape, strides, 2)));
        CHECK(memory.norm(&Loops::sum_squares) == 5.0);
        CHECK(memory.norm(&Loops::largest) == 4.0);
        const double half = 0.5;
        CHECK(memory.write(&Loops::scale, &half, false));
        CHECK(numbers[0] == 9.0f && numbers[1] == 1.5f && numbers[3] == 2.0f && numbers[5] == 9.0f);
    }
    CHECK(!use_instruction_set("abacus"));
    int64_t with_gaps[] = {3, 1}, overlapping[] = {0, 1};
    Memory memory;
    CHECK(!memory.add(tensor_of(numbers, shape, with_gaps, 2)));
    CHECK(!memory.add(tensor_of(numbers, shape, overlapping, 2)));
    return 0;
}
