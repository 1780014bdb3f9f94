"""The report of a run: one HTML page, made from the files in the run's folder.

The page stands alone: its curves are inline SVG, it loads no other file and runs no script. A
section for which the run wrote nothing is left out.
"""

from __future__ import annotations

import base64
import html
from typing import NamedTuple

from rlhf_jax import storage
from rlhf_jax.storage import Path
from rlhf_jax.training.charts import BOTTOM, HEIGHT, TOP, Curve, chart, number
from rlhf_jax.training.metrics import (
    Display,
    flat,
    read_displays,
    read_lines,
    read_object,
)

# The metrics whose charts have a line at the summary's `best_reachable_accuracy`.
ACCURACIES = ("rewards/accuracies", "eval/rewards/accuracies", "eval/accuracy")
MAX_SAMPLES = 24  # prompts whose responses before and after are shown


def write(folder: Path) -> Path:
    """Writes `report.html` into the folder of a run and returns its path.

    Reads metrics.jsonl, alarms.jsonl, stages.json, samples.jsonl, config.json and summary.json,
    each of which may be absent. Raises ValueError naming the file and line that this library
    cannot have written.

    The section of a stage shows its held-out evaluations (metrics named `eval/...`), each before
    the training curve of the same name, then the curves that its `Display` names, then what a
    reward function reports (`reward/...`). All other metrics are folded away. For a stage without
    a `Display` every metric is shown.

    The cards at the top show `gold_before`, `gold_after`, `win_rate`, `kl` and each `eval_accuracy`
    of the summary, wherever they are nested in it, and `best_reachable_accuracy` with the accuracy.
    A score, KL or accuracy that the summary lacks is taken from the first and last steps.
    """
    stages = _stages(read_lines(folder / "metrics.jsonl"))
    displays = read_displays(folder)
    titles = _titles(stages, displays)
    samples = read_lines(folder / "samples.jsonl")
    described = _read_object(folder / "config.json")
    summary = flat(_read_object(folder / "summary.json"))
    parts = [
        _header(folder, described),
        _alarms(read_lines(folder / "alarms.jsonl"), titles),
        _cards(stages, titles, summary),
        *(
            _stage_section(titles[name], curves, displays.get(name), summary)
            for name, curves in reversed(stages.items())
        ),
        _samples_section(samples),
        _table("Summary", summary, open_=True),
        _table("Configuration", flat(described.get("config", {}))),
        _table("Run", flat({k: v for k, v in described.items() if k != "config"})),
    ]
    title = html.escape(f"{described.get('experiment', folder.name)}")
    path = folder / "report.html"
    storage.write(path, PAGE.format(title=title, style=STYLE, body="\n".join(filter(None, parts))))
    return path


def write_sweep(
    folder: Path, rows: list[dict[str, str]], image: bytes | None, failed: dict[str, str]
) -> None:
    """Writes the `report.html` of several runs: a table of their figures, and a drawing (PNG)."""
    head, *_ = rows
    body = ["<header><h1>Sweep</h1></header>"]
    if image is not None:
        encoded = base64.b64encode(image).decode()
        body.append(f'<section><img alt="curves" src="data:image/png;base64,{encoded}"></section>')
    cells = [[f"<td><b>{html.escape(name)}</b></td>" for name in head]]
    cells += [[f"<td>{html.escape(value)}</td>" for value in row.values()] for row in rows]
    lines = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    note = "Mean ± half of the 95 % interval (number of seeds)"
    body.append(f"<section><h2>Figures</h2><p>{note}</p><table>{lines}</table></section>")
    if failed:
        listed = "".join(
            f"<li>{html.escape(name)}: {html.escape(why)}</li>" for name, why in failed.items()
        )
        body.append(f"<section><h2>Failed</h2><ul>{listed}</ul></section>")
    page = PAGE.format(title="sweep", style=STYLE, body="\n".join(body))
    storage.write(folder / "report.html", page)


# ---------------------------------------------------------------------------------------- reading


def _stages(lines: list[dict]) -> dict[str, dict[str, Curve]]:
    """Lines of metrics.jsonl -> stage -> metric -> curve, in order of appearance."""
    stages: dict[str, dict[str, Curve]] = {}
    for line in lines:
        curves = stages.setdefault(line["stage"], {})
        for name, value in line.items():
            if name not in ("stage", "step") and value is not None:
                curve = curves.setdefault(name, Curve([], []))
                curve.steps.append(line["step"])
                curve.values.append(float(value))  # "NaN" and "Infinity" too
    return stages


