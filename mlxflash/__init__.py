"""Run language models larger than memory: feed-forward weights stay on flash, each token reads the units it needs.

Modules import only from those below themselves:

    cli                          the command: verbs and failures
    commands                     what each verb does
    api                          load()
    hub, plot, imported          names to bundles; pictures of a fidelity report; predictors of others
    train, order                 training a predictor; the order of units on disk
    rounding, routing            what quantising cost; which experts tokens choose
    calibrate                    measuring a predictor
    thinning                     finding levels of fidelity
    converters, evaluate         checkpoints to bundles; what a model says of text
    preview                      what a public model would do here, before it is downloaded
    decode                       the decode loop: generate(), stream_generate()
    model                        a bundle to a model
    assemble, ways               the model without its FFNs; which predictor and level, within what memory
    sizes                        what a bundle takes in memory
    wishes                       what was asked for, and what contradicts it
    flash                        what a model holds and did
    experts, routed              which units, bring them, compute: where routers or the model's own predictor say
    ffn                          the same for neurons
    fidelity, bound, sketch      which active units are worth a read; x to unit ids by proof; x to activations
    forecast                     how long a token will take
    lookahead                    x to the next layer's unit ids
    predictor                    x to unit ids
    backends                     where rows live and how the FFN is computed on them
    catalog                      public models by short names, and what they will take
    models, plan                 model families; budgets
    misses                       what layers miss, by how much they hold
    window, hosttier             ids to rows held; the host's memory beside a device with its own
    diskprofile, resident        how long reads take here; weights that stay
    pool, policy                 host memory for units; who leaves memory first
    reader, kept                 extents to bytes; what was measured of this machine
    bundle, _native              what lies on disk; the optional native part
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
