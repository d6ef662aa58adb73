"""A model's name to a bundle on disk: the embedded story model, bundles, checkpoints, aliases, Hugging Face names.

What is not yet a bundle is converted once into a cache folder (MLXFLASH_CACHE, else ~/.cache/mlxflash) and reused.
Nothing is downloaded unless the name is a remote model's. Downloads are huggingface_hub's: they resume.
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from mlxflash.catalog import ALIASES, KNOWN, preview
from mlxflash.kept import cache_folder

STORY = Path(__file__).parent / "story.flash"
CHECKPOINT_FILES = ["*.json", "*.txt", "*.model"]  # beside weights
Progress = Callable[[str, int, int], None]


def find_bundle(
    name: str | Path,
    *,
    dtype: str | None = None,
    bits: int | None = None,
    progress: Progress = lambda what, done, total: None,
    say: Callable[[str], None] = lambda text: None,
    memory: str | int | None = None,
) -> Path:
    """The bundle directory of `name`, converting (and downloading) it first where that is needed.

    `memory` is the budget it is wanted for: what is said before a download tells what it would do.

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

    def reached() -> None:
        if str(name) in KNOWN:
            say(preview(KNOWN[str(name)], memory))

    return _converted(download(repo, reached), repo, re.sub("[/@]", "--", repo), dtype, bits, progress, say)


def is_repo(name: str) -> bool:
    """Whether this is a hub name, with a revision or without."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) is not None


def download(repo: str, reached: Callable[[], None] = lambda: None) -> Path:
    """The checkpoint of a hub repository (`org/name`, `org/name@revision`), downloaded or from the hub's own cache.

    Of weights it takes safetensors, and PyTorch's files where there are no safetensors. `reached` is called once the
    hub has answered, before anything large comes.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    name, _, revision = repo.partition("@")
    patterns = [*CHECKPOINT_FILES, "*.safetensors", "pytorch_model*.bin"]
    try:
        try:
            files = HfApi().list_repo_files(name, revision=revision or None)
            patterns = [*CHECKPOINT_FILES, weights_pattern(files)]
            reached()
        except (HfHubHTTPError, OSError) as error:
            if isinstance(error, RepositoryNotFoundError):
                raise  # else the hub's cache may have it
        return Path(
            snapshot_download(
                name, revision=revision or None, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]
            )
        )
    except RepositoryNotFoundError:
        raise ValueError(f"model {repo!r}: the Hugging Face hub has no such repository, or it needs a login") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = type(error).__name__
        raise ValueError(
            f"model {repo!r}: not on this machine, and the Hugging Face hub cannot be reached ({reason}); "
            "connect, or give a checkpoint directory"
        ) from None


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
    say: Callable[[str], None],
) -> Path:
    target = _target(identity, label, dtype, bits)
    if (target / "manifest.json").is_file():
        return target
    from mlxflash.calibrate import calibrate
    from mlxflash.converters import convert
    from mlxflash.converters.checkpoint import Checkpoint

    Checkpoint(checkpoint)  # what cannot be converted is refused before anything is said or made
    target.parent.mkdir(parents=True, exist_ok=True)
    say(f"converting {label} into {target} (once)")
    bundle = convert(checkpoint, target, dtype=dtype, bits=bits, progress=progress)
    if "low-bit" in bundle.predictors():
        calibrate(bundle, progress=progress)
    return target
