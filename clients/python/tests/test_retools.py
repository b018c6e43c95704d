"""The class is retools' own to its callers, and shares limiters with processes that still use that.

`Retools` is that library's documented behaviour on plain Redis commands, in words of our own.
"""

import asyncio
import threading
import time

import pytest
import redis
import redis.asyncio

from conftest import wait_until, waiting
from redis_limiter import Limiter


class Retools:
    """Fewer members than the limit: add one. Else, once, remove the lapsed and look again."""

    def __init__(self, limit, redis, prefix):
        self.limit, self.redis, self.prefix = limit, redis, prefix
        self.between = lambda: None  # Runs between the look and the write.

    def acquire_limit(self, key, ttl):
        if self._full():
            self.redis.zremrangebyscore(self.prefix, "-inf", time.time())
            if self._full():
                return False
        self.between()
        self.redis.zadd(self.prefix, {key: time.time() + ttl})
        return True

    def _full(self):
        return self.redis.zcard(self.prefix) >= self.limit

    def release_limit(self, key):
        self.redis.zrem(self.prefix, key)


def test_acquires_up_to_the_limit_and_again_after_a_release(client, prefix):
    limiter = Limiter(2, client, prefix, expiration_in_seconds=400)
    assert [limiter.acquire_limit(key) for key in ("a", "b", "c")] == [True, True, False]
    assert limiter.acquire_limit("c", retry=False) is False
    assert limiter.acquire_limit("b") is True  # It has its lease already.
    assert limiter.release_limit("a") is True
    assert limiter.release_limit("a") is False
    assert limiter.acquire_limit("c") is True
    assert limiter.acquire_limit(b"\x00\xff") is False


def test_the_arguments_have_the_old_names_and_defaults(server, prefix):
    with redis.Redis(port=server.port) as client:
        limiter = Limiter(limit=1, redis=client)
        assert (limiter.prefix, limiter.expiration_in_seconds) == ("retools_limiter", 10)
        limiter = Limiter(limit=1, redis=client, prefix=prefix, expiration_in_seconds=45)
        assert limiter.acquire_limit(key="k", expiration_in_seconds=20, retry=True) is True
        assert limiter.acquire_limit("other", 20, False) is False
        limiter.limit = 2  # As with the old class, attributes count when they are used.
        assert limiter.acquire_limit("other") is True
        limiter.release_limit(key="k")
        limiter.release_limit("other")
    limiter = Limiter(limit=10)
    assert limiter.redis.connection_pool.connection_kwargs["host"] == "localhost"


@pytest.mark.parametrize("ttl, lasts", [(None, 45), (0, 45), (7, 7), (0.25, 0.25), (1e-5, 0.001)])
def test_the_score_is_the_expiry_in_unix_seconds(client, prefix, ttl, lasts):
    limiter = Limiter(1, client, prefix, expiration_in_seconds=45)
    before = time.time()
    assert limiter.acquire_limit("k", ttl) is True
    # The server cuts its clock to milliseconds, and rounds a ttl up to them.
    after = time.time() + 0.001
    assert before - 0.001 + lasts <= client.zscore(prefix, "k") <= after + lasts


def test_a_negative_ttl_gives_a_lease_that_has_lapsed(client, prefix):
    limiter = Limiter(2, client, prefix, expiration_in_seconds=400)
    assert limiter.acquire_limit("a") is True
    assert limiter.acquire_limit("b", -1) is True
    assert abs(client.zscore(prefix, "b") - (time.time() - 1)) < 1
    assert limiter.acquire_limit("c") is True  # At once: the lapsed one does not count.
    assert limiter.acquire_limit("d", -0.5) is False  # No slot, no lease, lapsed or not.
    assert limiter.acquire_limit("c", -5) is True  # A live lease lapses by it.
    assert limiter.acquire_limit("d") is True


@pytest.mark.parametrize("limit, slots", [(-1, 0), (0, 0), (1.5, 2), (float("inf"), 3)])
def test_a_limit_is_what_fewer_members_are_less_than(admin, prefix, limit, slots):
    limiter = Limiter(limit, admin, prefix)
    assert [limiter.acquire_limit(key) for key in "abc"].count(True) == slots


def test_old_and_new_see_each_others_leases(client, prefix):
    old, new = Retools(2, client, prefix), Limiter(2, client, prefix)
    assert old.acquire_limit("old", 60) and new.acquire_limit("new")
    assert not old.acquire_limit("x", 60) and not new.acquire_limit("x")
    # What one acquired the other can release.
    assert new.release_limit("old")
    old.release_limit("new")
    # And what the one leaves to lapse, the other removes.
    assert old.acquire_limit("old", -1) and old.acquire_limit("older", -1)
    assert new.acquire_limit("a") and new.acquire_limit("b", -1)
    assert old.acquire_limit("c", 60)
    assert sorted(str(key).strip("b'") for key in client.zrange(prefix, 0, -1)) == ["a", "c"]


def test_a_late_write_of_the_old_class_is_all_that_can_exceed_the_limit(admin, prefix):
    old, new = Retools(2, admin, prefix), Limiter(2, admin, prefix)
    # The old process has seen a free slot when the new ones take it: retools with two processes
    # can do the same.
    old.between = lambda: [new.acquire_limit(key) for key in ("a", "b", "c")]
    assert old.acquire_limit("late", 60)
    assert admin.zcard(prefix) == 3
    assert not new.acquire_limit("d")
    # The one too many does not let another in when it goes.
    new.release_limit("late")
    assert not new.acquire_limit("d")
    assert new.release_limit("a") and new.acquire_limit("d")


@pytest.mark.parametrize("olds, news", [(0, 6), (3, 3)])
def test_both_at_once_keep_the_bound(server, prefix, olds, news):
    limit, rounds = 2, 60
    most, denied, errors = [], [], []  # Lists, since threads may add to them as they like.

    def work(name, make):
        with redis.Redis(port=server.port) as client:
            limiter = make(limit, client, prefix)
            give_up = time.monotonic() + 20
            done = 0
            while done < rounds:
                assert time.monotonic() < give_up
                if not limiter.acquire_limit(name, 30):
                    denied.append(name)
                    continue
                most.append(client.zcard(prefix))  # None lapses: each member is a holder.
                limiter.release_limit(name)
                done += 1

    def guarded(*args):
        try:
            work(*args)
        except BaseException as error:
            errors.append(error)

    workers = [(f"old-{n}", Retools) for n in range(olds)]
    workers += [(f"new-{n}", Limiter) for n in range(news)]
    threads = [threading.Thread(target=guarded, args=worker) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert denied and max(most) >= limit  # They did meet.
    # Old processes alone, as many as these are, can reach limit + olds + news - 1.
    assert max(most) <= limit + olds


def test_a_client_of_the_other_kind_is_refused(server, prefix):
    async def attempt():
        async with redis.asyncio.Redis(port=server.port) as client:
            with pytest.raises(RuntimeError, match="client for threads"):
                Limiter(1, client, prefix).acquire_limit("k")

    asyncio.run(attempt())


def test_old_processes_make_waiters_wait_and_let_them_in(server, admin, prefix):
    old, new = Retools(1, admin, prefix), Limiter(1, admin, prefix)
    assert old.acquire_limit("old", 60)
    got = []

    def wait():
        with new.slot("new", wait=20):
            got.append(admin.zrange(prefix, 0, -1))

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until("it waits", lambda: waiting(admin) == 1)
    old.release_limit("old")
    thread.join()
    assert got == [["new"]]
