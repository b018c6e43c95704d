"""Real servers with the module for the tests, on free ports.

- The server is `$REDIS_SERVER`, the module's library `$LIMITER_MODULE`: `scripts/test-clients`
  says so.
- Each test has a limiter name of its own, so that they share the servers.
- Nothing waits for a time to pass, only for a condition, with a deadline (`wait_until`).
"""

import os
import socket
import subprocess
import tempfile
import time
import uuid

import pytest
import redis
from redis.cluster import RedisCluster

DEADLINE = 20

ON_EACH_PROTOCOL = [
    pytest.param({"protocol": protocol, "decode_responses": decode}, id=f"resp{protocol}-{name}")
    for protocol in (2, 3)
    for decode, name in ((False, "bytes"), (True, "text"))
]


def wait_until(what, condition):
    give_up = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < give_up, f"waited in vain until {what}"
        time.sleep(0.002)  # Between two looks, not instead of them.


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    def __init__(self, *options):
        self._folder = tempfile.TemporaryDirectory()
        for _ in range(20):  # Another process may take the port between our look and the server's.
            self.port = free_port()
            self.socket = os.path.join(self._folder.name, "socket")
            command = [os.environ["REDIS_SERVER"], "--port", str(self.port), "--save", ""]
            command += ["--unixsocket", self.socket, "--dir", self._folder.name]
            command += ["--loadmodule", os.environ["LIMITER_MODULE"], *options]
            if "--cluster-enabled" in options:
                self.bus = free_port()
                command += ["--cluster-port", str(self.bus)]
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            if self._comes_up():
                return
        raise AssertionError("the server does not start")

    def _comes_up(self):
        up = False

        def settled():
            nonlocal up
            try:
                # A client without retries: it must not take the time of the look itself.
                with redis.Redis(port=self.port, socket_timeout=1) as client:
                    up = client.ping()
            except (redis.ConnectionError, redis.TimeoutError):
                pass
            return up or self.process.poll() is not None

        wait_until("the server is up", settled)
        return up

    def stop(self):
        self.process.kill()
        self.process.wait()
        self._folder.cleanup()


@pytest.fixture(scope="session")
def server():
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def own_server():
    """A server for one test, which may do to it what it likes."""
    server = Server()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def cluster():
    """Two masters, each with half of the slots."""
    nodes = [Server("--cluster-enabled", "yes") for _ in range(2)]
    admins = [redis.Redis(port=node.port) for node in nodes]
    for admin, (first, last) in zip(admins, ((0, 8191), (8192, 16383))):
        admin.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
    meet = ("CLUSTER MEET", "127.0.0.1", nodes[1].port, nodes[1].bus)
    admins[0].execute_command(*meet)

    def whole():
        infos = [admin.execute_command("CLUSTER INFO") for admin in admins]
        return all(
            info["cluster_state"] == "ok" and info["cluster_slots_ok"] == "16384" for info in infos
        )

    wait_until("the cluster is whole", whole)
    for admin in admins:
        admin.close()
    yield nodes
    for node in nodes:
        node.stop()


@pytest.fixture
def prefix():
    return f"limiter-{uuid.uuid4().hex}"


@pytest.fixture
def admin(server):
    with redis.Redis(port=server.port, decode_responses=True) as client:
        yield client


@pytest.fixture(params=ON_EACH_PROTOCOL)
def client(request, server):
    with redis.Redis(port=server.port, **request.param) as client:
        yield client


@pytest.fixture(params=ON_EACH_PROTOCOL)
def cluster_client(request, cluster):
    with RedisCluster(host="127.0.0.1", port=cluster[0].port, **request.param) as client:
        yield client


def waiting(client):
    """How many clients wait in line."""
    return int(client.info("clients")["blocked_clients"])


def in_line(client):
    """Those clients, as CLIENT LIST has them. Who has left may still be listed, but not blocked."""
    return [c for c in client.client_list() if "b" in c["flags"]]
