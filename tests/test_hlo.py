"""Modules are read as they are written, and everything in a loop counts as often as it runs."""

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax import cost, hlo

# Four devices; a loop of 3 in a loop of 5. The inner one multiplies [8, 16] by [16, 32] and gathers
# the 32 columns of what the four devices hold. Its counter starts at 2 and is tested in a fusion.
NESTED = """
HloModule nested, num_partitions=4

%tested (p: s32[], q: s32[]) -> pred[] {
  %p = s32[] parameter(0)
  %q = s32[] parameter(1)
  ROOT %lt = pred[] compare(%p, %q), direction=LT
}

%test_inner (c: (s32[], f32[8,16])) -> pred[] {
  %five = s32[] constant(5)
  %c = (s32[], f32[8,16]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %end = pred[] fusion(%i, %five), kind=kLoop, calls=%tested
}

%do_inner (b: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %b = (s32[], f32[8,16]) parameter(0)
  %i.1 = s32[] get-tuple-element(%b), index=0
  %x = f32[8,16] get-tuple-element(%b), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i.1, %one)
  %w = f32[16,8]{1,0:T(8,128)S(1)} constant({...})
  %gathered = f32[16,32] all-gather(%w), replica_groups=GROUPS, dimensions={1}
  %y = f32[8,32] convolution(%x, %gathered), dim_labels=bf_io->bf
  %half = f32[8,16] slice(%y), slice={[0:8], [0:16]}
  ROOT %out = (s32[], f32[8,16]) tuple(%next, %half)
}

%test_outer (c: (s32[], f32[8,16])) -> pred[] {
  %three = s32[] constant(3)
  %c.1 = (s32[], f32[8,16]) parameter(0)
  %i.2 = s32[] get-tuple-element(%c.1), index=0
  ROOT %lt.1 = pred[] compare(%i.2, %three), direction=LT
}

%do_outer (b: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %b.1 = (s32[], f32[8,16]) parameter(0)
  %i.3 = s32[] get-tuple-element(%b.1), index=0
  %x.1 = f32[8,16] get-tuple-element(%b.1), index=1
  %one.1 = s32[] constant(1)
  %next.1 = s32[] add(%i.3, %one.1)
  %two = s32[] constant(2)
  %start = (s32[], f32[8,16]) tuple(%two, %x.1)
  %inner = (s32[], f32[8,16]) while(%start), condition=%test_inner, body=%do_inner, INNER
  %x.2 = f32[8,16] get-tuple-element(%inner), index=1
  ROOT %out.1 = (s32[], f32[8,16]) tuple(%next.1, %x.2)
}

ENTRY %main (x: f32[8,16]) -> (s32[], f32[8,16]) {
  %x.3 = f32[8,16] parameter(0), metadata={op_name="x"}
  %zero = s32[] constant(0)
  %start.1 = (s32[], f32[8,16]) tuple(%zero, %x.3)
  ROOT %loop = (s32[], f32[8,16]) while(%start.1), condition=%test_outer, body=%do_outer, OUTER
}
"""


PATHS = {"OUTER": "while", "INNER": "while/body/while"}


def nested(groups="{{0,1,2,3}}", inner_test="LT"):
    first, second = NESTED.replace("GROUPS", groups).split("ROOT %lt =")
    text = "ROOT %lt =".join((first, second.replace("=LT", f"={inner_test}", 1)))
    for name, path in PATHS.items():
        text = text.replace(name, f'metadata={{op_name="{path}"}}')
    return hlo.read(text)


@pytest.mark.parametrize(
    "groups", ["{{0,1,2,3}}", "[1,4]<=[4]", "mesh['a'=1,'b'=4] {'b'}", "mesh['a'=8] {'a':(2)4}"]
)
def test_loops_multiply_what_is_in_them_and_groups_have_three_spellings(groups):
    found = cost.of(nested(groups))
    times = 3 * (5 - 2)
    assert found.flops == times * 2 * 8 * 16 * 32
    (gather,) = found.collectives
    assert (gather.kind, gather.group, gather.count) == ("all-gather", 4, times)
    assert gather.loops == (PATHS["OUTER"], PATHS["INNER"])
    assert gather.payload == 4 * 16 * 32 and gather.received == gather.payload * 3 / 4
    assert found.unbounded == 0


