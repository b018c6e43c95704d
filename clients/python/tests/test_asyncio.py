"""The limiter for asyncio: what is its own. What it shares with the other is tested there."""

import asyncio
import contextlib
import signal

import pytest
import redis.asyncio

from conftest import DEADLINE, ON_EACH_PROTOCOL
from redis_limiter.asyncio import LeaseLost, Limiter, NotAcquired


@pytest.fixture(params=ON_EACH_PROTOCOL)
def play(request, server, prefix):
    """Runs a test's coroutine with a client, and a second one that looks on."""

    def run(test):
        async def body():
            async with redis.asyncio.Redis(port=server.port, **request.param) as client:
                async with redis.asyncio.Redis(port=server.port) as admin:
                    await asyncio.wait_for(test(client, admin, prefix), 2 * DEADLINE)

        asyncio.run(body())

    return run


async def until(what, condition):
    give_up = asyncio.get_running_loop().time() + DEADLINE
    while not await condition():
        assert asyncio.get_running_loop().time() < give_up, f"waited in vain until {what}"
        await asyncio.sleep(0.002)  # Between two looks, not instead of them.


def waits(admin, count=1):
    async def look():
        return (await admin.info("clients"))["blocked_clients"] == count

    return look


def test_the_old_methods(play):
    async def test(client, admin, prefix):
        limiter = Limiter(2, client, prefix, expiration_in_seconds=60)
        assert [await limiter.acquire_limit(key) for key in "abc"] == [True, True, False]
        assert await limiter.release_limit("a") is True
        assert await limiter.release_limit("a") is False
        assert await limiter.acquire_limit("b", expiration_in_seconds=-1, retry=False) is True
        assert await limiter.acquire_limit("c", 0.5) is True
        assert await limiter.acquire_limit("d", 0) is True
        assert await limiter.acquire_limit("e", None) is False

    play(test)


def test_slots_are_waited_for_held_and_given_back(play):
    async def test(client, admin, prefix):
        limiter = Limiter(2, client, prefix, expiration_in_seconds=60)
        inside = most = 0

        async def work():
            nonlocal inside, most
            async with limiter.slot(wait=DEADLINE) as slot:
                inside += 1
                most = max(most, inside)
                await admin.zcard(prefix)
                slot.check()
                inside -= 1

        await asyncio.gather(*(work() for _ in range(20)))
        assert most <= 2
        assert await admin.zcard(prefix) == 0

    play(test)


def test_no_slot_in_time_is_an_error(play):
    async def test(client, admin, prefix):
        limiter = Limiter(1, client, prefix)
        async with limiter.slot():
            for wait in (0, 0.05):
                with pytest.raises(NotAcquired):
                    async with limiter.slot(wait=wait):
                        pass
            assert await admin.zcard(prefix) == 1

    play(test)


def test_a_cancelled_waiter_leaves_the_line(play):
    async def test(client, admin, prefix):
        limiter = Limiter(1, client, prefix, expiration_in_seconds=60)
        async with limiter.slot():
            waiter = asyncio.create_task(limiter.slot().__aenter__())
            await until("it waits", waits(admin))
            waiter.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiter
            await until("it has left", waits(admin, 0))
        assert await limiter.acquire_limit("another") is True

    play(test)


def test_a_cancelled_holder_gives_its_slot_back(play):
    async def test(client, admin, prefix):
        limiter = Limiter(1, client, prefix, expiration_in_seconds=60)
        inside = asyncio.Event()

        async def hold():
            async with limiter.slot():
                inside.set()
                await asyncio.Event().wait()

        holder = asyncio.create_task(hold())
        await inside.wait()
        holder.cancel()
        with pytest.raises(asyncio.CancelledError):
            await holder
        assert await admin.zcard(prefix) == 0

    play(test)


@pytest.mark.parametrize("play", ON_EACH_PROTOCOL[:1], indirect=True)
def test_a_lost_lease_cancels_the_block(play):
    async def test(client, admin, prefix):
        limiter = Limiter(1, client, prefix, expiration_in_seconds=1.5)
        with pytest.raises(LeaseLost):
            async with limiter.slot() as slot:
                await admin.delete(prefix)
                await asyncio.Event().wait()  # Without end: only the loss ends it.
        assert slot.lost
        # The task goes on as if nobody had cancelled it.
        await asyncio.sleep(0)
        if hasattr(asyncio.current_task(), "cancelling"):
            assert asyncio.current_task().cancelling() == 0

        # The same when the block does not let itself be cancelled.
        with pytest.raises(LeaseLost):
            async with limiter.slot():
                await admin.delete(prefix)
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
        # And an error of the block's own goes first.
        with pytest.raises(ZeroDivisionError):
            async with limiter.slot():
                await admin.delete(prefix)
                try:
                    await asyncio.Event().wait()
                finally:
                    1 / 0

    play(test)


def test_a_loss_that_no_renewal_has_seen_is_told_on_leaving(play):
    async def test(client, admin, prefix):
        limiter = Limiter(1, client, prefix, expiration_in_seconds=60)
        with pytest.raises(LeaseLost):
            async with limiter.slot():
                await admin.delete(prefix)

    play(test)


@pytest.mark.parametrize("play", ON_EACH_PROTOCOL[:1], indirect=True)
def test_a_lease_outlives_its_ttl(play):
    async def test(client, admin, prefix):
        limiter = Limiter(1, client, prefix, expiration_in_seconds=1)
        async with limiter.slot("k") as slot:
            first = await admin.zscore(prefix, "k")

            async def renewed_past_its_end():
                return (await admin.zscore(prefix, "k") or 0) > first + 1

            await until("it has outlived its first lease", renewed_past_its_end)
            slot.check()
        assert await admin.zcard(prefix) == 0

    play(test)


def test_a_server_that_stands_still_costs_the_lease(own_server, prefix):
    async def test():
        async with redis.asyncio.Redis(port=own_server.port, socket_timeout=60) as client:
            limiter = Limiter(1, client, prefix, expiration_in_seconds=0.5)
            slot = await limiter.slot().__aenter__()
            own_server.process.send_signal(signal.SIGSTOP)  # It answers nothing, and closes nothing.
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(asyncio.Event().wait(), DEADLINE)
            own_server.process.send_signal(signal.SIGCONT)
            assert slot.lost
            with pytest.raises(LeaseLost):
                await slot.__aexit__(asyncio.CancelledError, asyncio.CancelledError(), None)

    asyncio.run(test())
