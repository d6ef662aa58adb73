"""Beside llama.cpp: the same weights in float16, each program in a memory cgroup of the same size, one after the other.

    exact     every unit is computed by both (SiLU): ours streams what is not held, llama.cpp maps the file
    sparse    ours reads the units that a trace says (trace.py; the same weights under ReLU); llama.cpp computes all of
              them, as above: it has no other way
    sketch    the same reads of down rows alone: the activations come from copies in memory (end_to_end.py)
    fits      a smaller shape that both hold: nothing is read

Both get `--memory` and what they take to import beside it. The file's pages are dropped from the page cache before a
run, so that llama.cpp's are charged to its cgroup; ours bypasses that cache. Every token is fed on its own, the first
one not counted. Weights are random; `logits` says how far those of the last token lie apart, in standard deviations.

What it does not show: quantised weights, prompts, GPUs.

    pip install llama-cpp-python gguf
    python benchmarks/against_llamacpp.py --shape llama-2-7b-relu --memory 55% [--layers 4] [--dir FOLDER]
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from trace import synthetic
from typing import Any

import numpy as np
from end_to_end import CONTEXT, total_bytes
from limited import run_in
from safetensors import safe_open
from shapes import SHAPES, Shape, write_bundle

from mlxflash.bundle import HEADER_BYTES, Bundle, write_manifest
from mlxflash.plan import format_bytes, parse_memory

WARM, WINDOW_WARM = 1, 8  # tokens not counted; of a trace, until the window is full of what tokens use
LOGITS = 256  # compared
BESIDE = 100_000_000  # bytes for the trace and what libraries allocate, given to both
NAMES = {  # of a layer's resident matrices and norms, in GGUF's words
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module = name.removesuffix(".weight")
    if module in whole:
        return f"{whole[module]}.weight"
    layer, rest = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def gguf_tensors(bundle: Bundle, heads: int, kv_heads: int) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """Names, shapes and what makes the arrays: norms in float32, rotated halves of q and k as GGUF wants them."""

    def resident(file: Path, name: str) -> np.ndarray:
        with safe_open(file, "numpy") as f:
            array: np.ndarray = f.get_tensor(name)
        if array.ndim == 1:
            return array.astype(np.float32)
        count = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
        if count is None:
            return array
        return array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)

    def streamed(index: int, part: str) -> np.ndarray:
        stride, units = bundle.manifest.record.stride, bundle.manifest.layers[index].units
        shape = (units, stride)
        raw = np.memmap(bundle.layer_path(index), np.uint8, "r", HEADER_BYTES, shape)
        at = bundle.manifest.record[part].offset
        assert at is not None
        rows = np.ascontiguousarray(raw[:, at : at + 2 * bundle.manifest.d_model]).view(np.float16)
        return np.ascontiguousarray(rows.T) if part == "down" else rows

    for file in bundle.resident_files():
        with safe_open(file, "numpy") as f:
            shapes = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
        for name, shape in shapes.items():
            yield gguf_name(name), shape, lambda file=file, name=name: resident(file, name)
    for i, layer in enumerate(bundle.manifest.layers):
        for part in ("gate", "up", "down"):
            wide = (layer.units, bundle.manifest.d_model)
            shape = wide[::-1] if part == "down" else wide
            yield f"blk.{i}.ffn_{part}.weight", shape, lambda i=i, part=part: streamed(i, part)


def write_gguf(bundle: Bundle, path: Path) -> None:
    from gguf import GGUFWriter

    c, partial = bundle.config(), path.with_suffix(".partial")
    out = GGUFWriter(str(partial), "llama")
    out.add_context_length(c["max_position_embeddings"])
    out.add_embedding_length(c["hidden_size"])
    out.add_block_count(c["num_hidden_layers"])
    out.add_feed_forward_length(c["intermediate_size"])
    out.add_head_count(c["num_attention_heads"])
    out.add_head_count_kv(c["num_key_value_heads"])
    out.add_layer_norm_rms_eps(c["rms_norm_eps"])
    out.add_rope_freq_base(c["rope_theta"])
    out.add_rope_dimension_count(c["hidden_size"] // c["num_attention_heads"])
    out.add_vocab_size(c["vocab_size"])
    out.add_tokenizer_model("no_vocab")
    tensors = list(gguf_tensors(bundle, c["num_attention_heads"], c["num_key_value_heads"]))
    for name, shape, _ in tensors:
        dtype = np.dtype(np.float32 if len(shape) == 1 else np.float16)
        out.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    for _, _, make in tensors:
        out.write_tensor_data(make())
    out.close()
    os.rename(partial, path)


def silu_twin(bundle: Bundle) -> Bundle:
    """The same weights under the activation that llama.cpp computes: a bundle of links."""
    path = bundle.path.with_suffix(".silu.flash")
    if bundle.manifest.activation == "silu":
        return bundle
    if not (path / "manifest.json").exists():
        shutil.copytree(bundle.path, path, copy_function=os.link)
        config = bundle.config() | {"hidden_act": "silu"}
        for name in ("config.json", "manifest.json"):
            (path / name).unlink()
        (path / "config.json").write_text(json.dumps(config, indent=1))
        write_manifest(path, replace(bundle.manifest, activation="silu"))
    return Bundle.open(path)


def cool(path: Path) -> None:
    """Drop a file's pages from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


