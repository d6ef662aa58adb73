"""Run language models larger than memory: feed-forward weights stay on flash, each token reads the units it needs.

Modules import only from those below themselves:

    cli, api                     commands; load()
    hub, plot, imported          names to bundles; pictures of a fidelity report; predictors of others
    train                        training a predictor
    rounding, routing            what quantising cost; which experts tokens choose
    calibrate, thinning          measuring a predictor; finding levels of fidelity
    converters, evaluate         checkpoints to bundles; what a model says of text
    preview                      what a public model would do here, before it is downloaded
    decode                       the decode loop: generate(), stream_generate()
    model                        a bundle to a model
    assemble, ways               the model without its FFNs; which predictor and level, within what memory
    sizes, forecast              what a bundle takes in memory; how long a token
    wishes                       what was asked for, and what contradicts it
    ffn, experts, routed         which units, bring them, compute
    fidelity                     which active units are worth a read
    bound                        x to unit ids, by proof
    predictor, window            x to unit ids; ids to rows held
    backends                     where rows live and how the FFN is computed on them
    catalog                      public models by short names, and what they will take
    models, plan, policy, pool   model families; budgets; who leaves memory first; host memory
    kept                         what was measured of this machine
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
