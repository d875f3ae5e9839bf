"""What the search of the site knows: every public name, every page and every heading with its text, in one file that loads when one searches."""

import json
import re
from collections.abc import Iterator

from docutils import nodes
from site_names import PublicName

UNREAD = (nodes.raw, nodes.math, nodes.math_block, nodes.image, nodes.comment, nodes.title)


def _text(node: nodes.Node) -> Iterator[str]:
    "Text of a section, without its cells, its title and the sections in it"
    for child in node.children:
        is_cell = isinstance(child, nodes.Element) and "cell" in child.get("classes", ())
        if isinstance(child, (*UNREAD, nodes.section)) or is_cell:
            continue
        if isinstance(child, nodes.Text):
            yield child.astext()
        elif isinstance(child, nodes.TextElement):
            words = [text.astext() for text in child.findall(nodes.Text) if not isinstance(text.parent, nodes.math)]
            yield "".join(words)
        else:
            yield from _text(child)


def sections_of(
    document: nodes.document,
) -> list[tuple[str, str, str]]:  # anchor, heading, text; the page itself has no anchor
    "The sections of a page, each with its own text"
    sections = []
    for section in document.findall(nodes.section):
        heading = section.next_node(nodes.title).astext()
        text = re.sub(r"\s+", " ", " ".join(_text(section))).strip()
        is_page = isinstance(section.parent, nodes.document)
        sections.append(("" if is_page else section["ids"][0], heading, text))
    return sections


def search_index(
    names: list[PublicName],
    pages: dict[str, list[tuple[str, str, str]]],  # page -> its sections
) -> str:  # JavaScript
    "The index as a script, since a page that is opened from a disk may load a script and not a file"
    entries = []
    described = {}
    for page, sections in pages.items():
        for anchor, _, text in sections:
            address = f"{page}.html" + (f"#{anchor}" if anchor else "")
            described[address] = text
    for each in names:
        if each.address:
            text = described.get(each.address, "")
            entries.append([each.kind, each.name, f"vlkd_lab.{each.module}", each.address, f"{each.summary}. {text}".strip(". ")])
    taken = {entry[3] for entry in entries}
    for page, sections in pages.items():
        title = sections[0][1] if sections else page
        for anchor, heading, text in sections:
            address = f"{page}.html" + (f"#{anchor}" if anchor else "")
            if address not in taken:
                kind = "section" if anchor else "page"
                entries.append([kind, heading, title if anchor else "", address, text])
    return f"window.siteIndex = {json.dumps(entries, ensure_ascii=False, separators=(',', ':'))};\n"
