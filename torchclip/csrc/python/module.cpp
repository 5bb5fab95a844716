// The CPU kernel: norms, scaling and clamping of many tensors at once.
//
// Tensors are read through DLPack's C exchange table, so nothing of torch is needed to compile this, and one build
// serves every torch that has the table.  The headers are parts of this one translation unit.  In ../arithmetic, which
// knows nothing of Python, from the bottom up:
//
//     array.h             an array that grows
//     dlpack.h            the parts of DLPack that are used
//     dtypes.h            a row a dtype; widening and rounding
//     loops.h             the loops over numbers without gaps
//     instruction_sets.h  the loops of the instruction set in use
//     layout.h            how a tensor lies in memory
//     threads.h           torch's threads
//     memory.h            the memory of tensors: norms and changes, in chunks
//     rows.h              rows: norms, and units clipped relative to weights
//     examples.h          gradients of single examples: norms, and their clipped sum
//
// and here:
//
//     references.h        references to Python objects
//     calls.h             how calls end, and their arguments
//     torch.h             what is needed of torch
//     parameters.h        whose gradients are meant: lists, modules, generators
//     tensors.h           the distinct tensors of a call, and access to their memory
//     new_tensors.h       tensors that a call returns
//     functions.h         the functions of torch's names, where nothing is unusual
//     batch.h             the Python type `Batch`, for all other calls
#include "batch.h"

namespace {

// connect(tensor, parameter, exchange_api, increment_version, get_num_threads, other_norms, checks,
//         is_inference_mode_enabled, strided, library)
//
// `other_norms` takes tensors, an order other than 1, 2 and inf, and whether to return a list with the norm of each.
// `checks` are _core/memory.py's; the kernel takes nothing while one fails.
// `library` is the path of a library that was linked to torch's OpenMP.
PyObject* connect(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (expect_count(count, 10) != kDone) return nullptr;
    auto* exchange = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(args[2], "dlpack_exchange_api"));
    if (exchange == nullptr) return nullptr;
    while (exchange != nullptr && exchange->major != 1) exchange = exchange->previous;
    if (exchange == nullptr || exchange->dltensor_from_py_object_no_sync == nullptr ||
        exchange->managed_tensor_to_py_object_no_sync == nullptr || exchange->managed_tensor_allocator == nullptr)
        return PyErr_Format(PyExc_RuntimeError, "torch offers no DLPack exchange table of version 1");
    if (!PyType_Check(args[0]) || !PyType_Check(args[1]))
        return PyErr_Format(PyExc_TypeError, "the first two arguments must be the Tensor and Parameter types");
    auto made = std::make_unique<Torch>();
    made->exchange = exchange;
    made->tensor = reinterpret_cast<PyTypeObject*>(new_reference(args[0]));
    made->parameter = reinterpret_cast<PyTypeObject*>(new_reference(args[1]));
    if (made->grad.connect(args[0], "grad") != kDone || made->layout.connect(args[0], "layout") != kDone ||
        made->is_cpu.connect(args[0], "is_cpu") != kDone || made->version.connect(args[0], "_version") != kDone)
        return nullptr;
    made->increment_version.connect(args[3]);
    made->get_num_threads.connect(args[4]);
    made->other_norms = new_reference(args[5]);
    if (!PyTuple_Check(args[6])) return PyErr_Format(PyExc_TypeError, "the checks must be a tuple");
    for (Py_ssize_t i = 0; i < PyTuple_Size(args[6]); ++i) {
        PyObject *function, *argument, *idle, *otherwise;
        if (!PyArg_ParseTuple(PyTuple_GetItem(args[6], i), "OOOO", &function, &argument, &idle, &otherwise))
            return nullptr;
        Check check{{}, new_reference(idle), new_reference(otherwise)};
        check.function.connect(function, argument == Py_None ? nullptr : argument);
        made->checks.push_back(check);
    }
    made->is_inference_mode_enabled.connect(args[7]);
    made->strided = new_reference(args[8]);
    made->is_neg = PyObject_GetAttrString(args[0], "is_neg");
    if (made->is_neg == nullptr) return nullptr;
    made->is_conj = PyObject_GetAttrString(args[0], "is_conj");
    if (made->is_conj == nullptr) return nullptr;
    const Ref library(PyUnicode_AsUTF8String(args[9]));
    if (library == nullptr) return nullptr;
    connect_openmp(PyBytes_AsString(library));
    connection = made.release();
    return new_reference(Py_None);
}

