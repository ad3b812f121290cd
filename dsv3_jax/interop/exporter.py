"""`save_hf`: a model into a folder in the published layout.

Everything is written to a hidden folder beside the target, which takes the target's name once it is whole; shards come
first, what makes a folder look like a checkpoint (index and config.json) last.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.interop.checkpoint_folder import INDEX_NAME, SINGLE_NAME
from dsv3_jax.interop.fp8_parameter import Fp8Weight
from dsv3_jax.interop.fp8_weights import quantise
from dsv3_jax.interop.hf_config import CONFIG_NAME, Quantization, to_published
from dsv3_jax.interop.parameter_tree import arrays
from dsv3_jax.interop.progress import byte_progress
from dsv3_jax.interop.safetensors_reader import DTYPE_NAMES, DTYPES
from dsv3_jax.interop.safetensors_writer import TensorSpec, write_safetensors
from dsv3_jax.interop.tensor_names import EMBEDDING, SCALE_SUFFIX, Slot, slots
from dsv3_jax.interop.tokenizer_files import TokenIds, write_tokenizer
from dsv3_jax.model import DeepSeekV3

Format = Literal["float32", "bfloat16", "fp8"]
SHARD_BYTES = 5 * 10**9
_PLAIN = {"float32": "F32", "bfloat16": "BF16"}
_TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How each tensor is stored.

    Attributes:
      plain: dtype of unquantised tensors by our parameter's path.
      fp8: paths stored as e4m3 with scales.
      power_of_two_scales: the scales' form.
    """

    plain: Callable[[str], str]
    fp8: frozenset[str]
    power_of_two_scales: bool = False

    @property
    def quantization(self) -> Quantization | None:
        """What config.json says of it."""
        return Quantization(self.power_of_two_scales) if self.fp8 else None


def save_hf(
    model: DeepSeekV3,
    folder: str | Path,
    *,
    dtype: Format | None = None,
    power_of_two_scales: bool = False,
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
      tokenizer: a tokenizer.json, or a folder with one, to go with it.
      max_shard_bytes: a shard is closed before it grows beyond this.
      progress: show a progress bar on stderr.

    Raises:
      UserError: the folder is there already or cannot be written, or the layout has no word for this model.
    """
    target = Path(folder)
    _check_target(target)
    parameters = arrays(model)
    layout = _layout(parameters, model.config, dtype, power_of_two_scales)
    specs = list(tensor_specs(model.config, layout))
    shards = split_into_shards(specs, max_shard_bytes)
    to_published(model.config, dtype="float32")  # refuses what cannot be expressed before anything is written
    temporary = _temporary_folder(target)
    try:
        total = sum(spec.nbytes for spec in specs)
        with byte_progress("writing", total, shown=progress) as advance:
            values = tensor_values(model.config, layout, parameters)
            for name, shard in shards.items():
                write_safetensors(temporary / name, shard, itertools.islice(values, len(shard)), advance)
        ids = write_tokenizer(tokenizer, temporary, model.config.vocab_size)
        _write_index(temporary, shards, total)
        _write_config(temporary, model.config, layout, ids)
        os.rename(temporary, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); nothing is left there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def published_layout(config: ModelConfig, dtype: Format, *, power_of_two_scales: bool = False) -> Layout:
    """The layout of a whole model in one format."""
    fp8 = frozenset(slot.path for slot in slots(config) if slot.quantised) if dtype == "fp8" else frozenset()
    plain = _PLAIN.get(dtype, "BF16")
    return Layout(lambda path: plain, fp8, power_of_two_scales)


def tensor_specs(config: ModelConfig, layout: Layout) -> Iterator[TensorSpec]:
    """Every tensor an export writes, in order."""
    for slot in slots(config):
        if slot.path in layout.fp8:
            yield TensorSpec(slot.name, "F8_E4M3", slot.shape)
            yield TensorSpec(slot.name + SCALE_SUFFIX, "F32", slot.scale_shape)
        else:
            plain = "F32" if slot.always_float32 else layout.plain(slot.path)
            yield TensorSpec(slot.name, plain, slot.shape)


def tensor_values(config: ModelConfig, layout: Layout, parameters: dict[str, Any]) -> Iterator[np.ndarray]:
    """The values of `tensor_specs`, on the host, one at a time."""
    for slot in slots(config):
        parameter = parameters[slot.path]
        if slot.path in layout.fp8:
            yield from _fp8_values(slot, parameter, layout.power_of_two_scales)
        else:
            plain = "F32" if slot.always_float32 else layout.plain(slot.path)
            yield _plain_values(slot, parameter).astype(DTYPES[plain], copy=False)


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
        return published_layout(config, dtype, power_of_two_scales=power_of_two_scales)
    kept = frozenset(path for path, value in parameters.items() if isinstance(value, Fp8Weight))
    scales = [np.asarray(parameters[path].scales) for path in kept]
    powers = bool(scales) and all((np.frexp(scale)[0] == 0.5).all() for scale in scales)
    return Layout(lambda path: DTYPE_NAMES[np.dtype(parameters[path].dtype)], kept, powers)


def _plain_values(slot: Slot, parameter: Any) -> np.ndarray:
    if isinstance(parameter, Fp8Weight):
        parameter = Fp8Weight(
            jnp.asarray(_at(parameter.values, slot.index)),
            jnp.asarray(_at(parameter.scales, slot.index)),
            parameter.columns,
        ).astype(jnp.float32)
        return np.asarray(parameter).reshape(slot.shape)
    return _at(parameter, slot.index).reshape(slot.shape)


def _fp8_values(slot: Slot, parameter: Any, power_of_two_scales: bool) -> Iterator[np.ndarray]:
    if isinstance(parameter, Fp8Weight):
        yield _at(parameter.values, slot.index).reshape(slot.shape)
        yield _at(parameter.scales, slot.index)
    else:
        plain = _plain_values(slot, parameter).astype(np.float32, copy=False)
        yield from quantise(plain, power_of_two_scales=power_of_two_scales)


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


def _check_target(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise UserError(f"{target}: is there already; choose a new folder")


def _temporary_folder(target: Path) -> Path:
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{target.name}.unfinished-", dir=target.absolute().parent))
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None


def _write_index(folder: Path, shards: dict[str, list[TensorSpec]], total: int) -> None:
    if SINGLE_NAME in shards:
        return
    weight_map = {spec.name: name for name, shard in shards.items() for spec in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / INDEX_NAME, index)


def _write_config(folder: Path, config: ModelConfig, layout: Layout, ids: TokenIds) -> None:
    values = to_published(
        config,
        dtype=_TORCH_NAMES[layout.plain(EMBEDDING)],
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
