// The short way: the usual call in one go, with everything on the stack.
//
// In a training step the backward pass has put its own code and data into the processor's caches, so that every object,
// and every crossing between Python and here, costs several times what it costs alone.  What is not usual is found
// before anything is changed and left to the full way, which gives the same to the bit.
//
// User code can run where a gradient is read from its parameter, where a reference to a parameter is given back, and
// wherever Python allocates (finalizers).  So first references to all gradients are taken, and those to the parameters
// given back; then, without any of Python, the memory is read, measured and changed; autograd is told last.
#pragma once

#include "modules.h"
#include "scalar.h"
#include "snapshot.h"

namespace {

// Of all gradients; up to here one thread is right, and not to let other Python threads run meanwhile.
constexpr size_t kMostElements = 64 * 1024;
constexpr double kEps = 1e-6;  // what torch adds to the norm

// Of the gradient that was read first in the last call: probably that of the next call, too.
size_t last_dtype = 0;

// Has the beginning of a function fetched into the second cache.
template <class Code> void fetch(Code* function, size_t bytes) {
#ifdef __GNUC__
    const uintptr_t code = reinterpret_cast<uintptr_t>(function);
    for (size_t byte = 0; byte < bytes; byte += kCacheLine)
        __builtin_prefetch(reinterpret_cast<const void*>(code + byte), 0, 2);
#endif
}

// What a call comes to when it has looked through its parameters: reading tensors, and some loops.  Left alone, the
// processor would wait for each line of that code when it gets there.
template <class... Loop> void fetch_code(Loop Loops::*... loops) {
    fetch(torch.read, 2 * kCacheLine);
    (fetch(short_loops_of[last_dtype].*loops, 1024), ...);
}

// Whether an optimizer has nothing that a GradScaler sets.
bool is_unscaled(PyObject* optimizer) {
    static PyObject* const of_scaler[] = {PyUnicode_InternFromString("grad_scale"),
                                          PyUnicode_InternFromString("found_inf")};
    const Attribute attributes(attributes_of(optimizer));
    return attributes != nullptr && !has_own(attributes, of_scaler[0]) && !has_own(attributes, of_scaler[1]);
}

// The usual optimizer: what a GradScaler sets is not there, and no group brings its own threshold along.
bool collect_of_optimizer(PyObject* optimizer, Items& items) {
    static PyObject* const param_groups = PyUnicode_InternFromString("param_groups");
    static PyObject* const params = PyUnicode_InternFromString("params");
    static PyObject* const unusual[] = {PyUnicode_InternFromString("grad_scale"),
                                        PyUnicode_InternFromString("found_inf")};
    static PyObject* const max_norm = PyUnicode_InternFromString("max_norm");
    const Attribute attributes(attributes_of(optimizer));
    if (attributes == nullptr || has_own(attributes, unusual[0]) || has_own(attributes, unusual[1])) return false;
    const Attribute groups(own_attribute(attributes, param_groups));
    if (groups == nullptr || !PyList_CheckExact(groups)) return false;
    for (Py_ssize_t i = 0; i < PyList_Size(groups); ++i) {
        const Attribute group(new_reference(PyList_GetItem(groups, i)));
        if (!PyDict_CheckExact(group) || has_own(group, max_norm)) return false;
        const Attribute parameters(own_attribute(group, params));
        if (parameters == nullptr || !PyList_CheckExact(parameters) || !collect(parameters, items)) return false;
    }
    return true;
}

// The gradients of a usual call.
class Gradients {
    Items tensors_;
    Layout layouts_[kMostItems];
    int facts_ = 0;  // of dtypes

    static bool read_flat(PyObject* tensor, Layout& layout) {
        DLTensor t;
        Axis axes[kMaxAxes];
        return describe(tensor, t) && read_layout(t, layout, axes) && layout.axes == 0;
    }

    const Loops& loops(const Layout& layout) const { return short_loops_of[layout.dtype]; }
    size_t numbers(const Layout& layout, size_t elements) const { return elements * kDtypes[layout.dtype].parts; }

  public:
    bool is_double() const { return (facts_ & kDouble) != 0; }
    bool is_complex() const { return (facts_ & kAnyComplex) != 0; }

    // All that makes a call usual.  False for any other, where nothing was changed; with an error set if it was raised
    // by user code, where a gradient was read.
    bool take(PyObject* parameters) {
        Items items;
        // A list, tuple, module or fresh generator of plain tensors.
        return is_usable() && collect(parameters, items) && take(items);
    }

    // Likewise of an optimizer: of the parameters of all its groups, if all of them are clipped together.
    bool take_of_optimizer(PyObject* optimizer) {
        Items items;
        return is_usable() && collect_of_optimizer(optimizer, items) && take(items);
    }

    bool take(Items& parameters) {
        for (PyObject* parameter : parameters) {
            PyObject* const grad = get_grad(parameter);
            if (grad == nullptr) return false;
            if (grad == Py_None)
                Py_DECREF(grad);
            else if (!tensors_.take(grad))
                return false;
        }
        parameters.clear();
        tensors_.drop_repeated();  // also those of a parameter that is there twice
        if (tensors_.size() == 0) return false;
        for (PyObject* tensor : tensors_)
            if (!is_plain(tensor) || !may_describe(tensor)) return false;
        size_t elements = 0;
        for (size_t i = 0; i < tensors_.size(); ++i) {
            if (!read_flat(tensors_.begin()[i], layouts_[i]))
                return false;  // plain, dense, in host memory, of our dtypes
            elements += layouts_[i].count;
            const DtypeFacts& dtype = kDtypes[layouts_[i].dtype];
            facts_ |= (dtype.is_double() ? kDouble : 0) | (dtype.is_complex() ? kAnyComplex : 0);
        }
        last_dtype = layouts_[0].dtype;
        return elements <= kMostElements;
    }

