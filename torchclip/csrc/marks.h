// Marks of an optimizer's gradients, which show later whether they are still the same.
#pragma once

#include <cstring>
#include <vector>

#include "gradients.h"

namespace {

class Marks {
    struct Mark {
        PyObject* gradient;  // a reference, or a weak one
        long long version;
    };
    std::vector<Mark> marks_;
    bool are_weak_ = true;
    // A number in one of the gradients, as not every change increments a version.
    size_t sampled_ = 0, place_ = 0, size_ = 0;  // the gradient, the position, the number's bytes; no bytes for none
    char sample_[8];

    // Calls each(gradient or None) for every parameter until it returns false; then, or after an error, returns false.
    // User code can run in between.
    template <class Each> static bool visit(PyObject* optimizer, Each each) {
        static PyObject* const param_groups = PyUnicode_InternFromString("param_groups");
        static PyObject* const params = PyUnicode_InternFromString("params");
        if (optimizer == Py_None) return true;
        const Ref groups(PyObject_GetAttr(optimizer, param_groups));
        if (groups == nullptr) return PyErr_Format(PyExc_AttributeError, "the optimizer has no param_groups"), false;
        return collect_any(groups, [&](const Ref& group) {
            const Ref parameters(PyObject_GetItem(group, params));
            if (parameters == nullptr) return PyErr_Format(PyExc_KeyError, "a parameter group lacks params"), false;
            return collect_any(parameters, [&](const Ref& parameter) {
                const Ref gradient = get_grad(parameter);
                return gradient != nullptr && each(gradient);
            });
        });
    }

    static bool read_flat(PyObject* tensor, Layout& layout) {
        DLTensor t;
        Axes axes;
        return is_plain(tensor) && (!has_refused || is_dense_on_host(tensor)) && describe(tensor, t) &&
               read_layout(t, layout, axes) && layout.axes == 0;
    }

    // False, with an error set, for an error.
    bool add(PyObject* gradient) {
        if (gradient == Py_None) return true;
        const long long version = version_of(gradient);
        Ref kept = are_weak_ ? Ref(PyWeakref_NewRef(gradient, nullptr)) : Ref::to(gradient);
        if (kept == nullptr) return false;
        marks_.push_back({kept, version});
        kept.release();
        return true;
    }

    // Takes a number of the gradient that was added last, unless there is one.
    void sample() {
        Layout layout;
        if (size_ != 0 || marks_.empty()) return;
        PyObject* const gradient = marked(marks_.size() - 1);
        if (!read_flat(gradient, layout)) return;
        const DtypeFacts& dtype = kDtypes[layout.dtype];
        const size_t size = dtype.item / dtype.parts, end = layout.count * dtype.item;
        for (size_t place = 0; place < end; place += size) {
            uint64_t bits = 0;
            std::memcpy(&bits, layout.data + place, size);
            if (!is_telling(bits, dtype)) continue;
            sampled_ = marks_.size() - 1;
            place_ = place;
            size_ = size;
            std::memcpy(sample_, layout.data + place, size);
            return;
        }
    }

    // Whether a gradient is the same, given the place from which on to look for it.  Of the parameters some may have
    // had none, or have none any more.
    bool is_same(size_t& place, PyObject* gradient) const {
        if (gradient == Py_None) return true;  // no gradient
        size_t i = place;
        while (i < marks_.size() && marked(i) != gradient) ++i;
        if (i == marks_.size()) return false;
        place = i;
        const long long version = marks_[i].version;
        if (version_of(gradient) != version) return false;
        if (size_ == 0 || i != sampled_) return true;
        Layout layout;
        return read_flat(gradient, layout) && place_ + size_ <= layout.count * kDtypes[layout.dtype].item &&
               std::memcmp(layout.data + place_, sample_, size_) == 0;
    }

    PyObject* marked(size_t i) const {
        return are_weak_ ? PyWeakref_GetObject(marks_[i].gradient) : marks_[i].gradient;
    }

  public:
    Marks() = default;
    Marks(const Marks&) = delete;
    Marks& operator=(const Marks&) = delete;
    ~Marks() { clear(); }

    // Takes note of nothing.  Giving a reference back can run user code.
    void clear() {
        size_ = 0;
        while (!marks_.empty()) {
            PyObject* const gradient = marks_.back().gradient;
            marks_.pop_back();
            Py_XDECREF(gradient);
        }
    }

    // Notes all gradients of an optimizer, and a number in one of them if so wished.  They are kept alive unless the
    // references are weak, which cost more.  False, with an error set, for an error.
    bool take(PyObject* optimizer, bool sampled, bool are_weak) {
        clear();
        are_weak_ = are_weak;
        return visit(optimizer, [&](PyObject* gradient) {
            if (!add(gradient)) return false;
            if (sampled) sample();
            return true;
        });
    }

    // Likewise gradients that were collected from an optimizer, and a number in one of them.
    bool take(PyObject* const* begin, PyObject* const* end, bool are_weak) {
        clear();
        are_weak_ = are_weak;
        for (; begin < end; ++begin) {
            if (!add(*begin)) return false;
            sample();
        }
        return true;
    }

    // Whether the gradients are as they were; false also for an error.
    bool are_same(PyObject* optimizer) const {
        size_t place = 0;
        return visit(optimizer, [&](PyObject* gradient) { return is_same(place, gradient); });
    }

    // A list of the gradients that have changed; null after an error.
    PyObject* changed(PyObject* optimizer) const {
        PyObject* const found = PyList_New(0);
        size_t place = 0;
        const auto add = [&](PyObject* gradient) {
            return is_same(place, gradient) || PyList_Append(found, gradient) == 0;
        };
        if (found != nullptr && visit(optimizer, add)) return found;
        Py_XDECREF(found);
        return nullptr;
    }
};

}  // namespace