# What runs in the cgroups


def feed_llama(path: Path, tokens: int) -> dict[str, Any]:
    import llama_cpp

    begin = time.perf_counter()
    settings = {"n_ctx": CONTEXT, "n_threads": os.cpu_count(), "use_mmap": True, "verbose": False}
    model = llama_cpp.Llama(str(path), **settings)
    ready, seconds = time.perf_counter() - begin, []
    for _ in range(WARM + tokens):
        begin = time.perf_counter()
        model.eval([5])
        seconds.append(time.perf_counter() - begin)
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),))
    return {"seconds": seconds[WARM:], "logits": logits[:LOGITS].tolist(), "ready_s": ready}


def feed_ours(path: Path, tokens: int, memory: int | None, shape: Shape | None, sketched: bool) -> dict[str, Any]:
    """`shape` of a sparse model: its trace decides what is read."""
    import mlx.core as mx
    from end_to_end import run_flash

    from mlxflash.backends import make_backend
    from mlxflash.decode import reserved_cache
    from mlxflash.model import load_bundle

    mx.set_default_device(mx.cpu)
    if shape is not None:
        bundle = Bundle.open(path)
        trace = synthetic(shape.layers, shape.ffn, tokens + WINDOW_WARM, shape.activity)
        many = np.full(tokens + WINDOW_WARM, 5)
        settings = many, WINDOW_WARM, make_backend("cpu"), trace, shape.activity, None if sketched else "early"
        o = run_flash(bundle, str(memory), *settings, foresee=False, sketched=sketched)
        return {"seconds": o.seconds, "bytes": o.bytes_per_token, "plan": o.plan, "ready_s": o.ready_s}
    begin = time.perf_counter()
    limits = {"memory": memory, "direct": memory is not None}
    with load_bundle(path, predictor="all", device="cpu", max_kv_size=CONTEXT, **limits) as model:
        ready, seconds = time.perf_counter() - begin, []
        cache, before = reserved_cache(model, None, CONTEXT), model.flash.snapshot()
        for i in range(WARM + tokens):
            before = model.flash.snapshot() if i == WARM else before
            begin = time.perf_counter()
            logits = model(mx.array([[5]]), cache=cache)
            mx.eval(logits)
            seconds.append(time.perf_counter() - begin)
        plan, num_bytes = model.flash.describe(), model.flash.stats(before, tokens).bytes_per_token
    last = logits[0, -1, :LOGITS].astype(mx.float32).tolist()
    return {"seconds": seconds[WARM:], "logits": last, "bytes": num_bytes, "plan": plan, "ready_s": ready}


def worker(job: dict[str, Any]) -> dict[str, Any]:
    path, tokens = Path(job["path"]), job["tokens"]
    if job["program"] == "llama.cpp":
        return feed_llama(path, tokens)
    shape = SHAPES[job["shape"]].first(job["layers"]) if job["shape"] else None
    return feed_ours(path, tokens, job["memory"], shape, job["sketched"])


# What starts them


