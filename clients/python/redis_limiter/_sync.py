"""The limiter for threads. `_core` says what it does; here is only what threads need."""

import threading
import time

import redis as redis_py
from redis.retry import Retry

from ._core import LimiterCore, SlotCore, finish


class Limiter(LimiterCore):
    """At most `limit` holders at once: ``retools.limiter.Limiter`` on the redis-limiter module.

    Both keep the same sorted set, so old and new processes share a limiter. The module takes a slot
    in one atomic step, by the server's clock. Threads may share it as they share its client.
    """

    _client = redis_py.Redis
    _retry = Retry

    def acquire_limit(self, key, expiration_in_seconds=None, retry=True):
        """Takes a slot if one is free, without waiting.

        A key that holds a live lease gets it refreshed, also at the limit.

        :param key: the holder's name, to release it by.
        :param expiration_in_seconds: the lease's ttl. None and 0 take the limiter's; a negative one
            gives a lease that has lapsed already.
        :param retry: without effect, as lapsed leases never count. retools had it.
        :returns: True if the key holds a slot now, else False.
        """
        return finish(self._acquire_limit(key, expiration_in_seconds))

    def release_limit(self, key):
        """Gives the slot of a key back.

        :returns: True if it held one; False if it never did, or its lease had lapsed.
        """
        return finish(self._release_limit(key))

    def slot(self, key=None, wait=None, expiration_in_seconds=None):
        """A slot for a ``with`` block: waits in line for it, renews it meanwhile, releases it.

        Raises `NotAcquired` on entering if no slot came free in time, and `LeaseLost` on leaving if
        the lease had ended before (unless the block raised an error itself).

        :param key: the holder's name; by default one that nobody else has. Who names a key that
            holds a live lease shares that one's slot.
        :param wait: for how many seconds to wait, at most; 0 = not at all, None = without end.
        :param expiration_in_seconds: the lease's ttl, the longest that a holder's death can keep
            the slot. It is renewed every third of it. None and 0 take the limiter's.
        """
        return Slot(self, key, wait, expiration_in_seconds)


class Slot(SlotCore):
    """What ``with limiter.slot() as slot`` gives: `key`, `lost`, `check()` and `wait_lost()`."""

    def __enter__(self):
        finish(self._acquire())
        self._leaving = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=lambda: finish(self._keep()), name="redis-limiter-renewal", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace):
        self._leaving.set()
        self._thread.join()
        finish(self._release(failed=kind is not None))

    def wait_lost(self, timeout=None):
        """Waits until the lease is lost, or for `timeout` seconds; returns whether it is lost."""
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while not self.lost:
            now = time.monotonic()
            if now >= deadline:
                return False
            # Renewals move the lease's end meanwhile.
            self._ended.wait(min(deadline, self._until) - now)
        return True

    def _lose(self):
        self._ended.set()

    async def _left(self, pause):
        return self._leaving.wait(pause)

    async def _sleep(self, pause):
        time.sleep(pause)
