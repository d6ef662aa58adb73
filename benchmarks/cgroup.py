"""A checkpoint larger than memory converts and generates: both commands in a memory cgroup, with what they took.

The checkpoint is a real shape's in float16, random weights in shards of 2 GB, safetensors or (`--bin`) PyTorch's zip
files. `charged` counts the page cache that reading and writing fills, up to the limit; `resident` is the process alone.
The text that comes out is noise.

What it does not show: a real download, quality, speed on a machine that has no more memory than the limit.

    python benchmarks/cgroup.py --shape llama-3-8b --limit 6GB [--bin] [--layers 4] [--dir FOLDER]
"""

import argparse
import json
import resource
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from against_llamacpp import cool
from limited import run_in
from safetensors import safe_open
from shapes import SHAPES, folder_bytes, write_checkpoint

from mlxflash.plan import format_bytes, parse_memory

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from torch_file import KINDS, table, view

IMPORTS = "import mlxflash.cli, mlxflash.api, mlxflash.decode, mlx_lm.sample_utils"
TOKENS, CONTEXT = 8, 256


def to_bin(folder: Path) -> None:
    """Every shard as torch.save would have it, its tensors' storages one after the other."""
    for shard in sorted(folder.glob("*.safetensors")):
        target = shard.with_name(shard.name.replace("model-", "pytorch_model-")).with_suffix(".bin")
        with safe_open(shard, "numpy") as f, zipfile.ZipFile(target, "w") as out:
            entries = {}
            for key, name in enumerate(f.keys()):
                array = f.get_tensor(name)
                entries[name] = view(str(key), KINDS[str(array.dtype)], array.size, array.shape)
                with out.open(f"archive/data/{key}", "w", force_zip64=True) as storage:
                    storage.write(array.data)
            out.writestr("archive/data.pkl", table(entries))
            out.writestr("archive/byteorder", b"little")
        shard.unlink()
    index = folder / "model.safetensors.index.json"
    said = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
    (folder / "pytorch_model.bin.index.json").write_text(said)
    index.unlink()


def step(name: str, limit: int, *arguments: object) -> dict[str, Any]:
    """One command of mlxflash in its cgroup."""
    begin = time.perf_counter()
    done, charged = run_in([sys.executable, "-m", "mlxflash", *arguments], limit)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"cgroup: {name} ended with {done.returncode}: {done.stderr[-2000:]}")
    resident = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of the largest so far: conversion first
    return {"step": name, "seconds": seconds, "charged": charged, "resident": resident, "out": done.stdout}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=None, help="only so many of the shape's")
    parser.add_argument("--limit", default="6GB", help="of the cgroup (6GB)")
    parser.add_argument("--bin", action="store_true", help="PyTorch's zip files instead of safetensors")
    parser.add_argument("--dir", type=Path, default=None, help="where to write; what is written is removed at the end")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        checkpoint, bundle = Path(scratch) / "checkpoint", Path(scratch) / "bundle.flash"
        write_checkpoint(SHAPES[args.shape].first(args.layers), checkpoint)
        if args.bin:
            to_bin(checkpoint)
        for file in checkpoint.iterdir():
            cool(file)
        size, limit = folder_bytes(checkpoint), parse_memory(args.limit, 0)
        assert limit is not None
        print(f"{args.shape}, {format_bytes(size)} of {'.bin' if args.bin else 'safetensors'}, limit {args.limit}")
        converted = step("convert", limit, "convert", checkpoint, bundle)
        memory = limit - run_in([sys.executable, "-c", IMPORTS])[1]
        wanted = ["--memory", memory, "--max-kv-size", CONTEXT, "-m", TOKENS, "--json", "-p", "The sea"]
        made = step("generate", limit, "generate", "--model", bundle, *wanted)
    said = json.loads(made.pop("out"))
    made |= {"resident": int(said["peak_rss_gb"] * 1e9), "tokens_per_s": said["generation_tps"]}
    del converted["out"]
    for row in (converted, made):
        print(
            f"{row['step']:<9}{row['seconds']:7.1f} s, resident {format_bytes(row['resident'])},"
            f" charged {format_bytes(row['charged'])}"
        )
    print(f"{said['generation_tokens']} tokens at {said['generation_tps']:.2f} per second, {said['mode']}")
    print(json.dumps({"shape": args.shape, "bytes": size, "limit": limit, "bin": args.bin, "rows": [converted, made]}))


if __name__ == "__main__":
    main()
