"""Parquet shards of clips: written whole or not at all, verified bit for bit when opened, read at the speed of a copy.

A row is a clip, a row group is a row. See `_format` for the columns, `_seal` for what guards which bytes.
"""

from stagebench.store._buffer import HostBuffer
from stagebench.store._encode import EncodedRow
from stagebench.store._format import FORMAT_VERSION, ClipRow, RowMeta
from stagebench.store._reader import Shard
from stagebench.store._writer import ShardWriter

__all__ = ["FORMAT_VERSION", "ClipRow", "EncodedRow", "HostBuffer", "RowMeta", "Shard", "ShardWriter"]
