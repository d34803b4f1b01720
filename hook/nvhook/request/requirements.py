# SPDX-License-Identifier: Apache-2.0
"""The NVIDIA_REQUIRE_* expressions of an image, checked against what the host has. Pure: no file, no NVML.

    expression   alternatives, separated by spaces: one is enough
    alternative  terms, separated by commas: all must hold
    term         name, operator, value; empty parts are skipped, and an empty expression holds
    name         cuda, driver, arch (versions), brand (a word); in any case
    operator     = != < <= > >=; a lone `!` is `!=`; brand has = and != alone
    version      digits and dots; a missing part is 0, so 12 equals 12.0

This is libnvidia-container's reading, and so is the order: from the left, and what decides ends it. An expression is
malformed only if a term is met that is, as `brnd=x` is in `cuda>=99 brnd=x` but not behind an alternative that holds.
NVIDIA's container toolkit reads otherwise (terms with unknown names are dropped, `v1.2-rc3` is a version); images were
written for libnvidia-container. A term about something that the host does not tell holds.

An image's expressions have to hold for each GPU that its container gets: selection.py collects the facts.
"""

from __future__ import annotations

from nvhook.errors import RequirementError
from nvhook.formats.record import Record

_NAMES = ("cuda", "driver", "arch", "brand")
_OPERATORS = ("!=", "<=", ">=", "=", "<", ">", "!")  # the longer ones first
_MAX_TEXT = 32 << 10  # characters of all expressions; those of NVIDIA's images have five thousand
_MAX_VERSION = 64  # characters; Python refuses to convert thousands of digits, and takes its time below that
_ANYWAY = "set NVIDIA_DISABLE_REQUIRE=1 to start it anyway"

# CUDA version -> the first Linux driver that has it (NVIDIA, CUDA Toolkit release notes).
_MINIMUM_DRIVERS = (
    ("9.0", "384.81"),
    ("9.1", "387.26"),
    ("9.2", "396.26"),
    ("10.0", "410.48"),
    ("10.1", "418.39"),
    ("10.2", "440.33"),
    ("11.0", "450.36.06"),
    ("11.1", "455.23"),
    ("11.2", "460.27.03"),
    ("11.3", "465.19.01"),
    ("11.4", "470.42.01"),
    ("11.5", "495.29.05"),
    ("11.6", "510.39.01"),
    ("11.7", "515.43.04"),
    ("11.8", "520.61.05"),
    ("12.0", "525.60.13"),
    ("12.1", "530.30.02"),
    ("12.2", "535.54.03"),
    ("12.3", "545.23.06"),
    ("12.4", "550.54.14"),
    ("12.5", "555.42.02"),
    ("12.6", "560.28.03"),
    ("12.7", "565.57.01"),
    ("12.8", "570.26"),
    ("12.9", "575.51.03"),
    ("13.0", "580.65.06"),
)


class Facts(Record):
    """What one GPU and its driver have, each None where it is not known.

    `cuda`: the newest CUDA version of the driver (12.2); `driver`: its version (535.54.03); `arch`: the compute
    capability (9.0); `brand`: NVML's brand as a word (tesla, geforce, …). `gpu` is how messages call it.
    """

    cuda: str | None = None
    driver: str | None = None
    arch: str | None = None
    brand: str | None = None
    gpu: str = ""


def facts_of(driver: str) -> Facts:
    """What the kernel module's version alone tells: itself, and the newest CUDA version that came with it.

    The table never says too much: every driver from the named one on has that CUDA version. That of a driver from a
    branch that the table does not know is left open.
    """
    ours = _version(driver)
    newest = _version(_MINIMUM_DRIVERS[-1][1])
    if ours is None or newest is None or ours[:1] > newest[:1]:
        return Facts(driver=driver)
    known = [cuda for cuda, minimum in _MINIMUM_DRIVERS if (_version(minimum) or []) <= ours]
    return Facts(driver=driver, cuda=known[-1] if known else None)


class _Term(Record):
    """One condition; `text` is how the image has it."""

    name: str
    operator: str
    value: str
    text: str


def check(expressions: list[str] | tuple[str, ...], facts: Facts) -> None:
    """Return if all `expressions` hold; RequirementError names the first that does not, or is malformed."""
    if not _are_short(expressions):
        raise RequirementError(
            f"the image's NVIDIA_REQUIRE_* variables have more than {_MAX_TEXT} characters",
            f"shorten them, or {_ANYWAY}",
        )
    for expression in expressions:
        failing = _failing(expression, facts)
        if failing:
            raise _unsatisfied(expression, failing, facts)


def are_sure(expressions: list[str] | tuple[str, ...], facts: Facts) -> bool:
    """Whether all of them hold whatever else there may be to know; False says nothing, not even that they are well
    formed."""
    if not _are_short(expressions):
        return False
    try:
        return not any(_failing(expression, facts, unknown=False) for expression in expressions)
    except RequirementError:
        return False


def _are_short(expressions: list[str] | tuple[str, ...]) -> bool:
    """Whether they are read at all: each term takes its time, for each GPU."""
    return sum(map(len, expressions)) <= _MAX_TEXT


