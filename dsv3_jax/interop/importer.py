"""`load_hf`, which makes a model from a folder in the published layout."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.interop.account import FP8_DTYPE, Account, take_account
from dsv3_jax.interop.checkpoint_folder import CheckpointFolder
from dsv3_jax.interop.fp8_weights import E4M3
from dsv3_jax.interop.hf_config import PublishedConfig
from dsv3_jax.interop.parameter_tree import arrays, shardings, with_arrays
from dsv3_jax.interop.progress import byte_progress
from dsv3_jax.interop.published_checkpoint import open_published
from dsv3_jax.interop.safetensors_reader import DTYPES, TensorEntry
from dsv3_jax.interop.stored_format import StoredFormat, are_powers_of_two
from dsv3_jax.interop.stored_tensor import StoredTensor
from dsv3_jax.interop.streaming import READERS, load_parameter
from dsv3_jax.interop.tensor_names import SCALE_SUFFIX, PublishedTensor, published_tensors
from dsv3_jax.model import DeepSeekV3, abstract_model
from dsv3_jax.modules.devices import Devices, OneDevice
from dsv3_jax.precision import PRECISIONS, Precision
from dsv3_jax.precision.fp8_weight import Fp8Weight

_COMPARED_ROWS = 4096
_BFLOAT16 = np.dtype(jnp.bfloat16)
_FLOAT32 = np.dtype(np.float32)


def load_hf(
    folder: str | Path,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    devices: Devices = OneDevice(),
    mtp: bool = True,
    keep_fp8: bool = False,
    precision: Precision = PRECISIONS["float32"],
    remat: str = "none",
    progress: bool = False,
) -> DeepSeekV3:
    """Returns the model of a checkpoint in the published layout: V3, R1, V3.1, Moonlight, Kimi-K2, V2, V2-Lite.

    Each tensor is read straight to the devices that keep it. Host memory beyond the final arrays stays near a few
    pieces of 32 MiB, whatever the size of the model.

    Args:
      folder: config.json, and model.safetensors or shards with their index.
      dtype: dtype of every parameter, float32 or bfloat16. None keeps the stored dtype (FP8 becomes bfloat16). Router
        biases are float32 always.
      devices: where the parameters are kept and computed with: `OneDevice()`, or `OnMesh(mesh)`, under which each host
        reads what its own devices keep.
      mtp: load the MTP modules.
      keep_fp8: keep FP8 weights as e4m3 values with their scales (`Fp8Weight`) instead of dequantising them.
      precision, remat: as for DeepSeekV3.
      progress: show a progress bar on stderr.

    Raises:
      UserError: anything is wrong with the files; the message is one line that names file and tensor.

    Warns:
      UserWarning: a tensor holds NaN, config.json has unknown fields or announces MTP modules that are absent, or the
        folder holds weights that belong to no index.
    """
    dtype = _checked_dtype(dtype)
    checkpoint, published = open_published(folder)
    account = take_account(checkpoint, published, mtp=mtp)
    for notice in account.notices:
        warnings.warn(notice, stacklevel=2)
    model = abstract_model(account.config, precision=precision, remat=remat, devices=devices)
    kept_at = shardings(model)
    stored = stored_tensors(checkpoint, published, account.consumed)
    _check_copies(checkpoint, account)
    values: dict[str, jax.Array | Fp8Weight] = {}
    nan: list[StoredTensor] = []
    total = sum(tensor.nbytes for tensors in stored.values() for tensor in tensors)
    with ThreadPoolExecutor(READERS) as readers, byte_progress("loading", total, shown=progress) as advance:
        load = functools.partial(load_parameter, readers=readers, advance=advance, on_nan=nan.append)
        for path, abstract in arrays(model).items():
            tensors = stored[path]
            if keep_fp8 and all(tensor.scale and not tensor.rotary_width for tensor in tensors):
                values[path] = _load_fp8(tensors, abstract.shape, kept_at[path], load)
            else:
                kind = _parameter_dtype(tensors, dtype)
                values[path] = load(tensors, abstract.shape, kind, kept_at[path])
    for tensor in dict.fromkeys(nan):
        warnings.warn(f"{tensor.entry.path}: tensor '{tensor.entry.name}' holds NaN", stacklevel=2)
    return with_arrays(model, values)


def architecture_of(folder: str | Path) -> ModelConfig:
    """Returns the architecture that `load_hf` would give, read from config.json and the headers of the files alone."""
    return take_account(*open_published(folder)).config


def stored_tensors(
    checkpoint: CheckpointFolder, published: PublishedConfig, wanted: Iterable[PublishedTensor]
) -> dict[str, list[StoredTensor]]:
    """Returns the tensors that fill each parameter, by the parameter's path."""
    entries = checkpoint.entries
    assert entries is not None
    stored: dict[str, list[StoredTensor]] = defaultdict(list)
    for tensor in wanted:
        entry = entries[tensor.name]
        scale = entries[tensor.name + SCALE_SUFFIX] if entry.dtype == FP8_DTYPE else None
        reordered = tensor.rotary_head and not published.rope_interleave
        rotary = published.model.qk_rope_head_dim if reordered else 0
        stored[tensor.path].append(StoredTensor(tensor, entry, scale, rotary))
    return stored


