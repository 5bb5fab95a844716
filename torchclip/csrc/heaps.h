// Norms of which a percentile is wanted again and again, while some are added and others leave.
//
// They lie in one row of memory, as two heaps that grow towards each other: from the left those up to the percentile,
// the largest on top; from the right the others, the smallest on top.  So the two norms that the percentile lies
// between are at the ends of the row, and to add one takes a time that grows with the logarithm of their number.  With
// a window, the oldest norm has to be found.  There every norm has a slot, its number modulo the window; a cell knows
// the slot of its norm, and a slot the place of its own.
#pragma once

#include <cstdint>

namespace {

class Heaps {
    double* values_;
    int32_t* slots_;   // of the cells' norms; null without a window
    int32_t* places_;  // of the slots' norms: an index of the left heap, or the complement of one of the right
    int64_t capacity_;
    int64_t sizes_[2];  // of the right heap, and of the left one

    struct Norm {
        double value;
        int32_t slot;
    };

    template <bool left> int64_t cell(int64_t i) const { return left ? i : capacity_ - 1 - i; }
    template <bool left> double value(int64_t i) const { return values_[cell<left>(i)]; }
    template <bool left> static bool is_above(double a, double b) { return left ? a > b : a < b; }

    template <bool left> Norm at(int64_t i) const {
        return {value<left>(i), slots_ == nullptr ? 0 : slots_[cell<left>(i)]};
    }

    template <bool left> void put(int64_t i, Norm norm) {
        values_[cell<left>(i)] = norm.value;
        if (slots_ == nullptr) return;
        slots_[cell<left>(i)] = norm.slot;
        places_[norm.slot] = int32_t(left ? i : ~i);
    }

    // Put a norm at an index, or above it, where it belongs.
    template <bool left> void rise(int64_t i, Norm norm) {
        for (; i > 0 && is_above<left>(norm.value, value<left>((i - 1) / 2)); i = (i - 1) / 2)
            put<left>(i, at<left>((i - 1) / 2));
        put<left>(i, norm);
    }

    // Likewise at an index, or below it.
    template <bool left> void sink(int64_t i, Norm norm) {
        const int64_t size = sizes_[left];
        for (int64_t child; (child = 2 * i + 1) < size; i = child) {
            if (child + 1 < size && is_above<left>(value<left>(child + 1), value<left>(child))) ++child;
            if (!is_above<left>(value<left>(child), norm.value)) break;
            put<left>(i, at<left>(child));
        }
        put<left>(i, norm);
    }

    template <bool left> void push(Norm norm) { rise<left>(sizes_[left]++, norm); }

    template <bool left> Norm pop() {
        const Norm top = at<left>(0);
        if (--sizes_[left] > 0) sink<left>(0, at<left>(sizes_[left]));
        return top;
    }

    template <bool left> void change(int64_t i, Norm norm) {
        if (i > 0 && is_above<left>(norm.value, value<left>((i - 1) / 2)))
            rise<left>(i, norm);
        else
            sink<left>(i, norm);
    }

  public:
    Heaps(double* values, int32_t* slots, int32_t* places, int64_t capacity, int64_t left, int64_t right)
        : values_(values), slots_(slots), places_(places), capacity_(capacity), sizes_{right, left} {}

    double low() const { return value<true>(0); }
    double high() const { return sizes_[false] > 0 ? value<false>(0) : low(); }

    // Adds a norm, and has so many of them in the left heap.
    void add(double value, int64_t slot, int64_t left) {
        const Norm norm{value, int32_t(slot)};
        if (sizes_[true] > 0 && value < low())
            push<true>(norm);
        else
            push<false>(norm);
        while (sizes_[true] < left) push<true>(pop<false>());
        while (sizes_[true] > left) push<false>(pop<true>());
    }

    // Puts a norm in the place of the one that has this slot.
    void replace(double value, int64_t slot) {
        const Norm norm{value, int32_t(slot)};
        const int32_t place = places_[slot];
        if (place >= 0)
            change<true>(place, norm);
        else
            change<false>(~place, norm);
        if (low() <= high()) return;
        const Norm largest = at<true>(0), smallest = at<false>(0);
        sink<true>(0, smallest);
        sink<false>(0, largest);
    }
};

}  // namespace
