"""Every tensor of a checkpoint consumed exactly once, every parameter of the model filled exactly once.

The account needs names only; where the files are there, dtypes and shapes are held against the architecture too. It
allocates no weights, so it does for 671B parameters on a laptop.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.interop.checkpoint_folder import CheckpointFolder, named
from dsv3_jax.interop.hf_config import PublishedConfig
from dsv3_jax.interop.parameter_tree import abstract_model, arrays
from dsv3_jax.interop.safetensors_reader import TensorEntry
from dsv3_jax.interop.tensor_names import SCALE_SUFFIX, Slot, carries_nothing, is_mtp, slots

PLAIN_DTYPES = ("F32", "BF16", "F16")
FP8_DTYPE = "F8_E4M3"
_SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")


@dataclasses.dataclass(frozen=True)
class Account:
    """What becomes of each tensor.

    Attributes:
      config: the model that is filled (without MTP where the checkpoint has none or none is wanted).
      consumed: slots whose tensors fill parameters.
      copies: slots whose tensors repeat a parameter (MTP's embedding and head), present in the checkpoint.
      scales: names of scale tensors.
      ignored: tensors that hold no weights, and MTP where it is left out.
      notices: what the user should know, one line each.
    """

    config: ModelConfig
    consumed: tuple[Slot, ...]
    copies: tuple[Slot, ...]
    scales: frozenset[str]
    ignored: tuple[str, ...]
    notices: tuple[str, ...]

    @property
    def tensor_count(self) -> int:
        """Tensors of the checkpoint, each counted once."""
        return len(self.consumed) + len(self.copies) + len(self.scales) + len(self.ignored)

    def describe(self) -> str:
        """The account as text."""
        mtp = sum(is_mtp(self.config, slot.name) for slot in self.consumed)
        lines = [
            f"{len(self.consumed) - mtp:>9,}  tensors fill the main model",
            f"{mtp:>9,}  fill {self.config.num_nextn_predict_layers} MTP modules",
            f"{len(self.copies):>9,}  repeat the embedding or the head for MTP (must be equal)",
            f"{len(self.scales):>9,}  hold FP8 scales",
            f"{len(self.ignored):>9,}  hold nothing this model needs",
            f"{self.tensor_count:>9,}  in all, each consumed once; every parameter filled once",
            f"{self.config.num_parameters():>18,}  parameters, and "
            f"{self.config.num_parameters(mtp=True) - self.config.num_parameters():,} of MTP alone",
        ]
        return "\n".join([*lines, *self.notices])


def take_account(checkpoint: CheckpointFolder, published: PublishedConfig, *, mtp: bool = True) -> Account:
    """Holds a checkpoint's tensors against its configuration.

    Args:
      checkpoint: the tensors.
      published: what config.json says.
      mtp: with False, MTP modules are left out though the checkpoint has them.

    Raises:
      UserError: tensors missing, left over, or of the wrong dtype or shape, naming file and tensor.
    """
    config, ignored, notices = _without_absent_mtp(checkpoint, published.model, mtp)
    wanted = list(slots(config))
    present = [slot for slot in wanted if slot.name in checkpoint.names]
    missing = [slot.name for slot in wanted if slot.name not in checkpoint.names and not slot.copy]
    if missing:
        raise UserError(f"{checkpoint.path}: {named(missing)} missing")
    scales = _scales(checkpoint, present)
    ignored |= {name for name in checkpoint.names if carries_nothing(name)}
    known = {slot.name for slot in present} | scales | ignored
    extra = sorted(checkpoint.names - known)
    if extra:
        raise UserError(f"{checkpoint.path}: {named(extra)} left over: no part of this architecture")
    if checkpoint.entries is not None:
        for slot in present:
            _check_entry(slot, checkpoint.entries)
    elif published.quantization is not None:
        unscaled = [s.name for s in present if s.quantised and s.name + SCALE_SUFFIX not in scales]
        if unscaled:
            raise UserError(f"{checkpoint.path}: {named([name + SCALE_SUFFIX for name in unscaled])} missing")
    account = Account(
        config=config,
        consumed=tuple(slot for slot in present if not slot.copy),
        copies=tuple(slot for slot in present if slot.copy),
        scales=frozenset(scales),
        ignored=tuple(sorted(ignored)),
        notices=tuple(notices),
    )
    check_filled(account)
    return account


def check_filled(account: Account) -> None:
    """Holds the slots against the model's own parameters: every element of each is filled exactly once.

    Raises:
      AssertionError: names and model disagree; a defect of this package, not of a file.
    """
    by_path: dict[str, list[Slot]] = defaultdict(list)
    for slot in account.consumed:
        by_path[slot.path].append(slot)
    parameters = arrays(abstract_model(account.config))
    assert by_path.keys() == parameters.keys(), sorted(by_path.keys() ^ parameters.keys())
    for path, array in parameters.items():
        filling = by_path[path]
        places = {slot.index for slot in filling}
        assert len(places) == len(filling), f"{path} is filled twice"
        for slot in filling:
            assert (*array.shape[: len(slot.index)], *slot.tail) == array.shape, (slot, array.shape)
            assert all(0 <= at < size for at, size in zip(slot.index, array.shape, strict=False)), slot
            assert math.prod(slot.tail) == math.prod(slot.shape), slot
        assert sum(math.prod(slot.tail) for slot in filling) == math.prod(array.shape), f"{path} has gaps"


def _without_absent_mtp(
    checkpoint: CheckpointFolder, config: ModelConfig, mtp: bool
) -> tuple[ModelConfig, set[str], list[str]]:
    """The configuration less MTP where there is none; the MTP tensors left out; a line for the user."""
    if not config.num_nextn_predict_layers:
        return config, set(), []
    without = config.replace(num_nextn_predict_layers=0)
    found = {name for name in checkpoint.names if is_mtp(without, name) and not carries_nothing(name)}
    if not mtp:
        return without, found, []
    if not found:
        line = (
            f"{checkpoint.path}: config.json says {config.num_nextn_predict_layers} MTP modules, "
            "but there are no tensors of them; the model is loaded without MTP"
        )
        return without, set(), [line]
    return config, set(), []


def _scales(checkpoint: CheckpointFolder, present: list[Slot]) -> set[str]:
    names = {slot.name + SCALE_SUFFIX for slot in present if slot.quantised} & checkpoint.names
    entries = checkpoint.entries
    if entries is not None:
        names = {name for name in names if entries[name.removesuffix(SCALE_SUFFIX)].dtype == FP8_DTYPE}
    return names


def _check_entry(slot: Slot, entries: dict[str, TensorEntry]) -> None:
    entry = entries[slot.name]
    where = f"{entry.path}: tensor '{slot.name}'"
    if entry.shape != slot.shape:
        raise UserError(f"{where} has shape {list(entry.shape)}; config.json makes it {list(slot.shape)}")
    if entry.dtype in PLAIN_DTYPES:
        return
    if entry.dtype != FP8_DTYPE or not slot.quantised:
        also = f" or {FP8_DTYPE} with scales" if slot.quantised else ""
        raise UserError(f"{where} has dtype {entry.dtype}; {', '.join(PLAIN_DTYPES)}{also} is wanted")
    scale = entries.get(slot.name + SCALE_SUFFIX)
    if scale is None:
        raise UserError(f"{where} is FP8, but its scales '{slot.name + SCALE_SUFFIX}' are missing")
    if scale.dtype not in _SCALE_DTYPES or scale.shape != slot.scale_shape:
        raise UserError(
            f"{scale.path}: tensor '{scale.name}' is {scale.dtype} {list(scale.shape)}; "
            f"F32 {list(slot.scale_shape)} is wanted"
        )
