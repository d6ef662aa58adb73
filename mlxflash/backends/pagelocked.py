"""Page-locked host memory that a GPU reads and writes itself, which MLX does not give.

What MLX makes from a host array is managed memory, which moves over the bus page fault by page fault. Here memory of
ours is locked with the driver's own call, and kernels of ours, run by MLX in its stream, copy rows out of it to a new
array and small results into it: whole lines, at the bus's speed, no copy on the host.

Nothing of this has run on a GPU yet: `open_bus` tries every part on the machine at hand before it is used, and says
why where it is not. Kernels were compiled with NVRTC and their bodies run on a CPU (tests/test_pagelocked.py).
"""

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from mlxflash.pool import host_memory

PIECE = 16  # bytes that one thread copies; records are multiples of it
THREADS = 256
RESULTS = 4  # buffers per size of result that take turns; at most two results are under way
PORTABLE, MAPPED = 1, 2  # CU_MEMHOSTREGISTER_*

ROWS_BODY = """
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const size_t row = i / PIECES;
    if (row < (size_t)addresses_shape[0]) {
        const uint4* from = reinterpret_cast<const uint4*>(addresses[row]);
        reinterpret_cast<uint4*>(rows)[i] = from[i % PIECES];
    }
"""

STORE_BODY = """
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const size_t row = i / PIECES;
    if (row < (size_t)addresses_shape[0]) {
        reinterpret_cast<uint4*>(addresses[row])[i % PIECES] = reinterpret_cast<const uint4*>(rows)[i];
    }
    if (i == 0) {
        done[0] = 1;
    }
"""

RESULT_BODY = """
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (size_t)values_shape[0]) {
        reinterpret_cast<float*>(address[0])[i] = values[i];
    }
    if (i == 0) {
        done[0] = 1;
    }
"""


class Bus:
    """Host memory and the GPU's way to it. `lock` makes memory known; other memory is not for `rows`."""

    def __init__(self, driver: Any):
        self._driver = driver
        self._bases: dict[int, int] = {}  # host address of locked memory to the device's
        self._results: dict[int, list[np.ndarray]] = {}
        self._turn = 0
        make: Any = mx.fast.cuda_kernel
        self._rows_kernel = make("mlxflash_rows", ["addresses"], ["rows"], ROWS_BODY)
        self._store_kernel = make("mlxflash_store", ["addresses", "rows"], ["done"], STORE_BODY)
        self._result_kernel = make("mlxflash_result", ["values", "address"], ["done"], RESULT_BODY)

    def lock(self, memory: memoryview, owner: Any) -> bool:
        """Lock the pages of `memory` as long as `owner` lives; False where the driver refuses."""
        host = _address(memory)
        if self._driver.cuMemHostRegister_v2(ctypes.c_void_p(host), ctypes.c_size_t(memory.nbytes), PORTABLE | MAPPED):
            return False
        base = ctypes.c_uint64()
        if self._driver.cuMemHostGetDevicePointer_v2(ctypes.byref(base), ctypes.c_void_p(host), 0):
            self._driver.cuMemHostUnregister(ctypes.c_void_p(host))
            return False
        self._bases[host] = base.value
        weakref.finalize(owner, self._unlock, host).atexit = False
        return True

    def _unlock(self, host: int) -> None:
        if self._bases.pop(host, None) is not None:
            mx.synchronize()
            self._driver.cuMemHostUnregister(ctypes.c_void_p(host))

    def rows(self, memory: memoryview, slots: np.ndarray, stride: int, word: int) -> mx.array | None:
        """Records at `slots` of `memory` as words [k, stride / word] on the device; None where it is not locked."""
        base = self._bases.get(_address(memory))
        if base is None or stride % PIECE:
            return None
        pieces = stride // PIECE
        rows: mx.array = self._rows_kernel(
            inputs=[mx.array((base + slots * stride).astype(np.int64))],
            template=[("PIECES", pieces)],
            grid=(-(-len(slots) * pieces // THREADS) * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(len(slots), stride // word)],
            output_dtypes=[{1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[word]],
        )[0]
        return rows

    def store(self, rows: mx.array, memory: memoryview, slots: np.ndarray, stride: int) -> mx.array | None:
        """What writes rows, words [k, n], to where `slots` of `memory` begin when it is evaluated; None as above."""
        base, num_bytes = self._bases.get(_address(memory)), rows.nbytes // len(slots)
        if base is None or stride % PIECE or num_bytes % PIECE:
            return None
        pieces = num_bytes // PIECE
        done: mx.array = self._store_kernel(
            inputs=[mx.array((base + slots * stride).astype(np.int64)), rows],
            template=[("PIECES", pieces)],
            grid=(-(-len(slots) * pieces // THREADS) * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(1,)],
            output_dtypes=[mx.uint32],
        )[0]
        return done

    def result(self, y: mx.array) -> tuple[mx.array, Callable[[], np.ndarray]]:
        """float32 y for the host: an array to evaluate, and what then gives y's values."""
        kept = self._results.setdefault(y.size, [])
        if len(kept) < RESULTS:
            memory = host_memory(4 * y.size)[: 4 * y.size]
            if not self.lock(memory, self):
                raise RuntimeError("the driver locks no more memory")
            kept.append(np.frombuffer(memory, np.float32))
        self._turn += 1
        out = kept[self._turn % len(kept)]
        done: mx.array = self._result_kernel(
            inputs=[y.reshape(-1), mx.array(np.array([self._bases[out.ctypes.data]], np.int64))],
            grid=(-(-y.size // THREADS) * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(1,)],
            output_dtypes=[mx.uint32],
        )[0]
        return done, lambda: out.reshape(y.shape).copy()


def _address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def open_bus() -> tuple[Bus | None, str]:
    """A bus that was tried here and works, or None; and in words what is used."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        context, device = ctypes.c_void_p(), ctypes.c_int()
        for failed in (
            driver.cuInit(0),
            driver.cuDeviceGet(ctypes.byref(device), 0),
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
            driver.cuCtxSetCurrent(context),
        ):
            if failed:
                return None, f"plain copies: the driver says error {failed}"
        bus = Bus(driver)
        return (bus, "page-locked memory") if _works(bus) else (None, "plain copies: page-locked ones came out wrong")
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        return None, f"plain copies: {' '.join(str(error).split())[:200]}"


def _works(bus: Bus) -> bool:
    """Whether rows arrive whole and fresh, and they and results come back, twice each."""
    stride, rng, owner = 4096 + PIECE, np.random.default_rng(0), Keeper()
    memory = host_memory(50 * stride)[: 50 * stride]
    if not bus.lock(memory, owner):
        return False
    raw = np.frombuffer(memory, np.uint32).reshape(50, -1)
    for _ in range(2):
        raw[:] = rng.integers(0, 1 << 32, raw.shape, dtype=np.uint32)
        before, slots = raw.copy(), rng.permutation(50)[:33]
        rows = bus.rows(memory, slots, stride, 4)
        if rows is None:
            return False
        done, values = bus.result((rows & 0xFFFF).astype(mx.float32).reshape(33, -1))
        stored = bus.store(rows[:7] ^ 1, memory, np.arange(7), stride)
        if stored is None:
            return False
        mx.eval(rows, done)
        mx.eval(stored)
        right = np.array_equal(values(), (before[slots] & 0xFFFF).astype(np.float32))
        if not (right and np.array_equal(raw[:7], before[slots[:7]] ^ 1) and np.array_equal(raw[7:], before[7:])):
            return False
    return True


class Keeper:
    """What lives as long as the try-out."""
