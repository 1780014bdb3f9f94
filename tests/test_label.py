"""The labelling page: safe text, an order that is undone, and what a person's clicks download."""

import html.parser
import json
import re

import numpy as np
import pytest
from page import Page

from rlhf_jax.data import batches, builders, tokenizers
from rlhf_jax.tools import label, pages

HOSTILE = (
    "</script><script>document.title='broken'</script> & \"q\" 'q' <!-- \u2028 \u2029 ${x} $title"
)
SKY = ["It is air.", "It mirrors the sea.", "Blue light scatters most.", "Who knows?"]
ROWS = [
    {"prompt": "Why is the sky blue?", "responses": SKY},
    {"prompt": "什么是三原色？", "responses": ["红、绿、蓝。", "红、黄、绿。"]},
    {"prompt": "Say it " + HOSTILE, "responses": ["yes " + HOSTILE, "no\n\tdifferent"]},
]


pytestmark = pytest.mark.usefixtures("caches")


@pytest.fixture
def write(tmp_path):
    """`write(rows, *flags)` -> the page."""

    def write(rows, *flags):
        source, output = tmp_path / "answers.jsonl", tmp_path / "page.html"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        label.main([str(source), "--output", str(output), *flags])
        return output

    return write


def embedded(path):
    """(the data in the page, tags of the page), as an HTML parser sees them."""

    class Reader(html.parser.HTMLParser):
        tags, data, inside = [], "", False

        def handle_starttag(self, tag, attributes):
            self.tags.append(tag)
            self.inside = ("id", "data") in attributes

        def handle_data(self, data):
            self.data += data if self.inside else ""

        def handle_endtag(self, tag):
            self.inside = False

    reader = Reader()
    reader.tags = []
    reader.feed(path.read_text("utf-8"))
    return json.loads(reader.data), reader.tags


def test_the_page_stands_alone_and_shows_hostile_text_as_text(write):
    page = write(ROWS)
    data, tags = embedded(page)
    assert tags.count("script") == 2 and not {"link", "img", "iframe"} & set(tags)
    assert not re.search(r"https?:|@import|url\(|fetch|XMLHttp", page.read_text("utf-8"))
    assert "default-src 'none'" in page.read_text("utf-8")
    assert data["items"][2]["prompt"] == "Say it " + HOSTILE
    assert set(data["items"][2]["responses"]) == set(ROWS[2]["responses"])


def test_answers_are_shuffled_by_the_seed_and_every_place_is_as_likely(write):
    rows = [{"prompt": f"p{i}", "responses": ["a", "b", "c"]} for i in range(300)]
    orders = [item["order"] for item in embedded(write(rows))[0]["items"]]
    for place in range(3):
        for response in range(3):
            assert 70 <= sum(order[place] == response for order in orders) <= 130
    assert orders == [item["order"] for item in embedded(write(rows))[0]["items"]]
    assert orders != [item["order"] for item in embedded(write(rows, "--seed", "1"))[0]["items"]]


def test_progress_is_kept_by_content(write):
    def name(*arguments):
        return embedded(write(*arguments))[0]["hash"]

    others = {name(ROWS[:2]), name(ROWS, "--seed", "1"), name(ROWS, "--task", "score")}
    assert name(ROWS) == name(ROWS) and len(others | {name(ROWS)}) == 4


def test_empty_and_repeated_answers_are_dropped_and_counted(write, capsys):
    rows = [
        {"prompt": "p", "responses": ["a", "b", "a", " "]},
        {"prompt": "q", "response": "only"},
        {"prompt": "r", "completion": "first"},
        {"prompt": "r", "completion": "second"},
        {"prompt": "s", "before": "x", "after": "y"},
    ]
    items = embedded(write(rows))[0]["items"]
    shown = [(item["prompt"], sorted(item["responses"])) for item in items]
    assert shown == [("p", ["a", "b"]), ("r", ["first", "second"]), ("s", ["x", "y"])]
    assert "3 items to label; left out: 2 answers" in capsys.readouterr().out


