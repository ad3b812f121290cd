"""Checks that every tensor of a checkpoint is used exactly once, and that every parameter is filled exactly once.

The account needs only the names of the tensors. Where the files are present, their dtypes and shapes are checked
against the architecture too. No weights are allocated, so that a laptop can check a checkpoint of 671B parameters.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.interop.checkpoint_folder import CheckpointFolder, named
from dsv3_jax.interop.hf_config import PublishedConfig
from dsv3_jax.interop.parameter_tree import arrays
from dsv3_jax.interop.safetensors_reader import TensorEntry
from dsv3_jax.interop.tensor_names import (
    SCALE_SUFFIX,
    PublishedTensor,
    holds_no_weights,
    is_mtp,
    published_tensors,
)
from dsv3_jax.model import abstract_model

PLAIN_DTYPES = ("F32", "BF16", "F16")
FP8_DTYPE = "F8_E4M3"
_SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")


@dataclasses.dataclass(frozen=True)
class Account:
    """What each tensor of a checkpoint is used for.

    Attributes:
      config: the model that is filled. It has no MTP modules where the checkpoint has none or none are wanted.
      consumed: tensors that fill parameters.
      copies: tensors of the checkpoint that repeat a parameter (MTP's embedding and head).
      scales: names of scale tensors.
      ignored: names of tensors that hold no weights, and of MTP tensors that are not wanted.
      notices: lines that the user should read.
    """

    config: ModelConfig
    consumed: tuple[PublishedTensor, ...]
    copies: tuple[PublishedTensor, ...]
    scales: frozenset[str]
    ignored: tuple[str, ...]
    notices: tuple[str, ...]

    @property
    def tensor_count(self) -> int:
        """Number of tensors in the checkpoint."""
        return len(self.consumed) + len(self.copies) + len(self.scales) + len(self.ignored)

    def describe(self) -> str:
        """Returns the account as text."""
        mtp = sum(is_mtp(self.config, tensor.name) for tensor in self.consumed)
        lines = [
            f"{len(self.consumed) - mtp:>9,}  tensors fill the main model",
            f"{mtp:>9,}  fill {self.config.num_nextn_predict_layers} MTP modules",
            f"{len(self.copies):>9,}  are copies of embedding and head for MTP (checked to be identical when loaded)",
            f"{len(self.scales):>9,}  hold FP8 scales",
            f"{len(self.ignored):>9,}  are not needed by this model",
            f"{self.tensor_count:>9,}  in all, each used once; every parameter is filled once",
            f"{self.config.num_parameters():>18,}  parameters in the main model, and "
            f"{self.config.num_parameters(mtp=True) - self.config.num_parameters():,} in MTP alone",
        ]
        return "\n".join([*lines, *self.notices])


def take_account(checkpoint: CheckpointFolder, published: PublishedConfig, *, mtp: bool = True) -> Account:
    """Checks a checkpoint's tensors against its configuration, and returns what each is used for.

    Args:
      checkpoint: the tensors.
      published: the contents of config.json.
      mtp: if False, MTP modules are left out even where the checkpoint has them.

    Raises:
      UserError: tensors are missing, unknown, or of the wrong dtype or shape; the message names file and tensor.
    """
    config, ignored, more = _mtp_modules(checkpoint, published, mtp)
    notices = [*checkpoint.notices, *published.notices, *more]
    wanted = list(published_tensors(config))
    present = [tensor for tensor in wanted if tensor.name in checkpoint.names]
    missing = [tensor.name for tensor in wanted if tensor.name not in checkpoint.names and not tensor.copy]
    if missing:
        raise UserError(f"{checkpoint.path}: {named(missing)} missing")
    scales = _scales(checkpoint, present)
    ignored |= {name for name in checkpoint.names if holds_no_weights(name)}
    known = {tensor.name for tensor in present} | scales | ignored
    extra = sorted(checkpoint.names - known)
    if extra:
        raise UserError(f"{checkpoint.path}: {named(extra)} left over: no part of this architecture")
    if checkpoint.entries is not None:
        for tensor in present:
            _check_entry(tensor, checkpoint.entries)
    elif published.quantization is not None:
        unscaled = [t.name for t in present if t.quantised and t.name + SCALE_SUFFIX not in scales]
        if unscaled:
            raise UserError(f"{checkpoint.path}: {named([name + SCALE_SUFFIX for name in unscaled])} missing")
    account = Account(
        config=config,
        consumed=tuple(tensor for tensor in present if not tensor.copy),
        copies=tuple(tensor for tensor in present if tensor.copy),
        scales=frozenset(scales),
        ignored=tuple(sorted(ignored)),
        notices=tuple(notices),
    )
    check_filled(account)
    return account


def check_filled(account: Account) -> None:
    """Checks the tensors against the model's own parameters: every element of each is filled exactly once.

    Raises:
      AssertionError: the table of names and the model disagree, which is a defect of this package, not of a file.
    """
    by_path: dict[str, list[PublishedTensor]] = defaultdict(list)
    for tensor in account.consumed:
        by_path[tensor.path].append(tensor)
    parameters = arrays(abstract_model(account.config))
    assert by_path.keys() == parameters.keys(), sorted(by_path.keys() ^ parameters.keys())
    for path, array in parameters.items():
        filling = by_path[path]
        indices = {tensor.index for tensor in filling}
        assert len(indices) == len(filling), f"{path} is filled twice"
        for tensor in filling:
            assert (*array.shape[: len(tensor.index)], *tensor.tail) == array.shape, (tensor, array.shape)
            assert all(0 <= at < size for at, size in zip(tensor.index, array.shape, strict=False)), tensor
            assert math.prod(tensor.tail) == math.prod(tensor.shape), tensor
        assert sum(math.prod(tensor.tail) for tensor in filling) == math.prod(array.shape), f"{path} has gaps"


def _mtp_modules(
    checkpoint: CheckpointFolder, published: PublishedConfig, mtp: bool
) -> tuple[ModelConfig, set[str], list[str]]:
    """Returns the configuration with the MTP modules to load, MTP tensors to ignore, and lines for the user."""
    announced = published.model.num_nextn_predict_layers
    without = published.model.replace(num_nextn_predict_layers=0)
    present = _mtp_modules_present(checkpoint, without)
    found = {name for name in checkpoint.names if is_mtp(without, name) and not holds_no_weights(name)}
    if not announced and not present:
        return without, set(), []
    if not mtp:
        return without, found, []
    if not announced and published.says_mtp:
        raise UserError(
            f"{checkpoint.path}: config.json says num_nextn_predict_layers 0, but {present} MTP modules are there "
            f"({named(sorted(found))}); set it to {present}, or load without MTP (mtp=False, --no-mtp)"
        )
    if not announced:
        line = f"{checkpoint.path}: config.json has no num_nextn_predict_layers; {present} MTP modules are there"
        return without.replace(num_nextn_predict_layers=present), set(), [line]
    if not found:
        line = (
            f"{checkpoint.path}: config.json announces {announced} MTP modules, "
            "but the checkpoint has no tensors of them; the model is loaded without MTP"
        )
        return without, set(), [line]
    return published.model, set(), []


def _mtp_modules_present(checkpoint: CheckpointFolder, without: ModelConfig) -> int:
    """Returns the number of MTP modules by their tensors, of which no other layer has an `enorm`."""
    first = without.num_hidden_layers
    norms = (f"model.layers.{first + depth}.enorm.weight" for depth in itertools.count())
    return sum(1 for _ in itertools.takewhile(checkpoint.names.__contains__, norms))


def _scales(checkpoint: CheckpointFolder, present: list[PublishedTensor]) -> set[str]:
    names = {tensor.name + SCALE_SUFFIX for tensor in present if tensor.quantised} & checkpoint.names
    entries = checkpoint.entries
    if entries is not None:
        names = {name for name in names if entries[name.removesuffix(SCALE_SUFFIX)].dtype == FP8_DTYPE}
    return names


def _check_entry(tensor: PublishedTensor, entries: dict[str, TensorEntry]) -> None:
    entry = entries[tensor.name]
    where = f"{entry.path}: tensor '{tensor.name}'"
    if entry.shape != tensor.shape:
        raise UserError(f"{where} has shape {list(entry.shape)}; config.json makes it {list(tensor.shape)}")
    if entry.dtype in PLAIN_DTYPES:
        return
    if entry.dtype != FP8_DTYPE or not tensor.quantised:
        also = f" or {FP8_DTYPE} with scales" if tensor.quantised else ""
        raise UserError(f"{where} has dtype {entry.dtype}; expected {', '.join(PLAIN_DTYPES)}{also}")
    scale = entries.get(tensor.name + SCALE_SUFFIX)
    if scale is None:
        raise UserError(f"{where} is FP8, but its scales '{tensor.name + SCALE_SUFFIX}' are missing")
    if scale.dtype not in _SCALE_DTYPES or scale.shape != tensor.scale_shape:
        raise UserError(
            f"{scale.path}: tensor '{scale.name}' is {scale.dtype} {list(scale.shape)}; "
            f"expected F32 {list(tensor.scale_shape)}"
        )
