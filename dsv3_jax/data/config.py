"""What text is trained on, and how it becomes rows of tokens."""

from __future__ import annotations

import dataclasses
import math

from dsv3_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of a run, checked at construction.

    Attributes:
      corpus: "stdlib" (the source of the running interpreter's standard library), or a path: a text file, a .jsonl file
        (field `text`, optional field `domain`), a .parquet file (the same columns), an .arrayrecord file of documents
        already tokenised (`write_array_record`), or a folder of any of these (pre-tokenised ones not mixed with text).
      tokenizer: "train" (byte-level BPE trained on the corpus), "byte" (one id a byte), or the path of a
        tokenizer.json, possibly gzipped, or of a folder that holds one.
      vocab_size: ids of the tokenizer to train, control tokens included; ignored otherwise.
      sequence_length: T; a row holds T + 1 tokens, so T inputs and T targets.
      fill_in_middle_rate: share of the documents rearranged as prefix, suffix, middle (section 4.1; 0.1 in the report).
      punctuation_split_rate: share of the tokens joining punctuation and line breaks that are split in two, against the
        token boundary bias (section 4.1; the report does not give its share).
      isolate_documents: attention stays within a document. Rows are the same either way; the model reads this.
      validation_fraction: share of the documents held out, chosen by a hash of their names; of a corpus with fewer
        than 1 / validation_fraction documents, the end of each document is held out instead.
      validation_sequences: at most so many rows, evenly spaced over the held out text, make the validation set.
      seed: of order, fill-in-middle and token splitting.
      worker_count: processes that prepare rows; 0 reads in the training process. Never changes the rows.
    """

    corpus: str = "stdlib"
    tokenizer: str = "train"
    vocab_size: int = 4096
    sequence_length: int = 256
    fill_in_middle_rate: float = 0.1
    punctuation_split_rate: float = 0.0
    isolate_documents: bool = False
    validation_fraction: float = 0.02
    validation_sequences: int = 64
    seed: int = 0
    worker_count: int = 0

    def __post_init__(self) -> None:
        if not self.corpus:
            raise ConfigError("data.corpus is empty: give 'stdlib' or the path of a file or folder")
        if not self.tokenizer:
            raise ConfigError("data.tokenizer is empty: give 'train', 'byte' or the path of a tokenizer.json")
        for name, least in (
            ("vocab_size", 1),
            ("sequence_length", 1),
            ("validation_sequences", 1),
            ("seed", 0),
            ("worker_count", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"data.{name} must be an integer of at least {least}, got {value!r}")
        for name in ("fill_in_middle_rate", "punctuation_split_rate"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or math.isnan(value):
                raise ConfigError(f"data.{name} must lie in [0, 1], got {value!r}")
        if not 0 < self.validation_fraction <= 0.5:
            raise ConfigError(f"data.validation_fraction must lie in (0, 0.5], got {self.validation_fraction!r}")
