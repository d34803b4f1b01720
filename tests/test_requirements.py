# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvhook.errors import RequirementError
from nvhook.request.requirements import Facts, are_sure, check, facts_of

HOST = Facts(cuda="12.2", driver="535.54.03", arch="9.0", brand="tesla")

# What CUDA images carry (shortened): new enough, or a data centre's long-lived branch with the compat package.
CUDA_IMAGE = (
    "cuda>=12.6 brand=unknown,driver>=470,driver<471 brand=tesla,driver>=535,driver<536 "
    "brand=geforce,driver>=535,driver<536"
)

HOLD = {
    "empty": "",
    "blank": "   ",
    "only-commas": ",, ,",
    "cuda-equal-or-newer": "cuda>=12.2",
    "cuda-older-asked": "cuda>=11.8",
    "cuda-not-as-text": "cuda>=9.0",
    "cuda-above": "cuda>12.1",
    "cuda-exactly": "cuda=12.2",
    "cuda-not": "cuda!=12.3",
    "lone-exclamation-mark": "cuda!12.3",
    "cuda-at-most": "cuda<=12.2",
    "cuda-below": "cuda<13",
    "missing-parts-are-zero": "arch=9",
    "more-parts-of-zero": "arch=9.0.0.0",
    "zeros-before": "cuda=012.02",
    "dot-at-end": "arch=9.",
    "empty-part-is-zero": "arch=9..0",
    "driver-range": "driver>=535,driver<536",
    "driver-parts-as-numbers": "driver>=535.54.3,driver<=535.54.03",
    "arch": "arch>=8.9",
    "brand": "brand=tesla",
    "brand-in-capitals": "brand=TESLA",
    "brand-not": "brand!=geforce",
    "name-in-capitals": "CUDA>=12.0,Brand=tesla",
    "and": "cuda>=12.0,arch>=7.0,brand=tesla",
    "empty-and-parts": ",cuda>=12.0,,arch>=7.0,",
    "second-alternative": "cuda>=12.6 brand=tesla",
    "many-spaces": "  cuda>=12.6   brand=tesla ",
    "cuda-image": CUDA_IMAGE,
    "malformed-behind-what-holds": "cuda>=12 brnd=x",
    "malformed-behind-what-fails-in-its-alternative": "cuda>=99,brnd=x cuda>=12",
}


@pytest.mark.parametrize("expression", HOLD.values(), ids=HOLD)
def test_check_holds(expression: str) -> None:
    check([expression], HOST)


FAIL = {
    "cuda-newer-asked": ("cuda>=12.6", "cuda>=12.6"),
    "cuda-newer-not-as-text": ("cuda>=12.10", "cuda>=12.10"),
    "cuda-longer": ("cuda>=12.2.1", "cuda>=12.2.1"),
    "cuda-above-itself": ("cuda>12.2", "cuda>12.2"),
    "cuda-other": ("cuda=12.3", "cuda=12.3"),
    "cuda-not-itself": ("cuda!=12.2.0", "cuda!=12.2.0"),
    "lone-exclamation-mark": ("cuda!12.2", "cuda!12.2"),
    "cuda-below": ("cuda<12.2", "cuda<12.2"),
    "cuda-at-most": ("cuda<=11", "cuda<=11"),
    "driver": ("driver>=550", "driver>=550"),
    "arch": ("arch>=10.0", "arch>=10.0"),
    "brand": ("brand=geforce", "brand=geforce"),
    "brand-not": ("brand!=Tesla", "brand!=Tesla"),
    "second-of-two": ("cuda>=12,brand=geforce", "brand=geforce"),
    "first-alternative-is-named": ("driver<471,cuda>=99 brand=geforce", "driver<471"),
}


@pytest.mark.parametrize(("expression", "term"), FAIL.values(), ids=FAIL)
def test_check_fails(expression: str, term: str) -> None:
    with pytest.raises(RequirementError) as caught:
        check([expression], HOST)
    assert f"image needs `{expression}`" in caught.value.message
    assert f"`{term}`" in caught.value.message
    assert "this host has" in caught.value.message
    assert "NVIDIA_DISABLE_REQUIRE=1" in caught.value.remedy


