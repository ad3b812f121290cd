"""Training that starts from the weights of another run, on texts of your own."""

import dataclasses
import sys

import dsv3_jax as dsv3

source, texts, out = sys.argv[1:]


def weights(devices):
    return dsv3.load_checkpoint(source, devices=devices)[0]


model, tokenizer, _ = dsv3.load_checkpoint(source)
tokenizer.save(f"{source}/tokenizer")
run = dsv3.default_run("tiny")
data = dataclasses.replace(run.data, corpus=texts, tokenizer=f"{source}/tokenizer", fill_in_middle_rate=0.0)
schedule = dataclasses.replace(run.training.schedule, learning_rate=3e-4)
training = dataclasses.replace(run.training, steps=4, schedule=schedule, sample_tokens=0)
outcome = dsv3.train(
    dataclasses.replace(run, model=model.config, data=data, training=training), out, initial_model=weights
)
print(f"bits per byte: {outcome.start.main.bits_per_byte:.3f} before, {outcome.end.main.bits_per_byte:.3f} after")
