"""Public models by short names, and what each takes before it is downloaded: sizes, memory, how it runs.

Numbers are those of the models' own config.json; bytes follow from them by arithmetic. Imports no MLX.
"""

from dataclasses import dataclass
from pathlib import Path

from mlxflash.bundle import SPARSE_ACTIVATIONS, Part, make_record
from mlxflash.plan import LAYER_OBJECTS, MIN_SLOTS, BudgetError, Sizes, make_plan

STORY = Path(__file__).parent / "story.flash"  # the embedded one
GROUP_SIZE = 64
LOW_BIT_BYTES = (3 + 32 / GROUP_SIZE) / 8  # of a weight in a low-bit predictor: 3 bits, its group's scale and bias
CONTEXT = 4096  # tokens of key-value cache, unless the model's positions end before


@dataclass(frozen=True)
class Known:
    """A model's numbers. In a mixture `units` are the neurons of one expert."""

    repo: str
    activation: str
    gated: bool
    layers: int
    width: int
    units: int  # per layer
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int
    tied: bool = False
    head_dim: int = 0  # 0: width / heads
    experts: int = 0  # per layer
    chosen: int = 0  # of them by each token
    active: float = 0.0  # share of the units that a token activates, as published; 0: nobody said

    @property
    def kind(self) -> str:
        """How it runs where it is larger than memory."""
        if self.experts:
            return "experts"
        return "sparse" if self.activation in SPARSE_ACTIVATIONS else "exact"

    @property
    def weights(self) -> tuple[int, int]:
        """How many are streamed, and how many are resident (matrices; the rest is next to nothing)."""
        dim = self.head_dim or self.width // self.heads
        attention = 2 * self.width * dim * (self.heads + self.kv_heads) + self.experts * self.width
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.width
        streamed = self.layers * max(1, self.experts) * self.units * self.width * (3 if self.gated else 2)
        return streamed, self.layers * attention + embeddings

    def nbytes(self, bits: int | None = None) -> int:
        """Of the converted model, half precision or quantised."""
        return int(sum(self.weights) * _weight_bytes(bits))

    def sizes(self, bits: int | None = None) -> Sizes:
        """What the planner is told of it on a CPU."""
        names = ("gate", "up", "down") if self.gated else ("up", "down")
        parts = []
        for name in names:
            if bits:
                parts.append(Part(name, "uint32", (self.width * bits // 32,), 0))
                parts += [Part(f"{name}_{what}", "float16", (self.width // GROUP_SIZE,), 0) for what in ("s", "b")]
            else:
                parts.append(Part(name, "float16", (self.width,), 0))
        record = make_record(parts)
        units, slot = self.units, record.stride
        least, token = MIN_SLOTS, 0
        if self.experts:
            slot = int(3 * self.units * self.width * _weight_bytes(bits))
            units = self.experts
            least, token = self.chosen, self.chosen * (4 * self.width + 3 * self.units) * 4
        predictor = LOW_BIT_BYTES * self.width + 8 if self.kind == "sparse" else 0
        return Sizes(
            model=self.nbytes(bits),
            resident=int(self.weights[1] * _weight_bytes(bits)),
            objects=self.layers * LAYER_OBJECTS,
            predictor=int(self.layers * self.units * predictor),
            units=(units,) * self.layers,
            curves=None,
            slot=slot,
            stride=slot,
            kv_token=2 * self.layers * self.kv_heads * (self.head_dim or self.width // self.heads) * 4,
            activation_token=16 * self.width * 4,
            score_token=2 * self.heads * 4,
            activation_item=4,
            vocabulary=self.vocabulary,
            staged=not (record.aligned or self.experts),
            least_slots=least,
            expert_token=token,
        )

    def smallest(self, bits: int | None = None) -> int:
        """The least budget that works, bytes."""
        try:
            make_plan(self.sizes(bits), 1, min(CONTEXT, self.positions))
        except BudgetError as error:
            return error.smallest
        raise AssertionError("one byte is never enough")


def _weight_bytes(bits: int | None) -> float:
    return 2 if bits is None else bits / 8 + 4 / GROUP_SIZE


def _opt(size: str, layers: int, width: int, heads: int) -> Known:
    return Known(
        f"facebook/opt-{size}", "relu", False, layers, width, 4 * width, heads, heads, 50272, 2048, True, active=0.033
    )


def _llama2(
    repo: str, activation: str, layers: int, width: int, units: int, heads: int, kv_heads: int, active: float = 0.0
) -> Known:
    return Known(repo, activation, True, layers, width, units, heads, kv_heads, 32000, 4096, active=active)


KNOWN = {
    "opt-125m": _opt("125m", 12, 768, 12),
    "opt-350m": _opt("350m", 24, 1024, 16),
    "opt-1.3b": _opt("1.3b", 24, 2048, 32),
    "opt-2.7b": _opt("2.7b", 32, 2560, 32),
    "opt-6.7b": _opt("6.7b", 32, 4096, 32),
    "opt-13b": _opt("13b", 40, 5120, 40),
    "opt-30b": _opt("30b", 48, 7168, 56),
    "opt-66b": _opt("66b", 64, 9216, 72),
    "relullama-7b": _llama2("SparseLLM/ReluLLaMA-7B", "relu", 32, 4096, 11008, 32, 32, 0.33),
    "relullama-13b": _llama2("SparseLLM/ReluLLaMA-13B", "relu", 40, 5120, 13824, 40, 40, 0.28),
    "relullama-70b": _llama2("SparseLLM/ReluLLaMA-70B", "relu", 80, 8192, 28672, 64, 8),
    "prosparse-7b": _llama2("SparseLLM/prosparse-llama-2-7b", "fatrelu", 32, 4096, 11008, 32, 32, 0.11),
    "prosparse-13b": _llama2("SparseLLM/prosparse-llama-2-13b", "fatrelu", 40, 5120, 13824, 40, 40, 0.11),
    "minicpm-s-1b": Known(
        "openbmb/MiniCPM-S-1B-sft", "relu", True, 52, 1536, 3840, 24, 8, 122753, 4096, True, active=0.12
    ),
    "turbosparse-7b": Known(
        "PowerInfer/TurboSparse-Mistral-Instruct", "drelu", True, 32, 4096, 14336, 32, 8, 32064, 4096
    ),
    "bamboo-7b": Known("PowerInfer/Bamboo-base-v0_1", "drelu", True, 32, 4096, 14336, 32, 8, 32000, 4096),
    "afm-4.5b": Known("arcee-ai/AFM-4.5B", "relu2", False, 36, 2560, 18432, 20, 4, 128004, 65536, head_dim=128),
    "relufalcon-40b": Known(
        "SparseLLM/ReluFalcon-40B", "relu", False, 60, 8192, 32768, 128, 8, 65024, 2048, True, active=0.05
    ),
    "persimmon-8b": Known("adept/persimmon-8b-base", "relu2", False, 36, 4096, 16384, 64, 64, 262144, 16384),
    "nemotron-mini-4b": Known(
        "nvidia/Nemotron-Mini-4B-Instruct", "relu2", False, 32, 3072, 9216, 24, 8, 256000, 4096, head_dim=128
    ),
    "falcon-7b": Known("tiiuae/falcon-7b", "gelu", False, 32, 4544, 18176, 71, 1, 65024, 2048, tied=True),
    "falcon-rw-1b": Known("tiiuae/falcon-rw-1b", "gelu", False, 24, 2048, 8192, 32, 32, 50304, 2048, tied=True),
    "falcon-11b": Known("tiiuae/falcon-11B", "gelu", False, 60, 4096, 16384, 32, 8, 65024, 8192),
    "falcon-40b": Known("tiiuae/falcon-40b", "gelu", False, 60, 8192, 32768, 128, 8, 65024, 2048, tied=True),
    "falcon-180b": Known("tiiuae/falcon-180B", "gelu", False, 80, 14848, 59392, 232, 8, 65024, 2048, tied=True),
    "llama-2-7b": _llama2("meta-llama/Llama-2-7b-hf", "silu", 32, 4096, 11008, 32, 32),
    "llama-3.1-8b": Known("meta-llama/Llama-3.1-8B", "silu", True, 32, 4096, 14336, 32, 8, 128256, 131072),
    "llama-3.1-70b": Known("meta-llama/Llama-3.1-70B", "silu", True, 80, 8192, 28672, 64, 8, 128256, 131072),
    "mixtral-8x7b": Known(
        "mistralai/Mixtral-8x7B-v0.1", "silu", True, 32, 4096, 14336, 32, 8, 32000, 32768, experts=8, chosen=2
    ),
    "qwen3-30b-a3b": Known(
        "Qwen/Qwen3-30B-A3B", "silu", True, 48, 2048, 768, 32, 4, 151936, 40960, False, 128, experts=128, chosen=8
    ),
    "olmoe-1b-7b": Known(
        "allenai/OLMoE-1B-7B-0924", "silu", True, 16, 2048, 1024, 16, 16, 50304, 4096, experts=64, chosen=8
    ),
    "phi-3.5-moe": Known(
        "microsoft/Phi-3.5-MoE-instruct", "silu", True, 32, 4096, 6400, 32, 8, 32064, 4096, experts=16, chosen=2
    ),
    "mistral-7b": Known("mistralai/Mistral-7B-v0.1", "silu", True, 32, 4096, 14336, 32, 8, 32000, 4096),
    "qwen2.5-7b": Known("Qwen/Qwen2.5-7B", "silu", True, 28, 3584, 18944, 28, 4, 152064, 131072),
    "qwen2.5-32b": Known("Qwen/Qwen2.5-32B", "silu", True, 64, 5120, 27648, 40, 8, 152064, 131072),
    "qwen3-8b": Known("Qwen/Qwen3-8B", "silu", True, 36, 4096, 12288, 32, 8, 151936, 40960, head_dim=128),
    "qwen3-32b": Known("Qwen/Qwen3-32B", "silu", True, 64, 5120, 25600, 64, 8, 151936, 40960, head_dim=128),
    "gemma-2b": Known("google/gemma-2b", "gelu_tanh", True, 18, 2048, 16384, 8, 1, 256000, 8192, True, 256),
    "gemma-2-9b": Known("google/gemma-2-9b", "gelu_tanh", True, 42, 3584, 14336, 16, 8, 256000, 4096, True, 256),
    "gemma-3-1b": Known("google/gemma-3-1b-it", "gelu_tanh", True, 26, 1152, 6912, 4, 1, 262144, 32768, True, 256),
    "gemma-3-4b": Known("google/gemma-3-4b-pt", "gelu_tanh", True, 34, 2560, 10240, 8, 4, 262208, 131072, True, 256),
    "gemma-3-12b": Known("google/gemma-3-12b-pt", "gelu_tanh", True, 48, 3840, 15360, 16, 8, 262208, 131072, True, 256),
    "gemma-3-27b": Known(
        "google/gemma-3-27b-pt", "gelu_tanh", True, 62, 5376, 21504, 32, 16, 262208, 131072, True, 128
    ),
    "mistral-small-24b": Known(
        "mistralai/Mistral-Small-3.1-24B-Base-2503", "silu", True, 40, 5120, 32768, 32, 8, 131072, 131072, head_dim=128
    ),
    "ministral-3-8b": Known(
        "mistralai/Ministral-3-8B-Base-2512", "silu", True, 34, 4096, 14336, 32, 8, 131072, 262144, head_dim=128
    ),
    "olmo-2-7b": Known("allenai/OLMo-2-1124-7B", "silu", True, 32, 4096, 11008, 32, 32, 100352, 4096),
    "olmo-3-7b": Known("allenai/Olmo-3-1025-7B", "silu", True, 32, 4096, 11008, 32, 32, 100278, 65536),
    "olmo-3-32b": Known("allenai/Olmo-3-1125-32B", "silu", True, 64, 5120, 27648, 40, 8, 100278, 65536),
    "exaone-4-1.2b": Known(
        "LGAI-EXAONE/EXAONE-4.0-1.2B", "silu", True, 30, 2048, 4096, 32, 8, 102400, 65536, tied=True
    ),
    "exaone-4-32b": Known("LGAI-EXAONE/EXAONE-4.0-32B", "silu", True, 64, 5120, 27392, 40, 8, 102400, 131072),
    "helium-1-2b": Known("kyutai/helium-1-2b", "silu", True, 28, 2048, 8192, 16, 8, 64000, 4096),
    "internlm3-8b": Known("internlm/internlm3-8b-instruct", "silu", True, 48, 4096, 10240, 32, 2, 128512, 32768),
    "mimo-7b": Known("XiaomiMiMo/MiMo-7B-Base", "silu", True, 36, 4096, 11008, 32, 8, 151680, 32768),
    "hunyuan-7b": Known("tencent/Hunyuan-7B-Instruct", "silu", True, 32, 4096, 14336, 32, 8, 128167, 32768, tied=True),
    "command-r7b": Known(
        "CohereLabs/c4ai-command-r7b-12-2024", "silu", True, 32, 4096, 14336, 32, 8, 256000, 8192, tied=True
    ),
    "phi-2": Known("microsoft/phi-2", "gelu_tanh", False, 32, 2560, 10240, 32, 32, 51200, 2048),
    "phi-3.5-mini": Known("microsoft/Phi-3.5-mini-instruct", "silu", True, 32, 3072, 8192, 32, 32, 32064, 4096),
    "phi-4-mini": Known("microsoft/Phi-4-mini-instruct", "silu", True, 32, 3072, 8192, 24, 8, 200064, 4096, tied=True),
    "phi-4": Known("microsoft/phi-4", "silu", True, 40, 5120, 17920, 40, 10, 100352, 16384),
    "glm-4-9b": Known("THUDM/GLM-4-9B-0414", "silu", True, 40, 4096, 13696, 32, 2, 151552, 32768, head_dim=128),
    "gpt2-xl": Known("openai-community/gpt2-xl", "gelu_tanh", False, 48, 1600, 6400, 25, 25, 50257, 1024, tied=True),
    "pythia-6.9b": Known("EleutherAI/pythia-6.9b", "gelu", False, 32, 4096, 16384, 32, 32, 50432, 2048),
    "starcoder2-7b": Known("bigcode/starcoder2-7b", "gelu_tanh", False, 32, 4608, 18432, 36, 4, 49152, 4096, tied=True),
}
ALIASES = {name: known.repo for name, known in KNOWN.items()}