MALFORMED = {
    "unknown-name": ("foo=45", "`foo=45` at character 1: `foo` is none of"),
    "no-name": (">=12", "`>=12` at character 1: `` is none of"),
    "no-operator": ("cuda", "`cuda` at character 1: no operator"),
    "no-operator-but-a-value": ("cuda12", "`cuda12` at character 1: no operator"),
    "no-value": ("cuda>=", "`cuda>=` at character 1: no value"),
    "no-brand": ("brand=", "`brand=` at character 1: no value"),
    "two-equal-signs": ("cuda==12", "`=12` is no version"),
    "two-equal-signs-for-a-brand": ("brand==tesla", "`==` is no operator"),
    "turned-around": ("cuda=>12", "`>12` is no version"),
    "word-for-version": ("cuda=foo", "`foo` is no version"),
    "letter-before-version": ("cuda>=v12", "`v12` is no version"),
    "pre-release": ("cuda>=12.6-rc1", "`12.6-rc1` is no version"),
    "only-a-dot": ("cuda>=.", "`.` is no version"),
    "superscript-digit": ("cuda>=12²", "is no version"),
    "arabic-digit": ("cuda>=١٢", "is no version"),
    "minus": ("cuda>=-1", "`-1` is no version"),
    "thousands-of-digits": ("cuda<" + "9" * 5000, "is no version"),
    "brand-with-an-order": ("brand>=tesla", "a brand has no order"),
    "tab-is-no-space": ("cuda>=12.2\tarch>=7", "is no version"),
    "newline-at-end": ("cuda>=12.2\n", "is no version"),
    "space-in-a-term": ("cuda >= 13", "`cuda` at character 1: no operator"),
    "place-in-and": ("cuda>=12.0,brnd=x", "`brnd=x` at character 12"),
    "place-in-or": ("cuda>=13 ,brnd=x", "`brnd=x` at character 11"),
    "before-what-would-hold": ("brnd=x cuda>=1", "`brnd=x` at character 1"),
}


@pytest.mark.parametrize(("expression", "why"), MALFORMED.values(), ids=MALFORMED)
def test_check_malformed(expression: str, why: str) -> None:
    with pytest.raises(RequirementError) as caught:
        check([expression], HOST)
    assert caught.value.message.startswith(f"`{expression}` is no requirement: ")
    assert why in caught.value.message
    assert "NVIDIA_DISABLE_REQUIRE=1" in caught.value.remedy


UNKNOWN = {
    "nothing-known": ("cuda>=99,driver>=999,arch>=99,brand=x", Facts()),
    "brand-not-known": ("brand=x,brand!=x", Facts(cuda="12.2")),
    "driver-without-a-number": ("driver>=999", Facts(driver="unknown")),
}


@pytest.mark.parametrize(("expression", "facts"), UNKNOWN.values(), ids=UNKNOWN)
def test_check_what_the_host_does_not_tell_holds(expression: str, facts: Facts) -> None:
    check([expression], facts)


def test_check_malformed_though_nothing_is_known() -> None:
    with pytest.raises(RequirementError):
        check(["cuda>=foo"], Facts())


def test_check_every_expression_must_hold() -> None:
    check(["cuda>=12", "arch>=9"], HOST)
    check([], HOST)
    with pytest.raises(RequirementError, match="`arch>=10`"):
        check(["cuda>=12", "arch>=10", "brnd=x"], HOST)


SURE = {
    "nothing": ([], True),
    "empty": (["", " , "], True),
    "holds": (["cuda>=12.2"], True),
    "fails": (["cuda>=12.3"], False),
    "both-hold": (["cuda>=12.2", "driver>=535"], True),
    "one-fails": (["cuda>=12.2", "driver>=536"], False),
    "unknown": (["brand=tesla"], False),
    "unknown-and-holds": (["arch>=7,cuda>=12.2"], False),
    "unknown-or-holds": (["brand=tesla,driver>=1 cuda>=12.2"], True),
    "holds-or-malformed": (["cuda>=12.2 brnd=x"], True),
    "malformed": (["brnd=x"], False),
    "malformed-or-holds": (["brnd=x cuda>=12.2"], False),
    "unknown-or-malformed": (["brand=x brnd=x"], False),
    "cuda-image": ([CUDA_IMAGE.replace("12.6", "12.2")], True),
    "cuda-image-too-new": ([CUDA_IMAGE], False),
}


@pytest.mark.parametrize(("expressions", "expected"), SURE.values(), ids=SURE)
def test_are_sure(expressions: list[str], expected: bool) -> None:
    """By the driver's version alone: nothing of brand and architecture is known."""
    assert are_sure(expressions, facts_of("535.54.03")) is expected


@given(st.lists(st.sampled_from(["cuda", "driver", "arch", "x", "<", ">=", "=", " ", ",", "12", "535"])).map("".join))
def test_are_sure_holds_whatever_else_is_known(expression: str) -> None:
    if are_sure([expression], facts_of("535.54.03")):
        check([expression], HOST)


def test_are_sure_of_a_driver_that_the_table_does_not_know() -> None:
    assert not are_sure(["cuda>=12.2"], facts_of("999.1"))
    assert are_sure(["driver>=535"], facts_of("999.1"))


