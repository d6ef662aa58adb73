"""What the streamed model must equal: OPT's forward pass in NumPy, and what a bundle stores, read by other code.

Nothing here comes from mlxflash, MLX or mlx-lm; `test_reference.py` holds the forward pass against transformers. A
law that compares with this module compares with the arithmetic of the papers, on the weights that lie on disk.
"""

import json
import struct
from pathlib import Path

import numpy as np

LAYER_NORM_EPS = 1e-5
POSITION_OFFSET = 2
HEADER_BYTES = 16384


class Reference:
    """OPT on a dict of numpy weights under transformers' names, every tensor in `dtype`."""

    def __init__(self, config, weights, dtype=np.float32):
        self.config = config
        self.weights = {k.removeprefix("model.").removeprefix("decoder."): v.astype(dtype) for k, v in weights.items()}

    def logits(self, tokens):
        """Logits [tokens, vocabulary] of one sequence of ids, all positions in one pass."""
        w, config = self.weights, self.config
        x = w["embed_tokens.weight"][tokens]
        if "project_in.weight" in w:
            x = x @ w["project_in.weight"].T
        x = x + w["embed_positions.weight"][np.arange(len(tokens)) + POSITION_OFFSET]
        for i in range(config["num_hidden_layers"]):
            x = self._layer(x, f"layers.{i}")
        if config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False):
            x = self._norm(x, "final_layer_norm")
        if "project_out.weight" in w:
            x = x @ w["project_out.weight"].T
        tied = config.get("tie_word_embeddings", True)
        return x @ w["embed_tokens.weight" if tied else "lm_head.weight"].T

    def greedy(self, prompt, count):
        """The `count` most likely next tokens, one after another, and the logits each was chosen from."""
        tokens, chosen = list(prompt), []
        for _ in range(count):
            chosen.append(self.logits(tokens)[-1])
            tokens.append(int(chosen[-1].argmax()))
        return tokens[len(prompt) :], np.array(chosen)

    def active_share(self, tokens):
        """How much of the FFNs' units fires, per layer: the share of positive pre-activations."""
        self._fired = []
        self.logits(tokens)
        return [float((h > 0).mean()) for h in self._fired]

    _fired = None

    def _layer(self, x, name):
        before = self.config.get("do_layer_norm_before", True)
        h = self._norm(x, f"{name}.self_attn_layer_norm") if before else x
        x = x + self._attention(h, f"{name}.self_attn")
        if not before:
            x = self._norm(x, f"{name}.self_attn_layer_norm")
        h = self._norm(x, f"{name}.final_layer_norm") if before else x
        h = self._linear(h, f"{name}.fc1")
        if self._fired is not None:
            self._fired.append(h)
        x = x + self._linear(np.maximum(h, 0), f"{name}.fc2")
        return x if before else self._norm(x, f"{name}.final_layer_norm")

    def _attention(self, x, name):
        heads = self.config["num_attention_heads"]
        length, width = x.shape
        q, k, v = (
            self._linear(x, f"{name}.{p}_proj").reshape(length, heads, width // heads).swapaxes(0, 1) for p in "qkv"
        )
        q = q * x.dtype.type((width // heads) ** -0.5)
        scores = q @ k.swapaxes(1, 2)
        scores[:, np.triu(np.ones((length, length), bool), 1)] = -np.inf
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        return self._linear((scores @ v).swapaxes(0, 1).reshape(length, width), f"{name}.out_proj")

    def _linear(self, x, name):
        y = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _norm(self, x, name):
        centred = x - x.mean(axis=-1, keepdims=True)
        x = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + x.dtype.type(LAYER_NORM_EPS))
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def stored_model(bundle):
    """The dense model that a bundle directory holds: every part as stored, rounded or quantised, made float32."""
    bundle = Path(bundle)
    manifest, config = (json.loads((bundle / name).read_text()) for name in ("manifest.json", "config.json"))
    quantization = manifest["quantization"]
    arrays = {}
    for file in sorted(bundle.glob("resident*.safetensors")):
        arrays |= read_safetensors(file)
    weights = {}
    for name, array in arrays.items():
        module = name.removesuffix(".weight")
        if name.startswith("ffn.") or name.endswith((".scales", ".biases")):
            continue
        if f"{module}.scales" in arrays:
            array = dequantize(array, arrays[f"{module}.scales"], arrays[f"{module}.biases"], quantization["bits"])
        weights[name] = array
    for i, layer in enumerate(manifest["layers"]):
        base = f"model.decoder.layers.{i}"
        parts = read_records(bundle / layer["file"], layer["units"], manifest["record"])
        for part, name in (("up", "fc1"), ("down", "fc2")):
            matrix = parts[part]
            if quantization:
                matrix = dequantize(matrix, parts[f"{part}_scales"], parts[f"{part}_biases"], quantization["bits"])
            weights[f"{base}.{name}.weight"] = matrix if part == "up" else matrix.T
            if f"ffn.{i}.{part}_bias" in arrays:
                weights[f"{base}.{name}.bias"] = arrays[f"ffn.{i}.{part}_bias"]
    return Reference(config, weights)


def read_records(file, units, record):
    """Every streamed part of a bundle file, [units, ...]; floats as float32, words as uint32."""
    raw = np.frombuffer(file.read_bytes(), np.uint8, units * record["stride"], HEADER_BYTES)
    raw = raw.reshape(units, record["stride"])
    parts = {}
    for part in record["parts"]:
        if part["offset"] is not None:
            size = int(np.prod(part["shape"])) * {"float32": 4, "uint32": 4}.get(part["dtype"], 2)
            data = np.ascontiguousarray(raw[:, part["offset"] : part["offset"] + size])
            parts[part["name"]] = decode(data.ravel(), part["dtype"]).reshape(units, *part["shape"])
    return parts


def dequantize(words, scales, biases, bits):
    """MLX's affine format: 32 / bits values per word, lowest bits first; value * scale + bias per group of a row."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    values = (words[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    values = values.reshape(*scales.shape, -1).astype(np.float32)
    return (values * scales[..., None] + biases[..., None]).reshape(len(words), -1)


NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "U32": "uint32"}


def read_safetensors(file):
    """Every tensor of a safetensors file; floats as float32."""
    raw = Path(file).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    tensors = {}
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            data = np.frombuffer(raw, np.uint8, last - first, 8 + length + first)
            tensors[name] = decode(data, NAMES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def write_safetensors(file, tensors, dtype):
    """Write float32 `tensors` rounded to `dtype`."""
    header, blobs, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, array in tensors.items():
        blobs.append(encode(array, dtype).tobytes())
        kind = next(k for k, v in NAMES.items() if v == dtype)
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, at + len(blobs[-1])]}
        at += len(blobs[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(file).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def decode(data, dtype):
    """Bytes as an array: floats become float32, words stay."""
    if dtype == "bfloat16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return data.view("<u4") if dtype == "uint32" else data.view(dtype).astype(np.float32)


def encode(array, dtype):
    """A float32 array as stored: rounded to nearest, ties to even."""
    array = np.ascontiguousarray(array, np.float32)
    if dtype == "bfloat16":
        bits = array.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return array.astype(dtype)
