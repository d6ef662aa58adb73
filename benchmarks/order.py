"""Reads per token with units as stored and in an order made from a trace, and what they take on this disk.

What a memory of `--held` of the units misses is simulated on two recorded traces (trace.py record): one makes the order
(mlxflash/order.py), the other is read: every missed unit is a record of `--record` bytes in a file of random bytes,
read directly in one batch per layer and token, neighbours in one vectored read. Batches of both ways take turns.

    python benchmarks/order.py train.npz valid.npz [--held 0.25] [--record 16384] [--dir FOLDER]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from trace import Trace

import numpy as np

from mlxflash.bundle import HEADER_BYTES, Part, make_record
from mlxflash.misses import missed_units
from mlxflash.order import order_of, reads_of
from mlxflash.pool import RecordRows, Staging, host_memory
from mlxflash.reader import File, make_reader

WARM = 256  # tokens of the trace that fill the memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("valid", type=Path)
    parser.add_argument("--held", type=float, default=0.25, help="share of each layer's units in memory (0.25)")
    parser.add_argument("--record", type=int, default=16384, help="bytes of a unit, a multiple of 4096 (16384)")
    parser.add_argument("--tokens", type=int, default=400, help="tokens read (400)")
    parser.add_argument("--dir", type=Path, default=None, help="where the file is; a temporary folder otherwise")
    args = parser.parse_args()
    train, valid = Trace.load(args.train), Trace.load(args.valid)
    record = make_record([Part("row", "uint8", (args.record,), 0)])
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        path = Path(folder) / "layer"
        rng = np.random.default_rng(0)
        path.write_bytes(bytes(HEADER_BYTES) + rng.bytes(int(train.units.max()) * record.stride))
        rows = run(args, train, valid, record, path)
    print(f"{args.held:.0%} held, records of {args.record} bytes, {args.tokens} tokens, {len(train.units)} layers")
    print("order       reads/token   units/read   ms/token")
    for row in rows:
        print(f"{row['order']:<9}{row['reads']:14.1f}{row['units'] / row['reads']:13.2f}{row['ms']:11.2f}")
    print(json.dumps({"held": args.held, "record": args.record, "rows": rows}))


def run(args, train, valid, record, path):  # type: ignore[no-untyped-def]
    missed, orders = [], []
    for layer, units in enumerate(train.units.tolist()):
        orders.append(order_of(missed_units(train.sets["late"].matrix(layer, units), args.held)))
        there = missed_units(valid.sets["late"].matrix(layer, units), args.held)
        missed.append(there[WARM : WARM + args.tokens])
    most = int(max(m.sum(axis=1).max() for m in missed))
    file, reader = File(path, direct=True), make_reader(direct=True)
    slots = np.random.default_rng(1).permutation(most)  # where rows leave is nowhere in particular
    ways = ("identity", "ours")
    pool = RecordRows(record, host_memory(most * record.stride), Staging(0, record))
    seconds = dict.fromkeys(ways, 0.0)
    for token in range(args.tokens):
        for layer in range(len(missed)):
            for name in ways:
                row = missed[layer][token]
                at = np.flatnonzero(row if name == "identity" else row[orders[layer]])
                begin = time.perf_counter()
                pool.land(reader, file, at, slots[: len(at)]).wait()
                seconds[name] += time.perf_counter() - begin
    reader.close()
    file.close()
    rows = []
    for name in ways:
        orderly = zip(missed, orders, strict=True)
        reads = sum(reads_of(m if name == "identity" else m[:, order]) for m, order in orderly)
        units = sum(int(m.sum()) for m in missed) / args.tokens
        rows.append({"order": name, "reads": reads, "units": units, "ms": 1e3 * seconds[name] / args.tokens})
    return rows


if __name__ == "__main__":
    main()
