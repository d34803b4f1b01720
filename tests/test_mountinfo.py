# SPDX-License-Identifier: Apache-2.0
"""mountinfo as the kernel writes it, with paths that an image chose."""

from __future__ import annotations

import pytest

from nvhook.linux import mountinfo

TEXT = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
90 22 0:50 / /with\\040space rw - tmpfs none rw
91 22 0:51 / /no-break\u00a0space/and\u2028line\x85end rw master:3 - tmpfs none rw
92 22 0:52 / /carriage\rreturn rw shared:7 master:2 - tmpfs none rw
93 22 0:53 / /a\\134b\\011c\\012d rw - tmpfs shared:9 rw
"""


def test_mount_points() -> None:
    assert mountinfo.mount_points(TEXT) == {
        "/",
        "/with space",
        "/no-break\u00a0space/and\u2028line\x85end",
        "/carriage\rreturn",
        "/a\\b\tc\nd",
    }


def test_shared_looks_at_the_optional_fields_alone() -> None:
    assert mountinfo.shared(TEXT) == {22, 92}


@pytest.mark.parametrize("text", ["", "\n", "1", "1 2 3 4", "x y z\n"], ids=repr)
def test_lines_that_are_none(text: str) -> None:
    assert mountinfo.mount_points(text) == set()
    assert mountinfo.shared(text) == frozenset()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("1 2 3 - /x rw shared:1", id="end-of-the-fields-too-early"),
        pytest.param("x 2 3 / /x rw shared:1 - a b c", id="no-number"),
        pytest.param(f"{'9' * 5000} 2 3 / /x rw shared:1 - a b c", id="endless-number"),
    ],
)
def test_shared_of_lines_that_are_none(text: str) -> None:
    assert mountinfo.shared(text) == frozenset()


def test_mounts() -> None:
    text = "95 91 254:0 /lib/libcuda.so.1\\040x//deleted /usr/lib/libcuda.so.1 ro,nosuid - ext4 /dev/vda rw\n"
    found = [(item.id, item.root, item.point, item.fstype) for item in mountinfo.mounts(TEXT + text)]
    assert found[0] == (22, "/", "/", "ext4")
    assert found[1] == (90, "/", "/with space", "tmpfs")
    assert found[3] == (92, "/", "/carriage\rreturn", "tmpfs")
    assert found[-1] == (95, "/lib/libcuda.so.1 x//deleted", "/usr/lib/libcuda.so.1", "ext4")
    assert len(found) == 6


@pytest.mark.parametrize("text", ["", "1 2 3 / /x rw", "1 2 3 / /x rw -", "x 2 3 / /x rw - a b c"], ids=repr)
def test_mounts_of_lines_that_are_none(text: str) -> None:
    assert mountinfo.mounts(text) == []
