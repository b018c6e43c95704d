"""What a limiter and a slot do, written once for threads and for asyncio.

- Here are coroutines that `await` whatever redis-py's client returns, through `settle`. With the
  client for threads that is never an awaitable, so such a coroutine ends without ever being
  suspended (`finish`); the few things that must differ are methods of the subclasses.
- Time is the server's alone, except for one thing: how long a lease has certainly lasted is
  counted here, from when the command that made or renewed it was sent, with a clock that nobody
  can set. So `lost` may come too early, by the time a command takes, and never too late.
"""

import inspect
import math
import socket
import uuid
from decimal import Decimal
from time import monotonic

from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterDownError,
    ConnectionError,
    MovedError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

# How much longer than the wait itself its reply may take, in seconds.
GRACE = 5

# How long a server may be away in the middle of a wait, in seconds, and the time between two looks.
PATIENCE = 10
PAUSE = 0.1

# The largest limit the module takes.
MAX_LIMIT = 2**63 - 1


class LimiterError(Exception):
    """What this package raises. Errors of the server and the network are redis-py's own."""


class NotAcquired(LimiterError):
    """No slot came free in time. Nothing is held."""


class LeaseLost(LimiterError):
    """The lease ended before its holder gave it back: another may have had the slot meanwhile."""


def seconds(value):
    """A time as the module reads it: no exponent, nothing rounded."""
    return format(Decimal(str(value)), "f")


async def settle(value):
    """What a client of redis-py returned, awaited if it is the one for asyncio."""
    return await value if inspect.isawaitable(value) else value