def _titles(stages: dict[str, dict[str, Curve]], displays: dict[str, Display]) -> dict[str, str]:
    """The title of each stage; two with the same title, say two reward models, add their names."""
    given = [displays[name].title for name in stages if name in displays]
    titles = {}
    for name in stages:
        title = displays[name].title if name in displays else _words(name)
        titles[name] = f"{title} ({_words(name).lower()})" if given.count(title) > 1 else title
    return titles


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _read_object(path: Path) -> dict:
    return read_object(path, "remove it") if path.exists() else {}


def _number_named(summary: dict, name: str) -> float | int | None:
    """The first number called `name` in the flattened summary, however deeply it was nested."""
    for key, value in summary.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and key.rpartition(".")[2] == name:
            return value
    return None


# ---------------------------------------------------------------------------------- page sections


def _header(folder: Path, described: dict) -> str:
    versions = described.get("versions", {})
    facts = [
        described.get("started"),
        described.get("device"),
        " ".join(f"{axis}={size}" for axis, size in described.get("mesh", {}).items()),
        " ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    line = " · ".join(html.escape(str(fact)) for fact in facts if fact)
    title = html.escape(str(described.get("experiment", folder.name)))
    return f"<header><h1>{title}</h1><p>{line}</p></header>"


def _alarms(lines: list[dict], titles: dict[str, str]) -> str:
    """The first card: what was found wrong with the run, if anything was."""
    if not lines:
        return ""
    listed = "".join(
        f"<p><b>{html.escape(line['name'])}</b> ({html.escape(titles.get(line['stage'], ''))}, "
        f"step {line['step'] + 1}): {html.escape(line['text'])}</p>"
        for line in lines
    )
    return f'<div class="card alarm"><h3>Alarms</h3>{listed}</div>'


def _cards(stages: dict[str, dict[str, Curve]], titles: dict[str, str], summary: dict) -> str:
    def from_summary_or_steps(name: str, metric: str, index: int):
        found = _number_named(summary, name)
        steps = [curves[metric].values[index] for curves in stages.values() if metric in curves]
        return found if found is not None else steps[0] if steps else None

    cards = []
    before = from_summary_or_steps("gold_before", "objective/gold", 0)
    after = from_summary_or_steps("gold_after", "objective/gold", -1)
    if before is not None and after is not None:
        change = f"{after - before:+.3g} by the gold score"
        cards.append(("Gold score", f"{before:.3g} → {after:.3g}", change))
    win_rate = _number_named(summary, "win_rate")
    if win_rate is not None:
        interval = _interval(
            *(_number_named(summary, f"win_rate_{end}") for end in ("low", "high"))
        )
        note = "by a second reward model" + interval
        cards.append(("Win rate over the starting policy", f"{win_rate:.1%}", note))
    kl = from_summary_or_steps("kl", "objective/kl", -1)
    if kl is not None:
        cards.append(("KL to the reference", number(kl), "nats per response"))
    cards += _accuracy_cards(stages, titles, summary)
    seconds = {name: curves["seconds"].values[-1] for name, curves in stages.items()}
    if seconds:
        each = ", ".join(f"{titles[name]} {_duration(value)}" for name, value in seconds.items())
        cards.append(("Time", _duration(sum(seconds.values())), each))
    body = "".join(
        f'<div class="card"><h3>{html.escape(title)}</h3><b>{html.escape(figure)}</b>'
        f"<p>{html.escape(note)}</p></div>"
        for title, figure, note in cards
    )
    return f'<div class="cards">{body}</div>' if cards else ""


def _accuracy_cards(
    stages: dict[str, dict[str, Curve]], titles: dict[str, str], summary: dict
) -> list[tuple[str, str, str]]:
    """(title, figure, note) of the held-out accuracies; without any, of the last batch's."""
    best = _number_named(summary, "best_reachable_accuracy")
    cards = []
    for key, value in summary.items():
        place, _, name = key.rpartition(".")
        if name != "eval_accuracy":
            continue
        stage, _, data = place.rpartition(".") if place.count(".") else (place, "", "")
        note = "held-out comparisons" + f", {data}" * bool(data)
        note += _interval(summary.get(f"{key}_low"), summary.get(f"{key}_high"))
        note += f", best reachable {best:.1%}" if best is not None else ""
        stage = stage.rpartition(".")[2]
        title = titles.get(stage, _words(stage))
        cards.append((f"Accuracy, {title}" if title else "Accuracy", f"{value:.1%}", note))
    if not cards:
        for name, curves in stages.items():
            if "rewards/accuracies" in curves:
                last = curves["rewards/accuracies"].values[-1]
                note = "on the last batch it was trained on"
                cards.append((f"Accuracy, {titles[name]}", f"{last:.1%}", note))
    return cards


def _interval(low: float | None, high: float | None) -> str:
    known = low is not None and high is not None
    return f", 95 % interval {low:.1%} to {high:.1%}" if known else ""


def _stage_section(
    title: str, curves: dict[str, Curve], display: Display | None, summary: dict
) -> str:
    best = _number_named(summary, "best_reachable_accuracy")
    ends = [step for curve in curves.values() for step in (curve.steps[0], curve.steps[-1])]
    headings = {} if display is None else display.curves

    def draw(name: str) -> str:
        level = (float(best), "best reachable") if best is not None and name in ACCURACIES else None
        heading = _heading(name, headings)
        return chart(name, curves[name], heading, level, steps=(min(ends), max(ends)))

    shown = _shown(list(curves), display)
    rest = sorted(name for name in curves if name not in shown and name != "seconds")
    main, folded = (list(filter(None, map(draw, names))) for names in (shown, rest))
    more = ""
    if folded:
        head = f"<summary>{len(folded)} more curve{'s' * (len(folded) > 1)}</summary>"
        more = f'<details>{head}<div class="grid">{"".join(folded)}</div></details>'
    grid = f'<div class="grid">{"".join(main)}</div>'
    return f"<section><h2>{html.escape(title)}</h2>{grid}{more}</section>"


def _shown(metrics: list[str], display: Display | None) -> list[str]:
    """The metrics that are not folded away, in the order in which they are drawn."""
    metrics = [name for name in metrics if name != "seconds"]
    held_out = [name for name in metrics if name.startswith("eval/")]
    compared = [name for x in held_out for name in (x, x.removeprefix("eval/")) if name in metrics]
    if display is None:
        return list(dict.fromkeys([*compared, *metrics]))
    named = [name for name in display.curves if name in metrics]
    rewards = [name for name in metrics if name.startswith("reward/")]
    return list(dict.fromkeys([*compared, *named, *rewards]))


def _heading(metric: str, headings: dict[str, str]) -> str | None:
    """The words above the name of a metric; None for a metric that has only its name."""
    if metric in headings:
        return headings[metric]
    if metric.startswith("eval/"):
        trained = metric.removeprefix("eval/")
        return f"{headings.get(trained, _words(trained))}, held out"
    if metric.startswith("reward/"):
        return f"Reward: {_words(metric.removeprefix('reward/')).lower()}"
    return None


class Sample(NamedTuple):
    """The responses to one prompt before and after training, with the numbers of each."""

    prompt: str
    before: str
    after: str
    numbers_before: dict[str, float | int]
    numbers_after: dict[str, float | int]


def _pairs(rows: list[dict]) -> list[Sample]:
    """Samples of the rows with `before` and `after`, then of prompts with several completions.

    Of the latter the first and the last completion are shown.
    """
    pairs, rows_of_prompt = [], {}
    for row in rows:
        if {"prompt", "before", "after"} <= row.keys():
            numbers = (_numbers_of(row, side) for side in ("before", "after"))
            pairs.append(Sample(row["prompt"], row["before"], row["after"], *numbers))
        elif {"prompt", "completion"} <= row.keys():
            rows_of_prompt.setdefault(row["prompt"], []).append(row)
    for prompt, (first, *others) in rows_of_prompt.items():
        if others:
            texts = first["completion"], others[-1]["completion"]
            pairs.append(Sample(prompt, *texts, _numbers(first), _numbers(others[-1])))
    return pairs


def _numbers(row: dict) -> dict[str, float | int]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}


