"""A Hugging Face checkpoint on disk: config, tokenizer files and safetensors, read one tensor at a time."""

import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from mlxflash.models import build_model, family_of

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be converted; the message names file and tensor."""


class Checkpoint:
    """Tensors by the model's own parameter paths; nothing is read before `tensor` asks for it."""

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
        self.family, self.activation = family_of(self.config, str(path))
        if "quantization" in self.config or "quantization_config" in self.config:
            raise CheckpointError(f"{path}: already quantised; convert the float checkpoint with -q instead")
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{path}: holds no safetensors files")
        self._model = build_model(self.config, str(path))
        self._where: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for file in files:
            self._index(file)
        self._check_names()

    def _index(self, file: Path) -> None:
        try:
            with safe_open(file, "numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118  a safe_open handle is no mapping
                    view = tensors.get_slice(name)
                    if view.get_dtype() not in FLOATS:
                        raise CheckpointError(f"{file}: tensor {name!r} is {view.get_dtype()}, not a float type")
                    path = self._model.rename(name)
                    self._where[path] = (file, name)
                    self.shapes[path] = tuple(view.get_shape())
                    self.dtypes[path] = FLOATS[view.get_dtype()]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from None

    def _check_names(self) -> None:
        """Every parameter of the model is there in its shape, and nothing else that it would leave out."""
        wanted = {name: tuple(array.shape) for name, array in cast(Any, tree_flatten(self._model.parameters()))}
        if "lm_head.weight" not in wanted:
            self._where.pop("lm_head.weight", None)
            self.shapes.pop("lm_head.weight", None)
        for name, shape in wanted.items():
            if name not in self._where:
                raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
            if self.shapes[name] != shape:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} has shape {list(self.shapes[name])}, its config wants {list(shape)}"
                )
        if extra := sorted(set(self._where) - set(wanted)):
            raise CheckpointError(
                f"{self.path}: tensor {extra[0]!r} has no place in a {self.config['model_type']} model"
            )

    def tensor(self, name: str) -> mx.array:
        """Read one tensor. Raises CheckpointError when it holds NaN or infinity."""
        file, stored = self._where[name]
        try:
            array = cast(dict[str, mx.array], mx.load(str(file)))[stored]
            mx.eval(array)
        except RuntimeError as error:
            raise CheckpointError(f"{file}: tensor {stored!r} cannot be read ({error})") from None
        if not mx.isfinite(array).all().item():
            raise CheckpointError(f"{file}: tensor {stored!r} holds NaN or infinity")
        return array

    def fingerprint(self) -> list[Any]:
        """What tells one checkpoint from another without reading it all."""
        files = sorted({file for file, _ in self._where.values()})
        return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files] + [self.config]

    def num_layers(self) -> int:
        return len(self._model.layers)

    def ffn_path(self, layer: int) -> str:
        """Parameter path of a layer's FFN, as in `model.decoder.layers.3.mlp`."""
        wanted = getattr(self._model.layers[layer], self.family.ffn)
        return next(name for name, module in self._model.named_modules() if module is wanted)

    def quantisable(self) -> set[str]:
        """Paths of modules outside the FFNs that quantising a model quantises: linear layers and embeddings."""
        ffns = tuple(self.ffn_path(i) + "." for i in range(self.num_layers()))
        return {
            name
            for name, module in self._model.named_modules()
            if hasattr(module, "to_quantized") and not name.startswith(ffns)
        }

    def names(self) -> list[str]:
        return sorted(self._where)
