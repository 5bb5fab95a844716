// How a tensor lies in memory: a flat run of elements, or a grid with gaps between them.
#pragma once

#include <algorithm>
#include <vector>

#include "array.h"
#include "dtypes.h"

namespace {

struct Axis {
    int64_t size, stride;  // in elements
};
constexpr int32_t kMaxAxes = 64;

struct Layout {
    char* data;           // of the first element
    size_t count;         // elements
    uint32_t first_axis;  // among those of all grids
    uint16_t axes;        // of the grid; 0 for a flat run
    uint16_t dtype;       // row of the table
};

using Axes = Array<Axis, 16>;  // of several grids, one after the other

// The axes of a tensor with gaps between its elements, or with axes in another order, from the narrowest stride to the
// widest; none if it is a flat run after all.  False if elements may overlap.
bool read_grid(const DLTensor& t, Layout& layout, Axes& all) {
    Axis axes[kMaxAxes];
    size_t count = 0;
    for (int32_t d = 0; d < t.ndim; ++d)
        if (t.shape[d] != 1) axes[count++] = {t.shape[d], t.strides[d]};
    std::sort(axes, axes + count, [](Axis a, Axis b) { return a.stride < b.stride; });
    int64_t reach = 0;  // offset of the last element of the axes so far
    size_t last = 0;
    for (size_t i = 0; i < count; ++i) {
        const Axis axis = axes[i];
        if (axis.stride <= reach) return false;
        reach += (axis.size - 1) * axis.stride;
        if (i == 0) continue;
        if (axis.stride == axes[last].size * axes[last].stride)
            axes[last].size *= axis.size;
        else
            axes[++last] = axis;
    }
    if (last == 0 && axes[0].stride == 1) return true;
    layout.first_axis = uint32_t(all.size());
    layout.axes = uint16_t(last + 1);
    for (size_t i = 0; i <= last; ++i) all.push_back(axes[i]);
    return true;
}

// Computes `layout` for a tensor that the kernel can handle, and adds the axes of a grid.  False for others: on another
// device, of another dtype, not aligned, or with elements that may overlap.
INLINE bool read_layout(const DLTensor& t, Layout& layout, Axes& axes) {
    const size_t dtype = find_dtype(t);
    if (dtype == kDtypeCount || t.device_type != kCPU || t.ndim > kMaxAxes) return false;
    if (t.strides == nullptr && t.ndim > 0) return false;
    size_t count = 1;
    bool contiguous = true;
    for (int32_t d = t.ndim - 1; d >= 0; --d) {
        contiguous &= t.shape[d] == 1 || t.strides[d] == int64_t(count);
        count *= size_t(t.shape[d]);
    }
    layout = {static_cast<char*>(t.data) + t.byte_offset, count, 0, 0, uint16_t(dtype)};
    if (count == 0) return true;
    if (t.data == nullptr || reinterpret_cast<uintptr_t>(layout.data) % kDtypes[dtype].alignment != 0) return false;
    return contiguous || read_grid(t, layout, axes);
}

// Bytes from the first element to the end of the last.
size_t span(const Layout& layout, const Axis* axes) {
    const size_t item = kDtypes[layout.dtype].item;
    if (layout.axes == 0 || layout.count == 0) return layout.count * item;
    int64_t reach = 0;
    for (uint32_t d = 0; d < layout.axes; ++d) reach += (axes[d].size - 1) * axes[d].stride;
    return size_t(reach + 1) * item;
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

// Copies `n` elements between a buffer without gaps and memory with a stride.
template <class Item> void copy_strided(char* grid, char* buffer, size_t n, int64_t stride, bool gather) {
    for (size_t i = 0; i < n; ++i) {
        char* const there = grid + int64_t(i) * stride * int64_t(sizeof(Item));
        char* const here = buffer + i * sizeof(Item);
        gather ? std::memcpy(here, there, sizeof(Item)) : std::memcpy(there, here, sizeof(Item));
    }
}

void copy_run(char* grid, char* buffer, size_t n, int64_t stride, size_t item, bool gather) {
    if (stride == 1) {
        gather ? std::memcpy(buffer, grid, n * item) : std::memcpy(grid, buffer, n * item);
        return;
    }
    switch (item) {
        case 2: return copy_strided<uint16_t>(grid, buffer, n, stride, gather);
        case 4: return copy_strided<uint32_t>(grid, buffer, n, stride, gather);
        case 8: return copy_strided<uint64_t>(grid, buffer, n, stride, gather);
        default: return copy_strided<uint64_t[2]>(grid, buffer, n, stride, gather);
    }
}

// Copies elements [start, start + n) of a grid into the buffer, or back.
void copy_grid(const Layout& layout, const Axis* axes, size_t start, size_t n, char* buffer, bool gather) {
    const size_t item = kDtypes[layout.dtype].item;
    while (n > 0) {
        int64_t offset = 0;
        size_t index = start;
        for (uint32_t d = 0; d < layout.axes; ++d) {
            offset += int64_t(index % size_t(axes[d].size)) * axes[d].stride;
            index /= size_t(axes[d].size);
        }
        const size_t run = std::min(n, size_t(axes[0].size) - start % size_t(axes[0].size));
        copy_run(layout.data + offset * int64_t(item), buffer, run, axes[0].stride, item, gather);
        buffer += run * item;
        start += run;
        n -= run;
    }
}

}  // namespace
