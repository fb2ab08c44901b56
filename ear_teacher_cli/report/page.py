"""One HTML page that needs nothing else: styles inside, images as data, no script. All text is escaped here."""

import base64
import html
from collections.abc import Iterable, Sequence
from io import BytesIO

from PIL import Image

from ..files import printable

_STYLE = """
:root { --ink: #20242c; --faint: #6b7280; --line: #e3e6ea; --blue: #0072b2; --good: #0b7a4b; --bad: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fafaf8; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 8px 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 40px 0 8px; padding-top: 16px; border-top: 1px solid var(--line); }
h3 { font-size: 16px; margin: 20px 0 4px; }
p { max-width: 75ch; margin: 8px 0; }
.faint { color: var(--faint); }
.good { color: var(--good); } .bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; margin: 16px 0; }
.tile { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 22px; line-height: 1.25; overflow-wrap: anywhere; }
.tile span { color: var(--faint); font-size: 14px; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 12px; }
.panels > div { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 8px; }
.panels svg { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; margin: 8px 0 16px; }
.wide > img { display: block; max-width: 100%; min-width: min(760px, 100vw * 2); height: auto; }
table { border-collapse: collapse; font-size: 15px; margin: 8px 0; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
pre { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; overflow-x: auto; }
code, pre { font: 14px/1.6 ui-monospace, Menlo, Consolas, monospace; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(490px, 100%), 1fr)); gap: 0 24px; }
.ears { display: flex; flex-wrap: wrap; gap: 4px; margin: 2px 0 10px; align-items: flex-start; }
.ears figure { margin: 0; width: 76px; font-size: 13px; color: var(--faint); text-align: center; }
.ears img { display: block; width: 76px; height: 76px; border-radius: 6px; border: 3px solid transparent; }
@media (max-width: 640px) {
  main { padding: 16px 12px 48px; }
  table { font-size: 13px; } th { white-space: normal; } td, th { padding-right: 10px; }
  .ears { flex-wrap: nowrap; overflow-x: auto; } .ears figure, .ears img { width: 60px; } .ears img { height: 60px; }
}
.ears .query img { border-color: var(--ink); } .ears .same img { border-color: var(--good); }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole document; `parts` are HTML already. The policy keeps it from asking any machine for anything."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def escape(text: object) -> str:
    return html.escape(printable(text))


def element(name: str, text: object, kind: str = "") -> str:
    """`<p class="kind">text</p>`, escaped."""
    mark = f' class="{kind}"' if kind else ""
    return f"<{name}{mark}>{escape(text)}</{name}>"


def tiles(lines: Iterable[tuple[str, str, str]]) -> str:
    """(figure, what it is, class) side by side."""
    drawn = (
        f'<div class="tile">{element("b", value, kind)}{element("span", name)}</div>' for value, name, kind in lines
    )
    return f'<div class="tiles">{"".join(drawn)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    """Columns whose place is in `numbers` are set to the right."""

    def line(cells: Sequence[object], name: str) -> str:
        return "".join(element(name, cell, "number" if i in numbers else "") for i, cell in enumerate(cells))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    top = f"<thead><tr>{line(head, 'th')}</tr></thead>" if any(head) else ""
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'


def panels(drawings: Iterable[str]) -> str:
    """SVG drawings in a grid."""
    return f'<div class="panels">{"".join(f"<div>{svg}</div>" for svg in drawings)}</div>'


def commands(lines: Iterable[str]) -> str:
    return f"<pre>{escape_lines(lines)}</pre>"


def escape_lines(lines: Iterable[str]) -> str:
    return "\n".join(escape(line) for line in lines)


def wide(image: Image.Image, words: str, most: int = 1800) -> str:
    """An image as wide as the page, or to be scrolled where that is narrow."""
    if image.width > most:
        image = image.resize((most, round(image.height * most / image.width)), Image.Resampling.LANCZOS)
    return f'<div class="wide">{img(image, words)}</div>'


def img(image: Image.Image, words: str) -> str:
    """An <img> that holds its image, as JPEG."""
    content = BytesIO()
    image.convert("RGB").save(content, format="JPEG", quality=88)
    data = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="{escape(words)}" src="data:image/jpeg;base64,{data}">'


def beside(columns: Iterable[tuple[str, str]]) -> str:
    """(heading, HTML) side by side, or one below the other where the page is narrow."""
    drawn = (f"<div>{element('span', name, 'faint')}{body}</div>" for name, body in columns)
    return f'<div class="beside">{"".join(drawn)}</div>'


def ears(tiles: Iterable[tuple[Image.Image, str, str]]) -> str:
    """Small images in a row: (image, what is written below, class: query, same or nothing)."""
    drawn = (
        f'<figure class="{kind}">{img(image, words)}{element("figcaption", words)}</figure>'
        for image, words, kind in tiles
    )
    return f'<div class="ears">{"".join(drawn)}</div>'
