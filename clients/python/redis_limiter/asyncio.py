"""The limiter for asyncio. `_core` says what it does; here is only what asyncio needs."""

import asyncio
from time import monotonic

import redis.asyncio as redis_py
from redis.asyncio.retry import Retry

from ._core import LeaseLost, LimiterCore, LimiterError, NotAcquired, SlotCore

__all__ = ["LeaseLost", "Limiter", "LimiterError", "NotAcquired", "Slot"]


class Limiter(LimiterCore):
    """`redis_limiter.Limiter` for asyncio: the same arguments, replies and errors, to be awaited.

    The client is one of ``redis.asyncio``.
    """

    _client = redis_py.Redis
    _retry = Retry

    async def acquire_limit(self, key, expiration_in_seconds=None, retry=True):
        return await self._acquire_limit(key, expiration_in_seconds)

    async def release_limit(self, key):
        return await self._release_limit(key)

    def slot(self, key=None, wait=None, expiration_in_seconds=None):
        """A slot for an ``async with`` block.

        When the lease is lost, the task in the block is cancelled at once, and `LeaseLost` comes
        out of the block.
        """
        return Slot(self, key, wait, expiration_in_seconds)


class Slot(SlotCore):
    """What ``async with limiter.slot() as slot`` gives: `key`, `lost` and `check()`."""

    async def __aenter__(self):
        await self._acquire()
        self._leaving = asyncio.Event()
        self._cancelled = False
        self._holder = asyncio.current_task()
        self._cancels_before = self._cancels()
        self._renewal = asyncio.create_task(self._keep())
        return self

    async def __aexit__(self, kind, error, trace):
        self._leaving.set()
        await self._renewal
        failed = kind is not None
        if self._cancelled:
            if hasattr(self._holder, "uncancel"):
                self._holder.uncancel()
            # Somebody else may have cancelled the task too, and wins.
            if failed and issubclass(kind, asyncio.CancelledError):
                failed = self._cancels() > self._cancels_before
        await self._release(failed)

    def _cancels(self):
        # Python 3.9 and 3.10 do not count them.
        return self._holder.cancelling() if hasattr(self._holder, "cancelling") else 0

    def _lose(self):
        if not self._leaving.is_set():
            self._cancelled = True
            self._holder.cancel()

    async def _left(self, pause):
        try:
            await asyncio.wait_for(self._leaving.wait(), pause)
        except asyncio.TimeoutError:
            return False
        return True

    async def _sleep(self, pause):
        await asyncio.sleep(pause)

    async def _renew(self):
        # A server that does not answer must not keep the holder from hearing of it.
        return await asyncio.wait_for(super()._renew(), self._until - monotonic())
