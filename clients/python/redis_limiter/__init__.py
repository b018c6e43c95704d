"""Limits how many operations run at once, across processes: a client of the redis-limiter module.

``Limiter`` here is for threads; ``redis_limiter.asyncio`` has the same one for asyncio.
"""

from ._core import LeaseLost, LimiterError, NotAcquired
from ._sync import Limiter, Slot

__all__ = ["LeaseLost", "Limiter", "LimiterError", "NotAcquired", "Slot"]
