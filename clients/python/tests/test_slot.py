"""`with limiter.slot(...)`: it waits in line, holds, renews, tells a loss and gives back."""

import signal
import threading
import time

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import SentinelConnectionPool

from conftest import ON_EACH_PROTOCOL, in_line, wait_until, waiting
from redis_limiter import LeaseLost, Limiter, LimiterError, NotAcquired
from redis_limiter._core import finish


class Waiter(threading.Thread):
    """Enters a slot in another thread and stays until it is told to leave."""

    def __init__(self, slot):
        super().__init__(daemon=True)
        self.slot, self.error = slot, None
        self.inside, self.leave = threading.Event(), threading.Event()
        self.start()

    def run(self):
        try:
            with self.slot:
                self.inside.set()
                self.leave.wait(20)
        except BaseException as error:
            self.error = error

    def end(self):
        self.leave.set()
        self.join(20)
        assert not self.is_alive()
        return self.error


def test_a_slot_is_held_in_the_block_and_free_after_it(client, prefix):
    limiter = Limiter(1, client, prefix)
    with limiter.slot("k", wait=5) as slot:
        assert slot.key == "k"
        assert client.zcard(prefix) == 1 and not limiter.acquire_limit("other")
        assert not slot.lost
        slot.check()
    assert client.zcard(prefix) == 0
    with pytest.raises(ZeroDivisionError), limiter.slot("k"):
        1 / 0
    assert client.zcard(prefix) == 0


def test_keys_are_unique_unless_named(admin, prefix):
    limiter = Limiter(3, admin, prefix)
    with limiter.slot(), limiter.slot(), limiter.slot():
        assert admin.zcard(prefix) == 3
        with pytest.raises(NotAcquired), limiter.slot(wait=0):
            pass


def test_waiters_stand_in_line_and_are_handed_the_slot(client, admin, prefix):
    limiter = Limiter(1, client, prefix, expiration_in_seconds=60)
    assert limiter.acquire_limit("holder")
    first = Waiter(limiter.slot("first", wait=20))
    wait_until("the first waits", lambda: waiting(admin) == 1)
    second = Waiter(limiter.slot("second"))
    wait_until("the second waits", lambda: waiting(admin) == 2)
    limiter.release_limit("holder")
    assert first.inside.wait(20) and not second.inside.is_set()
    assert first.end() is None
    assert second.inside.wait(20)
    assert second.end() is None
    assert admin.zcard(prefix) == 0


def test_no_slot_in_time_is_an_error_and_nothing_is_held(client, admin, prefix):
    limiter = Limiter(1, client, prefix)
    limiter.acquire_limit("holder")
    for wait in (0, 0.0001, 0.05):
        before = time.monotonic()
        with pytest.raises(NotAcquired, match=f"within {wait} s"), limiter.slot("k", wait=wait):
            pass
        # The server counts in milliseconds.
        assert wait - 0.005 < time.monotonic() - before < 5
    assert admin.zrange(prefix, 0, -1) == ["holder"]
    assert waiting(admin) == 0
    assert issubclass(NotAcquired, LimiterError) and issubclass(LeaseLost, LimiterError)


def test_the_last_moment_of_a_wait_is_not_a_wait_without_end(admin, prefix):
    limiter = Limiter(1, admin, prefix)
    limiter.acquire_limit("holder")
    # 0 would be, to the server.
    assert finish(limiter.slot("k")._acquire_in_line(left=0.0001)) is False


def test_the_clients_time_out_does_not_cut_a_wait_short(server, admin, prefix):
    with redis.Redis(port=server.port, socket_timeout=0.05) as client:
        limiter = Limiter(1, client, prefix, expiration_in_seconds=60)
        limiter.acquire_limit("holder")
        for wait in (20, None):
            waiter = Waiter(limiter.slot("k", wait=wait))
            wait_until("it waits", lambda: waiting(admin) == 1)
            (blocked,) = in_line(admin)
            before = time.monotonic()
            wait_until("time-outs are over", lambda: time.monotonic() > before + 0.2)
            # It is still the same wait, with its place in line.
            assert [c["id"] for c in in_line(admin)] == [blocked["id"]]
            limiter.release_limit("holder")
            assert waiter.inside.wait(20)
            assert waiter.end() is None
            limiter.acquire_limit("holder")


