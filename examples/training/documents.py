"""Batches of packed documents: the paragraphs of this project's own texts, as bytes. Needs no PyTorch.

A batch has rows of the same length. Documents follow each other in a row; what is left at its end is padding, and the
last row of every batch is nothing but padding.
"""

import dataclasses
import pathlib
import random

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PADDING = -1
IGNORED = -100  # cross_entropy's ignore_index: the last byte of a document, and padding, predict nothing


def read_documents(longest):
    """Paragraphs of the Markdown files and the licence, cut where they are longer."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"), ROOT / "LICENSE"]
    paragraphs = [paragraph.strip() for path in sorted(files)
                  for paragraph in path.read_text(encoding="utf-8").encode().split(b"\n\n")]
    pieces = [paragraph[at:at + longest] for paragraph in paragraphs for at in range(0, len(paragraph), longest)]
    return [piece for piece in pieces if len(piece) > 1]


@dataclasses.dataclass
class Batch:
    """Lists with an element for each of rows * row_length tokens, and the pieces that those fall into."""

    tokens: list
    targets: list   # the next byte of the document, or IGNORED
    positions: list  # in the document
    segments: list  # the number of the document in its row, or PADDING
    starts: list    # of the pieces (documents and stretches of padding), and the end: cu_seqlens
    lengths: list   # of the pieces, 0 where one is padding


def pack(rows_of_documents, row_length):
    """A batch of these rows, each a list of documents."""
    batch = Batch([], [], [], [], [0], [])
    for documents in rows_of_documents:
        left = row_length
        for number, document in enumerate(documents):
            batch.tokens += document
            batch.targets += [*document[1:], IGNORED]
            batch.positions += range(len(document))
            batch.segments += [number] * len(document)
            batch.starts.append(batch.starts[-1] + len(document))
            batch.lengths.append(len(document))
            left -= len(document)
        if left:
            batch.tokens += [0] * left
            batch.targets += [IGNORED] * left
            batch.positions += [0] * left
            batch.segments += [PADDING] * left
            batch.starts.append(batch.starts[-1] + left)
            batch.lengths.append(0)
    return batch


def batches(documents, rows, row_length, seed):
    """Endless: the documents of each epoch in an order of its own."""
    source, waiting = random.Random(seed), []
    while True:
        filled = []
        while len(filled) < rows - 1:
            row, left = [], row_length
            while True:
                if not waiting:
                    waiting = documents[:]
                    source.shuffle(waiting)
                if len(waiting[-1]) > left:
                    break
                row.append(waiting.pop())
                left -= len(row[-1])
            filled.append(row)
        yield pack([*filled, []], row_length)
