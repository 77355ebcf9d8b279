"""One HTML page of plotly figures that opens without a network: what all reports look like."""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template

import plotly.io as pio
from plotly.offline import get_plotlyjs

# The colours of up to ten things.
PALETTE = "4e79a7 f28e2b 59a14f e15759 76b7b2 b07aa1 edc948 9c755f ff9da7 86bcb6"
LAYOUT = {
    "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#333"},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "hoverlabel": {"align": "left", "bgcolor": "white", "bordercolor": "#bbb", "font": {"color": "#222"}},
}
# From little to much.
SCALE = [[0, "#f7f9fb"], [0.5, "#8fb3d4"], [1, "#2f5d8a"]]
HOVER = "%{customdata}<extra></extra>"
_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>$title</title>
<style>
body { margin: 0; background: #f6f6f4; color: #333; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; font-weight: 600; margin: 0; }
p { margin: 4px 0 10px; color: #666; }
section { background: #fff; border: 1px solid #e4e4e0; border-radius: 8px; padding: 18px 20px; margin-top: 20px; }
blockquote { margin: 14px 0 0; padding-left: 12px; border-left: 3px solid #d5d5d0; max-height: 6em; overflow: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
select { font: inherit; max-width: 32em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 22px 4px 0; text-align: right; border-bottom: 1px solid #eeeeea; white-space: nowrap; }
th { font-weight: 600; color: #666; }
th:first-child, td:first-child { text-align: left; }
</style>
<script>$plotly</script>
</head>
<body>
<main>
<h1>$title</h1>
<p>$facts</p>
$introduction
$sections
</main>
</body>
</html>
""")
_CHOICE = Template("""<label>$label <select id="$name-choice">$options</select></label>
$parts
<script>
document.getElementById("$name-choice").addEventListener("change", event => {
  document.querySelectorAll("[data-choice='$name']").forEach((part, index) => {
    part.hidden = index != event.target.value;
    // What was hidden when it was drawn has not had its width.
    if (!part.hidden) part.querySelectorAll(".js-plotly-plot").forEach(plot => Plotly.Plots.resize(plot));
  });
});
</script>""")


def write_page(
    path: str | Path, title: str, facts: Sequence[str], sections: Sequence[str], introduction: str = ""
) -> None:
    """
    Write a page, whatever the file holds.

    Args:
        path (`str` or `Path`): The file.
        title (`str`): Its heading, as text.
        facts (`Sequence[str]`): What stands below it in one line, as text.
        sections (`Sequence[str]`): What [`section`] returned.
        introduction (`str`, *optional*): HTML before the sections.
    """
    page = _PAGE.substitute(
        title=html.escape(title),
        plotly=get_plotlyjs(),
        facts=html.escape(" · ".join(facts)),
        introduction=introduction,
        sections="\n".join(sections),
    )
    Path(path).write_text(page, encoding="utf-8")


def section(title: str, sentence: str, *parts: str) -> str:
    """A part of a page: a title, one sentence that explains it, and HTML such as [`plot`] returns."""
    return f"<section><h2>{html.escape(title)}</h2><p>{html.escape(sentence)}</p>{''.join(parts)}</section>"


def plot(name: str, figure: dict) -> str:
    """
    A figure as HTML.

    Args:
        name (`str`): What it is called in the page, once.
        figure (`dict`): Data and layout of plotly. The layout has a `height`, and may have a `minwidth`, the narrowest
            width at which the figure can be read: below it, the page scrolls.
    """
    # That width is ours, not plotly's.
    layout = {key: value for key, value in figure["layout"].items() if key != "minwidth"}
    drawn = pio.to_html(
        {"data": figure["data"], "layout": layout},
        full_html=False,
        include_plotlyjs=False,
        # A plotly that does not know an attribute then leaves it out.
        validate=False,
        div_id=identifier(name),
        default_height=f"{layout['height']}px",
        config={"displayModeBar": False, "responsive": True},
    )
    width = figure["layout"].get("minwidth", 0)
    return f'<div class="wide"><div style="min-width: {width}px">{drawn}</div></div>'


def choice(label: str, parts: Sequence[tuple[str, str]]) -> str:
    """HTML that shows one of several parts, each named by a text, and lets the reader choose."""
    if len(parts) == 1:
        return parts[0][1]
    # Names of parts are not unique on a page, but what the first one shows is.
    name = identifier(f"{label} {re.search('id=.([^ ]+?).[ >]', parts[0][1]).group(1)}")
    return _CHOICE.substitute(
        label=html.escape(label),
        name=name,
        options="".join(
            f'<option value="{index}">{html.escape(text)}</option>' for index, (text, _) in enumerate(parts)
        ),
        parts="".join(
            f'<div data-choice="{name}"{" hidden" if index else ""}>{part}</div>'
            for index, (_, part) in enumerate(parts)
        ),
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts as HTML; the first column is to the left, the others to the right."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def identifier(text: str) -> str:
    """A text as the id of an element."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def count(number: int, thing: str) -> str:
    """`1 token`, `2 tokens`."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def rgba(colour: str, alpha: float) -> str:
    """A colour such as `4e79a7` that lets something through."""
    red, green, blue = bytes.fromhex(colour)
    return f"rgba({red},{green},{blue},{alpha})"
