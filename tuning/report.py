"""A study as one page that opens offline: best trials, curves, what each key does, the Pareto front, what it all cost.

Optuna draws the figures, from a study of its own that is made from the records.
"""

import html
from collections.abc import Callable, Iterator
from typing import Any

import optuna
from optuna import visualization as draw
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
from plotly.graph_objects import Figure

from common import logs
from training.config import TrainConfig
from tuning.config import StudyConfig
from tuning.records import Record, Records, front, ranked
from tuning.search import direction, label
from tuning.table import saved_s, values_of

BEST = 10
CSS = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1c2430 }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem } p.note { color: #5a6675; margin: .2rem 0 }
table { border-collapse: collapse } td, th { padding: .15rem .9rem .15rem 0; text-align: right; white-space: nowrap }
td:last-child, th:last-child { text-align: left; white-space: normal } .numbers td, .numbers th { text-align: right }
"""


def render(study: StudyConfig, base: TrainConfig, records: Records) -> str:
    """The page, as far as the trials have come."""
    title = html.escape(f"Study {study.name}")
    sections = "\n".join(f"<section><h2>{name}</h2>{body}</section>" for name, body in _sections(study, base, records))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{CSS}</style></head><body>
<h1>{title}</h1>
<p>{html.escape(_about(study, base, records))}</p>
{sections}
</body></html>
"""


def _about(study: StudyConfig, base: TrainConfig, records: Records) -> str:
    second = f" and {study.cost} of a video" if study.cost else ""
    return (
        f"{len(records)} trials of {study.base}, compared by val {study.metric} ({study.mode}){second}; "
        f"searcher {study.searcher}, scheduler {study.scheduler}, seed {study.seed}; dataset {base.data.dataset}"
    )


def _sections(study: StudyConfig, base: TrainConfig, records: Records) -> Iterator[tuple[str, str]]:
    chosen = front(study, records) if study.cost else ranked(study, records)[:BEST]
    yield "Pareto front" if study.cost else "Best trials", _trials(study, chosen)
    yield "Cost", _costs(study, base, records)
    figures = list(_figures(study, records))
    for i, (name, note, figure) in enumerate(figures):
        figure.update_layout(title=None, margin={"t": 30})
        drawn = figure.to_html(full_html=False, include_plotlyjs=i == 0)  # the library once, in the page itself
        yield name, f'<p class="note">{html.escape(note)}</p>{drawn}'
    failed = [record for record in records if record.status == "failed"]
    if failed:
        rows = "".join(f"<tr><td>{r.name}<td>{html.escape(f'{r.error} ({values_of(r)})')}" for r in failed)
        yield "Failed trials", f"<table>{rows}</table>"


def _trials(study: StudyConfig, records: list[Record]) -> str:
    second = f"<th>{study.cost}" if study.cost else ""
    rows = [
        f"<tr><td>{r.name}<td>{r.status}<td>{r.step}<td>{r.metric(study):.4g}"
        f"{f'<td>{r.cost:.4g}' if study.cost else ''}<td>{logs.duration(r.worker_s)}<td>{html.escape(values_of(r))}"
        for r in records
    ]
    head = f"<tr><th>trial<th>status<th>step<th>val {study.metric}{second}<th>workers<th>values"
    return f"<table>{head}{''.join(rows)}</table>" if rows else "<p>No trial has been evaluated.</p>"


def _costs(study: StudyConfig, base: TrainConfig, records: Records) -> str:
    rows = []
    for status in ("finished", "stopped", "failed", "running", "all"):
        some = [r for r in records if status in (r.status, "all")]
        workers, clock = sum(r.worker_s for r in some), sum(r.seconds for r in some)
        if some:
            rows.append((status, len(some), logs.duration(workers), logs.duration(clock)))
    cells = "".join(f"<tr>{''.join(f'<td>{cell}' for cell in row)}" for row in rows)
    note = "workers: seconds in the training loop times ranks; by the clock: of the trials, with start-up and waiting"
    saved = f"Stopping early saved {logs.duration(saved_s(study, base, records))} of workers, at each trial's own pace."
    head = "<tr><th>trials<th>count<th>workers<th>by the clock"
    return f'<table class="numbers">{head}{cells}</table><p class="note">{note}</p><p>{saved}</p>'


def _figures(study: StudyConfig, records: Records) -> Iterator[tuple[str, str, Figure]]:
    """(title, note, figure) of each that there are trials enough for."""
    steps = [record.step for record in records if record.reports and record.status != "failed"]
    if not steps:
        return
    past = _compared(study, records, min(steps))
    curves = draw.plot_intermediate_values(past).update_yaxes(title=f"val {study.metric}")
    names = {f"Trial{i}": f"{record.name}  {values_of(record)}" for i, record in enumerate(records)}
    curves.for_each_trace(lambda trace: trace.update(name=names[trace.name]))
    # A legend of many lines would leave no room for them; a name is then told where the mouse points.
    legend = {"orientation": "h", "y": -0.25}
    curves.update_layout(hoverlabel_namelength=-1, legend=legend, showlegend=len(curves.data) <= BEST)
    yield "Learning curves", f"val {study.metric} by step", curves
    if study.cost:
        yield "Metric against cost", "the front is what no other trial beats in both", _pareto(study, records)
    ends = [t.value for t in past.trials if t.state == TrialState.COMPLETE]
    number = len(ends)
    if number < 2:
        return
    name = f"val {study.metric}"
    at = f"{name} at step {min(steps)}, the last that all these {number} trials reached"
    plots: list[tuple[str, Callable[..., Figure]]] = [("Parallel coordinates", draw.plot_parallel_coordinate)]
    for title, plot in (*plots, ("Slices", draw.plot_slice)):
        yield title, at, plot(past, target_name=name)
    if number >= 4 and len(set(ends)) > 1:
        yield "Importance of the keys", f"share in the variance of {at}", draw.plot_param_importances(past)


def _compared(study: StudyConfig, records: Records, common_step: int) -> optuna.Study:
    """The trials as Optuna's, by their best metric up to a step: a stopped one's last is that of a shorter run."""
    past = optuna.create_study(direction=direction(study))
    pick = max if study.mode == "max" else min
    for record in records:
        values = [r[study.metric] for r in record.reports if r["step"] <= common_step and record.status != "failed"]
        params = {key: _plain(study, key, value) for key, value in record.values.items()}
        past.add_trial(
            create_trial(
                state=TrialState.COMPLETE if values else TrialState.FAIL,
                value=pick(values) if values else None,
                params=params,
                distributions={key: _distribution(study, key) for key in params},
                intermediate_values={int(r["step"]): r[study.metric] for r in record.reports},
            )
        )
    return past


def _pareto(study: StudyConfig, records: Records) -> Figure:
    past = optuna.create_study(directions=[direction(study), StudyDirection.MINIMIZE])
    for record in records:
        metric = record.metric(study)
        if metric is None or record.status == "failed":
            past.add_trial(create_trial(state=TrialState.FAIL))
        else:
            past.add_trial(create_trial(values=[metric, record.cost]))
    figure = draw.plot_pareto_front(past, target_names=[f"val {study.metric}", str(study.cost)])
    best = front(study, records)
    metrics, costs = [record.metric(study) for record in best], [record.cost for record in best]
    return figure.add_scatter(x=metrics, y=costs, mode="lines", line={"color": "#c0392b", "width": 1}, showlegend=False)


def _distribution(study: StudyConfig, key: str) -> BaseDistribution:
    """What Optuna needs to draw an axis: numbers if all of a key's values are, else names."""
    domains = study.space[key]
    ends: list[Any] = [v for d in domains for v in (d.values if d.values is not None else d.bounds or ())]
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in ends):
        if all(isinstance(v, int) for v in ends):
            return IntDistribution(min(ends), max(ends))
        return FloatDistribution(min(ends), max(ends), log=all(d.loguniform is not None for d in domains))
    return CategoricalDistribution(list(dict.fromkeys(label(v) for v in ends)))


def _plain(study: StudyConfig, key: str, value: Any) -> Any:
    return label(value) if isinstance(_distribution(study, key), CategoricalDistribution) else value
