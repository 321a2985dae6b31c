"""What is on a page, and of which colours a picture is."""

from __future__ import annotations

from html.parser import HTMLParser
from io import BytesIO

import numpy as np
from PIL import Image

BLUE, ORANGE, GREEN = (31, 111, 235), (207, 124, 24), (45, 164, 78)
GREY, RED = (125, 133, 144), (207, 34, 46)


class _Balance(HTMLParser):
    """Checks that every element is closed in order."""

    void = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def addresses(page: str) -> list[str]:
    """Where the page's pictures and links lead to; every element must be closed in order."""
    balance = _Balance()
    balance.feed(page)
    assert balance.open == []
    return balance.addresses


def share(picture: bytes | None, colour: tuple[int, int, int]) -> float:
    """The share of a PNG picture that has a colour, or nearly."""
    assert picture is not None
    pixels = np.asarray(Image.open(BytesIO(picture)).convert("RGB")).astype(int)
    return float((np.abs(pixels - colour).max(axis=-1) < 12).mean())
