"""`--sparsity P`: leave out the P % of the units that are predicted to add least, where activations are never zero.

Lossy, so only on demand, and labelled with what it cost on the text it was measured on. What a unit adds to the FFN's
output is |act(gate) up| |down row|, or |act(up)| |down row|; the products are estimated by a copy of their matrices in
a few bits, which stays in memory, so that nothing of a unit that is left out is read. (CATS, arXiv 2404.08763, and DIP,
arXiv 2412.01380, have a true product to go by, and read a part of every unit.) One threshold on this in all layers,
each scaled by how much the model minds an error there, makes a P; `thinning` finds and prices it like a level.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlxflash.backends import make_backend
from mlxflash.bundle import Bundle, BundleError, write_manifest
from mlxflash.calibrate import recorded
from mlxflash.evaluate import check_length
from mlxflash.fidelity import SPARSITIES, save_cuts
from mlxflash.model import load_bundle
from mlxflash.predictor import load_magnitude, low_bit_matrix, save_copy
from mlxflash.thinning import Weights, find_levels

Progress = Callable[[str, int, int], None]


def calibrate_sparsity(
    bundle: Bundle,
    tokens: np.ndarray | None,
    percents: Sequence[int],
    *,
    num_tokens: int = 256,
    memory: str | int | None = None,
    device: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Bundle:
    """Make what `--sparsity` needs and measure it at each of `percents`, on `tokens` (int [n]; None: text the model
    makes up itself), with nothing held from earlier tokens; what was measured before is replaced.

    Takes some ten passes over the text. Returns the bundle, reopened. Raises ValueError (BundleError) with one sentence
    where activations are zero by themselves, for a mixture, a text too short, or one that gives NaN.
    """
    bundle.require_never_zero()
    percents = sorted(set(percents))
    if wrong := [p for p in percents if p not in SPARSITIES]:
        raise ValueError(f"sparsity {wrong[0]}: a percentage of the units, 1 to 99")
    d_model = bundle.manifest.d_model
    if d_model % 32:
        raise BundleError(f"{bundle.path}: a width of {d_model} is not in groups of 32, which a copy needs")
    if tokens is not None:
        check_length(tokens)
    sequences, inputs = recorded(bundle, tokens, num_tokens, memory, device, progress)
    if bad := [i for i, x in enumerate(inputs) if not np.isfinite(x).all()]:
        raise ValueError(f"{bundle.path}: layer {bad[0]} is given NaN or infinity on the calibration text")
    folder, count = bundle.path / "predictors" / "sparsity", bundle.num_layers
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        progress("copies", index, count)
        weights = Weights(bundle, index)
        parts = [weights.first] if weights.up is weights.first else [weights.first, weights.up]
        save_copy(folder / f"{index:03d}.safetensors", low_bit_matrix(mx.array(np.concatenate(parts))))
    progress("copies", count, count)
    backend, layers = make_backend(device), bundle.manifest.layers
    predictors = [(load_magnitude(bundle, i, backend), np.zeros(layers[i].units, np.float32)) for i in range(count)]
    with load_bundle(bundle.path, memory=memory, predictor="all", device=device, bundle=bundle) as model:
        cuts, found = find_levels(bundle, model, predictors, inputs, sequences, left_out=percents, progress=progress)
    save_cuts(bundle.path, "sparsity", cuts)
    found |= {"text": "text" if tokens is not None else "the model's own text"}
    said = bundle.manifest.calibration | {"fidelity": {"sparsity": found}}
    write_manifest(bundle.path, replace(bundle.manifest, calibration=said))
    return Bundle.open(bundle.path)
