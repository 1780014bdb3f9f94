"""One self-contained HTML page of a run, from the files in its folder.

Curves are inline SVG; the page asks for nothing from elsewhere and runs no script. What a run did
not write is left out.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from rlhf_jax.training.metrics import read_lines, write_atomically

# Shown at the top of a stage, in this order, where its steps report them; the rest folds away.
CURVES = {
    "objective/scores": "Reward (scores)",
    "objective/gold": "Gold score",
    "objective/kl": "KL to the reference, nats per response",
    "policy/entropy_avg": "Entropy, nats per token",
    "objective/length": "Response length, tokens",
    "loss/value_avg": "Value loss",
    "policy/clipfrac_avg": "Policy clip fraction",
    "loss": "Loss",
    "rewards/accuracies": "Accuracy on comparisons",
    "rewards/margins": "Margin, chosen minus rejected",
}
TITLES = {"sft": "Supervised fine-tuning", "reward_model": "Reward model", "ppo": "PPO"}
MAX_POINTS = 120  # a longer curve is drawn as the means of so many stretches of steps
MAX_SAMPLES = 24


def write(folder: Path) -> Path:
    """Write `report.html` into the folder of a run and return its path.

    Reads metrics.jsonl, samples.jsonl, config.json and summary.json, each of which may be absent.
    The cards at the top take `gold_before`, `gold_after`, `win_rate`, `kl`, every `eval_accuracy`
    and `best_reachable_accuracy` from the summary (under these names at its top level or as the
    last part of a nested name), and what the summary lacks from the first and last steps.
    Raises ValueError with file and line where one of them is not what this library writes.
    """
    folder = Path(folder)
    stages = _stages(read_lines(folder / "metrics.jsonl"))
    samples = read_lines(folder / "samples.jsonl")
    described = _read_object(folder / "config.json")
    summary = _flat(_read_object(folder / "summary.json"))
    parts = [
        _header(folder, described),
        _cards(stages, summary),
        *(_stage_section(name, curves, summary) for name, curves in reversed(stages.items())),
        _samples_section(samples),
        _table("Summary", summary, open_=True),
        _table("Configuration", _flat(described.get("config", {}))),
        _table("Run", _flat({k: v for k, v in described.items() if k != "config"})),
    ]
    title = html.escape(f"{described.get('experiment', folder.name)}")
    path = folder / "report.html"
    write_atomically(
        path, PAGE.format(title=title, style=STYLE, body="\n".join(filter(None, parts)))
    )
    return path


# ---------------------------------------------------------------------------------------- reading


class Curve(NamedTuple):
    """One metric of one stage: steps and values, of which some may be NaN."""

    steps: list[int]
    values: list[float]


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


def _read_object(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); remove it") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not an object; remove it")
    return value


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def _figure(summary: dict, name: str) -> float | int | None:
    """The number called `name` in the summary, however deeply it is nested there."""
    for key, value in summary.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and key.rpartition(".")[2] == name:
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


def _cards(stages: dict[str, dict[str, Curve]], summary: dict) -> str:
    def of(name: str, metric: str, place: int):
        found = _figure(summary, name)
        if found is not None:
            return found
        for curves in stages.values():
            if metric in curves:
                return curves[metric].values[place]
        return None

    cards = []
    before, after = of("gold_before", "objective/gold", 0), of("gold_after", "objective/gold", -1)
    if before is not None and after is not None:
        change = f"{after - before:+.3g} by the gold score"
        cards.append(("Gold score", f"{before:.3g} → {after:.3g}", change))
    won = _figure(summary, "win_rate")
    if won is not None:
        low, high = (_figure(summary, f"win_rate_{end}") for end in ("low", "high"))
        note = f"by a second reward model, 95 % interval {low:.1%} to {high:.1%}"
        cards.append(("Win rate over what SFT left", f"{won:.1%}", note))
    kl = of("kl", "objective/kl", -1)
    if kl is not None:
        cards.append(("KL to the reference", _number(kl), "nats per response"))
    cards += _accuracy_cards(stages, summary)
    seconds = {name: curves["seconds"].values[-1] for name, curves in stages.items()}
    if seconds:
        each = ", ".join(f"{_title(name)} {_duration(value)}" for name, value in seconds.items())
        cards.append(("Time", _duration(sum(seconds.values())), each))
    body = "".join(
        f'<div class="card"><h3>{html.escape(title)}</h3><b>{html.escape(figure)}</b>'
        f"<p>{html.escape(note)}</p></div>"
        for title, figure, note in cards
    )
    return f'<div class="cards">{body}</div>' if cards else ""


def _accuracy_cards(stages: dict, summary: dict) -> list[tuple[str, str, str]]:
    """(title, figure, note): all held-out accuracies, or where there is none the last batch's."""
    best = _figure(summary, "best_reachable_accuracy")
    cards = []
    for key, value in summary.items():
        place, _, name = key.rpartition(".")
        if name != "eval_accuracy":
            continue
        stage, _, data = place.rpartition(".") if place.count(".") else (place, "", "")
        note = "held-out comparisons" + f", {data}" * bool(data)
        low, high = (summary.get(f"{key}_{end}") for end in ("low", "high"))
        note += f", 95 % interval {low:.1%} to {high:.1%}" if low is not None else ""
        note += f", best reachable {best:.1%}" if best is not None else ""
        title = _title(stage.rpartition(".")[2] or "reward_model")
        cards.append((f"Accuracy, {title}", f"{value:.1%}", note))
    curves = [c["rewards/accuracies"] for c in stages.values() if "rewards/accuracies" in c]
    if not cards and curves:
        note = "on the last batch it was trained on"
        cards.append(("Accuracy, Reward model", f"{curves[0].values[-1]:.1%}", note))
    return cards


