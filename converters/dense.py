"""Dense FFNs, one record per neuron: plain, act(up.x + up_bias) * down, as `up | down`; gated, act(gate.x) * (up.x)
* down, as `gate | up | down`.

A down projection [d_model, units] is stored by column, so that a neuron's record holds its rows of `gate` and `up` and
its column of `down` side by side. Source: LLM in a flash (arXiv 2312.11514), "Bundling Columns and Rows".
"""

import mlx.core as mx
from mlxflash.converters.checkpoint import Checkpoint


def width(checkpoint: Checkpoint) -> int:
    """Numbers in a unit's row of each matrix: d_model."""
    return _down(checkpoint, 0)[0]


def units(checkpoint: Checkpoint, layer: int) -> int:
    return _down(checkpoint, layer)[1]


def _down(checkpoint: Checkpoint, layer: int) -> tuple[int, ...]:
    return checkpoint.shapes[f"{checkpoint.ffn_path(layer)}.{checkpoint.family.parts['down']}.weight"]


def streamed(checkpoint: Checkpoint) -> list[str]:
    """Names of a record's matrices, in their order on disk."""
    return list(checkpoint.family.parts)


def per_unit(checkpoint: Checkpoint) -> list[str]:
    """Names of `residents` that hold one value per unit."""
    return [f"{part}_bias" for part in checkpoint.family.parts if part != "down"]


def matrices(checkpoint: Checkpoint, layer: int) -> dict[str, mx.array]:
    """The streamed matrices of a layer, each [units, d_model]."""
    found = {name: part(checkpoint, layer, name, "weight") for name in checkpoint.family.parts}
    return found | {"down": found["down"].T}


def residents(checkpoint: Checkpoint, layer: int) -> dict[str, mx.array]:
    """What stays in memory: `gate_bias` and `up_bias` [units], one value per unit, and `down_bias` [d_model]."""
    base, parts = checkpoint.ffn_path(layer), checkpoint.family.parts
    biased = [name for name, path in parts.items() if f"{base}.{path}.bias" in checkpoint.shapes]
    return {f"{name}_bias": part(checkpoint, layer, name, "bias") for name in biased}


def part(checkpoint: Checkpoint, layer: int, name: str, kind: str) -> mx.array:
    """A part's weight, bias or what quantisation adds; of parts that share a path, its share of the rows."""
    path = checkpoint.family.parts[name]
    array = checkpoint.tensor(f"{checkpoint.ffn_path(layer)}.{path}.{kind}")
    sharing = [other for other, its in checkpoint.family.parts.items() if its == path]
    rows = len(array) // len(sharing)
    return array if len(sharing) == 1 else array[rows * sharing.index(name) :][:rows]
