"""Run language models larger than memory: feed-forward weights stay on flash, each token reads the units it needs.

Modules import only from those below themselves:

    cli, api                     commands; load()
    hub, train, plot             names to bundles; training a predictor; pictures of a fidelity report
    calibrate, thinning          measuring a predictor; finding levels of fidelity
    converters, evaluate         checkpoints to bundles; what a model says of text
    decode                       the decode loop: generate(), stream_generate()
    model                        a bundle to a model
    ffn, experts                 which units, bring them, compute
    fidelity                     which active units are worth a read
    predictor, window            x to unit ids; ids to rows held
    backends                     where rows live and how the FFN is computed on them
    catalog                      public models by short names, and what they will take
    models, plan, policy, pool   model families; budgets; who leaves memory first; host memory
    reader, bundle, _native      extents to bytes; what lies on disk; the optional native part

Importing does nothing: `load`, `generate` and `stream_generate` are found when first used.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["generate", "load", "stream_generate"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from mlxflash.api import load

        return load
    if name in ("generate", "stream_generate"):
        from mlxflash import decode

        return getattr(decode, name)
    raise AttributeError(f"module 'mlxflash' has no attribute {name!r}")
