"""A Hugging Face checkpoint on disk: config, tokenizer files and safetensors, read one tensor at a time."""

import copy
import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten
from mlxflash.converters.torch_zip import TorchFileError, as_safetensors, tensors
from safetensors import SafetensorError, safe_open

from mlxflash.models import (
    build_model,
    family_of,
    ffn_layers,
    find,
    may_cast,
    quantise,
    quantization_of,
    text_of,
)

FLOATS = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}
DTYPES = FLOATS | {mx.uint32: "uint32", mx.uint8: "uint8"}
BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")  # saved by old transformers, no parameters

TOWERS = ("vision_tower.", "audio_tower.", "multi_modal_projector.", "embed_vision.", "embed_audio.")


class CheckpointError(ValueError):
    """A checkpoint that cannot be converted; the message names file and tensor."""


class Checkpoint:
    """Tensors by the model's own parameter paths, as its class's `sanitize` makes them of what the files hold.

    Everything is lazy: nothing is read before `tensor` asks for it.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such directory")
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path}: not a checkpoint, config.json is missing")
        try:
            self.config: dict[str, Any] = json.loads((path / "config.json").read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{path / 'config.json'}: not JSON ({error})") from None
        said, self.config = self.config, text_of(self.config)
        self._beside = self.config is not said  # what sees and hears lies beside the text model
        self.family, self.activation, self.threshold = family_of(self.config, str(path))
        self.quantization = quantization_of(self.config, str(path))
        self.files = _files(path)
        self._check_files()
        if self.config.get("predictor_size"):
            self.family, self.activation, self.threshold = family_of(self.config, str(path))
        self._unfit = build_model(self.config, str(path))  # its `sanitize` may change the model, and is called again
        self._model, self._lazy, self._origins = self._fit()
        self.shapes = {name: tuple(array.shape) for name, array in self._lazy.items()}
        self._check_names()
        self.dtypes = {name: DTYPES[array.dtype] for name, array in self._lazy.items()}

    def _check_files(self) -> None:
        """Every file is whole, as far as its header tells."""
        for file in self.files:
            try:
                if file.suffix == ".bin":
                    tensors(file)
                else:
                    with safe_open(file, "numpy") as f:  # checks the header and every offset against the file's size
                        own = [name for name in f.keys() if name.endswith(".mlp.predictor.fc1.weight")]  # noqa: SIM118
                        if own:  # TurboSparse's config.json does not say that it has them
                            self.config["predictor_size"] = f.get_slice(own[0]).get_shape()[0]
            except TorchFileError as error:
                raise CheckpointError(f"{file}: {error}") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from None

    def _fit(self) -> tuple[Any, dict[str, mx.array], dict[str, str]]:
        """The model, its parameters as lazy arrays, and where those come from that `sanitize` did not compute."""
        stored: dict[str, mx.array] = {}
        said: dict[int, str] = {}
        for file in self.files:
            try:
                if file.suffix == ".bin":
                    loaded = mx.load(cast(Any, as_safetensors(file)), format="safetensors")
                else:
                    loaded = mx.load(str(file))
            except RuntimeError as error:
                raise CheckpointError(f"{file}: cannot be read ({error})") from None
            arrays = cast(dict[str, mx.array], loaded)
            stored |= {self._expected(name): array for name, array in arrays.items() if not self._left_out(name)}
            said |= {id(array): f"{file}: tensor {name!r}" for name, array in arrays.items()}
        model = copy.copy(self._unfit)
        try:
            lazy: dict[str, mx.array] = model.sanitize(dict(stored)) if hasattr(model, "sanitize") else stored
        except KeyError as error:
            raise CheckpointError(f"{self.path}: tensor {error} is missing") from None
        if self.quantization is not None:
            quantise(model, self.quantization, lazy, str(self.path))
        return model, lazy, {name: said[id(array)] for name, array in lazy.items() if id(array) in said}

    def _left_out(self, name: str) -> bool:
        return self._beside and name.removeprefix("model.").startswith(TOWERS)

    def _expected(self, name: str) -> str:
        if self._beside:
            name = name.replace("model.language_model.", "model.", 1).removeprefix("language_model.")
        for old, new in self.family.prefixes.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    def _check_names(self) -> None:
        """Every parameter of the model is there in its shape, and nothing else that it would leave out."""
        parameters: dict[str, mx.array] = dict(cast(Any, tree_flatten(self._model.parameters())))
        wanted = {name: tuple(array.shape) for name, array in parameters.items()}
        for name in self._lazy.keys() - wanted.keys():
            if name == "lm_head.weight" or name.endswith(BUFFERS):
                del self._lazy[name], self.shapes[name]
        for name, shape in wanted.items():
            if name not in self._lazy:
                raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
            if self.shapes[name] != shape:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} has shape {list(self.shapes[name])}, its config wants {list(shape)}"
                )
            kind = parameters[name].dtype
            if self._lazy[name].dtype not in (FLOATS if kind in FLOATS else (kind,)):
                raise CheckpointError(f"{self.path}: tensor {name!r} is {self._lazy[name].dtype}, not a float type")
        if extra := sorted(set(self._lazy) - set(wanted)):
            raise CheckpointError(
                f"{self.path}: tensor {extra[0]!r} has no place in a {self.config['model_type']} model"
            )

    def tensor(self, name: str) -> mx.array:
        """Read one tensor, which is kept nowhere else. Raises CheckpointError when it holds NaN or infinity."""
        if name not in self._lazy:
            _, self._lazy, self._origins = self._fit()
        array, origin = self._lazy.pop(name), self._origins.get(name)
        if origin is None:  # what it was computed of would stay in memory with its siblings
            self._lazy, origin = {}, f"{self.path}: tensor {name!r}"
        try:
            mx.eval(array)
        except RuntimeError as error:
            raise CheckpointError(f"{origin} cannot be read ({error})") from None
        if not mx.isfinite(array).all().item():
            raise CheckpointError(f"{origin} holds NaN or infinity")
        return array

    def fingerprint(self) -> list[Any]:
        """What tells one checkpoint from another without reading it all."""
        return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in self.files] + [self.config]

    def num_layers(self) -> int:
        """Layers whose FFN streams."""
        return len(ffn_layers(self._model, self.family))

    def ffn_path(self, layer: int) -> str:
        """Parameter path of a layer's FFN, as in `model.decoder.layers.3.mlp`."""
        wanted = find(ffn_layers(self._model, self.family)[layer], self.family.ffn)
        return next(name for name, module in self._model.named_modules() if module is wanted)

    def quantisable(self) -> set[str]:
        """Paths of modules outside the FFNs that quantising a model quantises: linear layers and embeddings."""
        ffns = tuple(self.ffn_path(i) + "." for i in range(self.num_layers()))
        blocks = ffns
        if self.family.layout == "experts":  # a router's error would change which experts are chosen
            blocks = tuple(f.rsplit(".", 2)[0] + "." for f in ffns)
        return {
            name
            for name, module in self._model.named_modules()
            if hasattr(module, "to_quantized")
            and not name.startswith(ffns)
            and not (name.startswith(blocks) and len(cast(Any, module).weight) <= self.most_experts())
        }

    def castable(self, name: str) -> bool:
        """Whether a tensor may be stored in another dtype: what corrects a router's scores, say, may not."""
        return may_cast(self._model, name)

    def quantised_as(self, path: str) -> dict[str, Any] | None:
        """How the module at `path` is quantised, or None."""
        module: Any = next(module for name, module in self._model.named_modules() if name == path)
        return {k: getattr(module, k) for k in ("bits", "group_size", "mode")} if "scales" in module else None

    def most_experts(self) -> int:
        """Of any layer; 0 where there are none."""
        if self.family.layout != "experts":
            return 0
        up = f"{self.family.ffn}.{self.family.parts['up']}"
        return max(len(find(layer, up).weight) for layer in ffn_layers(self._model, self.family))

    def names(self) -> list[str]:
        return sorted(self.shapes)


def _files(path: Path) -> list[Path]:
    """A checkpoint's weights: what its index names, else one file or all there are; safetensors before PyTorch's."""
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        for index in sorted(path.glob(f"{pattern}.index.json")):
            try:
                named = set(json.loads(index.read_bytes())["weight_map"].values())
                files = sorted(path / Path(name).name for name in named)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise CheckpointError(f"{index}: not an index of a checkpoint's files") from None
            if files and (missing := [file.name for file in files if not file.is_file()]):
                raise CheckpointError(f"{path}: {missing[0]} is missing, though {index.name} names it")
            if files:
                return files
        whole = path / ("model.safetensors" if "safetensors" in pattern else "pytorch_model.bin")
        if whole.is_file():  # others may lie beside it, as Mistral's consolidated ones do
            return [whole]
        if files := sorted(path.glob(pattern)):
            return files
    raise CheckpointError(f"{path}: holds no weights, neither *.safetensors nor pytorch_model*.bin")
