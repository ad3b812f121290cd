"""A training loop of your own: the losses and the balancing of experts in plain sight."""

import jax.numpy as jnp
import optax
from flax import nnx

import dsv3_jax as dsv3

config = dsv3.ModelConfig.preset("tiny")
data = dsv3.prepare_data(dsv3.DataConfig(corpus="texts", tokenizer="byte", sequence_length=64), None)
model = dsv3.DeepSeekV3(config.replace(vocab_size=data.tokenizer.vocab_size), rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)


@nnx.jit
def step(model: dsv3.DeepSeekV3, optimizer: nnx.Optimizer, tokens):
    def loss(model):
        out = model(tokens[:, :-1])
        heads = zip((out.logits, *out.mtp_logits), (tokens[:, k + 1 :] for k in range(9)), strict=False)
        main, *mtp = [optax.losses.softmax_cross_entropy_with_integer_labels(*head).mean() for head in heads]
        return main + 0.3 * sum(mtp) + 1e-4 * out.routing.sequence_balance.sum(), (main, out.routing.load)

    gradients, (main, load) = nnx.grad(loss, has_aux=True)(model)
    optimizer.update(model, gradients)
    moved = 0.003 * jnp.sign(load.mean(-1, keepdims=True) - load)  # busy experts become less likely
    dsv3.set_router_biases(model, dsv3.router_biases(model) + moved)
    return main


rows = data.train_iterator()
for number in range(20):
    print(number, step(model, optimizer, jnp.asarray(rows.next_rows(4)[0])))
