"""Another router: the model asks its `devices` for the experts of each token, and here they answer differently."""

import jax.numpy as jnp
from flax import nnx

import dsv3_jax as dsv3


class WithoutGroups(dsv3.OneDevice):
    """Chooses among all experts, where the report allows each token only some groups of them."""

    def gate(self, logits, bias, token_mask, **settings):
        return super().gate(logits, bias, token_mask, **settings | {"n_group": 1, "topk_group": 1})


config = dsv3.ModelConfig.preset("tiny")
tokens = jnp.arange(64).reshape(2, 32)
for devices in (dsv3.OneDevice(), WithoutGroups()):
    model = dsv3.DeepSeekV3(config, rngs=nnx.Rngs(0), devices=devices)
    load = model(tokens).routing.load
    print(f"{type(devices).__name__}: tokens of the busiest expert in each layer: {load.max(-1)}")