def test_waiters_do_not_use_up_the_pool(server, admin, prefix):
    # With as few connections as this, waiters on them would keep the holder from releasing.
    pool = redis.BlockingConnectionPool(port=server.port, max_connections=1, timeout=1)
    limiter = Limiter(1, redis.Redis(connection_pool=pool), prefix, expiration_in_seconds=60)
    with limiter.slot():
        waiters = [Waiter(limiter.slot()) for _ in range(3)]
        wait_until("all wait", lambda: waiting(admin) == 3)
    for waiter in waiters:
        waiter.leave.set()
    assert [waiter.end() for waiter in waiters] == [None] * 3
    pool.disconnect()


def test_a_wait_goes_on_after_unblocked_and_after_a_lost_connection(own_server, prefix):
    with redis.Redis(port=own_server.port, decode_responses=True) as admin:
        limiter = Limiter(1, redis.Redis(port=own_server.port), prefix, expiration_in_seconds=60)
        limiter.acquire_limit("holder")
        waiter = Waiter(limiter.slot("k", wait=20))

        def waits_anew(after):
            found = [c["id"] for c in in_line(admin)]
            return found != after and found

        wait_until("it waits", lambda: waits_anew([]))
        first = waits_anew([])
        admin.client_kill_filter(_id=first[0])
        wait_until("it waits again", lambda: waits_anew(first))
        # A server that becomes a replica lets its waiters go with UNBLOCKED.
        second = waits_anew([])
        admin.replicaof("127.0.0.1", 1)
        wait_until("it was let go", lambda: waiting(admin) == 0)
        admin.replicaof("NO", "ONE")
        wait_until("it waits again", lambda: waits_anew(second))
        assert not waiter.inside.is_set()
        limiter.release_limit("holder")
        assert waiter.inside.wait(20) and waiter.end() is None
        limiter.redis.close()


def test_a_wait_that_broke_off_ends_in_time(own_server, prefix):
    fast = Retry(NoBackoff(), 0)
    with redis.Redis(port=own_server.port, retry=fast) as client:
        limiter = Limiter(1, client, prefix, expiration_in_seconds=60)
        limiter.acquire_limit("holder")
        waiter = Waiter(limiter.slot("k", wait=0.5))
        wait_until("it waits", lambda: waiting(client) == 1)
        own_server.process.kill()
        error = waiter.end()
        assert isinstance(error, NotAcquired)
        assert isinstance(error.__cause__, redis.ConnectionError)
        # And before a wait, a server that is away is an error as for any command.
        with pytest.raises(redis.ConnectionError), limiter.slot("k", wait=5):
            pass


def test_errors_of_the_server_come_out_as_they_are(admin, prefix):
    admin.set(prefix, "no sorted set")
    limiter = Limiter(1, admin, prefix)
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"), limiter.slot(wait=5):
        pass
    admin.delete(prefix)
    limiter.acquire_limit("holder")
    waiter = Waiter(limiter.slot("k", wait=20))
    wait_until("it waits", lambda: waiting(admin) == 1)
    admin.set(prefix, "no sorted set")
    error = waiter.end()
    assert isinstance(error, redis.ResponseError) and "WRONGTYPE" in str(error)
    with pytest.raises(redis.ResponseError, match="invalid expire time"):
        limiter.slot(expiration_in_seconds=-1).__enter__()


def test_a_lease_is_renewed_for_as_long_as_the_block_lasts(admin, prefix):
    limiter = Limiter(1, admin, prefix, expiration_in_seconds=60)
    with limiter.slot("k", expiration_in_seconds=1.5) as slot:
        first_end = admin.zscore(prefix, "k")
        wait_until("it has outlived its first lease", lambda: time.time() > first_end + 0.5)
        assert limiter.acquire_limit("another") is False
        slot.check()
    assert admin.zcard(prefix) == 0


def test_a_lease_got_after_a_wait_is_renewed_at_once(admin, prefix):
    admin.config_resetstat()
    limiter = Limiter(1, admin, prefix, expiration_in_seconds=60)
    limiter.acquire_limit("holder")
    waiter = Waiter(limiter.slot("k", wait=20, expiration_in_seconds=600))
    wait_until("it waits", lambda: waiting(admin) == 1)
    limiter.release_limit("holder")
    assert waiter.inside.wait(20)
    # How long ago it was granted the holder cannot know: the first renewal does not wait.
    wait_until("it was renewed", lambda: "cmdstat_limiter.renew" in admin.info("commandstats"))
    assert waiter.end() is None