def test_bytes_are_those_of_arrays_in_hbm_and_tests_of_loops_cost_nothing():
    gather, product, half = 16 * 32, 8 * 16 + 16 * 32 + 8 * 32, 2 * 8 * 16
    counter = 3  # an addition reads two numbers and writes one
    # The gathered weights come from vector memory, so only what is written of them counts.
    inner = gather + product + half + counter
    found = cost.of(nested())
    assert found.bytes == 4 * 3 * (3 * inner + counter)


def test_a_loop_that_ends_by_its_data_counts_as_often_as_the_caller_says():
    found = cost.of(nested(inner_test="NE"), max_trips=7)
    assert found.flops == 3 * 7 * 2 * 8 * 16 * 32 and found.unbounded == 1


# Eight products of [4, 32] by [32, 16] as a TPU writes them: the batch is a dimension in space,
# whose window is so dilated that of its eight taps one falls on an element.
BATCHED = """
HloModule batched

ENTRY %main (x: f32[8,4,32], y: f32[8,32,16]) -> f32[8,4,16] {
  %x = f32[8,4,32]{2,1,0} parameter(0)
  %y = f32[8,32,16]{2,1,0} parameter(1)
  ROOT %z = f32[8,4,16]{2,1,0} convolution(%x, %y), WINDOW, dim_labels=0bf_0io->0bf
}
"""


def test_the_batch_of_a_product_is_no_part_of_its_sum():
    text = BATCHED.replace("WINDOW", "window={size=8 stride=7 lhs_dilate=8}")
    assert cost.of(hlo.read(text)).flops == 2 * 8 * 4 * 32 * 16


SCATTERED = """
HloModule scattered, num_partitions=4

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %ab = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (g: f32[64,32]) -> f32[16,32] {
  %g = f32[64,32]{1,0} parameter(0)
  %all-reduce.1 = f32[64,32]{1,0} all-reduce(%g), replica_groups={{0,1,2,3}}, to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %mine = f32[16,32]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero)
}

%written (buffer: f32[64,32], part: f32[16,32], i: s32[]) -> f32[64,32] {
  %buffer = f32[64,32]{1,0} parameter(0)
  %part = f32[16,32]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %new = f32[64,32]{1,0} dynamic-update-slice(%buffer, %part, %i, %i)
}

ENTRY %main (g: f32[64,32], i: s32[]) -> f32[64,32] {
  %g.1 = f32[64,32]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %part.1 = f32[16,32]{1,0} fusion(%g.1), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %all = f32[64,32]{1,0} fusion(%g.1, %part.1, %i.1), kind=kLoop, calls=%written
}
"""


def test_an_all_reduce_of_which_each_device_keeps_its_part_is_a_reduce_scatter():
    (found,) = cost.of(hlo.read(SCATTERED)).collectives
    assert found.kind == "reduce-scatter" and found.payload == 4 * 64 * 32


def test_a_slice_that_is_written_in_place_moves_itself_and_not_its_buffer():
    reduced = 4 * (64 * 32 + 16 * 32)
    written = 4 * (16 * 32) + 4 + 2 * 4 * (16 * 32)
    assert cost.of(hlo.read(SCATTERED)).bytes == reduced + written


def test_a_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="has no ENTRY computation"):
        hlo.read("HloModule nothing")


def test_a_program_of_this_machine_is_counted_too():
    def chained(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=7)[0]

    arguments = jnp.ones((64, 48)), jnp.ones((48, 48))
    module = hlo.read(jax.jit(chained).lower(*arguments).compile().as_text())
    assert cost.of(module).flops == 7 * 2 * 64 * 48 * 48