def test_a_run_folder_gives_its_samples(tmp_path):
    row = {"stage": "evaluation", "step": 0, "prompt": "p", "before": "x", "after": "y"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    (answers,) = pages.read(tmp_path)
    assert answers == ("p", ["x", "y"], "")


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        ({"responses": ["a", "b"]}, [], "answers.jsonl:1: 'prompt' is missing; a row has"),
        ({"prompt": "p"}, [], "answers.jsonl:1: no answers; a row has"),
        ({"prompt": "p", "responses": ["a", 3]}, [], "an answer must be a string, got 3"),
        ({"prompt": [{"role": "user"}], "responses": ["a"]}, [], "a string or a list of messages"),
        ({"prompt": "p", "responses": ["a", "a"]}, [], "no prompt has 2 different answers"),
        ({"prompt": "p", "responses": [*"abcdefghij"]}, [], "at most 9 are shown"),
        (
            {"prompt": "p", "responses": ["a", "b"]},
            ["--scale", "11"],
            "--scale 11: the highest score",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(write, capsys, row, flags, message):
    with pytest.raises(SystemExit) as stopped:
        write([row], *flags)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and message in error and "\n" not in error


def test_people_rank_tie_skip_and_come_back(write, browser):
    page = Page(browser, write(ROWS))
    assert page.texts("#count") == ["1 of 3 · 0 judged"] and sorted(page.responses()) == sorted(SKY)
    best, second, third, worst = SKY[2], SKY[0], SKY[3], SKY[1]
    page.press(page.letter(worst), "back")  # a slip, undone
    page.press(*map(page.letter, (best, second)), "t", page.letter(third), page.letter(worst))
    assert page.find("#next").get_attribute("class") == "main"
    page.press("enter")
    assert page.responses()[0] in ROWS[1]["responses"]  # Chinese is shown as it is
    page.press("->" if page.responses()[1] == ROWS[1]["responses"][0] else "<-")
    page.open()  # a reload
    assert page.texts("#count") == ["3 of 3 · 2 judged"]
    assert page.texts(".asked .text")[0].startswith("Say it </script><script>")
    page.press("s")
    assert page.texts("#count") == ["3 of 3 · 2 judged · 1 skipped"]
    path, rows = page.download()
    ranks = [SKY.index(x) for x in (best, second, third, worst)]
    assert path.name == "page.labels.jsonl"
    assert rows == [
        ROWS[0] | {"ranks": [dict(zip(ranks, (0, 1, 1, 2)))[i] for i in range(4)]},
        {"prompt": ROWS[1]["prompt"], "chosen": "红、绿、蓝。", "rejected": "红、黄、绿。"},
    ]
    page.press("down")  # the skipped one after all: a tie
    path, rows = page.download()
    assert rows[2] == ROWS[2] | {"ranks": [0, 0]}
    read = batches.comparisons(builders.load(path), tokenizers.byte_tokenizer(), 256, 256)
    assert read.gather(np.arange(2)).ranks.tolist() == [[1, 2, 0, 1], [0, 1, 0, 0]]
    assert read.counts.dropped == {batches.NO_PAIR: 1}  # nothing to learn from a tie of two
    assert browser.title == "page" and not page.errors()


def test_chips_are_dragged_to_their_place_and_dropped_on_each_other_for_a_tie(write, browser):
    page = Page(browser, write(ROWS[:1], "--seed", "5"))
    shown = page.responses()
    page.drag(".pool [data-response='2']", "[data-gap='0']")
    page.drag(".pool [data-response='0']", ".gap.wide:last-child")  # the worst so far
    page.drag(".cards [data-response='3']", "[data-gap='1']")  # between the two, from its card
    page.drag(".pool [data-response='1']", ".tier [data-response='0']")  # as bad as the worst
    assert page.texts(".tier") == ["C", "D", "A\n=\nB"]
    page.drag(".tier [data-response='3']", ".pool")
    assert page.texts(".pool .chip") == ["D"] and page.texts("#count") == ["1 of 1 · 0 judged"]
    page.click(".pool [data-response='3']")
    assert page.texts(".tier") == ["C", "A\n=\nB", "D"]
    ((row,),) = (page.download()[1],)
    tiers = dict(zip((shown[2], shown[0], shown[1], shown[3]), (0, 1, 1, 2)))
    assert row["responses"] == SKY and row["ranks"] == [tiers[text] for text in SKY]
    assert not page.errors()


def test_scores_by_keys_and_clicks_in_either_language(write, browser):
    page = Page(browser, write(ROWS[:1], "--task", "score", "--scale", "10"))
    page.click("#language")
    assert page.texts("#download") == ["下载"] and page.find("html").get_attribute("lang") == "zh"
    page.open()
    assert page.texts("#download") == ["下载"]  # remembered
    page.click("#language")
    assert page.texts("#download") == ["Download"]
    shown = page.responses()
    page.press("3", "0", "7")  # 0 is ten
    page.click("[data-response='3'][data-score='10']")
    page.press("enter")
    ((row,),) = (page.download()[1],)
    scores = dict(zip(shown, (3, 10, 7, 10)))
    assert row == ROWS[0] | {"scores": [scores[text] for text in SKY]}
    assert not page.errors()


def test_pairs_of_many_answers_are_compared_two_by_two(write, browser):
    page = Page(browser, write(ROWS[:1], "--task", "pairs"))
    for _ in range(6):
        page.press(
            "<-" if SKY.index(page.responses()[0]) < SKY.index(page.responses()[1]) else "->"
        )
    assert page.texts("#count") == ["6 of 6 · 6 judged"] and page.texts(".done")
    rows = page.download()[1]
    assert [(SKY.index(row["chosen"]), SKY.index(row["rejected"])) for row in rows] == [
        (i, j) for i in range(4) for j in range(i + 1, 4)
    ]
