"""The page of a run stands alone, escapes what models say, and leaves out what is missing."""

import html.parser
import json
import math
import re

import pytest

from rlhf_jax.training import charts, report
from rlhf_jax.training.metrics import Display, Log

SCORES = {"objective/scores": "Reward (scores)", "objective/gold": "Gold score"}
PPO = Display("PPO", ("objective/scores",), SCORES | {"objective/kl": "KL, nats per response"})
SCORER = Display(
    "Reward model", ("loss",), {"loss": "Loss", "rewards/accuracies": "Accuracy on comparisons"}
)


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text; fails on tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def run(tmp_path):
    log = Log(tmp_path, quiet=True)
    hostile = '<script src="x.js">alert("1")</script> & </pre>'
    log.samples("ppo", 0, [{"prompt": hostile, "completion": "was " + hostile, "gold": 0.25}])
    log.samples("ppo", 40, [{"prompt": hostile, "completion": "now " + hostile, "gold": 0.75}])
    with log.stage("reward_model", 3, display=SCORER) as stage:
        for step in range(3):
            stage.write(step, {"loss": 0.7 - step / 10, "rewards/accuracies": 0.5 + step / 10})
    with log.stage("ppo", 400, display=PPO) as stage:
        for step in range(400):
            broken = math.nan if step == 200 else 1.0
            kl = {"objective/kl": step / 40, "objective/gold": 0.4 + step / 1000}
            stage.write(step, kl | {"objective/scores": 1.0, "<b>": broken, "dead": math.nan})
    config = {"experiment": "a <b>bold</b> run", "config": {"ppo": {"kl_coef": 0.05}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    summary = {"ppo": {"gold_before": 0.412, "gold_after": 0.799}}
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"best_reachable_accuracy": 0.9}))
    return tmp_path


def test_the_page_asks_for_nothing_from_elsewhere(run):
    path = report.write(run)
    text = path.read_text()
    page = Page(text)
    assert path == run / "report.html"
    assert not re.search(r"https?:|//|@import|url\(", text)
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in page.tags}
    attributes = {name for _, given in page.tags for name in given}
    assert not {"src", "href", "onload", "onclick"} & attributes


def test_everything_that_comes_from_the_run_is_escaped(run):
    page = Page(report.write(run).read_text())
    assert not {"b>", "script"} & {tag for tag, _ in page.tags}
    text = "".join(page.text)
    assert 'was <script src="x.js">alert("1")</script> & </pre>' in text
    assert "a <b>bold</b> run" in text


def test_cards_take_the_summary_and_then_the_steps(run):
    text = report.write(run).read_text()
    assert "0.412 → 0.799" in text and "+0.387 by the gold score" in text
    assert "<b>9.975</b>" in text  # the last objective/kl, 399 / 40
    assert "70.0%" in text and "on the last batch it was trained on" in text


def test_held_out_accuracies_stand_in_the_place_of_the_last_batchs(run):
    measured = {"eval_accuracy": 0.612, "eval_accuracy_low": 0.5, "eval_accuracy_high": 0.7}
    summary = {"reward_model": {"rank": {"people": measured}}, "judge": {"eval_accuracy": 0.55}}
    summary |= {"win_rate": 0.61, "win_rate_low": 0.58, "win_rate_high": 0.64}
    (run / "summary.json").write_text(json.dumps(summary | {"best_reachable_accuracy": 0.9}))
    text = report.write(run).read_text()
    assert "<b>61.2%</b><p>held-out comparisons, people, 95 % interval 50.0% to 70.0%" in text
    assert "<b>55.0%</b><p>held-out comparisons, best reachable 90.0%" in text
    assert "Accuracy, Rank" in text and "95 % interval 58.0% to 64.0%" in text
    assert "70.0%</b>" not in text


def test_curves_carry_the_metric_names_and_a_tooltip_for_every_stretch_of_steps(run):
    text = report.write(run).read_text()
    for name in ("objective/scores", "objective/gold", "objective/kl", "rewards/accuracies"):
        assert f"<code>{name}</code>" in text
    assert "<title>step 2: 0.5</title>" in text  # three steps of the reward model's loss: 0.5
    drawn = text.count("<figure>")
    assert drawn == 2 + 4  # `dead` has no finite value: no figure
    assert text.count("<title>step") <= charts.MAX_POINTS * drawn


def figures(text):
    """(heading, metric) of every figure that is not folded away, in order."""
    text = re.sub("<details>.*?</details>", "", text, flags=re.DOTALL)
    pattern = r"<figcaption><span>(.*?)(?:<code>(.*?)</code>)?</span>"
    return [(heading, metric or heading) for heading, metric in re.findall(pattern, text)]


def test_a_stage_shows_first_what_its_algorithm_names_and_folds_the_rest_away(run):
    text = report.write(run).read_text()
    named = [*((title, metric) for metric, title in PPO.curves.items())]
    assert figures(text) == [*named, *((title, metric) for metric, title in SCORER.curves.items())]
    assert "<h2>PPO</h2>" in text and "<h2>Reward model</h2>" in text
    assert "<summary>1 more curve</summary>" in text  # `<b>`; `dead` has nothing to draw


