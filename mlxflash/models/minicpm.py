"""MiniCPM (arXiv 2404.06395), MiniCPM-S among them: mlx-lm's, but for its logits.

mlx-lm divides the last hidden state by `hidden_size / dim_model_base` only where the head is not tied to the
embedding; OpenBMB's own model always does.
"""

from typing import Any

import mlx.core as mx
from mlx_lm.models import minicpm
from mlx_lm.models.minicpm import ModelArgs

__all__ = ["Model", "ModelArgs"]


class Model(minicpm.Model):
    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """Logits [batch, tokens, vocabulary] of token ids [batch, tokens]."""
        x = self.model(inputs, cache) / (self.args.hidden_size / self.args.dim_model_base)
        return self.model.embed_tokens.as_linear(x) if self.args.tie_word_embeddings else self.lm_head(x)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return weights