def _failing(expression: str, facts: Facts, *, unknown: bool = True) -> list[_Term]:
    """The first failing term of each alternative; none if the expression holds. `unknown`: what a term about something
    that is not known counts as."""
    failing = []
    for alternative in _alternatives(expression):
        term = _first_failing(expression, alternative, facts, unknown=unknown)
        if term is None:
            return []
        failing.append(term)
    return failing


def _alternatives(expression: str) -> list[list[tuple[int, str]]]:
    """Per alternative, each term with its place in the expression, from 0."""
    alternatives = []
    place = 0
    for alternative in expression.split(" "):
        terms = []
        for text in alternative.split(","):
            if text:
                terms.append((place, text))
            place += len(text) + 1  # and the comma or space behind it
        if terms:
            alternatives.append(terms)
    return alternatives


def _first_failing(expression: str, terms: list[tuple[int, str]], facts: Facts, *, unknown: bool) -> _Term | None:
    for place, text in terms:
        try:
            term = _parse(text)
        except ValueError as error:
            raise _malformed(expression, place, text, str(error)) from None
        if not _holds(term, facts, unknown=unknown):
            return term
    return None


def _parse(text: str) -> _Term:
    """ValueError says why `text` is no term."""
    end = next((place for place, character in enumerate(text) if character in "<>=!"), len(text))
    name = text[:end].lower()
    operator = next((item for item in _OPERATORS if text.startswith(item, end)), "")
    value = text[end + len(operator) :]
    if not operator:
        raise ValueError("no operator (=, !=, <, <=, >, >=)")
    if name not in _NAMES:
        raise ValueError(f"`{name}` is none of {', '.join(_NAMES)}")
    if not value:
        raise ValueError("no value")
    if operator == "!":
        operator = "!="
    if name != "brand":
        if _version(value) is None:
            raise ValueError(f"`{value}` is no version")
    elif operator not in ("=", "!="):
        raise ValueError(f"a brand has no order, so `{operator}` is not possible")
    elif value[0] in "<>=!":
        raise ValueError(f"`{operator}{value[0]}` is no operator")
    return _Term(name, operator, value, text)


def _version(text: str) -> list[int] | None:
    """The parts as numbers, without zeros at the end, so that equal versions are equal lists; None if it is none."""
    if len(text) > _MAX_VERSION or not text.strip(".") or any(item not in "0123456789." for item in text):
        return None
    parts = [int(part or "0") for part in text.split(".")]
    while parts and parts[-1] == 0:
        parts.pop()
    return parts


def _holds(term: _Term, facts: Facts, *, unknown: bool = True) -> bool:
    present = _fact(facts, term.name)
    if present is None:
        return unknown
    if term.name == "brand":
        return (present.lower() == term.value.lower()) == (term.operator == "=")
    ours, wanted = _version(present), _version(term.value)
    if ours is None or wanted is None:  # a driver with a name for a version tells nothing either
        return unknown
    return {
        "=": ours == wanted,
        "!=": ours != wanted,
        "<": ours < wanted,
        "<=": ours <= wanted,
        ">": ours > wanted,
        ">=": ours >= wanted,
    }[term.operator]


def _fact(facts: Facts, name: str) -> str | None:
    return {"cuda": facts.cuda, "driver": facts.driver, "arch": facts.arch, "brand": facts.brand}[name]


def _unsatisfied(expression: str, failing: list[_Term], facts: Facts) -> RequirementError:
    """Says what is wrong with the first alternative: in NVIDIA's images that is the plain one, the driver's version."""
    term = failing[0]
    message = f"image needs `{expression}`, "
    if len(failing) > 1:
        message += f"of which no alternative holds: for `{term.text}`, "
    elif term.text != expression:
        message += f"of which `{term.text}` does not hold: "
    return RequirementError(message + _present(term.name, facts), _remedy(term))


def _present(name: str, facts: Facts) -> str:
    is_of_gpu = name in ("arch", "brand") and facts.gpu
    present = f"{f'GPU {facts.gpu}' if is_of_gpu else 'this host'} has {name} {_fact(facts, name)}"
    if name == "cuda" and facts.driver is not None:
        present += f" (driver {facts.driver})"
    return present


def _remedy(term: _Term) -> str:
    """For a term that wants something newer, the driver that has it."""
    driver = ""
    if term.name == "cuda" and term.operator in (">", ">="):
        driver = _minimum_driver(term)
    elif term.name == "driver" and term.operator == ">=":
        driver = term.value
    return f"install driver {driver} or newer, or {_ANYWAY}" if driver else _ANYWAY


def _minimum_driver(term: _Term) -> str:
    """The lowest driver in the table that satisfies `term`; empty for a CUDA version that the table does not reach."""
    for cuda, driver in _MINIMUM_DRIVERS:
        if _holds(term, Facts(cuda=cuda)):
            return driver
    return ""


def _malformed(expression: str, place: int, text: str, why: str) -> RequirementError:
    return RequirementError(
        f"`{expression}` is no requirement: `{text}` at character {place + 1}: {why}",
        f"correct the image's NVIDIA_REQUIRE_* variable, or {_ANYWAY}",
    )
