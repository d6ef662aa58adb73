"""The native kernels against numpy in float64, for every instruction set this processor has."""

import ctypes
import math
import mmap
import os
import threading
from functools import cache

import numpy as np
import pytest

from mlxflash._native import core

pytestmark = pytest.mark.skipif(core is None, reason="the native module is not built")

ISAS = ("avx512", "avx2", "neon", "portable")
DENSE = ("f32", "f16", "bf16")
BITS = (1, 2, 3, 4, 5, 6, 8)
GATED_ACTS = ("relu", "relu2", "fatrelu", "silu", "gelu", "gelu_tanh", "drelu")
ACTS = GATED_ACTS[:-1]
AFFINE_SHAPES = ((1, 3, "f16"), (3, 2, "f32"), (17, 17, "bf16"), (37, 1, "f16"))
THRESHOLD = 0.3


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture(params=ISAS)
def isa(request):
    before = core.isa()
    try:
        core.set_isa(request.param)
    except ValueError:
        pytest.skip(f"no {request.param} here")
    yield request.param
    core.set_isa(before)


@pytest.fixture
def threads():
    before = core.get_threads()
    yield core.set_threads
    core.set_threads(before)


def stored(values, dtype):
    """Rows as stored, and what they mean."""
    if dtype == "bf16":
        halves = ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
        return halves, (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    rows = values.astype({"f32": np.float32, "f16": np.float16}[dtype])
    return rows, rows.astype(np.float64)


@cache
def quantised(rows, cols, group, bits, scale_dtype):
    """mx.quantize's words, scales and biases of random rows as byte rows, and what they mean."""
    mx = pytest.importorskip("mlx.core")
    dtype = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}[scale_dtype]
    values = np.random.default_rng(rows + cols + group + bits).standard_normal((rows, cols)) / 8
    values = mx.array(values.astype(np.float32)).astype(dtype)
    parts = mx.quantize(values, group_size=group, bits=bits)
    exact = [parts[0], parts[1].astype(mx.float32), parts[2].astype(mx.float32)]
    meant = mx.dequantize(*exact, group_size=group, bits=bits)
    as_bytes = [np.frombuffer(memoryview(p).cast("B"), np.uint8).reshape(rows, -1) for p in parts]
    return as_bytes, np.array(meant).astype(np.float64)


def assert_close(out, want, magnitude):
    """magnitude: the same sum over absolute values."""
    np.testing.assert_array_less(np.abs(out - want), 3e-6 * magnitude + 1e-30)


# --- matmul ---------------------------------------------------------------------------------------


def check_matmul(rng, w, meant, m, dtype, row_stride, **kwargs):
    rows, cols = meant.shape
    x = rng.standard_normal((m, cols)).astype(np.float32)
    bias = rng.standard_normal(rows).astype(np.float32)
    out = np.full((m, rows), np.nan, np.float32)
    core.matmul(out, x, w, dtype, m, rows, cols, row_stride, bias=bias, **kwargs)
    exact = x.astype(np.float64)
    spread = np.abs(meant).max(initial=0)
    magnitude = np.abs(exact).sum(1, keepdims=True) * spread + np.abs(bias)
    assert_close(out, exact @ meant.T + bias, magnitude)


@pytest.mark.parametrize("dtype", DENSE)
def test_dense(isa, rng, dtype):
    for cols in (0, 1, 7, 16, 33, 515, 2300):
        for rows in (0, 1, 2, 3, 17):
            w, meant = stored(rng.standard_normal((rows, cols)).astype(np.float32), dtype)
            for m in (0, 1, 2, 3, 4, 5, 9):
                check_matmul(rng, w, meant, m, dtype, cols * w.itemsize)