def _numbers_of(row: dict, side: str) -> dict[str, float | int]:
    """{"gold before": 1, "gold after": 2} -> {"gold": 1} for the side `before`."""
    numbers = {name: value for name, value in _numbers(row).items() if side in name}
    return {name.replace(side, "").strip("_/ ") or side: x for name, x in numbers.items()}


def _samples_section(rows: list[dict]) -> str:
    pairs = _pairs(rows)[:MAX_SAMPLES]
    if not pairs:
        return ""

    def side(label: str, text: str, numbers: dict) -> str:
        chips = "".join(
            f"<span>{html.escape(name)} {number(value)}</span>" for name, value in numbers.items()
        )
        return f"<div><h4>{label}{chips}</h4><pre>{html.escape(text)}</pre></div>"

    items = "".join(
        f'<article><pre class="prompt">{html.escape(pair.prompt)}</pre><div class="sides">'
        f"{side('before', pair.before, pair.numbers_before)}"
        f"{side('after', pair.after, pair.numbers_after)}</div></article>"
        for pair in pairs
    )
    return f"<section><h2>The same prompts, before and after</h2>{items}</section>"


def _table(title: str, values: dict, open_: bool = False) -> str:
    if not values:
        return ""
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(number(value))}</td></tr>"
        for name, value in values.items()
    )
    opened = " open" if open_ else ""
    return f"<details{opened}><summary>{title}</summary><table>{rows}</table></details>"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


