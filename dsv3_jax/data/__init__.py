"""Text to batches (report section 4.1).

data = prepare_data(DataConfig(), cache_folder)
rows = data.train_iterator()
tokens, segment_ids = rows.next_rows(8)        # int32 [8, T+1] each: T inputs, and targets one place on
rows.set_state(rows.state())                   # exact, JSON-able
"""

from dsv3_jax.data.config import DataConfig
from dsv3_jax.data.corpus import Document, load_corpus, split_corpus
from dsv3_jax.data.iterator import TrainIterator
from dsv3_jax.data.prepare import Data, prepare_data
from dsv3_jax.data.token_records import read_token_records, write_token_records
from dsv3_jax.data.tokenizer import Tokenizer

__all__ = [
    "Data",
    "DataConfig",
    "Document",
    "Tokenizer",
    "TrainIterator",
    "load_corpus",
    "prepare_data",
    "read_token_records",
    "split_corpus",
    "write_token_records",
]