def finish(coroutine):
    """Runs a coroutine that never has to wait for an event loop, and returns its result."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise RuntimeError("this limiter needs a client for threads, such as redis.Redis")


def broke_off(error):
    """Whether a wait that ended with this error may go on elsewhere, or in a moment."""
    if isinstance(error, ResponseError) and str(error).startswith("UNBLOCKED"):
        return True
    # MovedError is the parent of AskError. A cluster that is down has an error of its own kind.
    return isinstance(
        error,
        (
            ConnectionError,
            TimeoutError,
            MovedError,
            ReadOnlyError,
            ClusterDownError,
            TryAgainError,
            RedisClusterException,
        ),
    )


class LimiterCore:
    # Set by the subclasses: redis-py's client and its class of retries, of the matching kind.
    _client = None
    _retry = None

    def __init__(
        self, limit, redis=None, prefix="retools_limiter", expiration_in_seconds=10
    ):
        """
        :param limit: how many may hold a slot at once.
        :param redis: a client of redis-py, for one server, behind Sentinel or for a cluster. By
            default one for the server on localhost.
        :param prefix: the limiter's name: the key of its sorted set.
        :param expiration_in_seconds: the ttl of a lease, unless a call says another. A number of
            seconds, with a fraction or not.
        """
        self.limit = limit
        self.redis = self._client() if redis is None else redis
        self.prefix = prefix
        self.expiration_in_seconds = expiration_in_seconds

    async def _ask(self, command, *args):
        return await settle(self.redis.execute_command(command, self.prefix, *args))

    def _limit(self):
        # As retools reads it: fewer members than this, whatever number it is.
        return math.ceil(min(max(self.limit, 0), MAX_LIMIT))

    async def _acquire_limit(self, key, expiration_in_seconds):
        ttl = expiration_in_seconds or self.expiration_in_seconds
        if ttl > 0:
            return (
                await self._ask("LIMITER.ACQUIRE", key, self._limit(), seconds(ttl))
                == 1
            )
        # A lease that has lapsed, by the server's clock: the shortest one, and then moved back.
        shortest = 0.001
        if not await self._ask("LIMITER.ACQUIRE", key, self._limit(), seconds(shortest)):
            return False
        back = {key: float(ttl) - shortest}
        await settle(self.redis.zadd(self.prefix, back, xx=True, incr=True))
        return True

    async def _release_limit(self, key):
        return await self._ask("LIMITER.RELEASE", key) == 1

    def _waiting_connection(self, patience):
        """A new connection for one wait, to where the limiter is, as the client would make it.

        It is none of the client's pool: waiters that use up a pool would keep the holders from
        releasing. It gives up after `patience` seconds (None: never) whatever time-out the client
        has, and tries nothing twice: to send the command again would be another wait.
        """
        source = self.redis
        if hasattr(source, "get_node_from_key"):
            source = source.get_node_from_key(self.prefix)
            if not hasattr(source, "connection_kwargs"):
                source = self.redis.get_redis_connection(source).connection_pool
        else:
            source = source.connection_pool
        options = dict(source.connection_kwargs)
        if "path" not in options:
            if options.get("socket_connect_timeout") is None:
                options["socket_connect_timeout"] = options.get("socket_timeout")
            # So that a wait without end notices a server that went away without a word.
            options["socket_keepalive"] = True
            if not options.get("socket_keepalive_options"):
                options["socket_keepalive_options"] = {
                    getattr(socket, name): value
                    for name, value in (
                        ("TCP_KEEPIDLE", 30),
                        ("TCP_KEEPINTVL", 10),
                        ("TCP_KEEPCNT", 3),
                    )
                    if hasattr(socket, name)
                }
        options.update(
            socket_timeout=patience,
            retry=self._retry(NoBackoff(), 0),
            retry_on_timeout=False,
            retry_on_error=[],
            health_check_interval=0,
        )
        return source.connection_class(**options)


class SlotCore:
    def __init__(self, limiter, key, wait, expiration_in_seconds):
        #: The holder's name in the limiter.
        self.key = uuid.uuid4().hex if key is None else key
        self._limiter = limiter
        self._wait = wait
        self._ttl = expiration_in_seconds or limiter.expiration_in_seconds
        self._gone = False
        self._until = -math.inf
        self._renew_at_once = False

    @property
    def lost(self):
        """Whether the lease has ended, or may have: whoever holds the slot must stop."""
        return self._gone or monotonic() >= self._until

    def check(self):
        """Raises `LeaseLost` if the lease has ended, or may have. Call it before each step."""
        if self.lost:
            raise LeaseLost(f"{self.key!r} has lost its slot in {self._limiter.prefix!r}")

    async def _acquire(self):
        deadline = math.inf if self._wait is None else monotonic() + self._wait
        waited = False
        broken_since = None
        while True:
            try:
                if await self._acquire_now():
                    return
                broken_since = None
                left = deadline - monotonic()
                if left <= 0:
                    raise self._not_acquired()
                waited = True
                if await self._acquire_in_line(left):
                    return
                raise self._not_acquired()
            except (RedisError, RedisClusterException) as error:
                # The client has its own retries, and before a wait there is nothing to save.
                if not waited or not broke_off(error):
                    raise
                now = monotonic()
                if broken_since is None:
                    broken_since = now
                if now >= deadline:
                    raise self._not_acquired() from error
                if now >= broken_since + PATIENCE:
                    raise
                await self._sleep(min(PAUSE, deadline - now))

    def _not_acquired(self):
        return NotAcquired(f"no slot in {self._limiter.prefix!r} within {self._wait} s")

    async def _acquire_now(self):
        sent = monotonic()
        limit, ttl = self._limiter._limit(), seconds(self._ttl)
        if not await self._limiter._ask("LIMITER.ACQUIRE", self.key, limit, ttl):
            return False
        self._until = sent + self._ttl
        return True

    async def _acquire_in_line(self, left):
        endless = left == math.inf
        # To the server 0 is no limit.
        timeout = "0" if endless else seconds(max(round(left, 3), 0.001))
        connection = self._limiter._waiting_connection(None if endless else left + GRACE)
        limit, ttl = self._limiter._limit(), seconds(self._ttl)
        command = ("LIMITER.BACQUIRE", self._limiter.prefix, self.key, limit, ttl, timeout)
        try:
            await settle(connection.connect())
            await settle(connection.send_command(*command))
            if not await settle(connection.read_response()):
                return False
        finally:
            await settle(connection.disconnect())
        # It was granted before this, by nobody knows how much: the first renewal comes at once.
        self._until = monotonic() + self._ttl
        self._renew_at_once = True
        return True

    async def _keep(self):
        """Renews the lease until the holder leaves or it is lost."""
        pause = 0 if self._renew_at_once else self._ttl / 3
        while not await self._left(pause):
            sent = monotonic()
            try:
                renewed = await self._renew()
            except Exception:
                # Whatever it was, the lease may still live, and another attempt may do.
                if self.lost:
                    break
                pause = min(self._ttl / 10, self._until - monotonic())
            else:
                if not renewed:
                    break
                self._until = sent + self._ttl
                pause = self._ttl / 3
        else:
            return
        self._gone = True
        self._lose()

    async def _renew(self):
        return await self._limiter._ask("LIMITER.RENEW", self.key, seconds(self._ttl))

    async def _release(self, failed):
        """Gives the slot back. Says if it was lost, unless the holder has an error of its own."""
        try:
            # A lease that was lost may be another's by now, if they share a key.
            held = not self.lost and await self._limiter._release_limit(self.key)
        except Exception:
            if not failed:
                raise
            return
        if not held:
            self._gone = True
            if not failed:
                self.check()