def _stage_section(stage: str, curves: dict[str, Curve], summary: dict) -> str:
    best = _figure(summary, "best_reachable_accuracy")
    levels = {} if best is None else {"rewards/accuracies": (float(best), "best reachable")}
    shown = [name for name in CURVES if name in curves]
    rest = [name for name in curves if name not in CURVES and name != "seconds"]
    main = "".join(chart(name, curves[name], levels.get(name)) for name in shown)
    more = "".join(chart(name, curves[name]) for name in sorted(rest))
    if more:
        head = f"<summary>{len(rest)} more curves</summary>"
        more = f'<details>{head}<div class="grid">{more}</div></details>'
    title = html.escape(_title(stage))
    return f'<section><h2>{title}</h2><div class="grid">{main}</div>{more}</section>'


def _title(stage: str) -> str:
    return TITLES.get(stage, stage.replace("_", " ").capitalize())


class Sample(NamedTuple):
    """What two policies said to one prompt, with the numbers that belong to each."""

    prompt: str
    before: str
    after: str
    numbers_before: dict[str, float | int]
    numbers_after: dict[str, float | int]


def _pairs(rows: list[dict]) -> list[Sample]:
    """Rows with `before` and `after`, then the first and the last completion of each prompt."""
    pairs, seen = [], {}
    for row in rows:
        if {"prompt", "before", "after"} <= row.keys():
            numbers = _numbers(row)
            sides = [
                {
                    k.replace(side, "").strip("_/ ") or side: v
                    for k, v in numbers.items()
                    if side in k
                }
                for side in ("before", "after")
            ]
            pairs.append(Sample(row["prompt"], row["before"], row["after"], *sides))
        elif {"prompt", "completion"} <= row.keys():
            seen.setdefault(row["prompt"], []).append(row)
    for prompt, said in seen.items():
        first, last = said[0], said[-1]
        if first is not last:
            texts = first["completion"], last["completion"]
            pairs.append(Sample(prompt, *texts, _numbers(first), _numbers(last)))
    return pairs


def _numbers(row: dict) -> dict[str, float | int]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}


def _samples_section(rows: list[dict]) -> str:
    pairs = _pairs(rows)[:MAX_SAMPLES]
    if not pairs:
        return ""

    def side(label: str, text: str, numbers: dict) -> str:
        chips = "".join(
            f"<span>{html.escape(name)} {_number(value)}</span>" for name, value in numbers.items()
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
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(_number(value))}</td></tr>"
        for name, value in values.items()
    )
    opened = " open" if open_ else ""
    return f"<details{opened}><summary>{title}</summary><table>{rows}</table></details>"


# ------------------------------------------------------------------------------------------ charts

WIDTH, HEIGHT = 340, 180
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 8, 22


