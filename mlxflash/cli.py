"""The command `mlxflash`: verbs and failures. Text to stdout, everything else to stderr.

A known failure is one sentence and exit code 1; MLXFLASH_DEBUG=1 shows the traceback.
"""

import argparse
import os
import sys
from typing import NoReturn

from mlxflash import __version__
from mlxflash.commands import evaluate, generate, inspect, prepare
from mlxflash.install import why_not_loaded


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see `{self.prog} --help`)")


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script."""
    args = parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notices about prompts are not for our users
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # nor each attempt to reach the hub
    try:
        if getattr(args, "device", None) in ("cpu", "mlx-cpu", "discrete"):
            import mlx.core as mx

            mx.set_default_device(mx.cpu)  # what no backend replaces would run on a Mac's GPU otherwise
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
        sys.exit(1)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("MLXFLASH_DEBUG"):
            raise
        fail(sentence(error))


def fail(message: str) -> NoReturn:
    print(f"mlxflash: {message}", file=sys.stderr)
    sys.exit(1)


def sentence(error: BaseException) -> str:
    """One line for one failure, with the file where there is one."""
    if isinstance(error, ImportError) and (why := why_not_loaded(error)):
        return why
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def parser() -> Parser:
    top = Parser(prog="mlxflash", description="Run language models larger than memory.")
    top.add_argument("--version", action="version", version=f"mlxflash {__version__}")
    verbs = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    generate.add(verbs.add_parser("generate", help="generate text from a prompt"))
    prepare.add_convert(verbs.add_parser("convert", help="convert a checkpoint into a bundle"))
    prepare.add_calibrate(verbs.add_parser("calibrate", help="measure a predictor, or a mixture's router, on text"))
    prepare.add_train(verbs.add_parser("train", help="train a low-rank predictor for a bundle"))
    evaluate.add(verbs.add_parser("eval", help="measure what streaming costs in fidelity on a text"))
    prepare.add_reorder(verbs.add_parser("reorder", help="copy a bundle so that units missed together lie together"))
    inspect.add_models(verbs.add_parser("models", help="list public models that have a short name"))
    inspect.add_info(verbs.add_parser("info", help="say what a bundle is"))
    inspect.add_verify(verbs.add_parser("verify", help="check every record of a bundle against its checksum"))
    return top
