"""`load` as mlx-lm has it: a name to a model and its tokenizer."""

from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer_files

from mlxflash.bundle import BundleError
from mlxflash.flash import FlashModel
from mlxflash.hub import find_bundle
from mlxflash.model import load_bundle


def load(
    path_or_hf_repo: str | Path = "story",
    *,
    memory: str | int | None = None,
    host_memory: str | int | None = None,
    predictor: str | None = None,
    fidelity: str | None = None,
    sparsity: int | None = None,
    window: int | None = None,
    device: str | None = None,
    max_kv_size: int | None = None,
    dtype: str | None = None,
    bits: int | None = None,
    **options: Any,
) -> tuple[FlashModel, TokenizerWrapper]:
    """A streaming model and its tokenizer: a bundle, a checkpoint directory, an alias or a hub name.

    A checkpoint is converted once into the cache (`dtype`, `bits`: as for `mlxflash convert`) and reused. All other
    options are load_bundle's. The model closes like a file: `with load(...)[0] as model`, or `model.close()`.
    """
    bundle = find_bundle(path_or_hf_repo, dtype=dtype, bits=bits)
    tokenizer = load_tokenizer(bundle)
    model = load_bundle(
        bundle,
        memory=memory,
        host_memory=host_memory,
        predictor=predictor,
        fidelity=fidelity,
        sparsity=sparsity,
        window=window,
        device=device,
        max_kv_size=max_kv_size,
        **options,
    )
    return model, tokenizer


def load_tokenizer(bundle: Path) -> TokenizerWrapper:
    """mlx-lm's tokenizer of a bundle. Raises BundleError when its files are missing or damaged."""
    if not any(file for pattern in ("tokenizer.json", "*.model", "vocab*") for file in bundle.glob(pattern)):
        raise BundleError(f"{bundle}: the tokenizer's files are missing; convert again")  # or an empty one would load
    try:
        return load_tokenizer_files(bundle)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BundleError(f"{bundle}: the tokenizer's files cannot be loaded ({first}); convert again") from None
