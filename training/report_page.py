"""report.html: tables with intervals, ranks, the easiest and hardest queries. It says what report.json says."""

import html
from collections.abc import Mapping

from common import page
from training.metrics import RECALLS
from training.report import DUAL_SOFTMAX, Estimate, Example, Report, RunReport

TITLES = {
    "": "Text to video",
    "v2t_": "Video to text",
    "first_": "Text to video, the first stage alone",
    "first_v2t_": "Video to text, the first stage alone",
    "dsl_": "Text to video after a dual softmax",
    "dsl_v2t_": "Video to text after a dual softmax",
}
COLUMNS = {**{f"r{k}": f"R@{k}" for k in RECALLS}, "rsum": "rSum", "mdr": "MdR", "mnr": "MnR"}
OTHERS = {
    "order": "Order score",
    "qa_accuracy": "Multiple choice",
    "action_top1": "Actions, top-1",
    "action_top5": "Actions, top-5",
}
CSS = """
h2 { font-size: 18px; margin: 36px 0 8px; overflow-wrap: anywhere } h3 { font-size: 15px; margin: 22px 0 6px }
.scroll, .bars { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 4px 14px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { font-size: 13px; font-weight: 600; color: var(--soft) } td, th { padding: 8px 10px; text-align: right }
.run { font-size: 22px; margin-top: 48px }
th:first-child, td:first-child { text-align: left; min-width: 9em; padding-left: 0; overflow-wrap: anywhere }
tr + tr td, .kind th { border-top: 1px solid var(--line) }
.kind th { padding-top: 18px; color: var(--ink) } td i { font-style: normal; font-weight: 600 }
td b { display: block; font-weight: 600 } td small { color: var(--soft); white-space: nowrap }
.note { color: var(--soft); font-size: 13px; margin: 8px 0 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); gap: 14px }
.scroll { margin-top: 24px }
.bars h3 { margin: 6px 0 }
.bars td { padding: 3px 0 3px 10px; border: 0; white-space: nowrap } .bars td:first-child { min-width: 0 }
.bars td:nth-child(2) { width: 70% }
.bars td i { display: block; height: 12px; border-radius: 3px; background: var(--accent); min-width: 1px }
.query { flex: 1; font-weight: 600 } .of { color: var(--soft); font-size: 13px; white-space: nowrap }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 14px } .pair p { margin: 0 0 6px; font-size: 13px }
.pair .id { font-size: 12px; color: var(--soft) }
@media (max-width: 640px) { .pair { grid-template-columns: 1fr } }
footer p { margin: 4px 0 }
"""


def render(report: Report, images: Mapping[str, list[bytes]]) -> str:
    """The page; `images` holds frames as JPEGs by the id of each video of the examples."""
    names = _names(report)
    several = len(names) > 1
    title = f"{f'{len(names)} runs' if several else names[0]} on {report.split}"
    headings = [f'<h2 class="run">{html.escape(name)}</h2>' if several else "" for name in names]
    details = [h + _ranks(run) + _examples(run, images) for h, run in zip(headings, report.runs, strict=True)]
    body = f"""<header>
<h1>{html.escape(title)}</h1>
<p>{report.runs[0].videos:,} videos, {report.runs[0].captions:,} captions · dataset {html.escape(report.dataset)}</p>
</header>
{_tables(report, names)}
{"".join(details)}
<footer>
{"".join(f"<p>{html.escape(note)}</p>" for note in report.notes)}
<p>{" · ".join(html.escape(run.run) for run in report.runs)}</p>
</footer>"""
    return page.render(title, body, CSS)


def _names(report: Report) -> list[str]:
    """Short names of the runs; the whole folders where two have the same."""
    names = [run.run.rsplit("/", 1)[-1] for run in report.runs]
    return names if len(set(names)) == len(names) else [run.run for run in report.runs]


def _tables(report: Report, names: list[str]) -> str:
    there = {name for run in report.runs for name in run.metrics}
    kinds = {title: [prefix + name for name in COLUMNS] for prefix, title in TITLES.items() if f"{prefix}r1" in there}
    table = _table(report, names, list(COLUMNS.values()), kinds)
    note = f'<p class="note">{DUAL_SOFTMAX}</p>' if "dsl_r1" in there else ""
    others = {name: title for name, title in OTHERS.items() if name in there}
    more = _table(report, names, list(others.values()), {"Other questions": list(others)}) if others else ""
    return table + note + more


def _table(report: Report, names: list[str], columns: list[str], kinds: Mapping[str, list[str]]) -> str:
    """Rows of values with their intervals: one for each kind, or under each kind's name one for each run."""
    runs = list(zip(map(html.escape, names), (run.metrics for run in report.runs), strict=True))
    if report.over_runs is not None:
        runs.append((f"<i>mean of {len(names)} runs</i>", report.over_runs))
    lines = []
    for title, keys in kinds.items():
        rows = [(name, [metrics.get(key) for key in keys]) for name, metrics in runs]
        if len(rows) == 1:
            rows = [(title, rows[0][1])]
        else:
            lines.append(f'<tr class="kind"><th colspan="{len(columns) + 1}">{title}')
        lines.extend(f"<tr><td>{name}{''.join(map(_cell, estimates))}" for name, estimates in rows)
    heads = "".join(f"<th>{title}" for title in ("", *columns))
    return f'<div class="scroll"><table><tr>{heads}{"".join(lines)}</table></div>'


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "<td>"
    return f"<td><b>{number(estimate.value)}</b><small>{number(estimate.low)} – {number(estimate.high)}</small>"


def number(value: float) -> str:
    """As the page shows a metric: two decimals, as the field's tables need no more."""
    return f"{value:.2f}"


def _ranks(run: RunReport) -> str:
    plots = (
        f'<div class="bars"><h3>{TITLES[prefix]}</h3>{_bars(counts)}</div>' for prefix, counts in run.histograms.items()
    )
    return f'<h2>Ranks of the right answers</h2><div class="plots">{"".join(plots)}</div>'


def _bars(counts: Mapping[str, int]) -> str:
    most, total = max(counts.values()), sum(counts.values())
    rows = "".join(
        f'<tr><td>{name}<td><i style="width:{100 * count / most:.1f}%"></i><td>{count:,}<td>{count / total:.0%}'
        for name, count in counts.items()
    )
    return f"<table>{rows}</table>"


def _examples(run: RunReport, images: Mapping[str, list[bytes]]) -> str:
    parts = [("Hardest queries", run.hardest), ("Easiest queries", run.easiest)]
    return "".join(
        f"<h2>{title}</h2><ol>{''.join(_example(run, example, images) for example in found)}</ol>"
        for title, found in parts
        if found
    )


def _example(run: RunReport, example: Example, images: Mapping[str, list[bytes]]) -> str:
    rival = "Ranked first" if example.margin < 0 else "The best of the others"
    sides = "".join(
        f'<div><p>{label} <span class="id">{html.escape(video)}</span></p>{page.strip(images.get(video, []))}</div>'
        for label, video in (("Its own video", example.video), (rival, example.rival))
    )
    return f"""<li>
<div class="head"><span class="rank">{example.rank:g}</span><span class="query">“{html.escape(example.query)}”</span>
<span class="of">rank of {run.videos:,} · margin {example.margin:+.3f}</span></div>
<div class="pair">{sides}</div>
</li>"""
