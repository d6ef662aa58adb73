"""What streaming costs in fidelity: a model through the decode path beside the same bundle computed exactly.

Teacher-forced, one token per pass, in stretches no longer than the model's positions; the window stays warm from
stretch to stretch, as in a long session. Dense logits, the FFNs' inputs and what was flagged go to a temporary folder,
so that large vocabularies and long texts need no memory.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxflash.backends import make_backend
from mlxflash.bundle import Bundle
from mlxflash.decode import reserved_cache
from mlxflash.ffn import FlashFFN
from mlxflash.flash import FlashModel
from mlxflash.model import load_bundle
from mlxflash.models import family_of, max_positions
from mlxflash.predictor import Ids, deciding

STRETCH = 512  # tokens: longer contexts cost time and say nothing more of the FFNs
LEAST_TOKENS = 16
CHUNK = 1024
BLOCK = 32  # tokens whose differences are averaged before their spread is taken: neighbours are not independent
SPANS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
Progress = Callable[[str, int, int], None]


def decode_losses(model: FlashModel, tokens: np.ndarray) -> Iterator[float]:
    """Teacher-forced, one token per pass, window warm: the negative log-probability of tokens[1:], one by one."""
    for logprobs, target in zip(decode_logprobs(model, tokens[:-1]), tokens[1:].tolist(), strict=True):
        yield float(-np.array(logprobs)[target])


def decode_logprobs(model: FlashModel, tokens: np.ndarray) -> Iterator[mx.array]:
    """After each token, one per pass: log-probabilities of the next one, float32 [vocabulary]."""
    cache = reserved_cache(model, None, len(tokens) + 1)
    for token in tokens.tolist():
        yield _logprobs(model(mx.array([[token]]), cache=cache)[0, -1])


def prompt_losses(model: FlashModel, tokens: np.ndarray) -> np.ndarray:
    """The same as decode_losses from one exact pass over all tokens: float32 [len(tokens) - 1]."""
    logprobs = _logprobs(model(mx.array(tokens[None, :-1]))[0])
    return -np.array(mx.take_along_axis(logprobs, mx.array(tokens[1:, None]), axis=-1)[:, 0])


def prompt_logprobs(model: FlashModel, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """The same as decode_logprobs in exact chunks as long as the plan allows: float32 [chunk, vocabulary]."""
    cache, step = reserved_cache(model, None, len(tokens) + 1), model.flash.plan.prefill_tokens
    for i in range(0, len(tokens), step):
        yield np.array(_logprobs(model(mx.array(tokens[None, i : i + step]), cache=cache)[0]))


def _logprobs(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def check_length(tokens: np.ndarray, what: str = "the text") -> None:
    """Raises ValueError for a text too short to measure on."""
    if len(tokens) < LEAST_TOKENS:
        raise ValueError(f"{what} is too short, {len(tokens)} tokens: give at least {LEAST_TOKENS}")


def perplexity(losses: np.ndarray) -> float:
    return float(np.exp(np.mean(losses)))


@dataclass(frozen=True)
class LayerReport:
    """One layer over all tokens; shares are of the layer's units, recall and precision of the truly active and of the
    flagged ones. Of exact streaming recall is 1 and everything is flagged."""

    units: int
    active: float
    flagged: float
    recall: float
    precision: float
    bytes_per_token: float
    ffn_share_read: float
    hit_rate: float
    capacity: int
    new_units: dict[int, float]  # by k: share of the units that a token flags and none of the k before it did


@dataclass(frozen=True)
class Report:
    """A bundle's fidelity at one setting. Bytes are those asked of the operating system, shares those of the FFN's."""

    bundle: str
    mode: str
    predictor: str
    window: int | None
    fidelity: str
    tokens: int
    ppl_dense: float
    ppl: float
    ppl_change: float
    ppl_change_se: float  # standard error of the paired change
    kl: float  # nats per token, of dense from streamed
    kl_se: float
    top1: float
    active: float
    flagged: float
    recall: float
    precision: float
    bytes_per_token: float
    kernel_bytes_per_token: float | None  # as the operating system counted, where it does
    reads_per_token: float
    ffn_share_read: float
    hit_rate: float
    memory_bytes: int
    predictor_bytes: int
    pool_bytes: int
    held_share: float
    layers: list[LayerReport]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Dense:
    """What the bundle says of a text when computed exactly: log-probabilities after every token, in a file.

    A context manager; its folder is gone afterwards. tokens: int [n]; `num_tokens` of them are asked about at most, in
    stretches of `context`.
    Raises ValueError for a text too short, or when a probability is not a number.
    """

    def __init__(
        self,
        bundle: Bundle,
        tokens: np.ndarray,
        *,
        num_tokens: int = 1024,
        context: int = STRETCH,
        memory: str | int | None = None,
        device: str | None = None,
        progress: Progress = lambda what, done, total: None,
    ):
        check_length(tokens)
        self.bundle, self.memory, self.device, self.progress = bundle, memory, device, progress
        tokens = tokens[: num_tokens + 1]
        length = min(context, max_positions(bundle.config()) - 1)
        self.targets = tokens[1:]
        self.stretches = [tokens[i : min(i + length, len(tokens) - 1)] for i in range(0, len(tokens) - 1, length)]
        self._folder = tempfile.TemporaryDirectory(prefix="mlxflash-eval-")
        self.folder = Path(self._folder.name)
        try:
            self._losses = self._measure()
        except BaseException:
            self._folder.cleanup()
            raise

    def __enter__(self) -> "Dense":
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    @property
    def perplexity(self) -> float:
        return perplexity(self._losses)

    def _measure(self) -> np.ndarray:
        losses: list[np.ndarray] = []
        with (
            _load(self.bundle, self, predictor="all") as model,
            open(self.folder / "logprobs.f32", "wb") as file,
        ):
            for stretch in self.stretches:
                for chunk in prompt_logprobs(model, stretch):
                    done = sum(map(len, losses))
                    self.progress("dense", done, len(self.targets))
                    losses.append(-chunk[np.arange(len(chunk)), self.targets[done : done + len(chunk)]])
                    chunk.tofile(file)
        self.progress("dense", len(self.targets), len(self.targets))
        found = np.concatenate(losses)
        if not np.isfinite(found).all():
            raise ValueError(f"{self.bundle.path}: the exact model gives NaN or infinity on this text")
        return found

    def compare(self, said: Iterator[mx.array]) -> "Comparison":
        """Beside what a model says after each of the tokens, in turn."""
        out = Comparison([], [], [])
        # Mapped, not read: the kernel's count of what this process reads is to be the model's.
        logprobs = np.memmap(self.folder / "logprobs.f32", np.float32, "r").reshape(len(self.targets), -1)
        for i, (streamed, target) in enumerate(zip(said, self.targets.tolist(), strict=True)):
            mine, dense = np.array(streamed), np.array(logprobs[i])
            out.losses.append(float(-mine[target]))
            out.kl.append(float(np.sum(np.exp(dense) * (dense - mine))))
            out.same.append(bool(mine.argmax() == dense.argmax()))
            self.progress("streamed", i + 1, len(self.targets))
        if not np.isfinite(out.losses).all() or not np.isfinite(out.kl).all():
            raise ValueError(f"{self.bundle.path}: the streamed model gives NaN or infinity on this text")
        return out

    def change(self, losses: list[float]) -> tuple[float, float]:
        """Relative change of perplexity against dense and its standard error, from paired differences."""
        difference = np.array(losses) - self._losses
        return float(np.expm1(difference.mean())), spread(difference)


@dataclass(frozen=True)
class Comparison:
    """By token: negative log-probability of the text's own, KL divergence from dense, whether the likeliest agree."""

    losses: list[float]
    kl: list[float]
    same: list[bool]


