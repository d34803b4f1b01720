# SPDX-License-Identifier: Apache-2.0
"""JSON in the hot path of a start: the C scanner and encoder of the standard library, without its package.

`import json` brings regular expressions and costs 7 ms, as much as the interpreter itself; `_json` costs nothing. Where
an interpreter has no such module, or one that wants other arguments, the package does the work.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any  # noqa: TID251 - never at run time

_BLANK = " \t\n\r"


def loads(content: bytes) -> Any:
    """The value that UTF-8 text holds. ValueError says where it is not JSON; RecursionError if nested too deep."""
    # Lone surrogates, which JavaScript writes, survive; a byte order mark is no JSON here.
    text = content.decode("utf-8", "surrogatepass")
    start = len(text) - len(text.lstrip(_BLANK))
    try:
        value, end = _scan(text, start)
        if not text[end:].strip(_BLANK):
            return value
    except (StopIteration, SystemError, ValueError):  # the scanner lacks its package to say what is wrong
        pass
    from json import JSONDecoder

    return JSONDecoder(parse_constant=_no_constant).decode(text)


def dumps(value: object) -> bytes:
    """UTF-8, on one line without blanks. ValueError for a value that refers to itself, and for NaN."""
    return "".join(_encoder()(value, 0)).encode("utf-8", "surrogatepass")


def _no_constant(name: str) -> object:
    raise ValueError(f"`{name}` is no JSON")


class _Context:
    """What the scanner asks for, under the names of json.JSONDecoder."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = staticmethod(_no_constant)


def _no_default(value: object) -> object:
    raise TypeError(f"{type(value).__name__} is no JSON")


try:
    from _json import encode_basestring, make_encoder, make_scanner

    _scan: Any = make_scanner(_Context)  # type: ignore[arg-type]

    def _encoder() -> Any:
        # The first argument is where it notes what it is inside of; a failure leaves that as it was then.
        return make_encoder({}, _no_default, encode_basestring, None, ":", ",", False, False, False)

    _encoder()
except (ImportError, TypeError, AttributeError):
    from json import JSONDecoder, JSONEncoder

    _scan = JSONDecoder(parse_constant=_no_constant).scan_once  # type: ignore[attr-defined]

    def _encoder() -> Any:
        encoder = JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return lambda value, _level: [encoder.encode(value)]
