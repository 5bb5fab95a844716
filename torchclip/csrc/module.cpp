// The CPU kernel: norms, scaling and clamping of many tensors at once.
//
// Tensors are read through DLPack's C exchange table, so nothing of torch is needed to compile this, and one
// build serves every torch that has the table.  The headers are parts of this one translation unit, each
// using those before it:
//
//     room.h        an array that grows
//     ref.h         references to Python objects
//     dlpack.h      the parts of DLPack that are read
//     dtypes.h      a row a dtype; widening and rounding
//     loops.h       the loops over numbers without gaps
//     dispatch.h    the loops of the instruction set in use
//     layout.h      how a tensor lies in memory
//     connection.h  what is needed of torch
//     threads.h     torch's threads, and those of Python
//     parameters.h  whose gradients are meant: lists, modules, generators, optimizers
//     memory.h      the memory of tensors during one call: norms and changes, in chunks
//     gradients.h   the distinct gradients of a call, from collecting to changing them
//     results.h     tensors that a call returns, in memory of torch
//     scalar.h      0-dim tensors
//     functions.h   the functions of torch's names, where nothing is unusual
//     batch.h       the Python type `Batch`, for all other calls
//     rows.h        rows: norms, and units clipped relative to weights
//     examples.h    gradients of single examples: norms, and their clipped sum
#include "batch.h"
#include "examples.h"

namespace {

PyObject* connect(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!count_is(count, 12, 12)) return nullptr;
    auto* api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(args[2], "dlpack_exchange_api"));
    if (api == nullptr) return nullptr;
    while (api != nullptr && api->major != 1) api = api->previous;
    if (api == nullptr || api->dltensor_from_py_object_no_sync == nullptr) {
        PyErr_SetString(PyExc_RuntimeError, "torch offers no DLPack exchange table of version 1");
        return nullptr;
    }
    if (!PyType_Check(args[0]) || !PyType_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "the first two arguments must be the Tensor and Parameter types");
        return nullptr;
    }
    if (!torch.grad.connect(args[0], "grad") || !torch.layout.connect(args[0], "layout") ||
        !torch.is_cpu.connect(args[0], "is_cpu") || !torch.version.connect(args[0], "_version"))
        return nullptr;
    torch.tensor = reinterpret_cast<PyTypeObject*>(new_reference(args[0]));
    torch.parameter = reinterpret_cast<PyTypeObject*>(new_reference(args[1]));
    torch.increment_version.connect(args[3]);
    torch.refuse = new_reference(args[4]);
    torch.get_num_threads.connect(args[5]);
    torch.other_norms = new_reference(args[6]);
    if (!PyTuple_Check(args[7]) || !PyDict_Check(args[10]))
        return PyErr_Format(PyExc_TypeError, "argument 7 must be a tuple, argument 10 a dictionary");
    torch.watchers.resize(size_t(PyTuple_Size(args[7])));
    for (size_t i = 0; i < torch.watchers.size(); ++i) {
        PyObject *function, *argument = nullptr;
        if (!PyArg_ParseTuple(PyTuple_GetItem(args[7], Py_ssize_t(i)), "O|O", &function, &argument)) return nullptr;
        torch.watchers[i].connect(function, argument);
    }
    torch.forward_ad = new_reference(args[10]);
    torch.current_level = PyUnicode_InternFromString("_current_level");
    if (torch.current_level == nullptr) return nullptr;
    torch.is_inference_mode_enabled.connect(args[8]);
    torch.strided = new_reference(args[9]);
    torch.is_neg = PyObject_GetAttrString(args[0], "is_neg");
    torch.is_conj = PyObject_GetAttrString(args[0], "is_conj");
    if (torch.is_neg == nullptr || torch.is_conj == nullptr) return nullptr;
    const Ref library(PyUnicode_AsUTF8String(args[11]));
    if (library == nullptr) return nullptr;
    connect_openmp(PyBytes_AsString(library));
    torch.read = api->dltensor_from_py_object_no_sync;
    torch.make = api->managed_tensor_to_py_object_no_sync;
    torch.allocate = api->managed_tensor_allocator;
    return new_reference(Py_None);
}

PyObject* gradients(PyObject*, PyObject* parameters) { return gather(parameters, true); }
PyObject* tensors(PyObject*, PyObject* iterable) { return gather(iterable, false); }

