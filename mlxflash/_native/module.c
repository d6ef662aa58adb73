/* The extension's front door: registers the reader and the kernels, and does nothing else. */
#include "native.h"

static int exec_module(PyObject *module) {
    if (mlxflash_add_reader(module) < 0) return -1;
    if (mlxflash_add_kernels(module) < 0) return -1;
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, exec_module}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_core", "Native reader and CPU kernels of mlxflash.", 0, NULL, slots,
    NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
