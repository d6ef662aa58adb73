"""Decoding mixtures of experts at real layers' shapes: tokens/s and time to first token beside their limits.

One table, cold (direct reads; the page cache never holds what is read), 4-bit experts of random weights, fewer layers
than the real model has (a token's time grows with their number; the output head and its cost stay):

    every weight       all of the model read again for every token, sequential, nothing computed: naive at its best
    nothing kept       the experts that the router chose, read again for every token: reloading
    experts            the same budget as always: what is not held is read

Which experts tokens choose is a trace's word, as random routers choose at random: each expert has a popularity and a
state that changes from token to token (first-order autoregressive), drawn so that half of the experts held under LRU
hit about 80 % (llama.cpp PR #27861: 81 %) and that tokens share about a quarter of their experts with the one before
(field's notes: 25.6 %). The model's own router still runs, its answer is replaced.

Limits are the disk's rate at records of this size (fio's, or our reader's) and the memory rate.

Before that, what asking for the next layer's experts a layer early would do to the reads, counted in a window that
reads nothing: guesses are the trace's scores with noise, as much as gives the recall that is published of applying the
next router to this layer's input (0.7 to 0.9). Right ones may hide their reads behind the layer before; wrong ones are
reads in vain, and push out experts that would have been wanted.

What it does not show: text, other routers' locality, a MacBook.

    python benchmarks/experts.py --shape qwen3-30b-a3b [--layers 8] [--held 0.5] [--dir FOLDER]
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from end_to_end import disk_rate, memory_rate
from mlx.utils import tree_flatten
from naive import Outcome
from shapes import SHARD_BYTES, FastWriter, Noise, Tensor, TensorWriter, quantised_parts, write_texts

from mlxflash.backends import Backend, make_backend
from mlxflash.bundle import Bundle, Layer, Manifest, Part, make_record, write_manifest
from mlxflash.decode import reserved_cache
from mlxflash.diskprofile import DiskProfile, disk_profile
from mlxflash.flash import FlashModel
from mlxflash.model import load_bundle
from mlxflash.models import build_model, graft
from mlxflash.plan import BudgetError, format_bytes
from mlxflash.pool import host_memory
from mlxflash.reader import File, make_reader
from mlxflash.window import Window

BITS, GROUP, CONTEXT = 4, 64, 640
BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class Mixture:
    """A real model's layers; `vocabulary` and `positions` are what write_texts needs of a shape."""

    model_type: str
    layers: int
    d_model: int
    hidden: int
    experts: int
    chosen: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    spread: float  # of popularity, in standard deviations of the changing part
    memory: float  # of the changing part, from token to token

    def config(self, dtype: str) -> dict[str, Any]:
        """A config.json, as the Hub has them."""
        return {
            "model_type": self.model_type,
            "hidden_act": "silu",
            "hidden_size": self.d_model,
            "intermediate_size": self.hidden,
            "moe_intermediate_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "num_experts": self.experts,
            "num_local_experts": self.experts,
            "num_experts_per_tok": self.chosen,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
            "torch_dtype": dtype,
            "bos_token_id": 2,
            "eos_token_id": 2,
        }


SHAPES = {  # real numbers of layers: 48, 32
    "tiny": Mixture("qwen3_moe", 2, 256, 128, 32, 4, 4, 2, 64, 512, 1024, 0.65, 0.3),
    "qwen3-30b-a3b": Mixture("qwen3_moe", 8, 2048, 768, 128, 8, 32, 4, 128, 151936, 4096, 0.65, 0.3),
    "mixtral-8x7b": Mixture("mixtral", 4, 4096, 14336, 8, 2, 32, 8, 128, 32000, 4096, 0.7, 0.6),
}


