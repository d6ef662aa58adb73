"""Page-locked memory without a GPU: kernel bodies compiled for the CPU behind a stand-in for the driver and for MLX's
way to run kernels. What it cannot show is what a GPU does; `open_bus` tries that where there is one.
"""

import ctypes
import shutil
import subprocess
import sys

import numpy as np
import pytest

from build import BACKENDS, Shape, load, prompt_of

mx = pytest.importorskip("mlx.core")
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from mlxflash.backends import pagelocked  # noqa: E402
from mlxflash.backends.cuda import DeviceBackend  # noqa: E402
from mlxflash.backends.pagelocked import RESULT_BODY, ROWS_BODY, STORE_BODY, Bus, _works, open_bus  # noqa: E402
from test_exactness import assert_exact  # noqa: E402

SOURCE = """
#include <stddef.h>
#include <stdint.h>
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct Dim { unsigned x; };
#define PLACE Dim blockIdx, Dim blockDim, Dim threadIdx
static void rows_body(const int64_t* addresses, const int* addresses_shape, int PIECES, uint32_t* rows, PLACE) {
%s}
static void store_body(const int64_t* addresses, const int* addresses_shape, int PIECES, const uint32_t* rows,
                       uint32_t* done, PLACE) {
%s}
static void result_body(const float* values, const int* values_shape, const int64_t* address, uint32_t* done, PLACE) {
%s}
#define LAUNCH for (unsigned b = 0; b * t < n; b++) for (unsigned i = 0; i < t; i++)
extern "C" void launch_rows(const int64_t* a, const int* shape, int pieces, uint32_t* out, unsigned n, unsigned t) {
    LAUNCH rows_body(a, shape, pieces, out, Dim{b}, Dim{t}, Dim{i});
}
extern "C" void launch_store(const int64_t* a, const int* shape, int pieces, const uint32_t* rows, uint32_t* out,
                             unsigned n, unsigned t) {
    LAUNCH store_body(a, shape, pieces, rows, out, Dim{b}, Dim{t}, Dim{i});
}
extern "C" void launch_result(const float* v, const int* shape, const int64_t* a, uint32_t* out, unsigned n, unsigned t) {
    LAUNCH result_body(v, shape, a, out, Dim{b}, Dim{t}, Dim{i});
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def bodies(tmp_path_factory):
    """The kernels' bodies as functions."""
    folder = tmp_path_factory.mktemp("bodies")
    (folder / "bodies.cpp").write_text(SOURCE % (ROWS_BODY, STORE_BODY, RESULT_BODY))
    compiler = [shutil.which("c++")] if shutil.which("c++") else [sys.executable, "-m", "ziglang", "c++"]
    command = [*compiler, "-O1", "-shared", "-fPIC", "-o", folder / "bodies.so", folder / "bodies.cpp"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"no compiler: {done.stderr[:200]}")
    return ctypes.CDLL(str(folder / "bodies.so"))


class Driver:
    """Locks anything below its limit; device addresses are the host's."""

    def __init__(self):
        self.locked, self.limit = {}, 1 << 40

    def cuMemHostRegister_v2(self, address, size, flags):  # noqa: N802
        assert flags == 3
        if sum(self.locked.values()) + size.value > self.limit:
            return 2
        assert address.value not in self.locked
        self.locked[address.value] = size.value
        return 0

    def cuMemHostGetDevicePointer_v2(self, out, address, flags):  # noqa: N802
        assert address.value in self.locked
        out._obj.value = address.value
        return 0

    def cuMemHostUnregister(self, address):  # noqa: N802
        del self.locked[address.value]
        return 0


@pytest.fixture
def bus(bodies, monkeypatch):
    def cuda_kernel(name, input_names, output_names, source):
        def run(inputs, grid, threadgroup, output_shapes, output_dtypes, template=()):
            mx.eval(inputs)
            given = [np.array(a) for a in inputs]
            dtype = {mx.uint8: np.uint8, mx.uint16: np.uint16, mx.uint32: np.uint32}[output_dtypes[0]]
            out = np.empty(output_shapes[0], dtype)
            shape = np.array(given[0].shape, np.int32)
            pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (given[0], shape, given[-1], out)]
            pieces = dict(template).get("PIECES")
            if source == ROWS_BODY:
                bodies.launch_rows(*pointers[:2], pieces, pointers[3], grid[0], threadgroup[0])
            elif source == STORE_BODY:
                bodies.launch_store(*pointers[:2], pieces, *pointers[2:], grid[0], threadgroup[0])
            else:
                bodies.launch_result(*pointers, grid[0], threadgroup[0])
            return [mx.array(out)]

        return run

    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
    return Bus(Driver())


def test_a_bus_that_works(bus):
    assert _works(bus)


def test_a_bus_that_does_not_is_noticed(bus, monkeypatch):
    rows = bus.rows
    bus.rows = lambda memory, slots, *more: rows(memory, slots[::-1], *more)
    assert not _works(bus)
    bus.rows = rows
    result = bus.result
    bus.result = lambda y: result(y + 1)
    assert not _works(bus)


def test_memory_is_unlocked_with_its_owner(bus):
    class Owner:
        pass

    owner, memory = Owner(), pagelocked.host_memory(8192)
    assert bus.lock(memory, owner)
    assert bus.rows(memory, np.arange(3), 1024, 4) is not None
    assert bus.rows(memory, np.arange(3), 1000, 4) is None
    del owner
    assert bus._driver.locked == {}
    assert bus.rows(memory, np.arange(3), 1024, 4) is None
    bus._driver.limit = 0
    other = Owner()
    assert not bus.lock(memory, other)


@pytest.mark.parametrize("limit", [1 << 40, 200_000])  # the second is too little for the tier, enough for results
@pytest.mark.parametrize(("dtype", "bits"), [("float32", None), ("float16", 4)])
def test_the_law_of_exactness(library, bus, monkeypatch, dtype, bits, limit):
    bus._driver.limit = limit
    monkeypatch.setitem(BACKENDS, "bus", lambda: DeviceBackend(mx.cpu, bus, "a stand-in"))
    path = library.bundle(Shape(dtype=dtype), bits)
    with load(path, "bus", "part", host_memory=200_000) as model:
        model(mx.array([prompt_of(20)]), cache=make_prompt_cache(model))
        assert_exact(model, path, prompt_of(12))
        locked = sum(bus._driver.locked.values())
        assert (locked > 200_000) == (limit > 200_000)
        assert model.flash.backend.traffic.updates > 10
        assert model.flash.backend.traffic.tier_hits > 10
        assert "by a stand-in" in model.flash.describe()


def test_why_there_is_no_bus():
    bus, why = open_bus()
    if bus is None:
        assert why.startswith("plain copies: ")
