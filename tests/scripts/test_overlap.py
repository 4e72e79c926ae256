"""What the benchmarks say of transfers beside compute, on small programs and on a profile's events."""

import pytest


@pytest.fixture
def overlap(bench_module):
    return bench_module("overlap")


PROGRAM = """HloModule step, is_scheduled=true

%body (p: (s32[], bf16[1024], bf16[512])) -> (s32[], bf16[1024], bf16[512]) {
  %p = (s32[], bf16[1024]{0}, bf16[512]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[1024]{0} get-tuple-element(%p), index=1
  %own = bf16[512]{0} get-tuple-element(%p), index=2
  %y = bf16[1024]{0} copy(%x)
  %all-gather-start.1 = ((bf16[512]{0}), bf16[1024]{0}) all-gather-start(%own), dimensions={0}
  %z = bf16[1024]{0} copy(%y)
  %all-gather-done.1 = bf16[1024]{0} all-gather-done(%all-gather-start.1)
  ROOT %next = (s32[], bf16[1024]{0}, bf16[512]{0}) tuple(%i, %z, %own)
}

%more (c: (s32[], bf16[1024], bf16[512])) -> pred[] {
  %c = (s32[], bf16[1024]{0}, bf16[512]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (a: bf16[1024], h: bf16[2048]) -> bf16[4096] {
  %a = bf16[1024]{0} parameter(0)
  %h = bf16[2048]{0} parameter(1)
  %zero = s32[] constant(0)
  %part = bf16[512]{0} slice(%a), slice={[0:512]}
  %all-gather-start = ((bf16[2048]{0}), bf16[4096]{0}) all-gather-start(%h), dimensions={0}
  %begin = (s32[], bf16[1024]{0}, bf16[512]{0}) tuple(%zero, %a, %part)
  %layers = (s32[], bf16[1024]{0}, bf16[512]{0}) while(%begin), condition=%more, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  ROOT %all-gather-done = bf16[4096]{0} all-gather-done(%all-gather-start)
}
"""


def test_a_window_is_what_runs_until_the_collective_is_waited_for(overlap):
    copy = 2 * 2 * 1024 / 1e9  # seconds, read and written
    found = {w.name: w for w in overlap.windows(PROGRAM, overlap.roofline.Ceilings(bandwidth=1e9, link=1e6))}
    head, layer = found["all-gather-start"], found["all-gather-start.1"]
    assert (head.times, head.bytes, head.takes) == (1, 2 * 4096, pytest.approx(2 * 4096 / 1e6))
    assert head.seconds == pytest.approx(3 * 2 * copy)
    assert (layer.times, layer.bytes) == (3, 2 * 1024) and layer.seconds == pytest.approx(copy)


OFFLOAD = """HloModule step, is_scheduled=true

%fetch (a: bf16[8,512], b: s32[], c: s32[]) -> bf16[1,512] {
  %a = bf16[8,512]{1,0:S(5)} parameter(0)
  %b = s32[] parameter(1)
  %c = s32[] parameter(2)
  ROOT %slice = bf16[1,512]{1,0} dynamic-slice(%a, %b, %c), dynamic_slice_sizes={1,512}
}

%send (a: bf16[8,512], x: bf16[1,512], b: s32[], c: s32[]) -> bf16[8,512] {
  %a = bf16[8,512]{1,0:S(5)} parameter(0)
  %x = bf16[1,512]{1,0} parameter(1)
  %b = s32[] parameter(2)
  %c = s32[] parameter(3)
  ROOT %update = bf16[8,512]{1,0:S(5)} dynamic-update-slice(%a, %x, %b, %c)
}

ENTRY %main (stack: bf16[8,512], x: bf16[1,512], i: s32[]) -> (bf16[8,512], bf16[1,512]) {
  %stack = bf16[8,512]{1,0:S(5)} parameter(0)
  %x = bf16[1,512]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %dynamic-slice-start.1 = ((bf16[8,512]{1,0:S(5)}, s32[], s32[]), bf16[1,512]{1,0}, u32[]) \
fusion-start(%stack, %i, %i), kind=kLoop, calls=%fetch
  %y = bf16[1,512]{1,0} copy(%x)
  %dynamic-update-slice-start = ((bf16[8,512]{1,0:S(5)}, bf16[1,512]{1,0}, s32[], s32[]), bf16[8,512]{1,0:S(5)}, \
u32[]) fusion-start(%stack, %y, %i, %i), kind=kLoop, calls=%send
  %z = bf16[1,512]{1,0} copy(%y)
  %dynamic-slice-done.1 = bf16[1,512]{1,0} fusion-done(%dynamic-slice-start.1)
  %dynamic-update-slice-done = bf16[8,512]{1,0:S(5)} fusion-done(%dynamic-update-slice-start)
  ROOT %out = (bf16[8,512]{1,0:S(5)}, bf16[1,512]{1,0}) tuple(%dynamic-update-slice-done, %dynamic-slice-done.1)
}
"""


def test_copies_to_the_host_are_transfers_too(overlap):
    """Of a slice of a stack there, which the type does not say alone."""
    copy, ceilings = 2 * 2 * 512 / 1e9, overlap.roofline.Ceilings(bandwidth=1e9, host=1e6)
    found = {w.name: w for w in overlap.windows(OFFLOAD, ceilings)}
    fetched, sent = found["dynamic-slice-start.1"], found["dynamic-update-slice-start"]
    assert fetched.bytes == sent.bytes == 1024
    assert fetched.takes == sent.takes == pytest.approx(1024 / 1e6)
    assert (fetched.seconds, sent.seconds) == pytest.approx((2 * copy, copy))


def test_copies_on_a_stream_of_their_own_hide_no_collective(overlap):
    ms = 1e6
    events = [
        ("Stream 1", "product", 0, 10 * ms),
        ("Stream 2", "all-gather-start", 8 * ms, 14 * ms),
        ("Stream 3", "copy of what is kept", 10 * ms, 14 * ms),
        ("Stream 1", "product", 13 * ms, 20 * ms),
    ]
    assert overlap.exposed(events) == pytest.approx((6, 3))  # from 10 to 13
