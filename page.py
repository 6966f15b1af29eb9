"""Pages to look at: pictures with captions in one HTML file, which needs no other file, no script and no network.

write_page("samples.html", "Samples", [("a caption", [picture, another])], total=1)    # PIL pictures, side by side"""

import base64
import html
import io
import itertools

import runtime

LIMIT = 100  # entries on a page: a browser has to hold them all
LEGIBLE = 128  # pixels: a smaller picture is shown as many times larger as its long side goes into this
HEAD = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{0}</title><style>
:root {{ color-scheme: light dark; font: 14px/1.4 system-ui, sans-serif }} main {{ display: flex; flex-wrap: wrap }}
figure {{ margin: 0 16px 16px 0; width: min-content; min-width: 128px; overflow-wrap: anywhere }}
div {{ white-space: nowrap }} img {{ margin-right: 4px; max-width: 45vw; height: auto; image-rendering: pixelated }}
</style><h1>{0}</h1><main>
"""


def write_page(path, title, entries, total):
    """Write the first `LIMIT` of `total` entries, an iterable of (caption, list of PIL pictures)."""
    with runtime.replacing(path) as binary, io.TextIOWrapper(binary, "utf-8", "backslashreplace") as file:
        file.write(HEAD.format(html.escape(title)))
        for caption, pictures in itertools.islice(entries, LIMIT):
            file.write("<figure><div>")
            for picture in pictures:
                png, zoom = io.BytesIO(), max(1, LEGIBLE // max(picture.size))
                picture.save(png, "PNG")
                size = f'width="{zoom * picture.width}" height="{zoom * picture.height}"'
                file.write(f'<img {size} src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">')
            file.write(f"</div><figcaption>{html.escape(caption)}</figcaption></figure>\n")
        file.write(f"</main><p>{'The first ' * (total > LIMIT)}{min(total, LIMIT):,} of {total:,}</p></html>\n")
