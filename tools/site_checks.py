"""The finished site, looked through file by file: where its links lead, what it would load, and what a reader or a screen reader misses."""

import os
import re
from base64 import b64decode
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lxml.html import HtmlElement, document_fromstring
from PIL import Image

PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
NOT_LOADED = ("next", "prev", "search", "canonical", "author", "index")  # links of a page's head


class Page:
    "A page of the site: its anchors, its links and what it loads by itself"

    def __init__(self, text: str):
        self.tree: HtmlElement = document_fromstring(text)
        self.anchors = set(self.tree.xpath("//@id | //a/@name"))
        self.links = [str(link) for link in self.tree.xpath("//a/@href")]
        self.loaded = [str(link) for link in self.tree.xpath("//@src")]
        for link in self.tree.xpath("//link[@href]"):
            if link.get("rel") not in NOT_LOADED:
                self.loaded.append(link.get("href"))


def read_pages(
    site: Path,  # its folder
) -> dict[str, Page]:  # address seen from the site's root -> page
    "Every page of a site"
    pages = {}
    for path in sorted(site.rglob("*.html")):
        pages[path.relative_to(site).as_posix()] = Page(path.read_text(encoding="utf-8"))
    return pages


# Links, and what is loaded


def _broken_pictures(site: Path, pages: dict[str, Page]) -> Iterator[str]:
    "Pictures, in files and within pages, that do not decode"
    pictures = []
    for name, page in pages.items():
        for link in page.loaded:
            if re.match(r"data:image/(png|jpeg|gif|webp);base64,", link):
                pictures.append((f"a picture within {name}", b64decode(link.partition(",")[2])))
    for path in site.rglob("*"):
        if path.suffix in PICTURES:
            pictures.append((path.name, path.read_bytes()))
    for name, data in pictures:
        try:
            Image.open(BytesIO(data)).load()
        except OSError:
            yield f"{name} is broken"


def _link_fault(site: Path, pages: dict[str, Page], name: str, link: str) -> str:  # empty: none
    "What is wrong with a link of the page `name`"
    parts = urlsplit(link)
    if parts.scheme or parts.netloc or link == "":
        is_known = parts.scheme in ("http", "https", "mailto", "data", "")
        return "" if is_known else f"{name} links to {link}"
    target = os.path.normpath(Path(name).parent / unquote(parts.path)) if parts.path else name
    is_outside = target.startswith("..") or parts.path.startswith("/")
    if is_outside or not (site / target).is_file():
        return f"{name} links to {link}, and there is no such file"
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
        return f"{name} links to {link}, and there is no such place"
    return ""


def _style_faults(site: Path) -> Iterator[str]:
    "Styles that load something from elsewhere, or what is not there"
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        for link in re.findall(r"url\(['\"]?([^'\")]+)|@import +['\"]([^'\"]+)", text):
            address = "".join(link)
            is_held = address.startswith(("data:", "#"))
            is_inside = is_held or (path.parent / urlsplit(address).path).is_file()
            if re.match(r"(https?:)?//", address) or not is_inside:
                yield f"{path.name} loads {address}"


def faults(site: Path, pages: dict[str, Page] | None = None) -> Iterator[str]:
    "Links, anchors and pictures that lead nowhere, and whatever the site would load from elsewhere"
    pages = read_pages(site) if pages is None else pages
    for name, page in pages.items():
        for link in page.loaded:
            if re.match(r"(https?:)?//", link):
                yield f"{name} loads {link}"
        for link in (*page.links, *page.loaded):
            fault = _link_fault(site, pages, name, link)
            if fault:
                yield fault
    yield from _style_faults(site)
    yield from _broken_pictures(site, pages)


# What a reader misses


def _words_of(element: HtmlElement) -> str:
    "What a screen reader says of a link or a button"
    named = element.get("aria-label") or element.get("title") or element.text_content()
    pictures = [str(alt) for alt in element.xpath(".//img/@alt")]
    return " ".join([named, *pictures]).strip()


def _heading_faults(tree: HtmlElement) -> Iterator[str]:
    "One title, and no level of headings left out on the way down; what a cell has drawn is no part of the text"
    headings = tree.xpath("//main//*[self::h1 or self::h2 or self::h3 or self::h4 or self::h5 or self::h6]")
    drawn = set(tree.xpath("//div[contains(@class, 'cell_output')]//*[self::h1 or self::h2 or self::h3 or self::h4 or self::h5 or self::h6]"))
    levels = [int(heading.tag[1]) for heading in headings if heading not in drawn]
    if levels.count(1) != 1:
        yield f"has {levels.count(1)} titles (h1)"
    for before, after in zip(levels, levels[1:], strict=False):
        if after > before + 1:
            yield f"goes from h{before} to h{after}"


def _head_faults(tree: HtmlElement) -> Iterator[str]:
    "What browsers, readers and search engines ask of the head of a page"
    if not tree.get("lang"):
        yield "does not say its language"
    if not "".join(tree.xpath("//head/title/text()")).strip():
        yield "has no title"
    for name in ("description", "viewport"):
        if not "".join(tree.xpath(f"//meta[@name='{name}']/@content")).strip():
            yield f"has no {name}"


def _label_faults(tree: HtmlElement) -> Iterator[str]:
    "Pictures, links, buttons, fields and frames without words"
    for picture in tree.xpath("//img"):
        in_text = picture.xpath("ancestor::article")
        if picture.get("alt") is None or (in_text and not picture.get("alt").strip()):
            yield f"has a picture without words: {picture.get('src', '')[:80]}"
    for element in tree.xpath("//a[@href][not(ancestor::nav[contains(@class, 'site-pages')])] | //button | //summary"):
        if not _words_of(element):
            yield f"has a {element.tag} without words: {element.get('href', element.get('class', ''))}"
    for field in tree.xpath("//input[not(@type='hidden')] | //select | //textarea"):
        is_labelled = field.get("aria-label") or field.xpath("ancestor::label")
        by_id = field.get("id") and tree.xpath("//label[@for=$name]", name=field.get("id"))
        if not is_labelled and not by_id:
            yield f"has a {field.tag} without words: {field.get('class', '')}"
    for frame in tree.xpath("//iframe[not(@title)]"):
        yield f"has a frame without a title: {frame.get('src', '')}"


def reading_faults(
    pages: dict[str, Page],  # address -> page
) -> Iterator[str]:
    "What is missing from pages for their readers: a language, a title, words for pictures and buttons, headings in order"
    for name, page in pages.items():
        for find in (_head_faults, _heading_faults, _label_faults):
            for fault in find(page.tree):
                yield f"{name} {fault}"
