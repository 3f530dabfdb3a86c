"""The colours of the pages: texts can be read on what they stand on, and series told apart by colour-blind people."""

from __future__ import annotations

import itertools
import math
import re
from importlib.resources import files

import pytest

MODES = ("light", "dark")
APART = 10
"""CIE76 distance under which two colours are hard to tell apart in small marks."""
# What is left of linear RGB: Machado, Oliveira and Fernandes, A Physiologically-based Model for Simulation of Color
# Vision Deficiency, IEEE TVCG 2009, at full severity.
BLINDNESS = {
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def linear(colour: str) -> list[float]:
    """Linear RGB, 0 to 1."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def lab(rgb: list[float]) -> tuple[float, float, float]:
    """CIE L*a*b* of linear RGB, D65."""
    rows = ((0.4339, 0.3762, 0.1899), (0.2126, 0.7152, 0.0722), (0.0177, 0.1095, 0.8728))
    light = [sum(weight * value for weight, value in zip(row, rgb, strict=True)) for row in rows]
    x, y, z = (value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116 for value in light)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def seen(colour: str, kind: str) -> tuple[float, float, float]:
    left = [sum(weight * value for weight, value in zip(row, linear(colour), strict=True)) for row in BLINDNESS[kind]]
    return lab([min(max(value, 0.0), 1.0) for value in left])


def palette() -> dict[str, dict[str, str]]:
    """The colours of either mode by name."""
    sheet = (files("limbeck.validate.rendering") / "colours.css.j2").read_text()
    light, dark = sheet.split("@media")
    named = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", part)) for part in (light, dark)]
    return {"light": named[0], "dark": {**named[0], **named[1]}}


def luminance(colour: str) -> float:
    """Relative luminance, 0 to 1 (WCAG 2.2)."""
    red, green, blue = linear(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("mode", MODES)
def test_every_text_can_be_read(mode: str) -> None:
    colours = palette()[mode]
    on = {"page": ["ink", "soft", "link"], "card": ["ink", "soft", "link", "pass", "fail", "open"],
          "faint": ["ink", "soft", "open"], "pass-back": ["ink", "pass"], "fail-back": ["ink", "fail", "open"],
          "open-back": ["ink", "open"]}  # fmt: skip
    for back, texts in on.items():
        for text in texts:
            assert contrast(colours[text], colours[back]) >= 4.5, f"{text} on {back}, {mode}"


@pytest.mark.parametrize("mode", MODES)
def test_every_mark_stands_out_from_the_page(mode: str) -> None:
    """Marks and bars need 3 to 1 (WCAG 1.4.11); two series that meet differ in shape as well."""
    colours = palette()[mode]
    for series in range(7):
        assert contrast(colours[f"s{series}"], colours["card"]) >= 3, f"s{series}, {mode}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", BLINDNESS)
def test_colour_blind_people_can_tell_series_apart(mode: str, kind: str) -> None:
    colours = palette()[mode]
    for one, other in itertools.combinations(range(7), 2):
        apart = math.dist(seen(colours[f"s{one}"], kind), seen(colours[f"s{other}"], kind))
        assert apart >= APART, f"s{one} and s{other}, {mode}: {apart:.0f}"
