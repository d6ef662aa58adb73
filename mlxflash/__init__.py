"""Run language models larger than memory: feed-forward weights stay on flash, each token reads the units it needs.

Modules import only from those below themselves:

    cli, api                     commands; load()
    hub, train, plot             names to bundles; training a predictor; pictures of a fidelity report
    calibrate, thinning          measuring a predictor; finding levels of fidelity
    sparsity                     leaving units out where none is ever zero
    converters, evaluate         checkpoints to bundles; what a model says of text
    decode                       the decode loop: generate(), stream_generate()
    model                        a bundle to a model
    ffn, experts                 which units, bring them, compute
    fidelity                     which active units are worth a read
    predictor, window            x to unit ids; ids to rows held
    backends                     where rows live and how the FFN is computed on them
    catalog                      public models by short names, and what they will take
    models, plan, policy, pool   model families; budgets; who leaves memory first; host memory
    hosttier                     the host's memory beside a device with its own
    reader, bundle, _native      extents to bytes; what lies on disk; the optional native part
    install                      which MLX is installed, and what is wrong with it

Importing does nothing: `load`, `generate` and `stream_generate` are found when first used.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["generate", "load", "stream_generate"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        try:
            from mlxflash import api, decode
        except ImportError as error:
            from mlxflash.install import why_not_loaded

            raise ImportError(why_not_loaded(error) or str(error)) from error
        return api.load if name == "load" else getattr(decode, name)
    raise AttributeError(f"module 'mlxflash' has no attribute {name!r}")
