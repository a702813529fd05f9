"""Rows to examples: token ids, and for each whether the model is trained to write it.

Masks come from the character offsets of the rendered text. The token that ends a turn is trained, a row with nothing
to train is refused, and a row too long is truncated or dropped, and counted.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from veneer.data.chat import Document, completion_text, document, prompt_text
from veneer.data.example import Example, Made, TooLong, split, supervise, truncate
from veneer.data.row_schema import Content, Layout, recognize
from veneer.data.settings import DataSettings
from veneer.data.sources import Row
from veneer.data.stats import Rendered, RenderReport, complaint, reported
from veneer.data.tokens import Encoder, Tokenized
from veneer.errors import DataError, ModelError
from veneer.models.tokenizer_info import leading_ids

__all__ = ["Example", "RenderReport", "Rendered", "Renderer", "TooLong"]

CHUNK = 512  # rows tokenized at once


class Renderer:
    """Renders rows for one tokenizer into examples of at most `max_length` tokens.
    Raises ModelError for a tokenizer without the fast version, chat template or end-of-text token that is needed."""

    def __init__(self, tokenizer: Any, settings: DataSettings, max_length: int) -> None:
        self.tokenizer, self.settings, self.max_length = tokenizer, settings, max_length
        self._encoder = Encoder(tokenizer)
        self._leading = leading_ids(tokenizer)
        self._enders = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
        self._layouts: dict[tuple[str, ...], Layout] = {}

    def layout(self, row: Row) -> Layout:
        """How this row is read.  Raises DataError if its columns are of no known layout."""
        columns = tuple(row.columns)
        if columns not in self._layouts:
            self._layouts[columns] = recognize(list(columns), self.settings)
        return self._layouts[columns]

    def example(self, row: Row) -> Example | TooLong:
        """One row; of a running text that is split, the first piece.  Raises DataError with the row's place."""
        with _placed(row):
            doc = self._document(row)
            made = self._example(row, doc, self._encode([doc])[0])
        return made if isinstance(made, TooLong) else made.pieces[0]

    def prompt(self, row: Row) -> list[int]:
        """Token ids up to and including the generation prompt, of any length; the example begins with them.

        Only the columns of the prompt need to be there.  Raises DataError with the row's place.
        """
        with _placed(row):
            text, earlier = prompt_text(self._content(row, complete=False), self.tokenizer, self.settings)
        leading = self._leading if self.settings.format == "plain" else []
        return [*leading, *self._encoder.encode([text], [earlier])[0].ids.tolist()]

    def completion(self, row: Row) -> str:
        """The text that should follow `prompt`.  Raises DataError with the row's place."""
        with _placed(row):
            return completion_text(self._content(row, complete=True))

    def render_all(self, rows: Sequence[Row], progress: Callable[[int], None] | None = None) -> Rendered:
        """All rows; `progress` is told how many more are done after each few hundred.

        Raises DataError that lists every kind of unusable row with the first lines of each, or if none is left.
        """
        made: list[Made | TooLong] = []
        unusable: list[tuple[Row, str]] = []
        for begin in range(0, len(rows), CHUNK):
            documents = []
            for row in rows[begin : begin + CHUNK]:
                try:
                    documents.append((row, self._document(row)))
                except DataError as error:
                    unusable.append((row, str(error)))
            for (row, doc), tokenized in zip(documents, self._encode([d for _, d in documents]), strict=True):
                try:
                    made.append(self._example(row, doc, tokenized))
                except DataError as error:
                    unusable.append((row, str(error)))
            if progress:
                progress(min(CHUNK, len(rows) - begin))
        if unusable:
            raise DataError(complaint(unusable, len(rows)))
        return reported(rows, made, self._layouts, self.max_length)

    def _content(self, row: Row, complete: bool) -> Content:
        return self.layout(row).read(row.columns, complete)

    def _document(self, row: Row) -> Document:
        return document(self._content(row, complete=True), self.tokenizer, self.settings)

    def _encode(self, documents: Sequence[Document]) -> list[Tokenized]:
        return self._encoder.encode([d.text for d in documents], [[a for a, _ in d.spans] for d in documents])

    def _example(self, row: Row, doc: Document, tokenized: Tokenized) -> Made | TooLong:
        ids, spans = tokenized.ids, [tokenized.within(*span) for span in doc.spans]
        if doc.closed:
            self._check_ends([ids[span][-3:].tolist() for span in spans])
        else:  # one span, up to the end
            spans = [slice(spans[0].start + len(self._leading), len(self._leading) + len(ids) + 1)]
            ids = np.array([*self._leading, *ids.tolist(), self._end_of_text()], dtype=np.int32)
        place = (row.source, row.line)
        if len(ids) <= self.max_length:
            return Made([Example(ids, supervise(len(ids), spans), *place)])
        if self.settings.too_long == "truncate" and doc.running and self.max_length > 1:
            return Made([Example(*piece, *place) for piece in split(ids, self.max_length)], split=True)
        if self.settings.too_long == "truncate" and not doc.running:
            kept = truncate(ids, spans, self.max_length, self.tokenizer.bos_token_id)
            if kept is not None:
                return Made([Example(*kept, *place)], truncated=True)
        return TooLong(len(ids), *place)

    def _check_ends(self, endings: list[list[int]]) -> None:
        """Each turn's last tokens end in one that the tokenizer knows as a whole, or the model never learns to stop."""
        for ending in endings:
            if ending[-1] not in self._enders:
                raise DataError(
                    f"the chat template ends the assistant's turn with ...{self.tokenizer.decode(ending)!r}, without "
                    "an end-of-turn token, so the model would never learn to stop; set data.format: plain, or correct "
                    "the template"
                )

    def _end_of_text(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end-of-text token (eos), so the model would never learn to stop")
        return int(self.tokenizer.eos_token_id)


@contextmanager
def _placed(row: Row) -> Iterator[None]:
    """Adds the row's place to a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{row.place}: {error}") from error
