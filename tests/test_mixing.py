"""rlhf_jax.data.mixing: split by prompt, mixed by weight, packed without a change of the loss."""

import collections

import jax
import numpy as np
import pytest
import tiny

from rlhf_jax.algorithms import sft
from rlhf_jax.data import batches, mixing
from rlhf_jax.data.tokenizers import byte_tokenizer

BYTES = byte_tokenizer()


def pairs(count: int, prompts: int) -> list[dict]:
    return [
        {"prompt": f"Question {i % prompts}", "chosen": f"a{i}", "rejected": f"b{i}"}
        for i in range(count)
    ]


def prompts_of(part) -> set[str]:
    return {" ".join(row["prompt"].lower().split()) for row, _ in part}


def test_no_prompt_is_on_both_sides_of_a_split_and_no_row_is_lost():
    rows = pairs(400, 100)
    train, held_out = mixing.split(rows, 0.25)
    assert not prompts_of(train) & prompts_of(held_out)
    assert len(train) + len(held_out) == 400
    assert 0.15 < len(held_out) / 400 < 0.35
    assert train[0][1].startswith("row ")
    assert len(batches.comparisons(held_out, BYTES, 16, 8)) == len(held_out)


def test_the_side_is_the_prompts_whatever_its_file_order_case_and_spaces():
    rows = pairs(200, 200)
    _, held_out = mixing.split(rows, 0.3)
    shouted = [{"prompt": f"  {row['prompt'].upper()}\n"} for row in rows[::-1]]
    assert prompts_of(mixing.split(shouted, 0.3)[1]) == prompts_of(held_out)
    assert prompts_of(mixing.split(rows, 0.3, seed=1)[1]) != prompts_of(held_out)
    larger = prompts_of(mixing.split(rows, 0.5)[1])
    assert prompts_of(held_out) < larger  # a larger share holds out more, not others


def test_plain_text_and_messages_are_split_by_what_they_say():
    rows = [{"text": f"story {i}"} for i in range(60)]
    train, held_out = mixing.split(rows + rows, 0.5)
    assert not {row["text"] for row, _ in train} & {row["text"] for row, _ in held_out}
    chats = [{"instruction": f"q{i}", "output": "a"} for i in range(60)]
    assert all(mixing.split(chats, 0.5))


def test_a_conversation_is_on_one_side_with_what_it_branches_into():
    turns = [("user", "q{}"), ("assistant", "a"), ("user", "and then?"), ("assistant", "b")]
    chat = [{"role": role, "content": text} for role, text in turns]
    system = {"role": "system", "content": "Be brief."}
    sides = []
    for shape in (chat, chat[:2], [system, *chat], [system, *chat[:2]]):
        rows = [
            {"messages": [t | {"content": t["content"].format(i)} for t in shape]}
            for i in range(50)
        ]
        train, held_out = mixing.split(rows, 0.4)
        assert train and held_out
        sides.append({where for _, where in held_out})
    assert sides == sides[:1] * 4


def test_a_faulty_row_of_a_split_is_met_by_what_tokenises_it():
    train, _ = mixing.split([{"prompt": 3}, *pairs(9, 9)], 0.5)
    with pytest.raises(ValueError, match="^row 1: 'prompt' must be a string"):
        batches.prompts(train, BYTES, 16)
    with pytest.raises(ValueError, match="held_out=1.5 must lie between 0 and 1"):
        mixing.split([], 1.5)


def texts(count: int, letter: str) -> batches.Examples:
    return batches.demonstrations([{"text": letter + str(i)} for i in range(count)], BYTES, 4, 4)


def test_a_mixture_has_its_weights_and_every_row():
    mixed = mixing.mix([(texts(30, "a"), 1), (texts(5, "b"), 3)])
    shown = collections.Counter(bytes(row.documents[0].ids[:-1].tolist()) for row in mixed.rows)
    assert all(shown[f"a{i}".encode()] == 1 for i in range(30))
    assert {shown[f"b{i}".encode()] for i in range(5)} == {18}  # 90 rows for 30
    assert len(mixed) == len(mixed.where) == 120 == mixed.counts.kept
    batch = batches.Loader(mixed, 64).batch(0)
    share = np.mean(batch.tokens[:, 0] == ord("b"))
    assert 0.6 < share < 0.9