@pytest.mark.parametrize("bits", BITS)
def test_affine(isa, rng, bits):
    for group in (32, 64, 128):
        for groups, rows, scale_dtype in AFFINE_SHAPES:
            cols = group * groups
            (words, scales, biases), meant = quantised(rows, cols, group, bits, scale_dtype)
            kwargs = {"scales": scales, "biases": biases, "scale_dtype": scale_dtype}
            for m in (0, 1, 2, 3, 4, 9):
                check_matmul(rng, words, meant, m, "affine", words.shape[1], group=group, bits=bits, **kwargs)


def test_rows_apart_and_unaligned(isa, rng):
    w, meant = stored(rng.standard_normal((9, 100)).astype(np.float32), "f16")
    memory = np.full(1 + 9 * 333, 255, np.uint8)
    for i, row in enumerate(w):
        memory[1 + i * 333 :][:200] = row.view(np.uint8)
    check_matmul(rng, memory[1 : 1 + 8 * 333 + 200], meant, 3, "f16", 333)


@pytest.fixture
def guarded():
    """Copies bytes to where a page ends and the next one may not be touched."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 4 * page)
    view = np.frombuffer(memory, np.uint8)
    end = 3 * page
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(view.ctypes.data + end), ctypes.c_size_t(page), 0) != 0:
        pytest.skip("cannot protect memory")

    def copy(values):
        place = view[end - values.nbytes : end]
        place[:] = values.view(np.uint8).ravel()
        return place

    return copy


def test_reads_nothing_beyond_the_last_row(isa, rng, guarded):
    for dtype in DENSE:
        w, meant = stored(rng.standard_normal((3, 45)).astype(np.float32), dtype)
        check_matmul(rng, guarded(w), meant, 2, dtype, w.shape[1] * w.itemsize)
        pool = Pool(rng, dtype, 45, 3, False)
        pool.bytes = guarded(pool.bytes[:3])
        check_ffn(rng, pool, 2, "gelu")
    for bits in BITS:
        for groups in (1, 5, 8):
            parts, meant = quantised(3, 32 * groups, 32, bits, "f16")
            for i in range(3):
                words, scales, biases = (*parts[:i], guarded(parts[i]), *parts[i + 1 :])
                kwargs = {"group": 32, "bits": bits, "scales": scales, "biases": biases, "scale_dtype": "f16"}
                check_matmul(rng, words, meant, 1, "affine", parts[0].shape[1], **kwargs)
            pool = Pool(rng, "affine", 32 * groups, 3, False, bits=bits, group=32, weights_last=True)
            pool.bytes = guarded(pool.bytes[:3])
            check_ffn(rng, pool, 2, "gelu")


def test_every_half(isa):
    """Each of the 65536 halves, subnormal, infinite and NaN ones included."""
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    out = np.empty((1, 65536), np.float32)
    core.matmul(out, np.ones(1, np.float32), halves, "f16", 1, 65536, 1, 2)
    np.testing.assert_array_equal(out[0], halves.astype(np.float32))
    out = np.empty((1, 1024), np.float32)
    x = np.zeros(64, np.float32)
    x[5] = 1
    finite = np.where(np.isfinite(halves), halves, np.float16(0))
    core.matmul(out, x, finite, "f16", 1, 1024, 64, 128)
    np.testing.assert_array_equal(out[0], finite[5::64].astype(np.float32))


# --- ffn ------------------------------------------------------------------------------------------


def apply(act, v):
    if act == "relu2":
        return np.maximum(v, 0) ** 2
    if act == "fatrelu":
        return np.where(v > THRESHOLD, v, 0)
    if act == "silu":
        return v / (1 + np.exp(-v))
    if act == "gelu":
        return v * np.array([0.5 * math.erfc(-e / 2**0.5) for e in v.flat]).reshape(v.shape)
    if act == "gelu_tanh":
        return 0.5 * v * (1 + np.tanh((2 / math.pi) ** 0.5 * (v + 0.044715 * v**3)))
    return np.maximum(v, 0)


class Pool:
    """Records of random rows. Beyond the first n, and between parts, every byte is 255: NaNs."""

    def __init__(self, rng, dtype, d, n, gated, padding=0, bits=0, group=0, weights_last=False):
        self.n, self.d, self.dtype = n, d, dtype
        self.meant, self.kwargs, parts = {}, {}, []
        for i, name in enumerate(("gate", "up", "down") if gated else ("up", "down")):
            if bits:
                rows, meant = quantised(n + i, d, group, bits, "f16")
                self.meant[name] = meant[i:]
                named = list(zip(("", "_scales", "_biases"), (r[i:] for r in rows), strict=True))
                if weights_last:
                    named.reverse()
            else:
                values = rng.standard_normal((n, d)).astype(np.float32) / max(d, 1) ** 0.5
                rows, self.meant[name] = stored(values, dtype)
                named = [("", rows.view(np.uint8))]
            for suffix, part in named:
                self.kwargs[name + suffix] = sum(p.shape[1] for p in parts)
                parts.append(part)
        if bits:
            self.kwargs |= {"bits": bits, "group": group, "scale_dtype": "f16"}
        records = np.concatenate(parts, 1)
        self.stride = records.shape[1] + padding
        self.bytes = np.full((n + 2, self.stride), 255, np.uint8)
        self.bytes[:n, : records.shape[1]] = records


def check_ffn(rng, pool, m, act, live=None, with_biases=False):
    n, d, gated = pool.n, pool.d, "gate" in pool.meant
    x = rng.standard_normal((m, d)).astype(np.float32)
    kwargs = dict(pool.kwargs)
    biases = {}
    for name in ("gate", "up") if gated else ("up",):
        biases[name] = rng.standard_normal(n).astype(np.float32) * with_biases
        if with_biases:
            kwargs[name + "_bias"] = biases[name]
    if live is None:
        live = np.ones(n, bool)
    else:
        kwargs["slots_mask"] = live.astype(np.uint8)
    exact = x.astype(np.float64)
    before = {name: exact @ pool.meant[name].T + bias for name, bias in biases.items()}
    lead = before["gate" if gated else "up"]
    h = apply(act, lead)
    if gated:
        h = h * (np.maximum(before["up"], 0) if act == "drelu" else before["up"])
    h[:, ~live] = 0
    start = rng.standard_normal((m, d)).astype(np.float32)
    out, active = start.copy(), np.full((m, n), 9, np.uint8)
    core.ffn(
        out, x, pool.bytes, n, pool.dtype, m, d, pool.stride,
        act=act, threshold=THRESHOLD, active=active, **kwargs,
    )  # fmt: skip
    want = start + h @ pool.meant["down"]
    bound = np.abs(h) @ np.abs(pool.meant["down"]) + n * 0.1 + np.abs(start)
    np.testing.assert_array_less(np.abs(out - want), 1e-5 * bound + 1e-30)
    assert not active[:, ~live].any()
    near = np.abs(lead - (THRESHOLD if act == "fatrelu" else 0)) < 1e-4
    near |= np.abs(before["up"]) < 1e-4
    np.testing.assert_array_equal(active[~near], (h != 0)[~near])


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_ffn_acts(isa, rng, gated):
    for act in GATED_ACTS if gated else ACTS:
        for m, n in ((1, 70), (2, 3), (7, 17), (9, 33)):
            pool = Pool(rng, "f16", 130, n, gated, padding=6)
            check_ffn(rng, pool, m, act, with_biases=n != 3)


@pytest.mark.parametrize("dtype", DENSE)
def test_ffn_dense(isa, rng, dtype):
    for d in (1, 7, 33, 515):
        for n in (0, 1, 2, 3, 17, 300):
            pool = Pool(rng, dtype, d, n, n % 2 == 0, padding=2)
            check_ffn(rng, pool, 1 + n % 5, "relu")


@pytest.mark.parametrize("bits", BITS)
def test_ffn_affine(isa, rng, bits):
    for group, groups, n, m in ((32, 1, 5, 1), (32, 19, 41, 4), (64, 3, 17, 3), (128, 17, 9, 2)):
        for gated in (False, True):
            pool = Pool(rng, "affine", group * groups, n, gated, padding=4, bits=bits, group=group)
            check_ffn(rng, pool, m, "relu", with_biases=True)


def test_ffn_leaves_out_masked_records(isa, rng):
    for gated in (False, True):
        pool = Pool(rng, "f16", 96, 200, gated)
        live = rng.random(200) < 0.3
        pool.bytes[:200][~live] = 255
        check_ffn(rng, pool, 3, "silu", live=live)
        check_ffn(rng, pool, 1, "relu", live=np.zeros(200, bool))


def test_ffn_reads_down_only_where_needed(isa):
    d, n = 64, 40
    records = np.full((n, 2, d), np.nan, np.float32)
    records[:, 0] = -1
    records[::4] = 1
    out = np.zeros((2, d), np.float32)
    core.ffn(out, np.ones((2, d), np.float32), records, n, "f32", 2, d, d * 8, up=0, down=d * 4)
    np.testing.assert_array_equal(out, np.full((2, d), n / 4 * d))


# --- blocks ---------------------------------------------------------------------------------------


def blocks_of(n, d, neurons, gated, bits, group, scale_dtype, down_bits):
    """Records of quantised matrices, 255 wherever nothing lies, and what they mean: by name, [n, rows, columns]."""
    meant, kwargs, parts, at = {}, {"scale_dtype": scale_dtype}, [], 0
    for name in ("gate", "up", "down") if gated else ("up", "down"):
        rows, cols = (d, neurons) if name == "down" else (neurons, d)
        own = (down_bits, neurons) if name == "down" else (bits, group)
        stored, values = quantised(rows * n + len(parts), cols, own[1], own[0], scale_dtype)
        meant[name] = values[-rows * n :].reshape(n, rows, cols)
        offsets = []
        for part in stored:
            parts.append(part[-rows * n :].reshape(n, -1))
            offsets.append(at)
            at += parts[-1].shape[1]
        kwargs[name] = (*own, *offsets)
    pool = np.full((n + 1, at + 3), 255, np.uint8)
    pool[:n, :at] = np.concatenate(parts, 1)
    return pool, meant, kwargs


def check_blocks(rng, m, act, pool, meant, kwargs, with_biases=False, live=None):
    n, neurons, d = meant["up"].shape
    names = [name for name in ("gate", "up") if name in meant]
    biases = {name: rng.standard_normal((n, neurons)).astype(np.float32) * with_biases for name in names}
    x = rng.standard_normal((m, d)).astype(np.float32)
    before = {name: np.einsum("md,nrd->mnr", x.astype(np.float64), meant[name]) + biases[name] for name in names}
    h = apply(act, before[names[0]])
    if "gate" in names:
        h = h * (np.maximum(before["up"], 0) if act == "drelu" else before["up"])
    if live is not None:
        h[:, ~live] = 0
        kwargs = kwargs | {"slots_mask": live.astype(np.uint8)}
    if with_biases:
        kwargs = kwargs | {f"{name}_bias": bias for name, bias in biases.items()}
    start = rng.standard_normal((m, d)).astype(np.float32)
    out = start.copy()
    core.blocks(out, x, pool, n, m, d, neurons, pool.shape[1], act=act, threshold=THRESHOLD, **kwargs)
    want = start + np.einsum("mnr,ndr->md", h, meant["down"])
    bound = np.einsum("mnr,ndr->md", np.abs(h), np.abs(meant["down"])) + n * 0.1 + np.abs(start)
    np.testing.assert_array_less(np.abs(out - want), 1e-5 * bound)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("neurons", [32, 64, 128])
def test_blocks(isa, rng, neurons, bits):
    for n, d, group, scales, m in ((1, 128, 32, "f16", 1), (5, 256, 64, "bf16", 4), (19, 128, 128, "f32", 9)):
        for gated in (False, True):
            made = blocks_of(n, d, neurons, gated, 4, group, scales, bits)
            check_blocks(rng, m, "silu", *made, with_biases=n > 1)


def test_blocks_acts(isa, rng):
    for gated in (False, True):
        made = blocks_of(3, 96, 32, gated, 8, 32, "f16", 6)
        for act in GATED_ACTS if gated else ACTS:
            check_blocks(rng, 3, act, *made, with_biases=True)


def test_blocks_leave_out_masked_records(isa, rng):
    pool, meant, kwargs = blocks_of(40, 64, 64, True, 4, 64, "f16", 4)
    live = rng.random(40) < 0.3
    pool[:40][~live] = 255
    check_blocks(rng, 2, "silu", pool, meant, kwargs, live=live)


def test_blocks_read_nothing_beyond_the_pool(isa, rng, guarded):
    pool, meant, kwargs = blocks_of(2, 32, 32, True, 3, 32, "f16", 5)
    n, _, d = meant["up"].shape
    want, got = (np.zeros((1, d), np.float32) for _ in range(2))
    x = rng.standard_normal((1, d)).astype(np.float32)
    for out, memory in ((want, pool), (got, guarded(np.ascontiguousarray(pool[:n])))):
        core.blocks(out, x, memory, n, 1, d, 32, pool.shape[1], act="silu", **kwargs)
    np.testing.assert_array_equal(got, want)


# --- threads --------------------------------------------------------------------------------------


def test_threads_agree(rng, threads):
    w, _ = stored(rng.standard_normal((3000, 512)).astype(np.float32), "f16")
    x = rng.standard_normal((2, 512)).astype(np.float32)
    pool = Pool(rng, "f16", 256, 5000, True)
    results = []
    for count in (1, 2, 5):
        threads(count)
        assert core.get_threads() == count
        out, ffn = np.empty((2, 3000), np.float32), np.zeros((2, 256), np.float32)
        core.matmul(out, x, w, "f16", 2, 3000, 512, 1024)
        core.ffn(ffn, x, pool.bytes, 5000, "f16", 2, 256, pool.stride, **pool.kwargs)
        results.append((out, ffn))
    for other in results[1:]:
        np.testing.assert_array_equal(other[0], results[0][0])
        np.testing.assert_array_equal(other[1], results[0][1])


def test_calls_from_several_threads(rng, threads):
    threads(3)
    w, meant = stored(rng.standard_normal((4000, 512)).astype(np.float32), "f16")
    xs = rng.standard_normal((6, 512)).astype(np.float32)
    outs = np.empty((6, 4000), np.float32)

    def work(i):
        for _ in range(20):
            core.matmul(outs[i], xs[i], w, "f16", 1, 4000, 512, 1024)

    callers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    np.testing.assert_allclose(outs, xs @ meant.T, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_works_after_fork(rng, threads):
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    threads(2)
    memory = np.ones(8 << 20, np.uint8)
    core.read_bandwidth(memory)
    child = os.fork()
    if child == 0:
        os._exit(0 if core.read_bandwidth(memory) > 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert core.read_bandwidth(memory) > 0


# --- the rest -------------------------------------------------------------------------------------


def test_copy_rows(rng):
    source = rng.integers(0, 256, (500, 300), dtype=np.uint8)
    target = np.zeros((600, 260), np.uint8)
    slots, rows = rng.permutation(600)[:400], rng.integers(0, 500, 400)
    core.copy_rows(target, 260, slots, source, 300, rows, 257)
    want = np.zeros_like(target)
    want[slots, :257] = source[rows, :257]
    np.testing.assert_array_equal(target, want)
    nothing = np.empty(0, np.int64)
    core.copy_rows(target, 260, nothing, source, 300, nothing, 257)


def test_refuses_a_transposed_mlx_array(rng):
    """MLX lends what it has to whoever asks for C order."""
    mx = pytest.importorskip("mlx.core")
    w, out = rng.normal(size=(8, 16)).astype(np.float32), np.empty((1, 8), np.float32)
    with pytest.raises(ValueError, match="w must be C-contiguous"):
        core.matmul(out, np.ones((1, 16), np.float32), mx.array(np.asfortranarray(w)), "f32", 1, 8, 16, 64)


def test_takes_mlx_arrays(rng):
    mx = pytest.importorskip("mlx.core")
    w = mx.random.normal((8, 64)).astype(mx.bfloat16)
    x = mx.random.normal((1, 64))
    out = np.empty((1, 8), np.float32)
    core.matmul(out, x, w, "bf16", 1, 8, 64, 128)
    np.testing.assert_allclose(out, np.array(x @ w.astype(mx.float32).T), atol=1e-4)


def test_settings():
    assert core.isa() in ISAS
    assert core.get_threads() >= 1
    with pytest.raises(ValueError, match="no mmx"):
        core.set_isa("mmx")
    for count in (0, -1, 10**6):
        with pytest.raises(ValueError, match="between 1 and"):
            core.set_threads(count)


X = np.zeros((2, 64), np.float32)
OUT = np.zeros((2, 4), np.float32)
W = np.zeros((4, 64), np.float16)
SCALES = np.zeros((4, 2), np.float16)
AFFINE_FORMAT = {"group": 32, "bits": 8, "scale_dtype": "f16"}
AFFINE = {"scales": SCALES, "biases": SCALES, **AFFINE_FORMAT}
MATMUL = dict(out=OUT, x=X, w=W, dtype="f16", m=2, rows=4, cols=64, row_stride=128)
FFN = dict(out=X.copy(), x=X, pool=np.zeros(512, np.uint8), n=2, dtype="f16", m=2, d=64)
FFN |= dict(record_stride=256, up=0, down=128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": OUT[:1]}, "out is too small"),
        ({"out": OUT.astype(np.float64)}, "out must hold float32"),
        ({"x": X[:1]}, "x is too small"),
        ({"x": X.view(np.uint8).ravel()[1:]}, "x is"),
        ({"w": np.asfortranarray(W)}, "C-contiguous"),
        ({"w": W[:3]}, "w is too small: 384 bytes of the 512 needed"),
        ({"dtype": "f8"}, "dtype must be"),
        ({"rows": 2**62}, "out is too small"),
        ({"cols": 2**61}, "row_stride"),
        ({"m": -1}, "must not be negative"),
        ({"row_stride": 127}, "row_stride of 127 is less than a row's 128 bytes"),
        ({"bias": OUT[0, :3].copy()}, "bias is too small"),
        ({"dtype": "affine", **AFFINE, "bits": 7}, "bits must be"),
        ({"dtype": "affine", **AFFINE, "group": 48}, "group must be"),
        ({"dtype": "affine", **AFFINE, "cols": 48}, "not a multiple"),
        ({"dtype": "affine", **AFFINE, "scale_dtype": None}, "scale_dtype must be"),
        ({"dtype": "affine", **AFFINE, "scales": SCALES[:3]}, "scales is too small"),
        ({"dtype": "affine", **AFFINE, "biases": SCALES[:3]}, "biases is too small"),
    ],
)
def test_matmul_refuses(changes, message):
    with pytest.raises((ValueError, BufferError), match=message):
        core.matmul(**MATMUL | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": X[:1].copy()}, "out is too small"),
        ({"pool": np.zeros(511, np.uint8)}, "pool is too small"),
        ({"n": 3}, "pool is too small"),
        ({"up": -1}, "up needs its offset"),
        ({"down": 129}, "down reaches byte 257 of records of 256"),
        ({"gate": 200}, "gate reaches byte 328"),
        ({"act": "tanh"}, "act must be"),
        ({"act": "drelu"}, "drelu needs a gate"),
        ({"gate_bias": X[0]}, "gate_bias needs a gate"),
        ({"up_bias": X[0, :1].copy()}, "up_bias is too small"),
        ({"slots_mask": np.zeros(1, np.uint8)}, "slots_mask is too small"),
        ({"active": np.zeros(3, np.uint8)}, "active is too small"),
        ({"record_stride": -256}, "must not be negative"),
        ({"dtype": "affine", **AFFINE_FORMAT}, "up needs its offset and"),
    ],
)
def test_ffn_refuses(changes, message):
    with pytest.raises((ValueError, BufferError), match=message):
        core.ffn(**FFN | changes)


BLOCK = (4, 32, 0, 512, 576)  # of neurons 32 and d 32; weights take 512 bytes, scales and biases 64 each
BLOCKS = dict(out=X[:, :32].copy(), x=X[:, :32].copy(), pool=np.zeros(4096, np.uint8), n=2, m=2, d=32, neurons=32)
BLOCKS |= dict(record_stride=2048, scale_dtype="f16", up=BLOCK, down=(4, 32, 640, 1152, 1216))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": X[:1, :32].copy()}, "out is too small"),
        ({"x": X[:1, :32].copy()}, "x is too small"),
        ({"pool": np.zeros(4095, np.uint8)}, "pool is too small"),
        ({"n": -1}, "must not be negative"),
        ({"up": None}, "up must be a tuple"),
        ({"down": (4, 32, 1473, 1152, 1216)}, "down reaches beyond records of 2048 bytes"),
        ({"up": (4, 32, 0, 1985, 576)}, "up reaches beyond"),
        ({"gate": (4, 32, -1, 0, 0)}, "must not be negative"),
        ({"gate": (4, 32, 2**62, 0, 0)}, "gate reaches beyond"),
        ({"gate": (7, 32, 0, 0, 0)}, "bits must be"),
        ({"up": (4, 64, 0, 512, 576)}, "not a multiple of the group of 64"),
        ({"neurons": 64, "pool": np.zeros(8192, np.uint8)}, "down's group is not the block of 64 neurons"),
        ({"scale_dtype": "f8"}, "scale_dtype must be"),
        ({"up_bias": X[0, :63].copy()}, "up_bias is too small"),
        ({"slots_mask": np.zeros(1, np.uint8)}, "slots_mask is too small"),
        ({"act": "drelu"}, "drelu needs a gate"),
    ],
)
def test_blocks_refuses(changes, message):
    with pytest.raises((ValueError, BufferError), match=message):
        core.blocks(**BLOCKS | changes)


def test_refuses_what_cannot_be_written_or_held():
    frozen = OUT.copy()
    frozen.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        core.matmul(frozen, X, W, "f16", 2, 4, 64, 128)
    with pytest.raises((ValueError, BufferError)):
        core.matmul(OUT, X[:, ::2], W, "f16", 2, 4, 32, 128)
    with pytest.raises(TypeError):
        core.matmul(OUT, X, 12345, "f16", 2, 4, 64, 128)


@pytest.mark.parametrize(
    ("slots", "rows", "size", "message"),
    [
        ([0, 4], [0, 1], 8, r"dst_slots\[1\] = 4"),
        ([0, -1], [0, 1], 8, r"dst_slots\[1\] = -1"),
        ([0, 1], [9, 1], 8, r"src_rows\[0\] = 9"),
        ([0, 2**62], [0, 1], 8, "dst_slots"),
        ([0, 1], [0], 8, "differ in length"),
        ([0, 3], [0, 1], 9, "dst_slots"),
        ([0, 1], [0, 1], -1, "must not be negative"),
    ],
)
def test_copy_rows_refuses(slots, rows, size, message):
    memory = np.zeros((4, 8), np.uint8)
    with pytest.raises((ValueError, BufferError), match=message):
        core.copy_rows(memory, 8, np.array(slots), memory.copy(), 8, np.array(rows), size)
