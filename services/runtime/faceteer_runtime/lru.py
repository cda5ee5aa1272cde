"""The in-process cache: least recently used out first, bounded by bytes.

Used from the event loop only, so it takes no lock.
"""

from __future__ import annotations

from collections import OrderedDict

from faceteer_runtime.record import Record, size_of

# A dict slot, the key, two array headers: roughly what an entry costs besides its bytes.
_OVERHEAD = 512
# One value may not push out everything else.
_LARGEST_SHARE = 4


class Lru:
    """Records by key, at most ``capacity`` bytes of them."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.bytes = 0
        self._entries: OrderedDict[str, tuple[Record, int]] = OrderedDict()

    def get(self, key: str) -> Record | None:
        """The record, now the most recently used; None if there is none. The dict is the caller's own."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0].copy()

    def put(self, key: str, record: Record) -> bool:
        """Keeps a record that nobody will change (:func:`faceteer_runtime.record.frozen`); False if it is too large."""
        size = size_of(record) + len(key) + _OVERHEAD
        if size * _LARGEST_SHARE > self.capacity:
            return False
        previous = self._entries.pop(key, None)
        if previous is not None:
            self.bytes -= previous[1]
        self._entries[key] = (record, size)
        self.bytes += size
        while self.bytes > self.capacity:
            _, (_, dropped) = self._entries.popitem(last=False)
            self.bytes -= dropped
        return True

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()
        self.bytes = 0
