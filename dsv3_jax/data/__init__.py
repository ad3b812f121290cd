"""From text to rows of tokens: corpora, tokenizers, fill-in-middle, packing, and an iterator with an exact state.

    from pathlib import Path
    from dsv3_jax.data import DataConfig, prepare_data

    config = DataConfig(corpus="stdlib", sequence_length=256)   # or the path of a file or folder
    data = prepare_data(config, Path("runs/nano/cache"))        # trains the tokenizer and tokenises; cached there

    rows = data.train_iterator()
    tokens, segment_ids = rows.next_rows(8)                     # int32 [8, 257]; inputs [:, :-1], targets [:, 1:]
    state = rows.state()                                        # can be stored as JSON; rows.set_state(state) resumes

    tokens, segment_ids = data.validation_rows()                # fixed, in order, without fill-in-middle
    data.validation_entropy_bits_per_byte                       # baselines on the same text
    data.validation_gzip_bits_per_byte

    data.tokenizer.decode(data.tokenizer.encode("def f():"))    # also .token_bytes, .eos_id, .save(folder)
    for document in data.documents("validation"):               # .name, .domain, .text
        ...

With several hosts, each gives its `shard_index` and the `shard_count` to `prepare_data` and reads its part of each
batch. The rows depend only on `data.fingerprint` (corpus, tokenizer, seed and so on). The number of hosts, worker
processes and rows per batch may change between saving a state and using it. Files, from text to rows:

    corpus, file_kinds, document_files     the files of a corpus, how each is stored, and the documents in each
    corpus_account                         what was read of a corpus and what was not
    splitting                              which documents are held out for validation
    tokenizer, token_bytes                 any byte-level tokenizer.json, checked; the bytes of each token
    chat_template, template_process        chats as text and tokens, with untrusted templates
    tokenizer_training                     the report's BPE, trained on the corpus
    tokenising, token_store, array_record  the corpus as ids: made and cached, or tokenised beforehand
    fill_in_middle, punctuation_splitting  how an epoch changes documents
    epoch, packing                         (seed, epoch, index) -> row
    conversation, sample_tokens            samples to fine-tune on: read and checked, then encoded with a loss mask
    conversation_data, best_fit            rows of whole samples
    train_iterator, worker_processes       rows in order, prepared in this process or in others
    prepare, prepared                      all of this together
    mixture, hub, token_bins               several corpora; data sets of the hub; files that other programs tokenised
"""

from dsv3_jax.data.array_record import read_array_record, write_array_record
from dsv3_jax.data.chat_template import ChatTemplate, ChatTokens, plain_template
from dsv3_jax.data.config import DataConfig
from dsv3_jax.data.document_files import Document
from dsv3_jax.data.prepare import prepare_data
from dsv3_jax.data.prepared import Data
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.data.train_iterator import TrainIterator

__all__ = [
    "ChatTemplate",
    "ChatTokens",
    "Data",
    "DataConfig",
    "Document",
    "Tokenizer",
    "TrainIterator",
    "plain_template",
    "prepare_data",
    "read_array_record",
    "write_array_record",
]