def test_a_lost_lease_is_told_in_the_block_and_after_it(client, prefix):
    limiter = Limiter(1, client, prefix, expiration_in_seconds=1.5)
    with pytest.raises(LeaseLost, match="'k' has lost its slot"), limiter.slot("k") as slot:
        assert slot.wait_lost(0) is False
        client.delete(prefix)
        limiter.acquire_limit("another", 60)
        assert slot.wait_lost(20) is True
        assert slot.lost
        with pytest.raises(LeaseLost):
            slot.check()
    # The other's lease is untouched, and a lost one is not taken back.
    assert client.zcard(prefix) == 1
    # An error of the block's own goes first.
    limiter.release_limit("another")
    with pytest.raises(ZeroDivisionError), limiter.slot("k") as slot:
        client.delete(prefix)
        assert slot.wait_lost() is True
        1 / 0


def test_a_loss_that_no_renewal_has_seen_is_told_on_leaving(admin, prefix):
    limiter = Limiter(1, admin, prefix, expiration_in_seconds=600)
    with pytest.raises(LeaseLost), limiter.slot("k") as slot:
        admin.delete(prefix)
        assert not slot.lost


def test_a_lease_is_lost_when_its_server_does_not_answer(own_server, prefix):
    fast = Retry(NoBackoff(), 0)
    with redis.Redis(port=own_server.port, retry=fast) as client:
        limiter = Limiter(1, client, prefix, expiration_in_seconds=0.5)
        with pytest.raises(ZeroDivisionError), limiter.slot("k") as slot:
            own_server.process.kill()
            before = time.monotonic()
            # As late as the lease's certain end, and no later.
            assert slot.wait_lost(20) is True
            assert time.monotonic() - before < 5
            1 / 0  # And an error of the block's own is not hidden by the failing release.
        with pytest.raises(LeaseLost):
            slot.check()


def test_a_renewal_that_fails_is_tried_again_while_the_lease_lives(own_server, prefix):
    failures = []

    class Client(redis.Redis):
        def execute_command(self, *args, **options):
            try:
                return super().execute_command(*args, **options)
            except redis.RedisError as error:
                failures.append(error)
                raise

    options = {"socket_timeout": 0.1, "retry": Retry(NoBackoff(), 0)}
    with redis.Redis(port=own_server.port) as admin:
        with Client(port=own_server.port, **options) as client:
            with Limiter(1, client, prefix, expiration_in_seconds=3).slot("k") as slot:
                end = admin.zscore(prefix, "k")
                own_server.process.send_signal(signal.SIGSTOP)
                wait_until("a renewal has failed", lambda: failures)
                assert not slot.lost
                own_server.process.send_signal(signal.SIGCONT)
                wait_until("it was renewed", lambda: (admin.zscore(prefix, "k") or 0) > end)
                assert not slot.lost


def test_a_release_that_fails_is_an_error_unless_the_block_has_its_own(own_server, prefix):
    fast = Retry(NoBackoff(), 0)
    with redis.Redis(port=own_server.port, retry=fast) as client:
        limiter = Limiter(2, client, prefix, expiration_in_seconds=60)
        with pytest.raises(redis.ConnectionError):
            with limiter.slot():
                try:
                    with limiter.slot():
                        own_server.process.kill()
                        own_server.process.wait()
                        1 / 0
                except Exception as error:
                    inner = error
        assert isinstance(inner, ZeroDivisionError)


@pytest.mark.parametrize("options", ON_EACH_PROTOCOL)
@pytest.mark.parametrize("way", ["url", "socket", "sentinel"])
def test_waits_go_the_way_of_the_clients_own_connections(server, admin, prefix, way, options):
    if way == "url":
        client = redis.Redis.from_url(f"redis://127.0.0.1:{server.port}/3", **options)
    elif way == "socket":
        client = redis.Redis(unix_socket_path=server.socket, db=3, **options)
    else:

        class Sentinels:
            def discover_master(self, name):
                return "127.0.0.1", server.port

        client = redis.Redis(
            connection_pool=SentinelConnectionPool("one", Sentinels(), db=3, **options)
        )
    with client:
        limiter = Limiter(1, client, prefix, expiration_in_seconds=60)
        with limiter.slot():
            waiter = Waiter(limiter.slot(wait=20))
            wait_until("it waits", lambda: waiting(admin) == 1)
            (found,) = in_line(admin)
            assert found["db"] == "3"
        assert waiter.inside.wait(20) and waiter.end() is None
        client.connection_pool.disconnect()
