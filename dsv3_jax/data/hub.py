"""Data sets that the library `datasets` loads, by name or from a folder: `hf:NAME[:CONFIG[:SPLIT]]`.

The documents are streamed once into a file of JSON lines in the run's cache, from which everything else is done as for
any corpus: a resumed run reads the same documents whatever has become of the data set. If the streaming is interrupted,
it goes on at the next document, by the library's own state.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv3_jax.errors import UserError, reason_of

HUB = "hf:"
_DOCUMENTS, _STATE = "documents.jsonl", "state.json"
_EVERY = 1000  # documents between two saves of the position


def streamed(name: str, most: int, cache: Path, say: Callable[[str], None]) -> Path:
    """Returns the file of JSON lines with the documents of a data set, after streaming those that it lacks.

    Args:
      name: hf:NAME[:CONFIG[:SPLIT]]; the split is `train` if not given. NAME may be the path of a folder.
      most: largest number of documents to read; 0 for all.
      cache: folder that keeps the file.

    Raises:
      UserError: `datasets` is not installed, or cannot load the data set, or it has no column `text`.
    """
    key = hashlib.sha256(json.dumps([name, most]).encode()).hexdigest()[:24]
    folder = cache / f"hf-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    documents, state = folder / _DOCUMENTS, folder / _STATE
    position: dict[str, Any] = {"done": False, "documents": 0, "bytes": 0, "stream": None}
    if state.exists() and documents.exists():
        position = json.loads(state.read_text(encoding="utf-8"))
    if position["done"]:
        return documents
    rows = _open(name)
    if position["stream"] is not None:
        rows.load_state_dict(position["stream"])
        say(f"going on with {name} after {position['documents']:,} documents")
    else:
        say(f"reading {name}")
    with documents.open("ab") as file:
        file.truncate(position["bytes"])

        def save(*, done: bool) -> None:
            file.flush()
            os.fsync(file.fileno())
            now = position | {"done": done, "bytes": file.tell(), "stream": rows.state_dict()}
            temporary = state.with_suffix(".tmp")
            temporary.write_text(json.dumps(now), encoding="utf-8")
            temporary.replace(state)

        try:
            for row in rows:
                if most and position["documents"] >= most:
                    break
                file.write(_line(row, name))
                position["documents"] += 1
                if position["documents"] % _EVERY == 0:
                    save(done=False)
        except UserError:
            raise
        except Exception as error:  # the library has no error of its own for a lost connection or a damaged file
            read = f"{position['documents']:,} documents"
            raise UserError(f"{name} cannot be read after {read}: {reason_of(error)}") from error
        save(done=True)
    return documents


def _open(name: str) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"{name} needs the Python package datasets: pip install 'dsv3-jax[hf]'") from error
    path, _, rest = name.removeprefix(HUB).partition(":")
    config, _, split = rest.partition(":")
    try:
        return datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
    except Exception as error:  # as above
        raise UserError(f"{name} cannot be loaded: {reason_of(error)}") from error


def _line(row: dict[str, Any], name: str) -> bytes:
    if "text" not in row:
        raise UserError(f"{name} has no column 'text'; its columns are {', '.join(map(str, row))}")
    kept = {column: row[column] for column in ("text", "domain") if column in row}
    return json.dumps(kept, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
