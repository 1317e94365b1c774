"""A figure as SVG to stand inside a page: no declarations, ids of its own, colours that follow the page's background."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

from lox_merge.publish.figures.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RULE, SKY, VERMILLION, house_style

# The page's stylesheet gives each variable a value for light and for dark.
_VARIABLES = {
    INK: "currentColor",
    RULE: "var(--rule)",
    VERMILLION: "var(--vermillion)",
    BLUE: "var(--blue)",
    GREEN: "var(--green)",
    ORANGE: "var(--orange)",
    PURPLE: "var(--purple)",
    SKY: "var(--sky)",
    GREY: "var(--grey)",
}
_COLOUR, _REFERENCE = re.compile(r"#[0-9a-f]{6}\b"), re.compile(r"url\(#([^)]+)\)")
_LONG = re.compile(r"-?\d+\.\d{3,}")
_SPACES = re.compile(r"\s*([A-Za-z])\s+|\s+")
_NAMESPACE, _HREF = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_FONTS = "system-ui, sans-serif"


def inline_svg(build: Callable[[], Any], name: str, title: str) -> str:
    """The figure that `build` makes as an <svg> element. name: unique in the page; title: what it shows, for who cannot see it.

    Letters stay letters, drawn in the reader's own fonts: they can be searched, and a figure takes about 15 kB.
    """
    data = io.BytesIO()
    with house_style():
        import matplotlib

        matplotlib.rcParams["svg.fonttype"] = "none"
        build().savefig(data, format="svg", metadata={"Date": None}, transparent=True)
    root = ElementTree.fromstring(data.getvalue())
    width = float(root.attrib.pop("width").removesuffix("pt"))
    root.attrib.pop("height")
    for key in ("version", "baseProfile"):
        root.attrib.pop(key, None)
    for parent in list(root.iter()):
        for child in [child for child in parent if _is_superfluous(child)]:
            parent.remove(child)
    used = {part for element in root.iter() for value in element.attrib.values() for part in _REFERENCE.findall(value)}
    used |= {element.attrib[_HREF].removeprefix("#") for element in root.iter() if _HREF in element.attrib}
    for element in root.iter():
        _make_inline(element, name, used)
    heading = ElementTree.Element("title", id=f"{name}-title")
    heading.text = title
    root.insert(0, heading)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title", "style": f"max-width: {width / 72:.2f}in"}
    return ElementTree.tostring(root, encoding="unicode")


def _is_superfluous(element: ElementTree.Element) -> bool:
    """Metadata, rules that would apply to the whole page, and shapes that paint nothing."""
    tag = element.tag.removeprefix(_NAMESPACE)
    return tag in ("metadata", "style") or (tag == "path" and element.attrib.get("style") == "fill: none" and "clip-path" not in element.attrib)


def _make_inline(element: ElementTree.Element, name: str, used: set[str]) -> None:
    element.tag = element.tag.removeprefix(_NAMESPACE)
    identity = element.attrib.pop("id", None)
    if identity in used:
        element.attrib["id"] = f"{name}-{identity}"
    if (target := element.attrib.pop(_HREF, None)) is not None:
        element.attrib["href"] = f"#{name}-{target.removeprefix('#')}"
    for key, value in element.attrib.items():
        if key in ("id", "href"):
            continue
        if key in ("d", "x", "y", "transform", "points"):  # a hundredth of a point is finer than any screen
            element.attrib[key] = _SPACES.sub(lambda found: found[1] or " ", _LONG.sub(lambda found: f"{float(found[0]):.2f}", value).strip())
            continue
        own = _REFERENCE.sub(lambda found: f"url(#{name}-{found[1]})", value)
        own = re.sub(r"'DejaVu Sans',.*?sans-serif", _FONTS, own)
        own = _COLOUR.sub(lambda found: _VARIABLES.get(found[0], found[0]), own)
        element.attrib[key] = own.replace(": ", ":").replace("; ", ";") if key == "style" else own
    if element.tag in ("svg", "g", "defs"):  # the line breaks between marks
        element.text = None
    element.tail = None
