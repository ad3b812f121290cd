"""Which experts of a trained model read which kind of text."""

import sys

import jax.numpy as jnp

import dsv3_jax as dsv3

model, tokenizer, step = dsv3.load_checkpoint(sys.argv[1])
texts = {
    "code": "def add(a, b):\n    return a + b\n" * 8,
    "prose": "The sea was calm, and nobody spoke of the storm. " * 8,
    "digits": "3.14159 2.71828 1.41421 1.61803 " * 8,
}
shares = {}
for name, text in texts.items():
    tokens = jnp.asarray([tokenizer.prompt_ids(text)[: model.config.max_position_embeddings]])
    load = model(tokens).routing.load
    shares[name] = load / load.sum(-1, keepdims=True)
    print(f"{name:8} three busiest experts in each layer: {jnp.argsort(-load, -1)[:, :3].tolist()}")
for first, second in (("code", "prose"), ("code", "digits")):
    shared = jnp.minimum(shares[first], shares[second]).sum(-1)
    print(f"{first} and {second} share {shared.mean():.0%} of their experts")
