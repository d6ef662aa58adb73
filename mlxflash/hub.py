"""A model's name to a bundle on disk: the embedded story model, bundles, checkpoints, aliases, Hugging Face names.

What is not yet a bundle is converted once into a cache folder (MLXFLASH_CACHE, else ~/.cache/mlxflash) and reused.
Nothing is downloaded unless the name is a remote model's. Downloads are huggingface_hub's: they resume.
"""

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxflash.catalog import ALIASES, KNOWN, STORY
from mlxflash.kept import cache_folder

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
ROUNDED_BYTES = 2e9  # of checkpoints whose rounding is measured unasked: a matter of seconds
CHECKPOINT_FILES = ["*.json", "*.txt", "*.model"]  # beside weights
Progress = Callable[[str, int, int], None]


def find_bundle(
    name: str | Path,
    *,
    dtype: str | None = None,
    bits: int | None = None,
    progress: Progress = lambda what, done, total: None,
    say: Callable[[str], None] | None = None,
    memory: str | int | None = None,
    context: int | None = None,
) -> Path:
    """The bundle directory of `name`, converting (and downloading) it first where that is needed.

    `say` is told what is about to be done; before a download also what the model would do here within `memory`, with
    a key-value cache for `context` tokens.

    Raises ValueError with one sentence when there is no such model or it cannot be converted.
    """
    path = STORY if str(name) == "story" else Path(name)
    if (path / "manifest.json").is_file():
        if dtype or bits:
            raise ValueError(f"{path}: is a bundle already; dtype and bits are chosen when a checkpoint is converted")
        return path
    if path.exists():
        return _converted(path, str(path.resolve()), path.resolve().name, dtype, bits, progress, say)
    repo = ALIASES.get(str(name), str(name))
    if not is_repo(repo) or str(name).startswith((".", "/")):
        raise ValueError(
            f"model {str(name)!r}: no such directory, hub name (org/name, org/name@revision) or alias "
            "(`mlxflash models` lists them)"
        )
    target = _target(repo, re.sub("[/@]", "--", repo), dtype, bits)
    if (target / "manifest.json").is_file():
        return target
    known = next((known for known in KNOWN.values() if known.repo == repo.partition("@")[0]), None)
    if known is not None and say is not None:
        from mlxflash.preview import preview

        say(preview(known, memory, bits, context))
    return _converted(download(repo), repo, re.sub("[/@]", "--", repo), dtype, bits, progress, say)


def is_repo(name: str) -> bool:
    """Whether this is a hub name, with a revision or without."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) is not None


def download(repo: str) -> Path:
    """The checkpoint of a hub repository (`org/name`, `org/name@revision`), downloaded or from the hub's own cache.

    Of weights it takes safetensors, and PyTorch's files where there are no safetensors. Raises ValueError with one
    sentence where there is no such repository or the hub cannot be reached, OSError where nothing can be written.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    name, _, revision = repo.partition("@")
    weights, away = "*", None
    # The base of the hub's errors is that of whichever HTTP library it is built on, which lets its own through.
    failures: tuple[Any, ...] = (*HfHubHTTPError.__bases__, OSError, RuntimeError)
    try:
        try:
            files = HfApi().list_repo_files(name, revision=revision or None)
            weights = weights_pattern(files)
        except failures as error:
            if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
                raise
            away = error  # if anywhere, the model is in the hub's cache
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=[*CHECKPOINT_FILES, weights],
                ignore_patterns=["*/*", "consolidated*"],
                local_files_only=away is not None,
            )
        )
    except RepositoryNotFoundError:
        raise ValueError(f"model {repo!r}: the Hugging Face hub has no such repository, or it needs a login") from None
    except RevisionNotFoundError:
        raise ValueError(f"model {repo!r}: the Hugging Face hub has no revision {revision!r} of it") from None
    except failures as error:
        if (code := _disk_error(error)) is not None:
            said = f"{os.strerror(code)}, downloading {repo}; what is there is kept"
            raise OSError(code, said, str(constants.HF_HUB_CACHE)) from None
        raise ValueError(
            f"model {repo!r}: not on this machine, and the Hugging Face hub cannot be reached "
            f"({type(away or error).__name__}); connect, or give a checkpoint directory"
        ) from None


def _disk_error(error: BaseException) -> int | None:
    """The number of what this machine's disk refused, where that is what went wrong; Rust's parts only print it."""
    number = getattr(error, "errno", None)
    if number is None and (printed := re.search(r"os error (\d+)", str(error))):
        number = int(printed[1])
    return number if number in DISK_ERRORS else None


def weights_pattern(files: list[str]) -> str:
    """Which of a repository's files are the weights to take."""
    safetensors = any(file.endswith(".safetensors") and "/" not in file for file in files)
    return "*.safetensors" if safetensors else "pytorch_model*.bin"


def _target(identity: str, label: str, dtype: str | None, bits: int | None) -> Path:
    options = f"{dtype or 'as-is'}-q{bits}" if bits else dtype or "as-is"
    digest = hashlib.sha256(f"{identity} {options}".encode()).hexdigest()[:8]
    return cache_folder() / f"{label}-{options}-{digest}.flash"


def _converted(
    checkpoint: Path,
    identity: str,
    label: str,
    dtype: str | None,
    bits: int | None,
    progress: Progress,
    say: Callable[[str], None] | None,
) -> Path:
    target = _target(identity, label, dtype, bits)
    if (target / "manifest.json").is_file():
        return target
    from mlxflash.calibrate import calibrate
    from mlxflash.converters import convert
    from mlxflash.converters.checkpoint import Checkpoint
    from mlxflash.rounding import measure_rounding, weight_bytes

    Checkpoint(checkpoint)  # what cannot be converted is refused before anything is said or made
    target.parent.mkdir(parents=True, exist_ok=True)
    if say is not None:
        say(f"converting {label} into {target} (once)")
    bundle = convert(checkpoint, target, dtype=dtype, bits=bits, progress=progress)
    if "low-bit" in bundle.predictors():
        bundle = calibrate(bundle, progress=progress)
    if bits and weight_bytes(checkpoint) < ROUNDED_BYTES:
        with contextlib.suppress(ValueError):  # no room on the disk: then no figure is told
            measure_rounding(bundle, checkpoint, dtype=dtype, progress=progress)
    return target
