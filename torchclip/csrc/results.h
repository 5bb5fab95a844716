// The tensors that a call returns.  They share one block of memory, which the last of them frees.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "connection.h"
#include "dtypes.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

class Results {
    struct Block {
        std::atomic<size_t> references{1};
        void* memory;
        size_t bytes;

        void release() {
            if (references.fetch_sub(1) == 1) give_back(memory, bytes);
        }
    };
    // A tensor; its sizes and strides follow in memory.
    struct Result {
        DLManagedTensorVersioned managed;
        Block* block;
    };
    static constexpr size_t kLine = 64, kHugePage = size_t(1) << 21;

    std::vector<DLTensor> tensors_;  // the offset of each in the block, until its data is known
    std::vector<int64_t> axes_;      // sizes and strides of all
    size_t bytes_ = 0;
    Block* block_ = nullptr;

    static size_t rounded_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

    // Memory aligned to kLine; `block` receives the pointer to free.
    static char* allocate(size_t bytes, Block& block) {
        if (bytes > size_t(-1) / 2) throw std::bad_alloc();
        const bool is_large = bytes >= kHugePage;
        const size_t unit = is_large ? kHugePage : kLine;
        block.bytes = rounded_up(bytes, unit) + unit;
        block.memory = obtain(block.bytes);
        if (block.memory == nullptr) throw std::bad_alloc();
        char* const begin = reinterpret_cast<char*>(rounded_up(reinterpret_cast<uintptr_t>(block.memory), unit));
#ifdef __linux__
        // Large pages if the system has them, as getting memory page by page takes longer than filling it.  The rest of
        // the last page is wasted, which should be less than half of it.
        if (is_large) madvise(begin, (bytes + kHugePage / 2) / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
        return begin;
    }
#ifdef __linux__
    static bool is_mapped(size_t bytes) { return bytes >= 2 * kHugePage; }
    static void* obtain(size_t bytes) {
        if (!is_mapped(bytes)) return std::malloc(bytes);
        void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        return memory == MAP_FAILED ? nullptr : memory;
    }
    static void give_back(void* memory, size_t bytes) {
        is_mapped(bytes) ? void(munmap(memory, bytes)) : std::free(memory);
    }
#else
    static void* obtain(size_t bytes) { return std::malloc(bytes); }
    static void give_back(void* memory, size_t) { std::free(memory); }
#endif

  public:
    Results() = default;
    Results(const Results&) = delete;
    Results& operator=(const Results&) = delete;
    ~Results() {
        if (block_ != nullptr) block_->release();
    }

    // Adds a tensor without gaps whose axes have the order of these strides; returns its number of elements.
    size_t add(decltype(DLTensor::dtype) dtype, int32_t axes, const int64_t* sizes, const int64_t* strides) {
        const size_t first = axes_.size();
        axes_.insert(axes_.end(), sizes, sizes + axes);
        axes_.resize(first + 2 * size_t(axes));
        int64_t* const own = axes_.data() + first + axes;
        std::vector<int32_t> order;  // from the narrowest
        for (int32_t axis = axes; axis-- > 0;) order.push_back(axis);
        std::stable_sort(order.begin(), order.end(), [=](int32_t a, int32_t b) { return strides[a] < strides[b]; });
        int64_t count = 1;
        for (const int32_t axis : order) {
            own[axis] = std::max<int64_t>(count, 1);
            count *= sizes[axis];
        }
        DLTensor tensor{};
        tensor.device_type = kCPU;
        tensor.ndim = axes;
        tensor.dtype = dtype;
        tensor.byte_offset = bytes_;
        tensors_.push_back(tensor);
        bytes_ += rounded_up(size_t(count) * dtype.bits / 8, kLine);
        return size_t(count);
    }

    // Call it after all were added.  The tensors have no values yet.
    void allocate() {
        size_t header = sizeof(Block) + axes_.size() * sizeof(int64_t) + tensors_.size() * sizeof(Result);
        header = rounded_up(header, kLine);
        Block block{};
        char* const begin = allocate(header + bytes_, block);
        block_ = new (begin) Block{};
        block_->memory = block.memory;
        block_->bytes = block.bytes;
        int64_t* sizes = reinterpret_cast<int64_t*>(reinterpret_cast<Result*>(block_ + 1) + tensors_.size());
        std::copy(axes_.begin(), axes_.end(), sizes);
        for (DLTensor& tensor : tensors_) {
            tensor.data = begin + header + std::exchange(tensor.byte_offset, 0);
            tensor.shape = std::exchange(sizes, sizes + 2 * tensor.ndim);
            tensor.strides = tensor.shape + tensor.ndim;
        }
    }

    char* data(size_t i) const { return static_cast<char*>(tensors_[i].data); }

    // Call it once for each, in any order; null, with an error set, after an error.
    Ref take(size_t i) {
        Result* const result = new (reinterpret_cast<Result*>(block_ + 1) + i) Result{};
        result->block = block_;
        DLManagedTensorVersioned& managed = result->managed;
        managed.major = 1;
        managed.manager_context = result;
        managed.deleter = [](DLManagedTensorVersioned* self) {
            static_cast<Result*>(self->manager_context)->block->release();
        };
        managed.tensor = tensors_[i];
        void* tensor = nullptr;
        if (torch.make(&managed, &tensor) != 0) return Ref();
        block_->references.fetch_add(1);
        return Ref(static_cast<PyObject*>(tensor));
    }
};

// A tensor with these numbers and one axis, or (without axes) with a single number.
template <class T> PyObject* new_tensor(uint8_t code, const double* numbers, int64_t size, int32_t axes) {
    const int64_t stride = 1;
    Results results;
    results.add({code, uint8_t(8 * sizeof(T)), 1}, axes, &size, &stride);
    results.allocate();
    std::transform(numbers, numbers + size, reinterpret_cast<T*>(results.data(0)), [](double x) { return T(x); });
    return results.take(0).release();
}

}  // namespace
