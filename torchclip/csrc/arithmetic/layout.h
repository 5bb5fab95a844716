// How a tensor lies in memory: a run of elements without gaps, whatever the order of its axes.
#pragma once

#include <algorithm>
#include <vector>

#include "dtypes.h"

namespace {

constexpr int32_t kMaxAxes = 64;

struct Layout {
    char* data;    // of the first element
    size_t count;  // elements
    size_t dtype;  // row of the table

    size_t bytes() const { return count * kDtypes[dtype].item; }
};

// Whether elements have no gaps between them, for a tensor whose axes lie in another order than theirs.
bool is_permuted(const DLTensor& t) {
    int32_t axes[kMaxAxes], count = 0;
    for (int32_t d = 0; d < t.ndim; ++d)
        if (t.shape[d] != 1) axes[count++] = d;
    std::sort(axes, axes + count, [&t](int32_t a, int32_t b) { return t.strides[a] < t.strides[b]; });
    int64_t next = 1;  // the stride that leaves no gap
    for (const int32_t* axis = axes; axis != axes + count; ++axis) {
        if (t.strides[*axis] != next) return false;
        next *= t.shape[*axis];
    }
    return true;
}

// Computes `layout` for a tensor that the kernel can handle.  False for others: on another device, of another dtype,
// not aligned, or with elements that have gaps between them or may overlap.
INLINE bool read_layout(const DLTensor& t, Layout& layout) {
    const size_t dtype = find_dtype(t);
    if (dtype == kDtypeCount || t.device_type != kCPU || t.ndim > kMaxAxes) return false;
    if (t.strides == nullptr && t.ndim > 0) return false;
    size_t count = 1;
    bool contiguous = true;
    for (int32_t d = t.ndim - 1; d >= 0; --d) {
        contiguous &= t.shape[d] == 1 || t.strides[d] == int64_t(count);
        count *= size_t(t.shape[d]);
    }
    layout = {static_cast<char*>(t.data) + t.byte_offset, count, dtype};
    if (count == 0) return true;
    if (t.data == nullptr || reinterpret_cast<uintptr_t>(layout.data) % kDtypes[dtype].alignment != 0) return false;
    return contiguous || is_permuted(t);
}

// A range of memory, and whether it will be written.
struct Range {
    const char *begin, *end;
    bool is_written;
};

// True if a range that is written overlaps another.
bool written_overlap(std::vector<Range>& ranges) {
    std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    const char *end = nullptr, *end_of_written = nullptr;
    for (const Range& range : ranges) {
        if (range.begin == range.end) continue;
        if (range.begin < (range.is_written ? end : end_of_written)) return true;
        end = std::max(end, range.end);
        if (range.is_written) end_of_written = std::max(end_of_written, range.end);
    }
    return false;
}

}  // namespace