def run(program: str, path: Path, tokens: int, memory: int | None, **more: Any) -> dict[str, Any]:
    """A worker's answer, with what its cgroup was charged; `more`: of a sparse run, see `worker`."""
    job = {"program": program, "path": str(path), "tokens": tokens, "memory": memory, "shape": None, "sketched": False}
    job |= more
    if path.is_file():
        cool(path)
    limit = None
    if memory is not None:
        limit = memory + BESIDE + run_in([sys.executable, __file__, "--imports", program])[1]
    done, charged = run_in([sys.executable, __file__, "--worker", json.dumps(job)], limit)
    if done.returncode:
        raise SystemExit(f"against_llamacpp: {program} ended with {done.returncode}: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer | {"charged": charged}


def compare(name: str, ours: dict[str, Any], theirs: dict[str, Any], goal: float) -> dict[str, Any]:
    ms = [1e3 * float(np.median(one["seconds"])) for one in (ours, theirs)]
    row = {"case": name, "ms": ms[0], "llamacpp_ms": ms[1], "ratio": ms[1] / ms[0], "goal": goal}
    row |= {"bytes": ours["bytes"], "charged": ours["charged"], "llamacpp_charged": theirs["charged"]}
    said = ""
    if "logits" in ours:
        row["logits"] = float(np.abs(np.subtract(ours["logits"], theirs["logits"])).max() / np.std(theirs["logits"]))
        said = f"  logits {row['logits']:.4f} apart"
    print(
        f"{name:<8}{ms[0]:8.0f} ms ours {ms[1]:8.0f} ms llama.cpp {row['ratio']:7.2f}x (goal {goal}){said};"
        f" {format_bytes(ours['bytes'])} read per token, charged {format_bytes(ours['charged'])}"
        f" and {format_bytes(theirs['charged'])}"
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    llamas = [name for name, shape in SHAPES.items() if shape.family == "llama"]
    parser.add_argument("--shape", choices=[n for n in llamas if SHAPES[n].sparse], default="llama-2-7b-relu")
    parser.add_argument("--small", choices=llamas, default="tinyllama", help="the shape that fits (tinyllama)")
    parser.add_argument("--layers", type=int, default=None, help="only so many of either shape's")
    parser.add_argument("--memory", default="55%", help="budget, as for generate (55%%)")
    parser.add_argument(
        "--tokens", type=int, default=3, help="counted where all weights pass (3); else 8 times as many"
    )
    parser.add_argument("--dir", type=Path, default=None, help="where files are kept; a temporary folder otherwise")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--imports", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.imports:
        importlib.import_module({"llama.cpp": "llama_cpp", "ours": "mlxflash.model"}[args.imports])
        return
    if args.worker:
        print(json.dumps(worker(json.loads(args.worker))))
        return
    if missing := [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"against_llamacpp: needs {missing[0]}: pip install llama-cpp-python gguf")
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        against(args, args.dir or Path(scratch))


def files(name: str, layers: int | None, folder: Path) -> tuple[Bundle, Path]:
    """A shape's bundle and the GGUF file of the same weights, made where they are not there."""
    stem = f"{name}-{layers}" if layers else name
    path, gguf = folder / f"{stem}.flash", folder / f"{stem}.gguf"
    if not (path / "manifest.json").exists():
        write_bundle(SHAPES[name].first(layers), path)
    if not gguf.exists():
        write_gguf(Bundle.open(path), gguf)
    return Bundle.open(path), gguf


def against(args: argparse.Namespace, folder: Path) -> None:
    bundle, gguf = files(args.shape, args.layers, folder)
    exact = silu_twin(bundle)
    memory = parse_memory(args.memory, total_bytes(bundle))
    print(f"{args.shape}: {format_bytes(total_bytes(bundle))} in {format_bytes(memory or 0)} each")
    theirs = run("llama.cpp", gguf, args.tokens, memory)
    rows = [compare("exact", run("ours", exact.path, args.tokens, memory), theirs, 1.0)]
    how = {"shape": args.shape, "layers": args.layers}
    sparse = run("ours", bundle.path, 8 * args.tokens, memory, **how)
    rows.append(compare("sparse", sparse, theirs, 10.0))
    rows.append(
        compare("sketch", run("ours", bundle.path, 8 * args.tokens, memory, sketched=True, **how), theirs, 10.0)
    )
    small, gguf = files(args.small, args.layers, folder)
    theirs = run("llama.cpp", gguf, 8 * args.tokens, None)
    rows.append(compare("fits", run("ours", silu_twin(small).path, 8 * args.tokens, None), theirs, 0.8))
    print(sparse["plan"])
    print(json.dumps({"shape": args.shape, "small": args.small, "memory_bytes": memory, "rows": rows}))


if __name__ == "__main__":
    main()
