"""The READMEs' blocks of Python are run as they stand, but for the server's port."""

import os
import pathlib
import subprocess
import sys

import pytest
import redis

PACKAGE = pathlib.Path(__file__).parent.parent
BLOCKS = [
    pytest.param(block.split("```")[0], id=f"{file.parent.name or 'main'}-{n}")
    for file in (PACKAGE / "README.md", PACKAGE.parent.parent / "README.md")
    for n, block in enumerate(file.read_text().split("```python\n")[1:])
]


def run(block, server):
    assert "Redis()" in block
    block = block.replace("Redis()", f"Redis(port={server.port})")
    # The package is the installed one, not the folder's.
    command = [sys.executable, "-W", "error", "-c", block]
    done = subprocess.run(command, cwd=os.sep, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("block", BLOCKS)
def test_the_blocks_run(block, server):
    with redis.Redis(port=server.port) as client:
        assert run(block, server) in ("part 0\npart 1\npart 2\n", "one of two\n")
        assert client.zcard("my-operation") == 0


def test_there_are_blocks():
    assert len(BLOCKS) == 3
