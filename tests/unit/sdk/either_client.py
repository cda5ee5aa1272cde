"""One face for both clients, so that each behaviour is tested on both from one text.

Knows nothing of the SDK's classes: whatever is awaitable is awaited, async iterators become iterators.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from typing import Any

import faceteer

_WRAPPED = (
    faceteer.AsyncClient,
    faceteer.AsyncPhoto,
    faceteer.AsyncEdit,
    faceteer.AsyncFeature,
    faceteer.AsyncFeatureLibrary,
)


class Blocking:
    """An asyncio object of the SDK, driven from blocking code."""

    def __init__(self, target: Any, runner: asyncio.Runner) -> None:
        self.target = target
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.target, name)
        if not inspect.ismethod(value):
            return self._out(value)

        def method(*arguments: Any, **named: Any) -> Any:
            given = {key: self._in(each) for key, each in named.items()}
            return self._out(value(*map(self._in, arguments), **given))

        return method

    def __getitem__(self, key: Any) -> Any:
        return self._out(self.target[key])

    def __eq__(self, other: object) -> bool:
        return bool(self.target == self._in(other))

    def __hash__(self) -> int:
        return hash(self.target)

    def __repr__(self) -> str:
        return repr(self.target)

    def __str__(self) -> str:
        return str(self.target)

    def _in(self, value: Any) -> Any:
        return value.target if isinstance(value, Blocking) else value

    def _out(self, value: Any) -> Any:
        if inspect.isawaitable(value):
            return self._out(self._runner.run(_awaited(value)))
        if inspect.isasyncgen(value):
            return self._iterated(value)
        if isinstance(value, _WRAPPED):
            return Blocking(value, self._runner)
        if isinstance(value, list) and value and isinstance(value[0], _WRAPPED):
            return [Blocking(each, self._runner) for each in value]
        return value

    def _iterated(self, values: Any) -> Iterator[Any]:
        try:
            while True:
                try:
                    yield self._out(self._runner.run(_awaited(anext(values))))
                except StopAsyncIteration:
                    return
        finally:
            self._runner.run(values.aclose())


async def _awaited(value: Any) -> Any:
    return await value
