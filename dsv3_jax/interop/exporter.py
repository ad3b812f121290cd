"""`save_hf`: a model into a folder in the published layout.

Everything is written to a hidden folder beside the target, which takes the target's name once it is whole; shards come
first, what makes a folder look like a checkpoint (index and config.json) last.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.interop.checkpoint_folder import INDEX_NAME, SINGLE_NAME
from dsv3_jax.interop.fp8_weights import quantise, quantise_with
from dsv3_jax.interop.hf_config import CONFIG_NAME, to_published
from dsv3_jax.interop.layout import FP8, Format, Layout, are_powers_of_two, layout_of, uniform_layout
from dsv3_jax.interop.parameter_tree import arrays
from dsv3_jax.interop.progress import byte_progress
from dsv3_jax.interop.safetensors_reader import DTYPES
from dsv3_jax.interop.safetensors_writer import TensorSpec, write_safetensors
from dsv3_jax.interop.tensor_names import Slot, slots
from dsv3_jax.interop.tokenizer_files import TokenIds, write_tokenizer
from dsv3_jax.interop.whole_folder import whole_folder
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.precision.fp8_weight import Fp8Weight

SHARD_BYTES = 5 * 10**9


def save_hf(
    model: DeepSeekV3,
    folder: str | Path,
    *,
    dtype: Format | None = None,
    power_of_two_scales: bool = False,
    layout: Layout | None = None,
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Writes `model` as transformers and serving engines read it: safetensors, index, config.json, tokenizer, MTP.

    Args:
      model: any model of this architecture; sharded arrays are gathered a tensor at a time.
      folder: a new folder.
      dtype: "float32", "bfloat16", "fp8" (e4m3 and scales for the linear maps, bfloat16 for the rest), or None for what
        each parameter has. Router biases are float32 always.
      power_of_two_scales: FP8 scales are powers of two (`scale_fmt: ue8m0`).
      layout: how each tensor is stored, in the place of `dtype`; an imported run keeps its checkpoint's.
      tokenizer: a tokenizer.json, or a folder with one, to go with it.
      max_shard_bytes: a shard is closed before it grows beyond this.
      progress: show a progress bar on stderr.

    Raises:
      UserError: the folder is there already or cannot be written, or the layout has no word for this model.
    """
    parameters = arrays(model)
    if layout is None:
        layout = _layout(parameters, model.config, dtype, power_of_two_scales)
    specs = list(layout.specs(model.config))
    shards = split_into_shards(specs, max_shard_bytes)
    total = sum(spec.nbytes for spec in specs)
    to_published(model.config, dtype="float32")  # refuses what cannot be expressed before anything is written
    with whole_folder(Path(folder)) as writing, byte_progress("writing", total, shown=progress) as advance:
        values = tensor_values(model.config, layout, parameters)
        for name, shard in shards.items():
            write_safetensors(writing / name, shard, itertools.islice(values, len(shard)), advance)
        ids = write_tokenizer(tokenizer, writing, model.config.vocab_size)
        _write_index(writing, shards, total)
        _write_config(writing, model.config, layout, ids)


def tensor_values(config: ModelConfig, layout: Layout, parameters: dict[str, Any]) -> Iterator[np.ndarray]:
    """The values of `layout.specs`, on the host, one at a time."""
    for slot in slots(config):
        parameter, stored = parameters[slot.path], layout.dtypes[slot.name]
        if stored == FP8:
            yield from _fp8_values(slot, parameter, layout)
        else:
            yield _plain_values(slot, parameter).astype(DTYPES[stored], copy=False)


def split_into_shards(specs: list[TensorSpec], max_bytes: int) -> dict[str, list[TensorSpec]]:
    """File names and what each holds, in order; one file when everything fits."""
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if groups[-1] and size + spec.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.nbytes
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    count = len(groups)
    return {f"model-{i:05d}-of-{count:06d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _layout(parameters: dict[str, Any], config: ModelConfig, dtype: Format | None, power_of_two_scales: bool) -> Layout:
    if dtype not in (None, "float32", "bfloat16", "fp8"):
        raise ConfigError(f"dtype must be float32, bfloat16, fp8 or None, not {dtype!r}")
    if dtype is not None:
        return uniform_layout(config, dtype, power_of_two_scales=power_of_two_scales)
    kept = [value for value in parameters.values() if isinstance(value, Fp8Weight)]
    powers = are_powers_of_two(np.asarray(value.scales) for value in kept)
    return layout_of(config, {path: value.dtype for path, value in parameters.items()}, powers)


def _plain_values(slot: Slot, parameter: Any) -> np.ndarray:
    if isinstance(parameter, Fp8Weight):
        parameter = Fp8Weight(
            jnp.asarray(_at(parameter.values, slot.index)),
            jnp.asarray(_at(parameter.scales, slot.index)),
            parameter.columns,
        ).astype(jnp.float32)
        return np.asarray(parameter).reshape(slot.shape)
    return _at(parameter, slot.index).reshape(slot.shape)


def _fp8_values(slot: Slot, parameter: Any, layout: Layout) -> Iterator[np.ndarray]:
    if isinstance(parameter, Fp8Weight):
        yield _at(parameter.values, slot.index).reshape(slot.shape)
        yield _at(parameter.scales, slot.index)
        return
    plain = _plain_values(slot, parameter).astype(np.float32, copy=False)
    scales = layout.scales.get(slot.name)
    if scales is None:
        yield from quantise(plain, power_of_two_scales=layout.power_of_two_scales)
    else:
        yield quantise_with(plain, scales)
        yield scales


def _at(array: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """array[index] on the host. Nothing else of the array is moved."""
    if not array.is_fully_addressable:
        raise UserError("a model spread over several processes cannot be exported; export its checkpoint from one")
    if len(array.devices()) == 1 and next(iter(array.devices())).platform == "cpu":
        return np.asarray(array)[index]
    return np.asarray(_slice(array, np.array(index, np.int32), len(index)))


@functools.partial(jax.jit, static_argnums=2)
def _slice(array: jax.Array, index: jax.Array, axes: int) -> jax.Array:
    starts = [index[axis] if axis < axes else 0 for axis in range(array.ndim)]
    sizes = [1] * axes + list(array.shape[axes:])
    return jax.lax.dynamic_slice(array, starts, sizes).reshape(array.shape[axes:])


def _write_index(folder: Path, shards: dict[str, list[TensorSpec]], total: int) -> None:
    if SINGLE_NAME in shards:
        return
    weight_map = {spec.name: name for name, shard in shards.items() for spec in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / INDEX_NAME, index)


def _write_config(folder: Path, config: ModelConfig, layout: Layout, ids: TokenIds) -> None:
    values = to_published(
        config,
        dtype=layout.torch_dtype,
        quantization=layout.quantization,
        bos_token_id=ids.bos,
        eos_token_id=ids.eos,
    )
    _write_json(folder / CONFIG_NAME, values)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with open(path, "x", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