STYLE = """
:root { color-scheme: light dark; --page: #fafaf8; --card: #fff; --ink: #1c1d22; --soft: #6b6e78;
  --rule: #e6e6e2; --line: #2a62c9; --level: #b5651d; --chip: #eef1f8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #141519; --card: #1d1f25; --ink: #e8e9ed; --soft: #969aa6; --rule: #31343d;
    --line: #7aa7ff; --level: #e0a060; --chip: #2a2e3a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 20px 60px; max-width: 1160px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { margin: 0; font-size: 26px; } h2 { margin: 40px 0 12px; font-size: 19px; }
h3 { margin: 0; font-size: 13px; font-weight: 500; color: var(--soft); }
header p { margin: 4px 0 20px; color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.cards, .grid { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.cards { grid-template-columns: repeat(auto-fit, minmax(min(100%, 205px), 1fr)); }
.card, figure, article, details { background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; }
.card { padding: 14px 16px; }
.card b { display: block; margin: 2px 0; font-size: 22px; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.card p { margin: 0; color: var(--soft); font-size: 13px; }
.alarm { margin-bottom: 14px; border-color: var(--level); }
.alarm h3, .alarm b { color: var(--level); } .alarm b { display: inline; font-size: 13px; }
figure { margin: 0; padding: 12px 12px 6px; }
figcaption { display: flex; justify-content: space-between; gap: 8px; font-size: 14px; }
figcaption span { min-width: 0; overflow-wrap: anywhere; }
figcaption b { font-weight: 600; white-space: nowrap; font-variant-numeric: tabular-nums; }
figcaption code { display: block; color: var(--soft); font-size: 11.5px; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
svg { display: block; width: 100%; height: auto; margin-top: 4px; }
svg text { fill: var(--soft); font-size: 10px; font-variant-numeric: tabular-nums; }
.rule { stroke: var(--rule); } .level { stroke: var(--level); stroke-dasharray: 4 3; }
.curve { fill: none; stroke: var(--line); stroke-width: 1.8; stroke-linejoin: round;
  stroke-linecap: round; }
circle { r: 2.6px; fill: var(--line); }
g rect { y: TOPpx; height: INNERpx; fill: transparent; } g circle { visibility: hidden; }
g:hover rect { fill: var(--rule); fill-opacity: .45; } g:hover circle { visibility: visible; }
article { margin-bottom: 14px; padding: 14px 16px; }
pre { margin: 0; font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { padding-bottom: 10px; margin-bottom: 10px; border-bottom: 1px solid var(--rule);
  color: var(--soft); }
.sides { display: grid; gap: 18px; grid-template-columns: 1fr 1fr; }
h4 { display: flex; flex-wrap: wrap; gap: 6px; margin: 0 0 6px; font-size: 12px;
  font-weight: 600; color: var(--soft); }
h4 span { padding: 0 8px; border-radius: 9px; background: var(--chip); color: var(--ink);
  font-weight: 500; font-variant-numeric: tabular-nums; }
details { margin-top: 14px; padding: 10px 16px; }
summary { cursor: pointer; font-weight: 600; font-size: 14px; }
details .grid { margin: 12px 0 4px; }
details figure { background: none; }
table { width: 100%; margin: 8px 0 4px; border-collapse: collapse; font-size: 13px; }
th, td { padding: 4px 8px 4px 0; border-top: 1px solid var(--rule); text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
th { width: 45%; font-weight: 500; color: var(--soft); }
@media (max-width: 620px) { .sides { grid-template-columns: 1fr; }
  body { padding: 18px 12px 40px; } }
""".replace("TOPpx", f"{TOP}px").replace("INNERpx", f"{HEIGHT - TOP - BOTTOM}px")

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""
