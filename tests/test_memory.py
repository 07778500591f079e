"""Freed memory: kept on glibc, the environment's word stands, and processes that start later know."""

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import os, resource
import numpy as np
from otcxr.memory import keep_memory

done = keep_memory() if {keep} else None

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        np.full(1 << 21, 1.0)  # 16 MiB
        np.full(1 << 23, 1.0)  # 64 MiB, more than glibc ever learns to keep by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(done, faults(), os.environ.get("MALLOC_TOP_PAD_"))
"""


def run(keep, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(keep=keep)], env={**clean, **environment},
                          capture_output=True, text=True, check=True)  # fmt: skip
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_blocks_are_not_asked_for_again():
    _, usual, _ = run(False)
    done, kept, told = run(True)
    assert done == "True"
    assert told == str(64 << 20)
    assert int(usual) > 50  # at the least one for each of the large blocks
    assert int(kept) < int(usual) / 10


def test_the_environment_has_the_last_word():
    assert run(True, MALLOC_TOP_PAD_="1048576")[::2] == ["False", "1048576"]
    assert run(True, GLIBC_TUNABLES="glibc.malloc.top_pad=1048576")[::2] == ["False", "None"]