TEXTS = {
    "brand-of-a-gpu": (
        "brand=geforce",
        Facts(brand="tesla", driver="535.54.03", gpu="1 (GPU-aa, 0000:07:00.0)"),
        "requirement error: image needs `brand=geforce`, GPU 1 (GPU-aa, 0000:07:00.0) has brand tesla; "
        "set NVIDIA_DISABLE_REQUIRE=1 to start it anyway",
    ),
    "cuda-is-of-the-host": (
        "cuda>=12.6",
        Facts(cuda="12.2", arch="9.0", gpu="1 (GPU-aa, 0000:07:00.0)"),
        "requirement error: image needs `cuda>=12.6`, this host has cuda 12.2; "
        "install driver 560.28.03 or newer, or set NVIDIA_DISABLE_REQUIRE=1 to start it anyway",
    ),
    "cuda-with-driver": (
        "cuda>=12.6",
        HOST,
        "requirement error: image needs `cuda>=12.6`, this host has cuda 12.2 (driver 535.54.03); "
        "install driver 560.28.03 or newer, or set NVIDIA_DISABLE_REQUIRE=1 to start it anyway",
    ),
    "cuda-without-driver": (
        "cuda>=10.1",
        Facts(cuda="9.2"),
        "requirement error: image needs `cuda>=10.1`, this host has cuda 9.2; "
        "install driver 418.39 or newer, or set NVIDIA_DISABLE_REQUIRE=1 to start it anyway",
    ),
    "between-two-of-the-table": (
        "cuda>=12.6.1",
        Facts(cuda="12.2"),
        "requirement error: image needs `cuda>=12.6.1`, this host has cuda 12.2; "
        "install driver 565.57.01 or newer, or set NVIDIA_DISABLE_REQUIRE=1 to start it anyway",
    ),
    "above": (
        "cuda>12.6",
        Facts(cuda="12.6"),
        "requirement error: image needs `cuda>12.6`, this host has cuda 12.6; "
        "install driver 565.57.01 or newer, or set NVIDIA_DISABLE_REQUIRE=1 to start it anyway",
    ),
    "beyond-the-table": (
        "cuda>=99",
        Facts(cuda="12.2"),
        "requirement error: image needs `cuda>=99`, this host has cuda 12.2; "
        "set NVIDIA_DISABLE_REQUIRE=1 to start it anyway",
    ),
    "newer-than-allowed": (
        "cuda<12",
        HOST,
        "requirement error: image needs `cuda<12`, this host has cuda 12.2 (driver 535.54.03); "
        "set NVIDIA_DISABLE_REQUIRE=1 to start it anyway",
    ),
    "one-of-several-terms": (
        "cuda>=12.2,driver>=550",
        HOST,
        "requirement error: image needs `cuda>=12.2,driver>=550`, of which `driver>=550` does not hold: "
        "this host has driver 535.54.03; "
        "install driver 550 or newer, or set NVIDIA_DISABLE_REQUIRE=1 to start it anyway",
    ),
    "alternatives": (
        "cuda>=12.6 brand=geforce",
        HOST,
        "requirement error: image needs `cuda>=12.6 brand=geforce`, of which no alternative holds: "
        "for `cuda>=12.6`, this host has cuda 12.2 (driver 535.54.03); "
        "install driver 560.28.03 or newer, or set NVIDIA_DISABLE_REQUIRE=1 to start it anyway",
    ),
    "malformed": (
        "cuda>=12.6\x1b[2J",
        HOST,
        "requirement error: `cuda>=12.6\\x1b[2J` is no requirement: `cuda>=12.6\\x1b[2J` at character 1: "
        "`12.6\\x1b[2J` is no version; "
        "correct the image's NVIDIA_REQUIRE_* variable, or set NVIDIA_DISABLE_REQUIRE=1 to start it anyway",
    ),
}


@pytest.mark.parametrize(("expression", "facts", "text"), TEXTS.values(), ids=TEXTS)
def test_check_message(expression: str, facts: Facts, text: str) -> None:
    with pytest.raises(RequirementError) as caught:
        check([expression], facts)
    assert text == str(caught.value)


pieces = st.sampled_from(["cuda", "driver", "arch", "brand", "x", "<", ">", "=", "!", " ", ",", ".", "12", "tesla"])


@given(st.lists(pieces | st.text(max_size=2)).map("".join))
def test_check_whatever_an_image_says(expression: str) -> None:
    message = f"`{expression}`"
    try:
        check([expression], HOST)
    except RequirementError as error:
        message = error.message
    assert f"`{expression}`" in message


@pytest.mark.parametrize(
    ("driver", "cuda"),
    [
        ("580.159.04", "13.0"),
        ("575.51.03", "12.9"),
        ("575.51.02", "12.8"),
        ("550.163.01", "12.4"),
        ("384.81", "9.0"),
        ("384.80", None),
        ("999.1", None),
        ("not a version", None),
        ("0.0", None),
    ],
)
def test_facts_of_driver(driver: str, cuda: str | None) -> None:
    facts = facts_of(driver)
    assert (facts.driver, facts.cuda, facts.arch, facts.brand) == (driver, cuda, None, None)
