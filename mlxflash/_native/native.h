/* What the parts of the extension share: nothing but their registration. The module uses only Python's
   stable ABI (3.11) and never links to MLX: it sees addresses, byte counts and file descriptors. */
#ifndef MLXFLASH_NATIVE_H
#define MLXFLASH_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

int mlxflash_add_reader(PyObject *module);  /* reader.c: batched reads from files into memory */
int mlxflash_add_kernels(PyObject *module); /* kernels.c: products with weight rows held in memory */

#endif
