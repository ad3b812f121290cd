"""Writing text with a model: sampling, generation with the latent cache, self-speculation."""

from dsv3_jax.inference.generate import complete, generate, stream
from dsv3_jax.inference.sampling import GREEDY, Sampler

__all__ = ["GREEDY", "Sampler", "complete", "generate", "stream"]
