"""An exhaustive approximate scan: every vector as 4-bit product codes, looked up in registers, for a short list.

Method: product quantization (Jégou, Douze and Schmid 2011) with 16 centroids a sub-vector of 4 dimensions, scanned with
SIMD table lookups (André, Kermarrec and Le Scouarnec 2017; faiss `IndexPQFastScan`). Shorter vectors get sub-vectors
of 2 dimensions (up to 256) or 1 (up to 128), so that their codes are as many. Vectors are rotated first by a
fixed random rotation (signs and Hadamard, twice), after which every sub-vector of a unit vector is close to a Gaussian:
so one codebook of 16 points serves all of them, is known beforehand, and never needs training or re-coding.

No graph: a row of up to 512 numbers costs at most 64 bytes, is found from the moment it is added, and a filter never
breaks connectivity.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchship.errors import CorruptArtifact, Unavailable

Floats = NDArray[np.float32]
CHUNK = 131_072
_BLOCK = 32
# Lloyd's optimum of 16 points for a 4-dimensional standard normal: mean squared error 0.341 a dimension.
_FOUR = np.array(
    [
        [0.0175, 0.719, 0.005, -1.5545], [0.111, 0.6949, -1.489, -0.3406], [-0.849, 0.5465, -0.7747, 1.1384],
        [0.8211, -1.228, 0.7431, 0.4163], [-1.3136, -0.3646, -0.7886, -0.6647], [-1.2448, 1.0308, 0.4847, -0.2183],
        [0.2675, -1.0412, -1.2499, 0.4475], [-0.0026, -0.0004, 0.0101, -0.0026], [-0.9799, -1.1042, 0.16, 0.8029],
        [1.6084, 0.071, -0.4385, -0.4122], [-0.7373, -0.6319, 1.2123, -0.7205], [0.4726, 1.6102, 0.0551, 0.2696],
        [-0.2871, 0.3253, 1.2319, 1.1134], [0.3204, -1.1283, -0.2458, -1.2036], [0.8849, 0.4064, 1.3197, -0.4524],
        [0.9435, 0.1435, -0.2368, 1.3807],
    ],
    np.float32,
)  # fmt: skip
# Of 4 points for one dimension, in pairs (0.118), and of 16 for one (0.0115): Max 1960, table I.
_PAIR = np.array([[x, y] for x in (-1.5104, -0.4528, 0.4528, 1.5104) for y in (-1.5104, -0.4528, 0.4528, 1.5104)])
_HALF = np.array([0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0691, 2.7326])
_ONE = np.concatenate([-_HALF[::-1], _HALF])[:, None]


def _points(padded: int) -> Floats:
    """The 16 centroids for vectors of so many numbers, of shape (16, dimensions of a sub-vector)."""
    return np.asarray(_ONE if padded <= 128 else _PAIR if padded <= 256 else _FOUR, np.float32)


def rotation(width: int) -> Floats:
    """A fixed orthogonal matrix of shape (width, padded), `padded` the next power of two, at least 8."""
    padded = max(8, 1 << (width - 1).bit_length())
    hadamard = np.ones((1, 1), np.float32)
    while len(hadamard) < padded:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    signs = np.random.Generator(np.random.PCG64(20_111)).integers(0, 2, (2, padded)) * 2 - 1
    turned = (hadamard * signs[0]) @ (hadamard * signs[1]) / np.float32(padded)
    return np.ascontiguousarray(turned[:width].astype(np.float32))


class Codes:
    """The codes of a growing set of unit vectors, in chunks that are searched side by side."""

    def __init__(self, width: int, *, threads: int = 2) -> None:
        """Raises Unavailable when faiss is not installed."""
        try:
            import faiss
        except ImportError:
            raise Unavailable(
                "a gallery of this size needs faiss", hint="pip install faiss-cpu, or raise its `exact_below`"
            ) from None
        self._faiss: Any = faiss
        self._rotation = rotation(width)
        self._chunks: list[Any] = []
        self._last = Lock()  # guards the chunk that grows; full ones never change
        self._pool = ThreadPoolExecutor(threads, "gallery", initializer=faiss.omp_set_num_threads, initargs=(1,))

    def __len__(self) -> int:
        return sum(chunk.ntotal for chunk in self._chunks)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False)

    def _empty(self) -> Any:
        width, points = self._rotation.shape[1], _points(self._rotation.shape[1])
        parts = width // points.shape[1]
        chunk = self._faiss.IndexPQFastScan(width, parts, 4, self._faiss.METRIC_INNER_PRODUCT, _BLOCK)
        centroids = np.tile((points / np.float32(np.sqrt(width))).ravel(), parts)
        self._faiss.copy_array_to_vector(centroids, chunk.pq.centroids)
        chunk.is_trained = True
        return chunk

    def add(self, vectors: Floats) -> None:
        """Append unit vectors (n, width)."""
        with self._last:
            for start in range(0, len(vectors), 16_384):
                self._fill(vectors[start : start + 16_384] @ self._rotation)

    def _fill(self, turned: Floats) -> None:
        while len(turned):
            if not self._chunks or self._chunks[-1].ntotal >= CHUNK:
                self._chunks.append(self._empty())
            room = CHUNK - self._chunks[-1].ntotal
            self._chunks[-1].add(np.ascontiguousarray(turned[:room]))
            turned = turned[room:]

    def shortlist(self, queries: Floats, *, count: int) -> tuple[Floats, NDArray[np.int64]]:
        """Approximate scores and row numbers, both (queries, at most `count`), best first; -1 where there are fewer."""
        # row by row: BLAS threads that wait for a busy core cost 50 ms where these products take 10 µs
        turned = np.stack([query @ self._rotation for query in queries])
        found = list(self._pool.map(lambda number: self._scan(number, turned, count), range(len(self._chunks))))
        scores = np.concatenate([score for score, _ in found], axis=1)
        rows = np.concatenate([row for _, row in found], axis=1)
        if scores.shape[1] > count:
            best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
            scores, rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
        order = np.argsort(-scores, axis=1)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

    def _scan(self, number: int, turned: Floats, count: int) -> tuple[Floats, NDArray[np.int64]]:
        chunk = self._chunks[number]
        if number == len(self._chunks) - 1:
            with self._last:
                scores, rows = _search(chunk, turned, min(count, chunk.ntotal))
        else:
            scores, rows = _search(chunk, turned, min(count, chunk.ntotal))
        scores[rows < 0] = -np.inf
        return scores, np.where(rows >= 0, rows + number * CHUNK, -1)

    def packed(self) -> bytes:
        """The codes as they lie in memory, for `load`."""
        tables = [self._faiss.AlignedTable_to_array(chunk.codes) for chunk in self._chunks]
        return b"".join(table.tobytes() for table in tables)

    def load(self, data: bytes, *, rows: int) -> None:
        """Take over what `packed` gave for `rows` rows. Raises CorruptArtifact when the size does not fit."""
        width = self._rotation.shape[1]
        per_row = width // _points(width).shape[1] // 2
        sizes = [min(CHUNK, rows - start) for start in range(0, rows, CHUNK)]
        padded = [-(-size // _BLOCK) * _BLOCK * per_row for size in sizes]
        if sum(padded) != len(data):
            raise CorruptArtifact(f"{len(data)} bytes of codes for {rows} rows, expected {sum(padded)}")
        position = 0
        for size, length in zip(sizes, padded, strict=True):
            chunk = self._empty()
            table = np.frombuffer(data, np.uint8, length, position)
            self._faiss.copy_array_to_AlignedTable(table, chunk.codes)
            chunk.ntotal = chunk.ntotal2 = size
            chunk.ntotal2 = -(-size // _BLOCK) * _BLOCK
            self._chunks.append(chunk)
            position += length


def _search(chunk: Any, turned: Floats, count: int) -> tuple[Floats, NDArray[np.int64]]:
    """One query after another: faiss' scan for several queries at once is 4 to 15 times slower a query."""
    found = [chunk.search(query[None], count) for query in turned]
    return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])
