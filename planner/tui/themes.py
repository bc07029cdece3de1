"""Light, dark and monochrome. Good is blue and bad is orange, which every eye tells apart."""

from __future__ import annotations

from textual.theme import Theme

THEMES = (
    Theme(
        name="planner-dark",
        primary="#56B4E9",
        secondary="#8FA8B8",
        accent="#F0E442",
        success="#56B4E9",
        warning="#E69F00",
        error="#F2884B",
        background="#101418",
        surface="#171D23",
        panel="#222B33",
        dark=True,
    ),
    Theme(
        name="planner-light",
        primary="#00598F",
        secondary="#4C5B66",
        accent="#7A5C00",
        success="#00598F",
        warning="#8A5A00",
        error="#B34700",
        background="#FBFBF8",
        surface="#F1F1EC",
        panel="#E3E4DE",
        dark=False,
    ),
    Theme(
        name="planner-monochrome",
        primary="#FFFFFF",
        secondary="#B0B0B0",
        accent="#FFFFFF",
        success="#FFFFFF",
        warning="#FFFFFF",
        error="#FFFFFF",
        foreground="#E8E8E8",
        background="#000000",
        surface="#0A0A0A",
        panel="#262626",
        dark=True,
    ),
)

DEFAULT_THEME = "planner-dark"