def write_bundle(shape: Mixture, target: Path) -> None:
    """A bundle of random 4-bit weights."""
    partial = target.with_name(target.name + ".partial")
    (partial / "layers").mkdir(parents=True)
    rng, rms = np.random.default_rng(0), shape.d_model**-0.5
    parts, noise_parts = [], []
    for name, rows, columns in (
        ("gate", shape.hidden, shape.d_model),
        ("up", shape.hidden, shape.d_model),
        ("down", shape.d_model, shape.hidden),
    ):
        for what, kind, size, value in quantised_parts("", rows, columns, BITS, rms, "float16"):
            parts.append(Part(f"{name}_{what}" if what else name, kind, size, 0))
            noise_parts.append((kind, size[0] * size[1], value))
    record = make_record(parts)
    layers = tuple(Layer(f"layers/{i:03d}.bundle", shape.experts) for i in range(shape.layers))
    noise = Noise(rng, noise_parts, rms)
    for i, layer in enumerate(layers):
        writer = FastWriter(partial / layer.file, i, layer.units, record)
        for rows_, sums in noise.blocks(layer.units):
            writer.append(rows_, sums)
        writer.finish()
    model = build_model(shape.config("float16"), "shape")
    tensors = []
    modules = dict(model.named_modules())
    for name, array in tree_flatten(model.parameters()):
        module, kind = name.rsplit(".", 1)
        if ".switch_mlp." in name:
            continue
        router = len(array) == shape.experts
        if kind == "weight" and hasattr(modules[module], "to_quantized") and not router:
            said = quantised_parts("weight", array.shape[0], array.shape[1], BITS, rms, "float16")
            tensors += [Tensor(f"{module}.{what}", t, size, value) for what, t, size, value in said]
        else:
            tensors.append(Tensor(name, "float16", tuple(array.shape), 1.0 if "norm" in name else None))
    writer_of = TensorWriter(rng, rms)
    writer_of.write_shards("resident-{index:05d}.safetensors", partial, tensors, SHARD_BYTES["resident"])
    write_texts(partial, shape, "float16")  # type: ignore[arg-type]
    quantization = {"bits": BITS, "group_size": GROUP, "mode": "affine"}
    manifest = Manifest(
        shape.model_type, "experts", "silu", "float16", shape.d_model, quantization, record, layers, "random weights"
    )
    write_manifest(partial, manifest)
    os.rename(partial, target)


def scores(shape: Mixture, tokens: int, seed: int) -> np.ndarray:
    """What a layer's router says of each token's experts: [tokens, experts]."""
    rng = np.random.default_rng(seed)
    favour = shape.spread * rng.standard_normal(shape.experts)
    state, rows = rng.standard_normal(shape.experts), []
    for _ in range(tokens):
        state = shape.memory * state + (1 - shape.memory**2) ** 0.5 * rng.standard_normal(shape.experts)
        rows.append(favour + state)
    return np.array(rows)


def best(shape: Mixture, said: np.ndarray) -> np.ndarray:
    """The experts with the highest scores, uint32 [tokens, chosen]."""
    return np.argpartition(-said, shape.chosen - 1, axis=1)[:, : shape.chosen].astype(np.uint32)


def routes(shape: Mixture, tokens: int, seed: int) -> np.ndarray:
    """Which experts a layer's tokens choose, uint32 [tokens, chosen]."""
    return best(shape, scores(shape, tokens, seed))


def guesses(shape: Mixture, said: np.ndarray, recall: float, seed: int) -> np.ndarray:
    """The best of scores with noise, so much that `recall` of what is chosen is among them."""
    noise, right = np.random.default_rng(seed).standard_normal(said.shape), best(shape, said)
    low, high = 0.0, 10.0
    for _ in range(20):
        middle = (low + high) / 2
        found = best(shape, said + middle * noise)
        hits = np.mean([np.isin(a, b).mean() for a, b in zip(right, found, strict=True)])
        low, high = (middle, high) if hits > recall else (low, middle)
    return found


class NoRows:
    """Rows for a window of which only the maps are of interest; and their landing."""

    def __init__(self, capacity: int):
        self.capacity = capacity

    def settle(self, discard: bool = False) -> None: ...

    def land(self, *what: Any) -> "NoRows":
        return self

    def wait(self) -> None: ...


def look_ahead(shape: Mixture, held: float) -> str:
    """Reads per layer and token with experts named a layer early, at published recalls, and without."""
    lines, count, nothing = [], 600, np.empty(0, np.int64)
    for recall in (None, 0.7, 0.8, 0.9):
        early = wanted = late = 0
        for seed in range(4):
            said = scores(shape, count, seed)
            window = Window(shape.experts, NoRows(round(held * shape.experts)), *(cast(Any, None),) * 2)
            named = guesses(shape, said, recall, seed) if recall else np.empty((count, 0), np.uint32)
            for t, (guess, right) in enumerate(zip(named, best(shape, said), strict=True)):
                asked = np.sort(guess).astype(np.int64) if recall else nothing
                new, before = asked[window.slot_of[asked] < 0], window.num_misses
                ticket = window.request(asked)
                window.add(ticket, np.sort(right).astype(np.int64))
                assert not len(ticket.left)
                window.ready(ticket)
                if t >= 100:
                    early, wanted = early + len(new), wanted + int(np.isin(new, right).sum())
                    late += window.num_misses - before - len(new)
        early, wanted, late = (n / 4 / (count - 100) for n in (early, wanted, late))
        name = f"{recall:.0%} named a layer early" if recall else "nothing named early"
        lines.append(
            f"{name}: {early + late:.2f} reads per layer and token, {wanted:.2f} early, {early - wanted:.2f} in vain,"
            f" {late:.2f} late"
        )
    return "\n".join(lines)


