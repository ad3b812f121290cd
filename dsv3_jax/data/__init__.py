"""Text to rows of tokens: corpora, tokenizers, fill-in-middle, packing, an iterator with an exact state."""

from dsv3_jax.data.array_record import read_array_record, write_array_record
from dsv3_jax.data.config import DataConfig
from dsv3_jax.data.document_files import Document
from dsv3_jax.data.prepare import Data, prepare_data
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.data.train_iterator import TrainIterator

__all__ = [
    "Data",
    "DataConfig",
    "Document",
    "Tokenizer",
    "TrainIterator",
    "prepare_data",
    "read_array_record",
    "write_array_record",
]
