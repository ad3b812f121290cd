"""The configuration of a run's data: the corpus, the tokenizer, and how text becomes rows of tokens."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from dsv3_jax.bounds import LARGEST_COUNT, LARGEST_SEED, check_bounds
from dsv3_jax.errors import ConfigError

LossOn = Literal["assistant", "last", "all"]
Form = Literal["text", "conversations", "preferences"]

_BOUNDS = {
    "hub_documents": (0, LARGEST_COUNT),
    "vocab_size": (1, 2**24),
    "sequence_length": (1, 2**24),
    "fill_in_middle_rate": (0.0, 1.0),
    "punctuation_split_rate": (0.0, 1.0),
    "validation_fraction": (1e-6, 0.5),
    "validation_sequences": (1, LARGEST_COUNT),
    "seed": (0, LARGEST_SEED),
    "worker_count": (0, 1024),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of a run: the corpus, the tokenizer, and how text becomes rows of tokens.

    Attributes:
      corpus: "stdlib" (the source code of Python's standard library), or a path: a text file, a file of JSON lines
        (named .jsonl, .ndjson or .json) with a field text and an optional field domain, a .parquet file with such
        columns, an .arrayrecord file of tokenised documents (`write_array_record`), a .bin file of ids as nanoGPT and
        Megatron-LM write it, or a folder of such files. Texts and JSON lines may be compressed (.gz, .bz2, .xz, .zst).
        A folder must not mix files of ids with others. hf:NAME[:CONFIG[:SPLIT]] is a data set that the library
        `datasets` loads. mix:0.7*CORPUS+0.3*CORPUS mixes corpora by their share of the rows, in steps of 0.001.
      hub_documents: largest number of documents that are read of an hf: data set; 0 for all of them.
      null_texts: what to do with rows whose text is null: "skip" (they are counted and the first is named) or "refuse".
      tokenizer: "train" (a byte-level BPE, trained on the corpus), "byte" (one id per byte), or the path of a
        tokenizer.json, of a gzipped one, or of a folder that holds one.
      vocab_size: number of ids of the tokenizer to train, control tokens included. Other tokenizers ignore it.
      sequence_length: T, number of input tokens per row. A row holds T + 1 tokens: T inputs and T targets.
      fill_in_middle_rate: fraction of the documents that are rearranged as prefix, suffix, middle (report section 4.1,
        which uses 0.1).
      punctuation_split_rate: fraction of the tokens joining punctuation and line breaks that are split in two, against
        the token boundary bias (report section 4.1, which does not give the fraction).
      isolate_documents: stop attention from crossing document boundaries in a packed row. Packing does not change.
      validation_fraction: fraction of the documents held out for validation, chosen by a hash of their names. If the
        corpus has fewer than 1 / validation_fraction documents, the end of each document is held out instead.
      validation_sequences: largest number of rows of the validation set, evenly spaced over the held-out text.
      seed: random seed of the order of documents and rows, of fill-in-middle and of token splitting.
      form: "text"; "conversations", JSON lines or Parquet files of samples to fine-tune on (`dsv3 sft --help`); or
        "preferences", such files of pairs of a chosen and a rejected answer (`dsv3 reward-model --help`).
      loss_on: which tokens of a conversation the model learns to write: those of the "assistant", of the assistant's
        "last" turn, or "all".
      drop_unknown_roles: leave out conversations with a role that is not system, user or assistant; otherwise they are
        an error.
      drop_empty_turns: leave out conversations that are empty, or in which a turn is.
      drop_without_target: leave out conversations in which there is nothing to learn to write.
      drop_overlong: leave out conversations of more than sequence_length + 1 tokens, or pairs of more than
        sequence_length tokens together.
      worker_count: number of processes that prepare rows, which does not change the rows. With 0 the training process
        prepares them itself.
    """

    corpus: str = "stdlib"
    hub_documents: int = 0
    null_texts: Literal["skip", "refuse"] = "skip"
    tokenizer: str = "train"
    vocab_size: int = 4096
    sequence_length: int = 256
    fill_in_middle_rate: float = 0.1
    punctuation_split_rate: float = 0.0
    isolate_documents: bool = False
    validation_fraction: float = 0.02
    validation_sequences: int = 64
    seed: int = 0
    form: Form = "text"
    loss_on: LossOn = "assistant"
    drop_unknown_roles: bool = False
    drop_empty_turns: bool = False
    drop_without_target: bool = False
    drop_overlong: bool = False
    worker_count: int = 0

    def __post_init__(self) -> None:
        if not self.corpus:
            raise ConfigError("data.corpus is empty: give 'stdlib' or the path of a file or folder")
        if not self.tokenizer:
            raise ConfigError("data.tokenizer is empty: give 'train', 'byte' or the path of a tokenizer.json")
        if self.null_texts not in ("skip", "refuse"):
            raise ConfigError(f"data.null_texts must be skip or refuse, not {self.null_texts!r}")
        for name, choices in (("form", get_args(Form)), ("loss_on", get_args(LossOn))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"data.{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if self.form != "text" and self.tokenizer == "train":
            raise ConfigError(f"data.tokenizer is train, but {self.form} need a tokenizer that exists: give its path")
        check_bounds(self, _BOUNDS, "data.")

    @property
    def row_space(self) -> int:
        """Number of tokens of a row that samples fill. The last token of a row of pairs is padding."""
        return self.sequence_length + (self.form != "preferences")