def describe(shape: Mixture) -> str:
    """What the traces are, measured: overlap with the token before, hits of an LRU that holds half."""
    overlap, hits, asked = [], 0, 0
    for seed in range(4):
        last = np.full(shape.experts, -1)
        rows = routes(shape, 400, seed)
        for t, row in enumerate(rows):
            if t:
                overlap.append(np.isin(row, rows[t - 1]).mean())
            if t >= 100:
                held = np.argsort(-last)[: shape.experts // 2]
                hits, asked = hits + int(np.isin(row, held).sum()), asked + len(row)
            last[row] = t
    rate = hits / asked
    return f"trace: {np.mean(overlap):.0%} of a token's experts are the last one's; half held under LRU hit {rate:.0%}"


def inside(shape: Mixture, disk: DiskProfile) -> str:
    """What a missing expert takes to read whole, and by rows of its neurons, were it sparse inside as
    TurboSparse-Mixtral's are (arXiv 2406.05955: 85 % of an expert's neurons are zero) and it known which."""
    lines, active = [], 0.15 * shape.hidden
    for name, size in (("float16", 2.0), (f"{BITS}-bit", BITS / 8 + 4 / GROUP)):
        row = 3 * shape.d_model * size
        whole, rows = disk.sequential(row * shape.hidden), disk.batch(max(row, 4096), active)
        lines.append(
            f"an expert of {format_bytes(row * shape.hidden)}, {name}: {1e3 * whole:.1f} ms whole, {1e3 * rows:.1f} ms"
            f" for the rows of 15 % of its neurons, {format_bytes(row)} each"
        )
    return "\n".join(lines)


class Replayed(nn.Module):
    """Stands before a layer's experts: the router's answer is computed, the trace's is used."""

    def __init__(self, experts: nn.Module, trace: np.ndarray):
        super().__init__()
        self._experts, self._trace, self._at = experts, trace, 0

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        mx.eval(indices)
        count = indices.size // indices.shape[-1]
        chosen = self._trace[self._at : self._at + count]
        self._at += count
        y: mx.array = self._experts(x, mx.array(chosen).reshape(indices.shape))
        return y


def decode(model: FlashModel, shape: Mixture, prompt: int, warm: int, count: int, mode: str, forget: bool) -> Outcome:
    """A prompt, `warm` tokens that are not counted, `count` that are. `forget`: nothing is kept from token to token."""
    for i, layer in enumerate(model.layers):
        owner, name = (
            (layer.block_sparse_moe, "switch_mlp") if hasattr(layer, "block_sparse_moe") else (layer.mlp, "switch_mlp")
        )
        graft(owner, name, Replayed(getattr(owner, name), routes(shape, prompt + warm + count, i)))
    flash, step = model.flash, model.flash.plan.prefill_tokens
    cache = reserved_cache(model, None, prompt + warm + count)
    begin = time.perf_counter()
    for first in range(0, prompt, step):
        mx.eval(model(mx.full((1, min(step, prompt - first)), 5), cache=cache)[:, -1])
    ready, seconds = time.perf_counter() - begin, []
    before = flash.snapshot()
    for n in range(warm + count):
        if n == warm:
            before = flash.snapshot()
        if forget:
            for layer in flash.layers:
                layer.window.clear()
        begin = time.perf_counter()
        mx.eval(model(mx.array([[5]]), cache=cache)[:, -1])
        seconds.append(time.perf_counter() - begin)
    s = flash.stats(before, count)
    outcome = Outcome(
        mode, s.mode, seconds[warm:], s.bytes_per_token, s.reads_per_token, s.flash_s / count, s.manage_s / count,
        s.predict_s / count, s.held_share, s.peak_rss_gb, ready_s=ready, memory_bytes=flash.plan.memory,
        plan=flash.describe(),
    )  # fmt: skip
    outcome.held_bytes = flash.plan.resident + shape.chosen * shape.layers * flash.layers[0].stride
    return outcome


def every_weight(bundle: Bundle) -> Outcome:
    """Reading all of it once, in large blocks, two at a time."""
    files = [
        File(p, True) for p in (*(bundle.layer_path(i) for i in range(bundle.num_layers)), *bundle.resident_files())
    ]
    reader, buffers, tickets, total, turn = (
        make_reader(direct=True),
        [host_memory(BLOCK_BYTES) for _ in range(2)],
        [],
        0,
        0,
    )
    begin = time.perf_counter()
    for file in files:
        size = Path(file.path).stat().st_size // 4096 * 4096
        for offset in range(0, size, BLOCK_BYTES):
            if len(tickets) == 2:
                tickets.pop(0).wait()
            length = min(BLOCK_BYTES, size - offset)
            tickets.append(reader.submit(file, np.array([[offset, 0, length]], np.uint64), buffers[turn % 2]))
            total, turn = total + length, turn + 1
    for ticket in tickets:
        ticket.wait()
    seconds = time.perf_counter() - begin
    reader.close()
    for file in files:
        file.close()
    return Outcome("every weight", "read only", [seconds], total, turn, seconds, 0, 0, 0, 0)


def budget_for(bundle: Bundle, held: float, backend: Backend) -> int:
    """The budget whose pools hold that share of the experts."""

    def share(memory: int) -> float:
        with load_bundle(bundle.path, memory=memory, max_kv_size=CONTEXT, backend=backend, direct=False) as model:
            plan = model.flash.plan
            return sum(plan.capacities) / sum(plan.units)

    low = int(bundle.resident_bytes() + held * bundle.streamed_bytes())
    for _ in range(40):
        try:
            if share(low) >= held - 0.005:
                return low
        except BudgetError as error:
            low = error.smallest
            continue
        low += max(1, bundle.streamed_bytes() // 50)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--held", type=float, default=0.5, help="share of the experts that the budget holds (0.5)")
    parser.add_argument("--tokens", type=int, default=48, help="decoded tokens counted (48)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (512)")
    parser.add_argument("--device", help="metal, cpu or mlx-cpu; the best here otherwise")
    parser.add_argument("--dir", type=Path, default=None, help="where bundles are kept; a temporary folder otherwise")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        run(args, args.dir or Path(scratch))


def run(args: argparse.Namespace, folder: Path) -> None:
    shape, path = SHAPES[args.shape], folder / f"{args.shape}-experts.flash"
    if not (path / "manifest.json").exists():
        write_bundle(shape, path)
    bundle, backend = Bundle.open(path), make_backend(args.device)
    if backend.name != "metal":
        mx.set_default_device(mx.cpu)
    print(describe(shape))
    print(look_ahead(shape, args.held))
    stride, file = bundle.manifest.record.stride, bundle.layer_path(bundle.num_layers // 2)
    memory = budget_for(bundle, args.held, backend)
    warm = 32
    if (disk := disk_profile([file])) is not None:
        print(inside(shape, disk))
    outcomes = [every_weight(bundle)]
    outcomes[0].held_bytes = 0
    settings: dict[str, Any] = {"memory": memory, "direct": True, "max_kv_size": CONTEXT, "backend": backend}
    for mode, prompt, tokens in (("nothing kept", 0, 8), ("experts", args.prompt, args.tokens)):
        with load_bundle(path, **settings) as model:
            forget = mode == "nothing kept"
            outcomes.append(decode(model, shape, prompt, 0 if forget else warm, tokens, mode, forget))
            if not forget:
                snapshot = model.flash.snapshot()
                hits = snapshot.hits / max(1, snapshot.hits + snapshot.misses)
    with load_bundle(path, memory=None, direct=False, max_kv_size=CONTEXT, backend=backend) as model:
        if model.flash.plan.whole:
            outcomes.append(decode(model, shape, args.prompt, 4, 16, "all held", False))
    seconds = 0.5 if args.shape == "tiny" else 2.0
    size = stride if stride <= BLOCK_BYTES else 1 << 20  # larger ones are read in pieces of that, one after another
    random, by = disk_rate(file, size, "random" if size == stride else "sequential", seconds)
    rate = memory_rate(backend)
    flash = outcomes[2]
    print(flash.plan)
    print(f"{by}, direct, {size} B: {random:.2f} GB/s; memory {rate:.1f} GB/s; hit rate of all {hits:.1%}")
    print("                   ms/token  tokens/s       bytes  reads  wait ms  GB/s  limit ms  prompt s")
    rows = []
    for o in outcomes:
        ms = 1e3 * float(np.median(o.seconds))
        mean = 1e3 * float(np.mean(o.seconds))
        disk = outcomes[0].rate if o is outcomes[0] else random
        limit = max(1e3 * o.bytes_per_token / disk / 1e9, o.held_bytes / rate / 1e6)
        rows.append(
            {"mode": o.mode, "ms": ms, "mean_ms": mean, "bytes": o.bytes_per_token, "wait_ms": 1e3 * o.flash_s,
             "limit_ms": limit, "ttft_s": o.ready_s}
        )  # fmt: skip
        print(
            f"{o.mode:<19}{ms:8.1f}  {1e3 / ms:8.2f}  {format_bytes(o.bytes_per_token):>10}  {o.reads_per_token:5.0f}"
            f"  {1e3 * o.flash_s:7.1f}  {o.bytes_per_token / mean / 1e6:4.2f}  {limit:8.1f}  {o.ready_s:8.2f}"
        )
    print(f"a token takes {rows[2]['mean_ms'] / rows[2]['limit_ms']:.2f} of the larger limit (means)")
    print(json.dumps({"shape": args.shape, "memory_bytes": memory, "hit_rate": hits, "random": random, "rows": rows}))


if __name__ == "__main__":
    sys.exit(main())
