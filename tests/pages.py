"""Reading a page as a browser does: its figures and their pictures, and that it asks nobody for anything."""

import base64
import html.parser
import io

import numpy as np
from PIL import Image


class _Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.entries, self.tags, self.texts, self.sizes = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        assert not set(attributes) & {"href", "onload", "onerror", "style", "srcset"}
        if tag == "figure":
            self.entries.append(["", []])
        if tag == "img":
            kind, _, data = attributes["src"].partition(",")
            assert kind == "data:image/png;base64"
            picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            assert picture.format == "PNG" and picture.mode == "RGB"
            self.entries[-1][1].append(np.asarray(picture))
            self.sizes.append((int(attributes["width"]), int(attributes["height"])))

    def handle_data(self, text):
        self.texts.append(text)
        if self.tags[-1] == "figcaption" and text.strip():
            self.entries[-1][0] += text


def read_page(path):
    """(entries [caption, [arrays (H, W, 3)]], texts, sizes shown) of a page."""
    text = path.read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    page.close()
    assert set(page.tags) == {"html", "meta", "title", "style", "h1", "main", "figure", "div", "img", "figcaption", "p"}
    assert "http" not in text and "url(" not in text and '"//' not in text and "@import" not in text
    return page.entries, page.texts, page.sizes
