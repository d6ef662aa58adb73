"""The plain layout: act(up.x + up_bias) * down, one record per neuron `up | down`; OPT's kind of FFN.

A down projection [d_model, units] is stored by column, so that a neuron's record holds its row of `up` and its
column of `down` side by side. Source: LLM in a flash (arXiv 2312.11514), "Bundling Columns and Rows".
"""

import mlx.core as mx
from mlxflash.converters.checkpoint import Checkpoint


def matrices(checkpoint: Checkpoint, layer: int) -> dict[str, mx.array]:
    """The streamed matrices of a layer, each [units, d_model]."""
    base, parts = checkpoint.ffn_path(layer), checkpoint.family.parts
    return {
        "up": checkpoint.tensor(f"{base}.{parts['up']}.weight"),
        "down": checkpoint.tensor(f"{base}.{parts['down']}.weight").T,
    }


def residents(checkpoint: Checkpoint, layer: int) -> dict[str, mx.array]:
    """What stays in memory: `up_bias` [units], one value per unit, and `down_bias` [d_model]."""
    base, parts = checkpoint.ffn_path(layer), checkpoint.family.parts
    names = {"up_bias": f"{base}.{parts['up']}.bias", "down_bias": f"{base}.{parts['down']}.bias"}
    return {part: checkpoint.tensor(name) for part, name in names.items() if name in checkpoint.shapes}


STREAMED = ("up", "down")
PER_UNIT = ("up_bias",)
