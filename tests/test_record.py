# SPDX-License-Identifier: Apache-2.0
"""The base of records, beside what dataclasses would make of the same class."""

from __future__ import annotations

import pytest

from nvhook.formats.record import Record


class Point(Record):
    """Of two fields, one with a default."""

    x: int
    name: str = "origin"

    def moved(self) -> Point:
        return Point(self.x + 1, self.name)


def test_fields_by_position_and_by_name() -> None:
    made = Point(1, name="a")
    assert (made.x, made.name) == (1, "a")
    assert (Point(x=2).x, Point(2).name) == (2, "origin")
    assert made.moved() == Point(2, "a")


def test_equal_if_all_fields_are() -> None:
    assert Point(1) == Point(1, "origin")
    assert Point(1) != Point(2)
    assert Point(1) != (1, "origin")
    assert len({Point(1), Point(1), Point(2)}) == 2


def test_repr_can_be_read() -> None:
    assert repr(Point(1, "a")) == "Point(x=1, name='a')"


@pytest.mark.parametrize(
    ("values", "named", "message"),
    [
        ((), {}, "Point: no value for `x`"),
        ((1, "a", 2), {}, r"Point has no field for \[2\]"),
        ((1,), {"y": 2}, r"Point has no field for \['y'\]"),
        ((1,), {"x": 2}, r"Point has no field for \['x'\]"),
    ],
)
def test_wrong_values(values: tuple[object, ...], named: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Point(*values, **named)  # type: ignore[arg-type]


def test_nothing_else_can_be_set() -> None:
    """As with slots of one's own: a name that is written wrong is found."""
    with pytest.raises(AttributeError):
        Point(1).z = 2  # type: ignore[attr-defined]