// The parts of torch's modules that a walk needs.
PyObject* connect_modules(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!count_is(count, 4, 4)) return nullptr;
    for (Py_ssize_t i = 0; i < 3; ++i)
        if (!PyType_Check(args[i])) return PyErr_Format(PyExc_TypeError, "argument %zd must be a type", i);
    auto& names = modules.names;
    PyObject** const wanted[] = {
        &names.parameters,     &names.named_parameters, &names.named_members, &names.named_modules,
        &names.own_parameters, &names.own_modules,      &names.get_attribute,
    };
    constexpr Py_ssize_t kNames = sizeof(wanted) / sizeof(*wanted);
    if (!PyTuple_Check(args[3]) || PyTuple_Size(args[3]) != kNames)
        return PyErr_Format(PyExc_TypeError, "argument 3 must be a tuple of %zd names", kNames);
    for (Py_ssize_t i = 0; i < kNames; ++i) {
        *wanted[i] = new_reference(PyTuple_GetItem(args[3], i));
        if (!PyUnicode_Check(*wanted[i])) return PyErr_Format(PyExc_TypeError, "name %zd must be a string", i);
        PyUnicode_InternInPlace(wanted[i]);
    }
    const std::pair<PyObject**, std::pair<PyObject*, PyObject*>> looked_up[] = {
        {&modules.parameters, {args[0], names.parameters}},
        {&modules.named_parameters, {args[0], names.named_parameters}},
        {&modules.named_members, {args[0], names.named_members}},
        {&modules.named_modules, {args[0], names.named_modules}},
        {&modules.get_attribute, {args[0], names.get_attribute}},
    };
    for (const auto& [place, from] : looked_up) {
        *place = PyObject_GetAttr(from.first, from.second);
        if (*place == nullptr) return nullptr;
    }
    modules.parameters_code = PyObject_GetAttrString(modules.parameters, "__code__");
    if (modules.parameters_code == nullptr) return nullptr;
    if (!modules.mro.connect_of_types("__mro__") || !modules.class_attributes.connect_of_types("__dict__"))
        return nullptr;
    modules.object = reinterpret_cast<PyObject*>(&PyBaseObject_Type);
    modules.parameter_list = reinterpret_cast<PyTypeObject*>(new_reference(args[1]));
    modules.generator = reinterpret_cast<PyTypeObject*>(new_reference(args[2]));
    modules.traverse = reinterpret_cast<traverseproc>(PyType_GetSlot(modules.generator, Py_tp_traverse));
    modules.finalize = reinterpret_cast<destructor>(PyType_GetSlot(modules.generator, Py_tp_finalize));
    if (modules.traverse == nullptr || modules.finalize == nullptr)
        return PyErr_Format(PyExc_RuntimeError, "generators are not what the kernel takes them for");
    modules.module = reinterpret_cast<PyTypeObject*>(new_reference(args[0]));  // last: everything is connected now
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
PyObject* has_threads(PyObject*, PyObject*) { return PyBool_FromLong(openmp.parallel != nullptr); }
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
     "connect(tensor, parameter, exchange_api, increment_version, refuse, get_num_threads, other_norms, "
     "watchers, is_inference_mode_enabled, strided, forward_ad, library): "
     "what the kernel needs of torch"},
    {"connect_modules", function<connect_modules>(), METH_FASTCALL,
     "connect_modules(module, parameter_list, generator): the types, so that modules can be walked"},
    {"clip_grad_norm", function<clip_grad_norm>(), METH_FASTCALL,
     "clip_grad_norm(parameters, max_norm, norm_type, error_if_nonfinite, group): the usual call in one go, or None"},
    {"clip_grad_value", function<clip_grad_value>(), METH_FASTCALL,
     "clip_grad_value(parameters, clip_value): the usual call in one go, or None"},
    {"clip_grad_each", function<clip_grad_each>(), METH_FASTCALL,
     "clip_grad_each(parameters, limit, norm_type, is_rms): each by its own norm or root mean square, likewise"},
    {"clip_grad_adaptive", function<clip_grad_adaptive>(), METH_FASTCALL,
     "clip_grad_adaptive(parameters, clip_factor, eps, norm_type, grad_scale): each unit, likewise"},
    {"clip_per_example", function<clip_per_example>(), METH_FASTCALL,
     "clip_per_example(grads, max_norm): the sums of clipped examples and how many were clipped, likewise"},
    {"gradients", function<gradients>(), METH_O, "gradients(parameters): a Batch of their gradients, or None"},
    {"tensors", function<tensors>(), METH_O, "tensors(tensors): a Batch of the tensors themselves, or None"},
    {"disable", function<disable>(), METH_NOARGS, "disable(): off until the enable() that belongs to it"},
    {"enable", function<enable>(), METH_NOARGS, "enable(): on, once it was called as often as disable()"},
    {"is_enabled", function<is_enabled>(), METH_NOARGS, "is_enabled(): whether it is on"},
    {"has_threads", function<has_threads>(), METH_NOARGS, "has_threads(): whether torch's threads can be used"},
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
