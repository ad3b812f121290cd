"""`save_hf`, which writes a model to a folder in the published layout.

All files are written to a hidden folder beside the target, which is renamed to the target once it is complete. Shards
are written first; index and config.json, without which no program takes the folder for a checkpoint, are written last.
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
from dsv3_jax.data import Tokenizer
from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.interop.checkpoint_folder import INDEX_NAME, SINGLE_NAME
from dsv3_jax.interop.fp8_weights import quantise, quantise_with
from dsv3_jax.interop.hf_config import CONFIG_NAME, to_published
from dsv3_jax.interop.parameter_tree import arrays
from dsv3_jax.interop.progress import byte_progress
from dsv3_jax.interop.safetensors_reader import DTYPES
from dsv3_jax.interop.safetensors_writer import TensorSpec, write_safetensors
from dsv3_jax.interop.stored_format import (
    FP8,
    DtypeName,
    StoredFormat,
    are_powers_of_two,
    format_of_parameters,
    uniform_format,
)
from dsv3_jax.interop.tensor_names import PublishedTensor, published_tensors
from dsv3_jax.interop.tokenizer_files import write_tokenizer
from dsv3_jax.interop.whole_folder import whole_folder
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.precision.fp8_weight import Fp8Weight

SHARD_BYTES = 5 * 10**9


def save_hf(
    model: DeepSeekV3,
    folder: str | Path,
    *,
    dtype: DtypeName | None = None,
    power_of_two_scales: bool = False,
    stored_format: StoredFormat | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Writes a model as transformers and serving engines read it: safetensors, index, config.json and tokenizer.

    Args:
      model: any model of this architecture. Of sharded arrays, one tensor at a time is gathered.
      folder: a new folder.
      dtype: "float32", "bfloat16" or "fp8" (linear maps in e4m3 with scales, the others in bfloat16). None keeps the
        dtype of each parameter. Router biases are float32 always.
      power_of_two_scales: make FP8 scales powers of two (`scale_fmt: ue8m0`).
      stored_format: how each tensor is stored, instead of `dtype`; an imported run gives that of its checkpoint.
      tokenizer: a tokenizer, its tokenizer.json, or a folder that has one and perhaps a chat template,
        generation_config.json and other settings, which are written too.
      max_shard_bytes: the largest size of a shard, unless a single tensor is larger.
      progress: show a progress bar on stderr.

    Raises:
      UserError: the folder exists already or cannot be written, or config.json has no field for a setting of the model.
    """
    parameters = arrays(model)
    if stored_format is None:
        stored_format = _format(parameters, model.config, dtype, power_of_two_scales)
    specs = list(stored_format.specs(model.config))
    shards = split_into_shards(specs, max_shard_bytes)
    total = sum(spec.nbytes for spec in specs)
    to_published(
        model.config, dtype="float32"
    )  # refuses a model that config.json cannot describe before anything is written
    with whole_folder(Path(folder)) as writing, byte_progress("writing", total, shown=progress) as advance:
        values = tensor_values(model.config, stored_format, parameters)
        for name, shard in shards.items():
            write_safetensors(writing / name, shard, itertools.islice(values, len(shard)), advance)
        ids = write_tokenizer(tokenizer, writing, model.config.vocab_size)
        _write_index(writing, shards, total)
        _write_config(writing, model.config, stored_format, ids)


def tensor_values(config: ModelConfig, stored_format: StoredFormat, parameters: dict[str, Any]) -> Iterator[np.ndarray]:
    """Yields the values of each tensor of `stored_format.specs`, on the host."""
    for tensor in published_tensors(config):
        parameter, dtype = parameters[tensor.path], stored_format.dtypes[tensor.name]
        if dtype == FP8:
            yield from _fp8_values(tensor, parameter, stored_format)
        else:
            yield _plain_values(tensor, parameter).astype(DTYPES[dtype], copy=False)


def split_into_shards(specs: list[TensorSpec], max_bytes: int) -> dict[str, list[TensorSpec]]:
    """Returns the tensors of each shard by its file name, in order; one file where all tensors fit into it."""
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


def _format(
    parameters: dict[str, Any], config: ModelConfig, dtype: DtypeName | None, power_of_two_scales: bool
) -> StoredFormat:
    if dtype not in (None, "float32", "bfloat16", "fp8"):
        raise ConfigError(f"dtype must be float32, bfloat16, fp8 or None, not {dtype!r}")
    if dtype is not None:
        return uniform_format(config, dtype, power_of_two_scales=power_of_two_scales)
    kept = [value for value in parameters.values() if isinstance(value, Fp8Weight)]
    powers = are_powers_of_two(np.asarray(value.scales) for value in kept)
    return format_of_parameters(config, {path: value.dtype for path, value in parameters.items()}, powers)


def _plain_values(tensor: PublishedTensor, parameter: Any) -> np.ndarray:
    if isinstance(parameter, Fp8Weight):
        parameter = Fp8Weight(
            jnp.asarray(_at(parameter.values, tensor.index)),
            jnp.asarray(_at(parameter.scales, tensor.index)),
            parameter.columns,
        ).astype(jnp.float32)
        return np.asarray(parameter).reshape(tensor.shape)
    return _at(parameter, tensor.index).reshape(tensor.shape)


def _fp8_values(tensor: PublishedTensor, parameter: Any, stored_format: StoredFormat) -> Iterator[np.ndarray]:
    if isinstance(parameter, Fp8Weight):
        yield _at(parameter.values, tensor.index).reshape(tensor.shape)
        yield _at(parameter.scales, tensor.index)
        return
    plain = _plain_values(tensor, parameter).astype(np.float32, copy=False)
    scales = stored_format.scales.get(tensor.name)
    if scales is None:
        yield from quantise(plain, power_of_two_scales=stored_format.power_of_two_scales)
    else:
        yield quantise_with(plain, scales)
        yield scales


def _at(array: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """Returns array[index] on the host. No other part of the array is copied to the host."""
    if not array.is_fully_addressable:
        raise UserError(
            "a model that is sharded over several processes cannot be exported; export its checkpoint from one"
        )
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


def _write_config(folder: Path, config: ModelConfig, stored_format: StoredFormat, ids: dict[str, Any]) -> None:
    values = to_published(
        config,
        dtype=stored_format.torch_dtype,
        quantization=stored_format.quantization,
        token_ids=ids,
    )
    _write_json(folder / CONFIG_NAME, values)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with open(path, "x", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
