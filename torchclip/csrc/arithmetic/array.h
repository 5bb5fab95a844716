// An array that grows.  Its first elements are in the object itself: on the stack, for objects that live during one
// call.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

namespace {

// Enough for the gradients of most models; more of them go to the heap.  All arrays of a call together take less than
// 16 KiB of the stack.
constexpr size_t kUsual = 128;

template <class T, size_t kInline> class Array {
    static_assert(std::is_trivially_copyable<T>::value, "elements are moved as bytes");
    alignas(T) unsigned char inline_[kInline * sizeof(T)];
    T* data_ = reinterpret_cast<T*>(inline_);
    size_t size_ = 0, capacity_ = kInline;

    bool is_inline() const { return data_ == reinterpret_cast<const T*>(inline_); }

  public:
    Array() = default;
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    ~Array() {
        if (!is_inline()) std::free(data_);
    }

    T* begin() { return data_; }
    T* end() { return data_ + size_; }
    const T* begin() const { return data_; }
    const T* end() const { return data_ + size_; }
    T& operator[](size_t i) { return data_[i]; }
    const T& operator[](size_t i) const { return data_[i]; }
    size_t size() const { return size_; }

    // Throws std::bad_alloc, like everything here that extends an array.
    void reserve(size_t wanted) {
        if (wanted <= capacity_) return;
        void* const larger = wanted > size_t(-1) / sizeof(T) ? nullptr : std::malloc(wanted * sizeof(T));
        if (larger == nullptr) throw std::bad_alloc();
        std::memcpy(larger, data_, size_ * sizeof(T));
        if (!is_inline()) std::free(data_);
        data_ = static_cast<T*>(larger);
        capacity_ = wanted;
    }

    // New elements have no value yet.
    void resize(size_t size) {
        reserve(size);
        size_ = size;
    }

    void push_back(T value) {
        if (size_ == capacity_) reserve(2 * capacity_);
        data_[size_++] = value;
    }

    T pop_back() { return data_[--size_]; }
    void clear() { size_ = 0; }
};

}  // namespace
