# SPDX-License-Identifier: Apache-2.0
"""The base of records: a class names its fields and their types, and gets slots, a constructor, `==` and a repr.

It is what dataclasses give. They cost 16 ms to import, which is more than a container start has to spare.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any  # noqa: TID251 - never at run time

    from typing_extensions import dataclass_transform
else:

    def dataclass_transform() -> object:
        """What tells a type checker that a class of this metaclass has a constructor of its fields."""
        return lambda made: made


@dataclass_transform()
class _RecordType(type):
    _fields: tuple[str, ...]
    _defaults: dict[str, Any]

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> type:
        fields = tuple(namespace.get("__annotations__", ()))
        defaults = {field: namespace.pop(field) for field in fields if field in namespace}
        own = {"__slots__": fields, "_fields": fields, "_defaults": defaults}
        return super().__new__(cls, name, bases, {**namespace, **own})


class Record(metaclass=_RecordType):
    """Fields in the order in which they are named, by position or by name. TypeError where one is missing."""

    def __init__(self, *values: Any, **named: Any) -> None:
        fields, defaults = type(self)._fields, type(self)._defaults
        for field, value in zip(fields, values, strict=False):
            setattr(self, field, value)
        for field in fields[len(values) :]:
            value = named.pop(field) if field in named else defaults.get(field, _MISSING)
            if value is _MISSING:
                raise TypeError(f"{type(self).__name__}: no value for `{field}`")
            setattr(self, field, value)
        if named or len(values) > len(fields):
            raise TypeError(f"{type(self).__name__} has no field for {[*named, *values[len(fields) :]]}")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        pairs = zip(type(self)._fields, self._values(), strict=True)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in pairs)})"

    def _values(self) -> tuple[Any, ...]:
        return tuple([getattr(self, field) for field in type(self)._fields])


_MISSING = object()
