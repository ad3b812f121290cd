"""Prepares the data of a run: tokenizer and tokenised corpus (both cached), of one corpus or of several."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dsv3_jax.data.config import DataConfig
from dsv3_jax.data.conversation_data import prepare_conversations
from dsv3_jax.data.corpus import Corpus, open_corpus
from dsv3_jax.data.corpus_account import CorpusAccount
from dsv3_jax.data.hub import HUB, streamed
from dsv3_jax.data.mixture import MIXTURE, MixedData, parse_mixture
from dsv3_jax.data.prepared import Data, cache_key
from dsv3_jax.data.splitting import split_documents
from dsv3_jax.data.token_store import TokenStore
from dsv3_jax.data.tokenising import TokenisedDocument, tokenise
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.data.tokenizer_training import byte_tokenizer, sample_text, train_bpe
from dsv3_jax.errors import UserError

_SECONDS_BETWEEN_LINES = 5.0


def prepare_data(
    config: DataConfig,
    cache_folder: Path | None,
    *,
    tokenizer: Tokenizer | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    progress: Callable[[str], None] | None = None,
) -> Data:
    """Reads, tokenises and splits the corpus.

    Args:
      config: the corpus, the tokenizer and how rows are made.
      cache_folder: folder in which the trained tokenizer and the tokenised corpus are kept, under names made from what
        they depend on; None keeps nothing.
      tokenizer: a tokenizer to use instead of `config.tokenizer`, as a resumed run does.
      shard_index: number of this host's part of the training rows, from 0.
      shard_count: number of parts of the training rows.
      progress: is called with a line of text before something that takes long.

    Raises:
      UserError: the corpus or the tokenizer cannot be used; the message says what and where.
    """
    say = progress or (lambda _: None)
    if config.form != "text":
        return prepare_conversations(config, cache_folder, tokenizer, shard_index, shard_count, say)
    mixed = parse_mixture(config.corpus) if config.corpus.startswith(MIXTURE) else []
    configs = [_of_part(config, name, count) for name, count in mixed] or [config]
    with tempfile.TemporaryDirectory() as unkept:
        corpora = [_open(each, cache_folder or Path(unkept), say) for each in configs]
        digests = [corpus.fingerprint() for corpus in corpora]
        tokenizer = tokenizer or _tokenizer(config, corpora, digests, cache_folder, say)
        parts = []
        for each, corpus, digest in zip(configs, corpora, digests, strict=True):
            store = _token_store(each, corpus, digest, tokenizer, cache_folder, say)
            parts.append(Data(each, tokenizer, store, digest, shard_index, shard_count))
    if not mixed:
        return parts[0]
    whole = dataclasses.replace(parts[0], config=config)
    return MixedData.of(whole, parts, [count for _, count in mixed])


def _of_part(config: DataConfig, name: str, count: int) -> DataConfig:
    """Returns the configuration of a corpus that gives `count` of every 1,000 rows of a mixture."""
    rows = max(1, config.validation_sequences * count // 1000)
    return dataclasses.replace(config, corpus=name, validation_sequences=rows)


def _open(config: DataConfig, cache_folder: Path, say: Callable[[str], None]) -> Corpus:
    """Returns the files of a corpus; those of a data set of the hub are written first."""
    if not config.corpus.startswith(HUB):
        return open_corpus(config)
    file = streamed(config.corpus, config.hub_documents, cache_folder, say)
    return dataclasses.replace(open_corpus(dataclasses.replace(config, corpus=str(file))), name=config.corpus)


def _tokenizer(
    config: DataConfig,
    corpora: list[Corpus],
    fingerprints: list[str],
    cache_folder: Path | None,
    say: Callable[[str], None],
) -> Tokenizer:
    if config.tokenizer == "byte":
        return Tokenizer(byte_tokenizer(), "the byte tokenizer")
    if config.tokenizer != "train":
        return Tokenizer.load(config.tokenizer)
    if named := [corpus.name for corpus in corpora if corpus.pretokenised]:
        raise UserError(f"the corpus {named[0]} holds token ids; set data.tokenizer to the tokenizer it was made with")
    key = cache_key(*fingerprints, str(config.vocab_size), repr(config.validation_fraction))
    folder = cache_folder / f"tokenizer-{key}" if cache_folder else None
    if folder is not None and folder.is_dir():
        return Tokenizer.load(folder)
    say(f"training a tokenizer of {config.vocab_size} ids")
    splits = (split for corpus in corpora for split in split_documents(corpus, config.validation_fraction))
    sample = sample_text((document.name, document.text) for document, held_out in splits if not held_out)
    tokenizer = Tokenizer(train_bpe(sample, config.vocab_size), "the trained tokenizer")
    if folder is not None:
        tokenizer.save(folder)
    return tokenizer


def _token_store(
    config: DataConfig,
    corpus: Corpus,
    corpus_fingerprint: str,
    tokenizer: Tokenizer,
    cache_folder: Path | None,
    say: Callable[[str], None],
) -> TokenStore:
    key = cache_key(corpus_fingerprint, tokenizer.fingerprint, repr(config.validation_fraction))
    folder = cache_folder / f"tokens-{key}" if cache_folder else None
    if folder is not None and (cached := TokenStore.load(folder)) is not None:
        return cached
    say(f"tokenising the corpus {corpus.name}")
    account = CorpusAccount()
    documents = tokenise(corpus, config.validation_fraction, tokenizer, account)
    store = TokenStore.build(_announced(documents, say), tokenizer.vocab_size)
    if not len(store):
        raise UserError(f"the corpus {corpus.name} is empty; its files hold no text")
    for line in account.describe(corpus.left_out):
        say(line)
    return store.save(folder) if folder else store


def _announced(documents: Iterator[TokenisedDocument], say: Callable[[str], None]) -> Iterator[TokenisedDocument]:
    """Yields the same documents, and says from time to time how many there were."""
    said, tokens = time.monotonic(), 0
    for count, document in enumerate(documents, start=1):
        tokens += len(document[-1])
        if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            say(f"tokenised {count:,} documents, {tokens:,} tokens so far")
        yield document
