"""The shell of our HTML pages: one file that opens offline, in a light and a dark dress."""

import html
from base64 import b64encode
from collections.abc import Sequence

CSS = """
:root { color-scheme: light dark; --line: #d9dde3; --soft: #667080; --card: #fff; --page: #f4f5f7; --ink: #1b1f24;
  --accent: #2563eb }
@media (prefers-color-scheme: dark) { :root { --line: #343a42; --soft: #97a1af; --card: #1d2126; --page: #14171a;
  --ink: #e7eaee; --accent: #6ea0ff } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1060px; padding: 32px 20px 48px; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { margin: 0 0 4px; font-size: 26px; line-height: 1.25; text-wrap: balance }
header p, footer { margin: 0; color: var(--soft); font-size: 13px; overflow-wrap: anywhere }
ol { list-style: none; margin: 24px 0; padding: 0; display: grid; gap: 14px }
li { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px 14px }
.head { display: flex; align-items: baseline; gap: 12px; margin-bottom: 10px }
.rank { min-width: 1.1em; font-size: 20px; font-weight: 650; color: var(--accent) }
.id { flex: 1; color: var(--soft); font: 13px ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere }
.strip { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 4px }
.strip img { width: 100%; max-width: 160px; display: block; border-radius: 4px; background: #888 }
footer { border-top: 1px solid var(--line); padding-top: 12px }
"""


def render(title: str, body: str, css: str = "") -> str:
    """A whole page; `title` is text, `body` HTML, `css` comes after that of all pages."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{CSS}{css}</style>
{body}
</html>
"""


def strip(jpegs: Sequence[bytes]) -> str:
    """Frames side by side, in the order of time."""
    images = "".join(
        f'<img alt="frame {n} of {len(jpegs)}" src="data:image/jpeg;base64,{b64encode(jpeg).decode()}">'
        for n, jpeg in enumerate(jpegs, 1)
    )
    return f'<div class="strip">{images}</div>'
