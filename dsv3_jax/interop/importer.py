"""`load_hf`: a model from a folder in the published layout."""

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
from dsv3_jax.interop.checkpoint_folder import CheckpointFolder, open_checkpoint
from dsv3_jax.interop.fp8_weights import E4M3
from dsv3_jax.interop.hf_config import PublishedConfig, read_config
from dsv3_jax.interop.layout import Layout, are_powers_of_two
from dsv3_jax.interop.parameter_tree import abstract_model, arrays, with_arrays
from dsv3_jax.interop.progress import byte_progress
from dsv3_jax.interop.safetensors_reader import DTYPES, TensorEntry
from dsv3_jax.interop.streaming import READERS, StoredTensor, load_parameter
from dsv3_jax.interop.tensor_names import SCALE_SUFFIX, Slot, slots
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.precision import PRECISIONS, Precision
from dsv3_jax.precision.fp8_weight import Fp8Weight

Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
_COMPARED_ROWS = 4096
_BFLOAT16 = np.dtype(jnp.bfloat16)
_FLOAT32 = np.dtype(np.float32)


def load_hf(
    folder: str | Path,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    shardings: Shardings | None = None,
    mtp: bool = True,
    keep_fp8: bool = False,
    precision: Precision = PRECISIONS["float32"],
    remat: str = "none",
    progress: bool = False,
) -> DeepSeekV3:
    """The model of a checkpoint in the published layout: V3, R1, V3.1, Moonlight, Kimi-K2, V2, V2-Lite.

    Tensors are read one by one and put straight where they stay, so host memory beyond the final arrays stays near
    a few tensors.

    Args:
      folder: config.json, and model.safetensors or shards with their index.
      dtype: of every parameter; None keeps what is stored (FP8 becomes bfloat16). Router biases are float32 always.
      mesh: devices to spread the parameters over; each host reads what its own devices hold.
      shardings: the sharding of a parameter by path and shape; by the project's rules for `mesh` unless given.
      mtp: load the MTP modules.
      keep_fp8: FP8 weights stay e4m3 values with their scales (`Fp8Weight`) instead of being dequantised.
      precision, remat: as for DeepSeekV3.
      progress: show a progress bar on stderr.

    Raises:
      UserError: anything wrong with the files, one line naming file and tensor.

    Warns:
      UserWarning: weights that are NaN; MTP modules announced but absent.
    """
    dtype = _checked_dtype(dtype)
    checkpoint = open_checkpoint(folder)
    published = read_config(checkpoint.path)
    account = take_account(checkpoint, published, mtp=mtp)
    for notice in account.notices:
        warnings.warn(notice, stacklevel=2)
    model = abstract_model(account.config, precision=precision, remat=remat)
    stored = stored_tensors(checkpoint, published, account.consumed)
    place = shardings or default_shardings(mesh)
    _check_copies(checkpoint, account)
    values: dict[str, jax.Array | Fp8Weight] = {}
    nan: list[StoredTensor] = []
    total = sum(tensor.nbytes for tensors in stored.values() for tensor in tensors)
    with ThreadPoolExecutor(READERS) as readers, byte_progress("loading", total, shown=progress) as advance:
        load = functools.partial(load_parameter, readers=readers, advance=advance, on_nan=nan.append)
        for path, abstract in arrays(model).items():
            tensors = stored[path]
            if keep_fp8 and all(tensor.scale and not tensor.rotary_width for tensor in tensors):
                values[path] = _load_fp8(path, abstract.shape, tensors, place, load)
            else:
                kind = _parameter_dtype(tensors, dtype)
                values[path] = load(tensors, abstract.shape, kind, place(path, abstract.shape))
    for tensor in dict.fromkeys(nan):
        warnings.warn(f"{tensor.entry.path}: tensor '{tensor.entry.name}' holds NaN", stacklevel=2)
    return with_arrays(model, values)


def architecture_of(folder: str | Path) -> ModelConfig:
    """The architecture `load_hf` would give, from config.json and headers alone."""
    checkpoint = open_checkpoint(folder)
    return take_account(checkpoint, read_config(checkpoint.path)).config


def stored_tensors(
    checkpoint: CheckpointFolder, published: PublishedConfig, slots: Iterable[Slot]
) -> dict[str, list[StoredTensor]]:
    """The tensors that fill each parameter, by its path."""
    entries = checkpoint.entries
    assert entries is not None
    stored: dict[str, list[StoredTensor]] = defaultdict(list)
    for slot in slots:
        entry = entries[slot.name]
        scale = entries[slot.name + SCALE_SUFFIX] if entry.dtype == FP8_DTYPE else None
        moved = slot.rotary_head and not published.rope_interleave
        rotary = published.model.qk_rope_head_dim if moved else 0
        stored[slot.path].append(StoredTensor(slot, entry, scale, rotary))
    return stored


def original_layout(checkpoint: CheckpointFolder, account: Account) -> Layout:
    """How the checkpoint stores each tensor, its FP8 scales included: what an export needs to give the same bytes."""
    entries = checkpoint.entries
    assert entries is not None
    scales = {name.removesuffix(SCALE_SUFFIX): entries[name].read().astype(np.float32) for name in account.scales}
    dtypes = {slot.name: entries[slot.name].dtype for slot in account.consumed}
    # Copies of embedding and head that the checkpoint leaves out are written in the dtype of the original.
    main = {slot.path: dtypes[slot.name] for slot in account.consumed if not slot.index}
    dtypes |= {slot.name: main[slot.path] for slot in slots(account.config) if slot.copy}
    return Layout(dtypes, are_powers_of_two(scales.values()), scales)


def default_shardings(mesh: jax.sharding.Mesh | None) -> Shardings:
    """Everything on the default device, or spread over `mesh`: the largest axis that divides, by all its devices."""
    if mesh is None:
        single = jax.sharding.SingleDeviceSharding(jnp.zeros(()).devices().pop())
        return lambda path, shape: single

    def spread(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        axes = [axis for axis, size in enumerate(shape) if size % mesh.size == 0]
        if len(shape) < 2 or not axes:
            return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        largest = max(axes, key=lambda axis: shape[axis])
        spec = [mesh.axis_names if axis == largest else None for axis in range(len(shape))]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    return spread


def _load_fp8(
    path: str, shape: tuple[int, ...], tensors: list[StoredTensor], place: Shardings, load: Callable[..., jax.Array]
) -> Fp8Weight:
    """Values and scales of one parameter, as stored."""
    first = tensors[0].slot
    leading = shape[: len(first.index)]
    values = [dataclasses.replace(tensor, scale=None) for tensor in tensors]
    scales = [tensor.scales for tensor in tensors]
    scales_shape = (*leading, *first.scale_shape)
    return Fp8Weight(
        load(values, shape, E4M3, place(path, shape)),
        load(scales, scales_shape, _FLOAT32, place(path + SCALE_SUFFIX, scales_shape)),
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
    """The wanted dtype, or the narrowest that holds what is stored; float32 where it must be."""
    if tensors[0].slot.always_float32:
        return _FLOAT32
    if dtype is not None:
        return dtype
    kinds = {_BFLOAT16 if t.scale else DTYPES[t.entry.dtype] for t in tensors}
    return kinds.pop() if len(kinds) == 1 else _FLOAT32


def _check_copies(checkpoint: CheckpointFolder, account: Account) -> None:
    """MTP's copies of embedding and head must be those of the main model, since one parameter serves both."""
    entries = checkpoint.entries or {}
    main = {slot.path: entries[slot.name] for slot in account.consumed if not slot.index}
    for slot in account.copies:
        copy, original = entries[slot.name], main[slot.path]
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