    // In the order of the full way: of the chunks of each tensor, one after the other.
    double sum_squares() const {
        double sum = kAbsent;
        for (size_t i = 0; i < tensors_.size(); ++i) {
            const Layout& layout = layouts_[i];
            const size_t item = kDtypes[layout.dtype].item;
            for (size_t start = 0; start < layout.count; start += kChunk) {
                const size_t n = numbers(layout, std::min(kChunk, layout.count - start));
                sum = join(sum, loops(layout).sum_squares(layout.data + start * item, n, 1.0), false);
            }
        }
        return sum;
    }

    // Changes all elements, and tells autograd if there was anything to change.  False with an error set for an error.
    bool change(Write Loops::* loop, double number) {
        bool written = false;
        for (size_t i = 0; i < tensors_.size(); ++i)
            written |= (loops(layouts_[i]).*loop)(layouts_[i].data, numbers(layouts_[i], layouts_[i].count), number);
        return !written || tell_autograd(new_tuple());
    }

  private:
    PyObject* new_tuple() const {
        PyObject* const tuple = PyTuple_New(Py_ssize_t(tensors_.size()));
        for (size_t i = 0; i < tensors_.size() && tuple != nullptr; ++i)
            PyTuple_SetItem(tuple, Py_ssize_t(i), new_reference(tensors_.begin()[i]));
        return tuple;
    }
};

// None, for the full way to be taken, if no error is set.
PyObject* unusual() { return PyErr_Occurred() == nullptr ? new_reference(Py_None) : nullptr; }

// A threshold that is a float or an int; anything else gives -1, which is none.
double read_threshold(PyObject* object) {
    if (PyFloat_CheckExact(object)) return PyFloat_AsDouble(object);
    if (!PyLong_CheckExact(object)) return -1;
    const double value = PyLong_AsDouble(object);
    PyErr_Clear();
    return value;
}

// As torchclip._core.scalars.clip_coef has it.
double clip_coef(double max_norm, double norm) {
    if (max_norm == std::numeric_limits<double>::infinity()) return 1.0;
    return std::min(1.0, max_norm / (norm + kEps));
}

// What clipping by the norm found and did.
struct Clipped {
    double norm, coef;
};

// Scales gradients by their norm.  False for an unusual norm, with nothing changed, or with an error set.  Inlined:
// a function of its own is one more that is not in the caches.
INLINE bool clip(Gradients& gradients, double max_norm, Clipped& clipped) {
    const double sum = gradients.sum_squares();
    if (!is_regular(sum)) return false;
    clipped.norm = std::sqrt(sum);
    clipped.coef = clip_coef(max_norm, clipped.norm);
    return clipped.coef == 1.0 || gradients.change(&Loops::scale, clipped.coef);
}

// clip_grad_norm(parameters, max_norm, norm_type, error_if_nonfinite, group)
PyObject* clip_grad_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!count_is(count, 5, 5)) return nullptr;
    const double max_norm = read_threshold(args[1]), p = read_threshold(args[2]);
    const bool is_flag = args[3] == Py_False || args[3] == Py_True;  // a norm that is not finite is not usual
    if (!(max_norm >= 0) || p != 2 || !is_flag || args[4] != Py_None) return unusual();
    fetch_code(&Loops::sum_squares, &Loops::scale);
    Gradients gradients;
    Clipped clipped;
    if (!gradients.take(args[0]) || !clip(gradients, max_norm, clipped)) return unusual();
    use_up(args[0]);
    return new_scalar(clipped.norm, gradients.is_double());
}

// Clips the gradients of an optimizer.  False for an unusual call, with nothing changed, or with an error set.
bool clip_optimizer(PyObject* optimizer, double max_norm, Clipped& clipped) {
    if (!(max_norm >= 0)) return false;
    fetch_code(&Loops::sum_squares, &Loops::scale);
    Gradients gradients;
    return gradients.take_of_optimizer(optimizer) && clip(gradients, max_norm, clipped);
}

// clip_step(optimizer, max_norm)
PyObject* clip_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!count_is(count, 2, 2)) return nullptr;
    Clipped clipped;
    if (!clip_optimizer(args[0], read_threshold(args[1]), clipped)) return unusual();
    return Py_BuildValue("(dd)", clipped.norm, clipped.coef);
}

// clip_grad_value(parameters, clip_value)
PyObject* clip_grad_value(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!count_is(count, 2, 2)) return nullptr;
    const double clip_value = read_threshold(args[1]);
    if (!(clip_value >= 0)) return unusual();
    fetch_code(&Loops::clamp);
    Gradients gradients;
    if (!gradients.take(args[0]) || gradients.is_complex()) return unusual();
    if (!gradients.change(&Loops::clamp, clip_value)) return nullptr;
    use_up(args[0]);
    return new_reference(Py_True);
}

}  // namespace