PyObject* disable(PyObject*, PyObject*) {
    ++disabled_count;
    return new_reference(Py_None);
}
PyObject* enable(PyObject*, PyObject*) {
    if (disabled_count == 0) return PyErr_Format(PyExc_RuntimeError, "enable() without a disable() before it");
    --disabled_count;
    return new_reference(Py_None);
}
PyObject* get_has_threads(PyObject*, PyObject*) { return PyBool_FromLong(has_threads()); }
PyObject* is_enabled(PyObject*, PyObject*) { return PyBool_FromLong(disabled_count == 0); }

PyObject* get_instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString(instruction_set); }

PyObject* select_instruction_set(PyObject*, PyObject* name) {
    const char* const text = name == Py_None ? nullptr : PyUnicode_AsUTF8AndSize(name, nullptr);
    if (text == nullptr && name != Py_None) return nullptr;
    if (use_instruction_set(text)) return new_reference(Py_None);
    return PyErr_Format(PyExc_ValueError, "this machine has no instruction set %R", name);
}

PyMethodDef module_methods[] = {
    {"connect", function<connect>(), METH_FASTCALL,
     "connect(tensor, parameter, exchange_api, increment_version, get_num_threads, other_norms, checks, "
     "is_inference_mode_enabled, strided, library): what the kernel needs of torch"},
    {"connect_modules", function<connect_modules>(), METH_FASTCALL,
     "connect_modules(module, parameter_list, generator, names): so that modules can be walked"},
    {"clip_grad_norm", function<clip_grad_norm>(), METH_FASTCALL,
     "clip_grad_norm(parameters, max_norm, norm_type, error_if_nonfinite, group): the usual call in one go, or None"},
    {"clip_grad_value", function<clip_grad_value>(), METH_FASTCALL,
     "clip_grad_value(parameters, clip_value): the usual call in one go, or None"},
    {"clip_grad_each", function<clip_grad_each>(), METH_FASTCALL,
     "clip_grad_each(parameters, limit, norm_type, is_rms): each by its own norm or root mean square; as above"},
    {"clip_grad_adaptive", function<clip_grad_adaptive>(), METH_FASTCALL,
     "clip_grad_adaptive(parameters, clip_factor, eps, norm_type, grad_scale): each unit; as above"},
    {"clip_per_example", function<clip_per_example>(), METH_FASTCALL,
     "clip_per_example(grads, max_norm): the sums of clipped examples and how many were clipped; as above"},
    {"gradients", function<gradients>(), METH_O, "gradients(parameters): a Batch of their gradients, or None"},
    {"measured", function<measured>(), METH_FASTCALL,
     "measured(parameters, norm_type, each): that Batch and its norm, or the norms of each, or None"},
    {"tensors", function<tensors>(), METH_O, "tensors(tensors): a Batch of the tensors themselves, or None"},
    {"disable", function<disable>(), METH_NOARGS, "disable(): off until the enable() that belongs to it"},
    {"enable", function<enable>(), METH_NOARGS, "enable(): on, once it was called as often as disable()"},
    {"fingerprint", function<fingerprint>(), METH_O, "fingerprint(parameters): eight bytes for each gradient"},
    {"is_enabled", function<is_enabled>(), METH_NOARGS, "is_enabled(): whether it is on"},
    {"has_threads", function<get_has_threads>(), METH_NOARGS, "has_threads(): whether torch's threads can be used"},
    {"instruction_set", function<get_instruction_set>(), METH_NOARGS, "instruction_set(): the one in use"},
    {"select", function<select_instruction_set>(), METH_O,
     "select(instruction_set): use another one, to compare; None for the best"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module_definition = {PyModuleDef_HEAD_INIT,
                                 "_kernel",
                                 "Norms, scaling and clamping of many tensors at once.",
                                 -1,
                                 module_methods,
                                 nullptr,
                                 nullptr,
                                 nullptr,
                                 nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__kernel() {
    use_instruction_set(nullptr);
    batch_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&batch_spec));
    PyObject* const module = PyModule_Create(&module_definition);
    if (batch_type == nullptr || module == nullptr) return nullptr;
    Py_INCREF(batch_type);
    if (PyModule_AddObject(module, "Batch", reinterpret_cast<PyObject*>(batch_type)) < 0) return nullptr;
    return module;
}