def chart(metric: str, curve: Curve, level: tuple[float, str] | None = None) -> str:
    """A figure with axes, the curve, and a tooltip over every point. Empty if nothing is finite.

    `level` is a value worth comparing with, and what it is: drawn as a dashed line.
    """
    steps, values = _thin(curve)
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, high = _span(finite, level)
    ticks = _ticks(low, high)
    first, last = curve.steps[0], max(curve.steps[-1], curve.steps[0] + 1)

    def x(step):
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first), 1)

    def y(value):
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low), 1)

    points = [(x(s), y(v) if math.isfinite(v) else None) for s, v in zip(steps, values)]
    body = [
        *(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>'
            f'<text x="{LEFT - 6}" y="{y(tick) + 3.5}" text-anchor="end">{_mark(tick)}</text>'
            for tick in ticks
        ),
        *_step_labels(first, last, x),
        _level_line(level, y) if level else "",
        _path(points),
        *_tooltips(steps, values, points),
    ]
    name = html.escape(metric)
    heading = html.escape(CURVES.get(metric, metric))
    code = f"<code>{name}</code>" if metric in CURVES else ""
    return (
        f"<figure><figcaption><span>{heading}{code}</span><b>{_number(curve.values[-1])}</b>"
        f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">'
        f"{''.join(body)}</svg></figure>"
    )


def _thin(curve: Curve) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points, each the mean of a stretch of steps (of its finite values)."""
    stride = math.ceil(len(curve.steps) / MAX_POINTS)
    steps, values = [], []
    for begin in range(0, len(curve.steps), stride):
        piece = curve.values[begin : begin + stride]
        finite = [value for value in piece if math.isfinite(value)]
        values.append(sum(finite) / len(finite) if finite else piece[0])
        where = curve.steps[begin : begin + stride]
        steps.append(sum(where) / len(where))
    return steps, values


def _span(values: list[float], level: tuple[float, str] | None) -> tuple[float, float]:
    """The lower and the upper end of the axis, with a little room around the values."""
    values = values + ([level[0]] if level else [])
    low, high = min(values), max(values)
    room = 0.05 * (high - low)
    if room < 1e-9 * max(abs(low), abs(high)) or room == 0.0:  # a constant: its own tenth
        room = 0.1 * abs(high) or 1.0
    above = 3 * room if level else room  # the label of the level stands above its line
    return low - room, high + above


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers within low..high."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * 0.999)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [index * step for index in range(first, last + 1)]


def _step_labels(first: int, last: int, x) -> Iterable[str]:
    for step in sorted({first, (first + last) // 2, last}):
        anchor = "end" if step == last else "start" if step == first else "middle"
        yield f'<text x="{x(step)}" y="{HEIGHT - 6}" text-anchor="{anchor}">{step}</text>'


def _level_line(level: tuple[float, str], y) -> str:
    value, name = level
    return (
        f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value)}" y2="{y(value)}"/>'
        f'<text x="{WIDTH - RIGHT}" y="{y(value) - 4}" text-anchor="end">'
        f"{html.escape(name)} {_number(value)}</text>"
    )


def _path(points: list[tuple[float, float | None]]) -> str:
    """The curve, broken where a value is not finite; a lone point is drawn as a dot."""
    pieces, current = [], []
    for px, py in [*points, (0.0, None)]:
        if py is not None:
            current.append(f"{px},{py}")
        elif current:
            pieces.append(current)
            current = []
    drawn = "".join("M" + "L".join(piece) for piece in pieces if len(piece) > 1)
    dots = "".join(
        '<circle cx="{}" cy="{}"/>'.format(*piece[0].split(","))
        for piece in pieces
        if len(piece) == 1
    )
    return f'<path class="curve" d="{drawn}"/>{dots}' if drawn else dots


def _tooltips(steps, values, points) -> Iterable[str]:
    """A band over each point that lights up and names its step and value."""
    edges = [(a[0] + b[0]) / 2 for a, b in zip(points, points[1:])]
    lefts, rights = [LEFT, *edges], [*edges, WIDTH - RIGHT]
    for step, value, (px, py), left, right in zip(steps, values, points, lefts, rights):
        dot = "" if py is None else f'<circle cx="{px}" cy="{py}"/>'
        yield (
            f'<g><rect x="{left:.4g}" width="{right - left:.3g}"/>{dot}'
            f"<title>step {step:.0f}: {_number(value)}</title></g>"
        )


def _number(value) -> str:
    if not isinstance(value, float):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.4g}"
    return "0" if value == 0 else text.replace("-", "−", 1) if text[0] == "-" else text


def _mark(tick: float) -> str:
    """A number beside an axis, where there is room for seven characters."""
    for least, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if least <= abs(tick) < 1e12:
            return _number(tick / unit) + letter
    return _number(tick)


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