def test_a_stage_that_states_no_display_shows_its_metrics_by_name(tmp_path):
    with Log(tmp_path, quiet=True).stage("my_own", 2) as stage:
        for step in range(2):
            stage.write(step, {"b": 1.0, "a/x": 2.0})
    text = report.write(tmp_path).read_text()
    assert "<h2>My own</h2>" in text and "<details><summary>" not in text.split("</section>")[0]
    assert figures(text) == [("b", "b"), ("a/x", "a/x")]


def test_two_stages_of_one_algorithm_are_told_apart_by_their_names(tmp_path):
    log = Log(tmp_path, quiet=True)
    for name in ("rank", "second_judge"):
        with log.stage(name, 1, display=SCORER) as stage:
            stage.write(0, {"loss": 0.0})
    text = report.write(tmp_path).read_text()
    assert "<h2>Reward model (rank)</h2>" in text
    assert "<h2>Reward model (second judge)</h2>" in text


def test_held_out_evaluations_stand_first_with_a_dot_each_on_the_axis_of_the_stage(tmp_path):
    with Log(tmp_path, quiet=True).stage("reward_model", 100, display=SCORER) as stage:
        for step in range(100):
            measured = {"loss": 1.0, "rewards/accuracies": 0.5, "lr": 0.1}
            if step in (40, 60, 80):
                measured |= {"eval/rewards/accuracies": step / 100, "eval/bleu": 1.0}
            stage.write(step, measured)
    (tmp_path / "summary.json").write_text('{"best_reachable_accuracy": 0.9}')
    text = report.write(tmp_path).read_text()
    assert figures(text) == [
        ("Accuracy on comparisons, held out", "eval/rewards/accuracies"),
        ("Accuracy on comparisons", "rewards/accuracies"),
        ("Bleu, held out", "eval/bleu"),
        ("Loss", "loss"),
    ]
    drawn = text[text.index('aria-label="eval/rewards/accuracies"') :].split("</figure>")[0]
    visible = re.sub("<g>.*?</g>", "", drawn)
    dots = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', visible)]
    width = charts.WIDTH - charts.LEFT - charts.RIGHT
    assert dots == [round(charts.LEFT + width * step / 99, 1) for step in (40, 60, 80)]
    assert "best reachable 0.9" in drawn and visible.count('class="curve"') == 1
    trained = text[text.index('aria-label="rewards/accuracies"') :].split("</figure>")[0]
    assert "<circle" not in re.sub("<g>.*?</g>", "", trained)


def test_what_a_reward_function_reports_is_shown_though_no_algorithm_names_it(tmp_path):
    with Log(tmp_path, quiet=True).stage("ppo", 2, display=PPO) as stage:
        for step in range(2):
            stage.write(step, {"lr": 0.1, "reward/well_formed": 0.5, "objective/kl": 1.0})
    text = report.write(tmp_path).read_text()
    shown = [
        ("KL, nats per response", "objective/kl"),
        ("Reward: well formed", "reward/well_formed"),
    ]
    assert figures(text) == shown


def test_samples_pair_the_first_and_the_last_completion_of_a_prompt(run):
    text = report.write(run).read_text()
    assert text.index("before<span>gold 0.25") < text.index("after<span>gold 0.75")
    assert text.count("<article>") == 1


def test_samples_may_hold_before_and_after_in_one_row(tmp_path):
    row = {"prompt": "p", "before": "x", "after": "y", "gold before": 0.1, "gold after": 0.9}
    Log(tmp_path, quiet=True).samples("evaluation", 0, [row])
    text = report.write(tmp_path).read_text()
    assert "before<span>gold 0.1</span></h4><pre>x</pre>" in text
    assert "after<span>gold 0.9</span></h4><pre>y</pre>" in text


def test_a_curve_breaks_where_a_value_is_not_finite():
    values = [1.0, 2.0, math.nan, 3.0, math.inf, 4.0, 5.0]
    drawn = charts.chart("x", charts.Curve(list(range(7)), values))
    path = re.search(r'class="curve" d="([^"]*)"', drawn).group(1)
    assert path.count("M") == 2 and path.count("L") == 2  # 0-1 and 5-6; 3 stands alone as a dot
    assert "step 2: nan" in drawn and "step 4: inf" in drawn
    assert drawn.count("nan") == drawn.count("inf") == 1


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [1e-12, 2e-12], [-3e8, 4e8], [1e30, 2e30]])
def test_the_axis_has_round_marks_among_the_values_whatever_their_size(values):
    low, high = charts._span(values, None)
    ticks = charts._ticks(low, high)
    assert low <= min(values) and max(values) <= high and low < high
    assert 2 <= len(ticks) <= 6
    assert all(low <= tick <= high for tick in ticks)
    assert "<path" in charts.chart("x", charts.Curve(list(range(len(values))), values)) or (
        len(values) == 1
    )


def test_an_empty_folder_gives_a_page_that_says_only_its_name(tmp_path):
    text = report.write(tmp_path).read_text()
    assert not any(word in text for word in ("<section", '<div class="card', "<svg", "<table"))
    assert f"<h1>{tmp_path.name}</h1>" in text


def test_broken_files_are_refused_by_name(tmp_path):
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json: not valid JSON"):
        report.write(tmp_path)
