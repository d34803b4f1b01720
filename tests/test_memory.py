# SPDX-License-Identifier: Apache-2.0
"""After a fork, what has been populated costs no faults any more."""

import os
import resource

import pytest

from nvhook.linux import memory

_PAGES = 1000
_SIZE = os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("is_populated", "expected"), [(False, range(_PAGES // 2, 2 * _PAGES)), (True, range(_PAGES // 10))]
)
def test_faults_of_a_child(is_populated: bool, expected: range) -> None:
    shared = bytearray(_PAGES * _SIZE)
    for place in range(0, len(shared), _SIZE):
        shared[place] = 1
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        try:
            if is_populated:
                memory.populate()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for place in range(0, len(shared), _SIZE):
                shared[place] = 2
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
            os.write(theirs, str(faults).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(theirs)
    with open(ours) as file:
        assert int(file.read()) in expected
