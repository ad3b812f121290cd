"""Text to rows of tokens: corpora, tokenizers, fill-in-middle, packing, an iterator with an exact state.

    from pathlib import Path
    from dsv3_jax.data import DataConfig, prepare_data

    config = DataConfig(corpus="stdlib", sequence_length=256)   # or a file, or a folder
    data = prepare_data(config, Path("runs/nano/cache"))        # trains the tokenizer, tokenises; cached there

    rows = data.train_iterator()
    tokens, segment_ids = rows.next_rows(8)                     # int32 [8, 257]; inputs [:, :-1], targets [:, 1:]
    state = rows.state()                                        # JSON-able; rows.set_state(state) goes back there

    tokens, segment_ids = data.validation_rows()                # fixed, in order, no fill-in-middle
    data.bits_per_byte(nats_per_token=5.0)                      # of their text; what it must beat:
    data.validation_entropy_bits_per_byte, data.validation_gzip_bits_per_byte

    data.tokenizer.decode(data.tokenizer.encode("def f():"))    # also .token_bytes, .eos_id, .save(folder)
    for document in data.documents("validation"):               # name, domain, text: expert load by domain
        ...

A host of several passes its `shard_index` and `shard_count` to `prepare_data` and asks for its share of each batch.
The rows depend on `data.fingerprint` alone (corpus, tokenizer, seed and so on), not on hosts, worker processes or batch
sizes, any of which may change between a state and its use. Files, from text to rows:

    corpus, document_files      which files, and the documents in each        splitting           what is held out
    tokenizer, token_bytes      any byte-level tokenizer.json, checked        tokenizer_training  the report's BPE
    tokenising, token_store     the corpus as ids, cached                     array_record        ... made beforehand
    fill_in_middle, punctuation_splitting                                     what an epoch does to documents
    epoch, packing              (seed, epoch, index) -> row                   train_iterator      rows one after another
"""

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
