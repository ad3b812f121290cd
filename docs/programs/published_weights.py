"""A checkpoint in the published layout: read, asked to go on with some ids, and written again in FP8."""

import sys

import jax
import jax.numpy as jnp

import dsv3_jax as dsv3

source, target = sys.argv[1:]
model = dsv3.load_hf(source)
print(model)
prompts = jnp.asarray([[5, 6, 7], [11, 12, 13]])
sampler = dsv3.Sampler(temperature=0.7, top_p=0.95)
written = dsv3.generate(model, prompts, max_new_tokens=8, sampler=sampler, key=jax.random.key(0))
for row in written.tolist():
    print(row[:3], "->", row[3:])
dsv3.save_hf(model, target, dtype="fp8")
print(dsv3.load_hf(target))