def test_the_rows_of_a_small_part_that_come_once_more_are_drawn_by_the_seed():
    def times(seed):
        """How often each of 5 rows comes where 12 of the part are needed."""
        mixed = mixing.mix([(texts(12, "a"), 1), (texts(5, "b"), 1)], seed=seed)
        spelt = [bytes(row.documents[0].ids[:-1].tolist()).decode() for row in mixed.rows]
        assert [source.completion for source in mixed.sources] == spelt
        return tuple(spelt.count(f"b{i}") for i in range(5))

    counts = [times(seed) for seed in range(40)]
    assert all(sorted(count) == [2, 2, 2, 3, 3] for count in counts)
    assert times(3) == counts[3]
    more = np.sum(np.array(counts) == 3, axis=0)  # 40 draws of 2 of 5: 16 each on average
    assert more.sum() == 80 and more.min() > 5


def test_mixed_comparisons_have_room_for_the_most_responses_of_any_part():
    two = batches.comparisons(pairs(2, 2), BYTES, 12, 4)
    three = [{"prompt": "q", "responses": ["x", "y", "z"], "ranks": [0, 1, 2]}]
    three = batches.comparisons(three, BYTES, 12, 4)
    mixed = mixing.mix([(two, 1), (three, 1)])
    assert mixed[0].present.tolist() == [1, 1, 0] and mixed[2].present.tolist() == [1, 1, 1]
    assert mixed[0].scores.tolist() == [1, 0, 0]
    rated = [{"prompt": "q", "responses": ["x", "y"], "scores": [3, 9]}]
    mixed = mixing.mix([(two, 1), (batches.comparisons(rated, BYTES, 12, 4), 1)])
    assert mixed[0].scores is None  # some ratings, some ranks: nothing to regress on


def test_what_does_not_mix_is_refused():
    with pytest.raises(ValueError, match="each with a weight above 0"):
        mixing.mix([(texts(2, "a"), 0)])
    prompts = batches.prompts([{"prompt": "p"}], BYTES, 8)
    with pytest.raises(ValueError, match=r"parts of Demonstrations and Prompts of \[8\] tokens do"):
        mixing.mix([(texts(2, "a"), 1), (prompts, 1)])


def test_packed_rows_hold_every_document_once_and_fewer_padding():
    rows = [{"prompt": "p" * (1 + i % 5), "completion": "c" * (1 + i % 7)} for i in range(35)]
    plain = batches.demonstrations(rows, BYTES, 8, 16)
    packed = mixing.pack(plain)
    assert len(packed) < len(plain)
    assert mixing.utilisation(packed) > 0.85 > 0.5 > mixing.utilisation(plain)
    apart, together = (
        sorted(tuple(document.ids) for row in examples.rows for document in row.documents)
        for examples in (plain, packed)
    )
    assert together == apart
    for row, sources in zip(packed.rows, packed.sources):
        spelt = [bytes(ids[on][:-1].tolist()).decode() for ids, on in row.documents]
        assert spelt == [source.completion for source in sources]
    example = packed[0]
    assert set(example.attend.tolist()) <= {0, *range(1, len(packed.rows[0].documents) + 1)}
    with pytest.raises(ValueError, match="Prompts cannot be packed; pack demonstrations"):
        mixing.pack(batches.prompts([{"prompt": "p"}], BYTES, 4))


def test_the_packed_loss_is_the_loss_of_the_same_documents_unpacked():
    rows = [{"prompt": w, "completion": w[::-1] * (1 + i % 3)} for i, w in enumerate(tiny.WORDS)]
    plain = batches.demonstrations(rows, BYTES, 8, 16)
    packed = mixing.pack(plain)
    policy = tiny.model()

    def value(examples):
        loader = batches.Loader(examples, len(examples), shuffle=False)
        (batch,) = loader.epoch_batches()
        return jax.jit(sft.loss)(tiny.SFT, {"policy": policy}, batch)

    (apart, counted), (together, packed_counted) = value(plain), value(packed)
    assert len(packed) < len(plain)
    assert int(counted["num_tokens"]) == int(packed_counted["num_tokens"])
    np.testing.assert_allclose(together, apart, rtol=1e-5)


@pytest.mark.parametrize("extra", [{"responses": ["a", "b"]}, {"completion": None}, {"text": "x"}])
def test_rows_that_only_hold_a_prompt_are_split_by_it_whatever_else_they_hold(extra):
    plain = [{"prompt": f"What is {i}?"} for i in range(60)]
    train, held_out = mixing.split(plain, 0.3)
    both = mixing.split([*plain, *(row | extra for row in plain)], 0.3)
    assert [len(part) for part in both] == [2 * len(train), 2 * len(held_out)]
    asked = [{row["prompt"] for row, _ in part} for part in both]
    assert not asked[0] & asked[1]