def original_format(checkpoint: CheckpointFolder, account: Account) -> StoredFormat:
    """Returns how the checkpoint stores each tensor, FP8 scales included: an export with it gives the same bytes."""
    entries = checkpoint.entries
    assert entries is not None
    scales = {name.removesuffix(SCALE_SUFFIX): entries[name].read().astype(np.float32) for name in account.scales}
    dtypes = {tensor.name: entries[tensor.name].dtype for tensor in account.consumed}
    # Copies of embedding and head that the checkpoint leaves out are written in the dtype of the original.
    main = {tensor.path: dtypes[tensor.name] for tensor in account.consumed if not tensor.index}
    dtypes |= {tensor.name: main[tensor.path] for tensor in published_tensors(account.config) if tensor.copy}
    return StoredFormat(dtypes, are_powers_of_two(scales.values()), scales)


def _load_fp8(
    tensors: list[StoredTensor],
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    load: Callable[..., jax.Array],
) -> Fp8Weight:
    """Returns one parameter as it is stored: e4m3 values under `sharding`, and their scales."""
    first = tensors[0].published
    leading = len(first.index)
    values = [dataclasses.replace(tensor, scale=None) for tensor in tensors]
    scales = [tensor.scales for tensor in tensors]
    scales_sharding = sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        # Scales are sharded over layers and experts only, since the blocks of a matrix need not divide evenly.
        spec = jax.sharding.PartitionSpec(*sharding.spec[:leading])
        scales_sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
    return Fp8Weight(
        load(values, shape, E4M3, sharding),
        load(scales, (*shape[:leading], *first.scale_shape), _FLOAT32, scales_sharding),
        first.shape[1],
    )


def _checked_dtype(dtype: jax.typing.DTypeLike | None) -> np.dtype | None:
    if dtype is None:
        return None
    try:
        kind = np.dtype(jnp.dtype(dtype))
    except TypeError:
        raise ConfigError(f"dtype {dtype!r} is not known; choose float32 or bfloat16") from None
    if kind not in (_FLOAT32, _BFLOAT16):
        raise ConfigError(f"dtype must be float32 or bfloat16, not {kind.name}")
    return kind


def _parameter_dtype(tensors: list[StoredTensor], dtype: np.dtype | None) -> np.dtype:
    """Returns float32 where it is required, else `dtype`, else the narrowest dtype that holds what is stored."""
    if tensors[0].published.always_float32:
        return _FLOAT32
    if dtype is not None:
        return dtype
    kinds = {_BFLOAT16 if t.scale else DTYPES[t.entry.dtype] for t in tensors}
    return kinds.pop() if len(kinds) == 1 else _FLOAT32


def _check_copies(checkpoint: CheckpointFolder, account: Account) -> None:
    """Checks that MTP's copies of embedding and head equal the main model's, since one parameter serves both."""
    entries = checkpoint.entries or {}
    main = {tensor.path: entries[tensor.name] for tensor in account.consumed if not tensor.index}
    for tensor in account.copies:
        copy, original = entries[tensor.name], main[tensor.path]
        if not _equal(copy, original):
            raise UserError(
                f"{copy.path}: tensor '{copy.name}' differs from '{original.name}', but MTP shares it; "
                "load without MTP (mtp=False, --no-mtp)"
            )


def _equal(a: TensorEntry, b: TensorEntry) -> bool:
    if a.dtype != b.dtype:
        return False
    for first in range(0, a.shape[0], _COMPARED_ROWS):
        last = min(first + _COMPARED_ROWS, a.shape[0])
        if not np.array_equal(a.read_rows(first, last).view(np.uint8), b.read_rows(first, last).view(np.uint8)):
            return False
    return True
