"""The blind page and its key, and the win rate with its interval."""

import json

import pytest
from page import Page

from rlhf_jax.tools import judge

PROMPTS = [f"prompt {i}" for i in range(6)]


pytestmark = pytest.mark.usefixtures("caches")


@pytest.fixture
def write(tmp_path):
    """`write(first rows, second rows, *flags)` -> the page."""

    def write(first, second, *flags):
        for name, rows in (("old", first), ("new", second)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{name}.jsonl").write_text(text, "utf-8")
        output = tmp_path / "judge.html"
        sources = [str(tmp_path / f"{name}.jsonl") for name in ("old", "new")]
        judge.main(["page", *sources, "--output", str(output), *flags])
        return output

    return write


def answers(version, prompts=PROMPTS):
    groups = ("en", "zh")
    return [
        {"prompt": p, "responses": [f"{version} to {p}"], "group": groups[i % 2]}
        for i, p in enumerate(prompts)
    ]


def test_nothing_in_the_page_says_which_side_is_whose(write):
    rows = answers("x", [f"prompt {i}" for i in range(200)])
    page = write(rows, [row | {"responses": ["y"]} for row in rows])
    text = page.read_text("utf-8")
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert set(data) == {"kind", "scale", "items", "hash", "file"}
    assert all(set(item) == {"prompt", "responses"} for item in data["items"])
    for name in ("old", "new", "jsonl.key", "seed", "second"):
        assert name not in json.dumps(data)
    key = json.loads(page.with_suffix(".key.json").read_text())
    right = [side["second"] == "right" for side in key["sides"]]
    assert 70 <= sum(right) <= 130
    assert right == [item["responses"][1] == "y" for item in data["items"]]
    write(rows, [row | {"responses": ["y"]} for row in rows])
    assert json.loads(page.with_suffix(".key.json").read_text())["sides"] != key["sides"]


def test_a_person_judges_and_the_second_wins_as_often_as_they_said(write, browser, capsys):
    better = answers("good")
    better[5]["responses"] = ["bad to prompt 5"]  # equal: never shown, a tie
    path = write(answers("bad"), better, "--seed", "3")
    page = Page(browser, path)
    assert page.texts("#count") == ["1 of 5 · 0 judged"] and browser.title == "A / B"

    def press_for(version):
        page.press("<-" if page.responses()[0].startswith(version) else "->")

    press_for("good")
    press_for("good")
    page.press("down", "s")
    press_for("bad")
    count = ["5 of 5 · 4 judged · 1 skipped"]
    assert page.texts("#count") == count
    page.open()
    assert page.texts("#count") == count
    downloaded, rows = page.download()
    assert downloaded.name == "judge.verdicts.jsonl" and len(rows) == 4
    assert all(set(row) == {"page", "item", "verdict"} for row in rows)
    rates = judge.score(downloaded, path.with_suffix(".key.json"))
    assert rates["all"][:4] == (2, 2, 1, 3 / 5)  # won, tied (one of them equal), lost
    assert rates["en"][:3] == (1, 1, 1) and rates["zh"][:3] == (1, 1, 0)
    assert "4 of 5 pairs judged; 1 equal pairs count as ties" in capsys.readouterr().out
    assert not page.errors()


def test_equal_pairs_that_a_broken_off_judgement_did_not_reach_do_not_count(write, tmp_path):
    better = answers("good")
    for i in (0, 5):
        better[i]["responses"] = [f"bad to prompt {i}"]
    path = write(answers("bad"), better, "--seed", "3")
    key = json.loads(path.with_suffix(".key.json").read_text())
    verdicts = tmp_path / "verdicts.jsonl"
    rows = [{"page": key["page"], "item": i, "verdict": "tie"} for i in range(4)]
    verdicts.write_text(json.dumps(rows[0]) + "\n")
    assert judge.score(verdicts, path.with_suffix(".key.json"))["all"][:3] == (0, 2, 0)
    verdicts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert judge.score(verdicts, path.with_suffix(".key.json"))["all"][:3] == (0, 6, 0)


def test_wilsons_interval_holds_the_shares_that_a_score_test_does_not_refuse():
    """(share - p)^2 = z^2 p (1 - p) / n at both ends p; and the printed digits of a known case."""
    for share, count in ((0.5, 10), (0.0, 7), (1.0, 30), (0.62, 250)):
        for end in judge.wilson(share, count):
            refused = 1.959963984540054**2 * end * (1 - end) / count
            assert (share - end) ** 2 == pytest.approx(refused, abs=1e-12)
    assert judge.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998


def test_a_run_folder_is_judged_before_against_after(tmp_path):
    row = {"stage": "evaluation", "step": 0, "prompt": "p", "before": "x", "after": "y"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    judge.page((tmp_path,), tmp_path / "ab.html")
    (side,) = json.loads((tmp_path / "ab.key.json").read_text())["sides"]
    text = (tmp_path / "ab.html").read_text()
    assert (
        f'"responses": {json.dumps(["y", "x"] if side["second"] == "left" else ["x", "y"])}' in text
    )


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (answers("new", PROMPTS[:5]), "do not answer the same prompts"),
        ([*answers("new"), answers("new")[0]], "has 1 answers in"),
        (answers("old"), "all 6 pairs of answers are equal"),
    ],
)
def test_answers_that_cannot_be_paired_are_refused(write, capsys, second, message):
    with pytest.raises(SystemExit) as stopped:
        write(answers("old"), second)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and message in error and "\n" not in error


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([("other", 0, "left")], "the verdict is on another page"),
        ([(None, 6, "left")], "item 6 with verdict 'left', but the page has items 0 to 5"),
        ([(None, 0, "middle")], "item 0 with verdict 'middle', .* verdicts left, right, tie"),
        ([(None, 0, "left"), (None, 0, "right")], "item 0 is judged at v.jsonl:1 already"),
    ],
)
def test_verdicts_that_do_not_fit_the_key_are_refused(write, tmp_path, given, message):
    key = write(answers("old"), answers("new")).with_suffix(".key.json")
    page = json.loads(key.read_text())["page"]
    rows = [{"page": p or page, "item": item, "verdict": verdict} for p, item, verdict in given]
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        judge.score(tmp_path / "v.jsonl", key)


def test_another_file_is_no_key(tmp_path):
    (tmp_path / "key.json").write_text("[]")
    with pytest.raises(ValueError, match="not a key file"):
        judge.score(tmp_path / "v.jsonl", tmp_path / "key.json")
