"""An account of what was read of a corpus and what was not, by kind of file."""

from __future__ import annotations

import dataclasses

from dsv3_jax.data.document_files import Document, NullText
from dsv3_jax.data.file_kinds import FileKind


@dataclasses.dataclass
class KindAccount:
    """What was read of one kind of files: counts of files, documents and characters."""

    files: int = 0
    documents: int = 0
    characters: int = 0


class CorpusAccount:
    """Counts what is read of a corpus.

    Attributes:
      kinds: what was read, by the name of the kind of file and how its documents are stored.
      null_texts: number of rows whose text is null.
      first_null: the place of the first such row.
    """

    def __init__(self) -> None:
        self.kinds: dict[tuple[str, str], KindAccount] = {}
        self.null_texts = 0
        self.first_null = ""

    def add_file(self, kind: FileKind) -> None:
        """Counts a file."""
        self._of(kind).files += 1

    def add(self, kind: FileKind, document: Document | NullText) -> None:
        """Counts a document of a file, or a row without text."""
        if isinstance(document, NullText):
            self.null_texts += 1
            self.first_null = self.first_null or document.where
        else:
            counts = self._of(kind)
            counts.documents += 1
            counts.characters += len(document.text)

    def describe(self, left_out: dict[str, list[str]]) -> list[str]:
        """Returns a line for each kind of file that was read, and for each reason why something was not.

        Args:
          left_out: names of files and folders that were not read, by the reason.
        """
        forms = {"lines": "a document per line", "parquet": "a document per row", "text": "a document per file"}
        lines = [
            f"read {counts.files:,} {name} {'file' if counts.files == 1 else 'files'} ({forms[form]}): "
            f"{counts.documents:,} {'document' if counts.documents == 1 else 'documents'}, "
            f"{counts.characters:,} characters"
            for (name, form), counts in sorted(self.kinds.items())
        ]
        lines += [f"not read: {described(reason, names)}" for reason, names in left_out.items()]
        if self.null_texts:
            rows = "row" if self.null_texts == 1 else "rows"
            lines.append(f"not read: {self.null_texts:,} {rows} whose text is null, the first in {self.first_null}")
        return lines

    def _of(self, kind: FileKind) -> KindAccount:
        return self.kinds.setdefault((kind.name, kind.form), KindAccount())


def described(reason: str, names: list[str]) -> str:
    """Returns a reason why something was not read, with the first name and how many more there are."""
    more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
    return f"{reason}: {names[0]}{more}"