def spread(values: np.ndarray) -> float:
    """Standard error of the mean of a series whose neighbours may be alike: of blocks of BLOCK."""
    size = min(BLOCK, max(1, len(values) // 4))
    blocks = values[: len(values) // size * size].reshape(-1, size).mean(axis=1)
    return float(blocks.std(ddof=1) / np.sqrt(len(blocks))) if len(blocks) > 1 else float("inf")


def evaluate(dense: Dense, **settings: Any) -> Report:
    """Decode the text at one setting: load_bundle's `predictor`, `fidelity`, `window`, ...

    Memory and device are Dense's. Look-ahead is off: bytes are those of the predictor inside the layer. Raises
    ValueError as load_bundle does, and when an FFN is given NaN or infinity (names the layer).
    """
    bundle = dense.bundle
    with _load(bundle, dense, look_ahead=False, **settings) as model:
        flash = model.flash
        watches = _watch(model, bundle, dense.folder)
        flash.forget()
        before, counted = flash.snapshot(), kernel_bytes(flash.files[0].direct)
        said = dense.compare(item for stretch in dense.stretches for item in decode_logprobs(model, stretch))
        stats, after = flash.stats(before, len(dense.targets)), kernel_bytes(flash.files[0].direct)
        plan, mode, tokens = flash.plan, flash.mode, len(dense.targets)
        predictor, level = flash.predictor, flash.level
        for watch in watches:
            watch.close()
    layers = []
    for index, watch in enumerate(watches):
        dense.progress("layers", index, len(watches))
        layers.append(watch.report(bundle, index, dense.device, tokens, plan.capacities[index]))
    dense.progress("layers", len(watches), len(watches))
    change, change_se = dense.change(said.losses)
    units = np.array([layer.units for layer in layers])
    active = np.array([layer.active for layer in layers]) * units
    flagged = np.array([layer.flagged for layer in layers]) * units
    found = float((active * [layer.recall for layer in layers]).sum())
    return Report(
        bundle=bundle.path.name,
        mode=mode,
        predictor=predictor,
        window=settings.get("window"),
        fidelity="exact" if mode.startswith("exact") else level.name if level else "",
        tokens=tokens,
        ppl_dense=dense.perplexity,
        ppl=perplexity(np.array(said.losses)),
        ppl_change=change,
        ppl_change_se=change_se,
        kl=float(np.mean(said.kl)),
        kl_se=spread(np.array(said.kl)),
        top1=float(np.mean(said.same)),
        active=float(active.sum() / units.sum()),
        flagged=float(flagged.sum() / units.sum()),
        recall=found / max(1e-9, float(active.sum())),
        precision=found / max(1e-9, float(flagged.sum())),
        bytes_per_token=stats.bytes_per_token,
        kernel_bytes_per_token=None if counted is None or after is None else (after - counted) / tokens,
        reads_per_token=stats.reads_per_token,
        ffn_share_read=stats.bytes_per_token / bundle.streamed_bytes(),
        hit_rate=stats.hit_rate,
        memory_bytes=plan.memory,
        predictor_bytes=plan.predictor,
        pool_bytes=plan.pools,
        held_share=stats.held_share,
        layers=layers,
    )


def kernel_bytes(direct: bool) -> int | None:
    """Bytes this process has read so far as Linux counts them: from storage where reads are direct, else by `read`
    calls; None elsewhere. What goes through io_uring and the page cache appears in neither."""
    try:
        text = Path("/proc/self/io").read_text()
        return int(text.split("\nread_bytes:" if direct else "rchar:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return None


class _Watch(nn.Module):
    """Stands before an FFN, and before its predictor: bytes read, inputs and flagged units, to files."""

    def __init__(self, ffn: FlashFFN, file: Path):
        super().__init__()
        layer = ffn._layer
        self._ffn, self._layer, self._predictor = ffn, layer, layer.predictor
        self._whole = layer.window.num_rows == layer.units or layer.predictor is None
        self._inputs: BinaryIO = open(file, "wb")  # noqa: SIM115  close() does
        self._flagged: list[np.ndarray] = []
        self._bytes = self._calls = 0
        self._hits, self._misses = layer.window.num_hits, layer.window.num_misses
        if layer.predictor is not None:
            layer.predictor = self
        self.nbytes = 0

    def __call__(self, x: mx.array) -> mx.array:
        before = self._layer.reader.num_bytes
        y = self._ffn(x)
        self._bytes += self._layer.reader.num_bytes - before
        np.array(x.reshape(-1, x.shape[-1]).astype(mx.float32)).tofile(self._inputs)
        return y

    def start(self, x: mx.array) -> Ids:
        """As the predictor's, which it calls."""
        assert self._predictor is not None
        ids = self._predictor.start(x)()
        flags = np.zeros(self._layer.units, bool)
        flags[ids] = True
        self._flagged.append(np.packbits(flags))
        return lambda: ids

    def close(self) -> None:
        self._inputs.close()
        window = self._layer.window
        self._hits, self._misses = window.num_hits - self._hits, window.num_misses - self._misses

    def report(self, bundle: Bundle, index: int, device: str | None, tokens: int, capacity: int) -> LayerReport:
        """What was seen beside the truly active units, computed from the inputs again."""
        x = np.memmap(self._inputs.name, np.float32, "r").reshape(tokens, bundle.manifest.d_model)
        if not np.isfinite(x).all():
            raise ValueError(f"{bundle.path}: layer {index} is given NaN or infinity on this text")
        (exact, _, bias), backend, units = deciding(bundle, index), make_backend(device), self._layer.units
        active = [backend.project(mx.array(x[i : i + CHUNK]), exact)() + bias > 0 for i in range(0, len(x), CHUNK)]
        truth = np.concatenate(active)
        if not bundle.manifest.sparse:  # no unit is ever zero
            truth[:] = True
        flags = np.ones_like(truth)
        if self._flagged:
            flags = np.unpackbits(np.stack(self._flagged), axis=1, count=units).astype(bool)
        found = int((truth & flags).sum())
        streamed = bundle.manifest.record.num_bytes * units
        wanted = self._hits + self._misses
        return LayerReport(
            units=units,
            active=float(truth.mean()),
            flagged=float(flags.mean()),
            recall=found / max(1, int(truth.sum())),
            precision=found / max(1, int(flags.sum())),
            bytes_per_token=self._bytes / tokens,
            ffn_share_read=self._bytes / tokens / streamed,
            hit_rate=self._hits / wanted if wanted else capacity / units,
            capacity=capacity,
            new_units=new_units(truth if self._whole else flags),
        )


def new_units(wanted: np.ndarray) -> dict[int, float]:
    """Share of a layer's units that a token wants and none of the k tokens before it did, by k; `wanted` is bool
    [tokens, units]. Source: LLM in a flash (arXiv 2312.11514), figure 4."""
    last = np.full(wanted.shape[1], -(1 << 30))
    age = np.zeros(len(SPANS) + 1, np.int64)
    first = min(SPANS[-1], len(wanted) // 2)  # a token needs its past to be known
    for token, now in enumerate(wanted):
        if token >= first:
            age += np.bincount(np.searchsorted(SPANS, token - last[now]), minlength=len(age))
        last[now] = token
    beyond = age.sum() - np.cumsum(age)
    counted = max(1, (len(wanted) - first) * wanted.shape[1])
    return {k: float(n / counted) for k, n in zip(SPANS, beyond, strict=False)}


def _load(bundle: Bundle, dense: Dense, **settings: Any) -> FlashModel:
    longest = max(map(len, dense.stretches)) + 1
    return load_bundle(
        bundle.path, memory=dense.memory, device=dense.device, max_kv_size=longest, bundle=bundle, **settings
    )


def _watch(model: FlashModel, bundle: Bundle, folder: Path) -> Sequence[_Watch]:
    family, *_ = family_of(bundle.config(), str(bundle.path))
    watches = []
    for index, layer in enumerate(model.layers):
        watches.append(_Watch(getattr(layer, family.ffn), folder / f"inputs-{index:03d}.f32"))
        setattr(layer, family.ffn, watches[-1])
    return watches
