"""Text generation: sampling, generation with the latent cache, and self-speculation with the MTP module."""

from dsv3_jax.inference.generate import complete, generate, stream
from dsv3_jax.inference.sampling import GREEDY, Sampler
from dsv3_jax.inference.speculative import Speculation, speculate

__all__ = ["GREEDY", "Sampler", "Speculation", "complete", "generate", "speculate", "stream"]
