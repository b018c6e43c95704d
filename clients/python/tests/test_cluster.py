"""In a cluster: commands and waits go to the node of the prefix, and follow it."""

import asyncio
import threading

import pytest
import redis
import redis.asyncio

from conftest import DEADLINE, ON_EACH_PROTOCOL, wait_until, waiting
from redis_limiter import Limiter, NotAcquired
from redis_limiter.asyncio import Limiter as AsyncLimiter


@pytest.fixture
def admins(cluster):
    admins = [redis.Redis(port=node.port, decode_responses=True) for node in cluster]
    yield admins
    for admin in admins:
        admin.close()


def prefixes_on_each(client, prefix):
    """A prefix that lives on each node."""
    found = {}
    for n in range(100):
        found.setdefault(client.get_node_from_key(f"{prefix}{n}").port, f"{prefix}{n}")
    assert len(found) == 2
    return found


def test_limiters_on_every_node(cluster_client, prefix, cluster, admins):
    for port, name in prefixes_on_each(cluster_client, prefix).items():
        limiter = Limiter(1, cluster_client, name, expiration_in_seconds=60)
        assert [limiter.acquire_limit(key) for key in "ab"] == [True, False]
        assert limiter.acquire_limit("a", -1) is True
        (admin,) = [admin for node, admin in zip(cluster, admins) if node.port == port]
        assert admin.zcard(name) == 1
        with limiter.slot("holder") as slot:
            with pytest.raises(NotAcquired), limiter.slot(wait=0.05):
                pass
            slot.check()
        with limiter.slot("holder"):
            entered = threading.Event()

            def wait():
                with limiter.slot(wait=DEADLINE):
                    entered.set()

            waiter = threading.Thread(target=wait, daemon=True)
            waiter.start()
            wait_until("it waits", lambda: waiting(admin) == 1)
            assert not entered.is_set()
        assert entered.wait(DEADLINE)
        waiter.join()
        assert admin.zcard(name) == 0


@pytest.mark.parametrize("options", ON_EACH_PROTOCOL)
def test_the_same_with_asyncio(cluster, prefix, options):
    async def test():
        port = cluster[0].port
        async with redis.asyncio.RedisCluster(host="127.0.0.1", port=port, **options) as client:
            await client.initialize()
            for name in prefixes_on_each(client, prefix).values():
                limiter = AsyncLimiter(2, client, name, expiration_in_seconds=60)
                inside = most = 0

                async def work():
                    nonlocal inside, most
                    async with limiter.slot(wait=DEADLINE):
                        inside += 1
                        most = max(most, inside)
                        await client.zcard(name)
                        inside -= 1

                await asyncio.gather(*(work() for _ in range(10)))
                assert most <= 2 and await client.zcard(name) == 0

    asyncio.run(test())


def test_a_wait_follows_its_limiter_to_another_node(cluster, admins, prefix):
    with redis.RedisCluster(host="127.0.0.1", port=cluster[0].port) as client:
        limiter = Limiter(1, client, prefix, expiration_in_seconds=60)
        assert limiter.acquire_limit("holder")
        home = client.get_node_from_key(prefix).port
        pair = list(zip(cluster, admins))
        pair.sort(key=lambda each: each[0].port != home)
        (_, here), (target, there) = pair
        entered = threading.Event()

        def wait():
            with limiter.slot(wait=DEADLINE):
                entered.set()

        waiter = threading.Thread(target=wait, daemon=True)
        waiter.start()
        wait_until("it waits", lambda: waiting(here) == 1)

        slot = here.execute_command("CLUSTER KEYSLOT", prefix)
        ids = [admin.execute_command("CLUSTER MYID") for admin in (here, there)]
        there.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[0])
        here.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[1])
        here.migrate("127.0.0.1", target.port, prefix, 0, 5000)
        for admin in (there, here):
            admin.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[1])

        wait_until("it waits there", lambda: waiting(there) == 1)
        assert waiting(here) == 0 and not entered.is_set()
        assert limiter.release_limit("holder") is True
        assert entered.wait(DEADLINE)
        waiter.join()
