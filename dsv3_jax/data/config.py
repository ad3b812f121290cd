"""What text a run is trained on, and how it becomes rows of tokens."""

from __future__ import annotations

import dataclasses

from dsv3_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Corpus, tokenizer and packing (report section 4.1).

    Attributes:
      corpus: "stdlib" (the source code of the running Python's standard library), a folder of text or code files, a
        .jsonl (field `text`), .parquet (column `text`) or .arrayrecord (documents already tokenised) file.
      tokenizer: "train" (byte-level BPE trained on the corpus), "byte", or the path of a tokenizer.json (or .json.gz).
      vocab_size: ids of a tokenizer that is trained.
      sequence_length: T, tokens a row.
      fill_in_middle_rate: share of documents rearranged to prefix, suffix, middle.
      punctuation_split_rate: share of tokens that join punctuation and line breaks which are split in training, against
        token boundary bias.
      isolate_documents: attention and targets stay inside a document (the report does not isolate in pre-training).
      validation_fraction: share of documents kept for validation.
      validation_sequences: rows of the validation set at most.
      seed: of every random choice here.
      worker_count: processes that read rows; 0 reads in the main process.
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
        for name, smallest in (
            ("vocab_size", 1),
            ("sequence_length", 2),
            ("validation_sequences", 1),
            ("seed", 0),
            ("worker_count", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise ConfigError(f"data.{name} must be a whole number of at least {smallest}, not {value!r}")
        for name in ("fill_in_middle_rate", "punctuation_split_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"data.{name} must lie between 0 and 1, not {getattr(self, name)}")
        if not 0.0 < self.validation_fraction < 1.0:
            raise ConfigError(f"data.validation_fraction must lie between 0 and 1, not {self.validation_fraction}")
        for name in ("corpus", "tokenizer"):
            if not getattr(self, name):
                raise ConfigError(f"data.{name} must not be empty")
