# ruff: noqa: E501
"""The floor of a compiled GPU program, counted by hand for a small one."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "roofline.py"
spec = importlib.util.spec_from_file_location("roofline", PATH)
roofline = importlib.util.module_from_spec(spec)
spec.loader.exec_module(roofline)

# A loop of 4 trips: one layer's matrix is sliced off a stack, multiplied, and the result put into a stacked buffer.
PROGRAM = """HloModule step, is_scheduled=true

%slice (p0: bf16[4,256,512], p1: s32[]) -> bf16[256,512] {
  %p0 = bf16[4,256,512]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = bf16[1,256,512]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,256,512}
  ROOT %flat = bf16[256,512]{1,0} bitcast(%cut)
}

%store (p0: bf16[4,128,256], p1: bf16[128,256], p2: s32[]) -> bf16[4,128,256] {
  %p0 = bf16[4,128,256]{2,1,0} parameter(0)
  %p1 = bf16[128,256]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %one = bf16[1,128,256]{2,1,0} bitcast(%p1)
  ROOT %put = bf16[4,128,256]{2,1,0} dynamic-update-slice(%p0, %one, %p2, %zero, %zero)
}

%body (arg: (s32[], bf16[4,256,512], bf16[128,512], bf16[4,128,256])) -> (s32[], bf16[4,128,256]) {
  %arg = (s32[], bf16[4,256,512]{2,1,0}, bf16[128,512]{1,0}, /*index=3*/bf16[4,128,256]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %stack = bf16[4,256,512]{2,1,0} get-tuple-element(%arg), index=1
  %x = bf16[128,512]{1,0} get-tuple-element(%arg), index=2
  %kept = bf16[4,128,256]{2,1,0} get-tuple-element(%arg), index=3
  %w = bf16[256,512]{1,0} fusion(%stack, %i), kind=kLoop, calls=%slice, metadata={op_name="jit(step)/dequantise/mul"}
  %y = bf16[128,256]{1,0} custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %out = bf16[4,128,256]{2,1,0} fusion(%kept, %y, %i), kind=kLoop, calls=%store, metadata={op_name="jit(step)/while/body/jit(dynamic_update_index_in_dim)/dynamic_update_slice"}
  ROOT %next = (s32[], bf16[4,128,256]{2,1,0}) tuple(%i, %out)
}

ENTRY %main (a: bf16[4,256,512]) -> bf16[4,128,256] {
  %a = (s32[], bf16[4,256,512]{2,1,0}) parameter(0)
  %loop = (s32[], bf16[4,128,256]{2,1,0}) while(%a), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  ROOT %last = bf16[4,128,256]{2,1,0} get-tuple-element(%loop), index=1
}
"""


SLICED = """HloModule step

%inside (p0: bf16[4,256,512], p1: s32[], p2: bf16[128,512]) -> bf16[128,256] {
  %p0 = bf16[4,256,512]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = bf16[1,256,512]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,256,512}
  %flat = bf16[256,512]{1,0} bitcast(%cut)
  %p2 = bf16[128,512]{1,0} parameter(2)
  ROOT %hero = bf16[128,256]{1,0} custom-call(%p2, %flat), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
}

ENTRY %main (a: bf16[4,256,512], i: s32[], x: bf16[128,512]) -> bf16[128,256] {
  %a = bf16[4,256,512]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = bf16[128,512]{1,0} parameter(2)
  ROOT %sliced = bf16[128,256]{1,0} fusion(%a, %i, %x), kind=kCustom, calls=%inside
}
"""


def test_a_call_inside_a_fusion_with_slices_is_counted_as_itself():
    (row,) = roofline.kernels(SLICED)
    assert (row.name, row.inner, row.kind) == ("sliced", "hero", "products")
    assert row.flops == 2 * 128 * 256 * 512
    assert row.bytes == 2 * (128 * 512 + 256 * 512 + 128 * 256) + 4


CUT = """HloModule step

%inside (p0: bf16[4,128,512], p1: s32[], p2: f32[128]) -> bf16[128,128] {
  %p0 = bf16[4,128,512]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = bf16[1,128,512]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,128,512}
  %flat = bf16[128,512]{1,0} bitcast(%cut)
  %wide = f32[128,512]{1,0} convert(%flat)
  %p2 = f32[128]{0} parameter(2)
  %factor = f32[128,512]{1,0} broadcast(%p2), dimensions={0}
  %scaled = f32[128,512]{1,0} multiply(%wide, %factor)
  %first = f32[128,64]{1,0} slice(%scaled), slice={[0:128], [64:128]}
  %second = f32[128,64]{1,0} slice(%scaled), slice={[0:128], [128:192]}
  %both = f32[128,128]{1,0} concatenate(%first, %second), dimensions={1}
  ROOT %narrow = bf16[128,128]{1,0} convert(%both)
}

ENTRY %main (a: bf16[4,128,512], i: s32[], s: f32[128]) -> bf16[128,128] {
  %a = bf16[4,128,512]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %s = f32[128]{0} parameter(2)
  ROOT %some = bf16[128,128]{1,0} fusion(%a, %i, %s), kind=kInput, calls=%inside
}
"""


def test_of_what_a_fusion_computes_only_the_slices_that_it_takes_are_read():
    (row,) = roofline.kernels(CUT)
    assert row.bytes == 2 * 128 * 128 + 4 + 4 * 128 + 2 * 128 * 128


def test_every_kernel_is_counted_as_often_as_it_runs():
    ceilings = roofline.Ceilings(bandwidth=1e9, bf16=1e12)
    rows = {row.name: row for row in roofline.kernels(PROGRAM, ceilings)}
    assert set(rows) == {"w", "y", "out"} and {row.times for row in rows.values()} == {4}
    # a slice reads and writes one layer; a store in place writes its update; a product reads both sides
    assert rows["w"].bytes == 2 * 2 * 256 * 512 + 4
    assert rows["out"].bytes == 2 * 2 * 128 * 256 + 4
    assert rows["y"].bytes == 2 * (128 * 512 + 256 * 512 + 128 * 256)
    assert rows["y"].flops == 2 * 128 * 256 * 512
    assert {row.name: row.kind for row in rows.values()} == {
        "w": "dequantise",
        "y": "products",
        "out": "kept",
    }
    assert rows["y"].seconds == pytest.approx(4 * rows["y"].bytes / 1e9)  # bound by memory at these ceilings
    assert roofline.kernels(PROGRAM, ceilings._replace(bandwidth=1e15))[1].seconds == pytest.approx(
        4 * rows["y"].flops / 1e12
    )
    assert sum(roofline.by_kind(list(rows.values())).values()) == pytest.approx(
        sum(row.seconds for row in rows.values())
    )


ATTENTION = """HloModule step

ENTRY %main (q: bf16[2,8192,32,128]) -> bf16[2,8192,32,128] {
  %q = bf16[2,8192,32,128]{3,2,1,0} parameter(0)
  ROOT %out = bf16[2,8192,32,128]{3,2,1,0} custom-call(%q), custom_call_target="__cudnn$fmhaSoftmax"
}
"""


def test_attention_is_within_documents():
    (whole,), (packed,) = (roofline.kernels(ATTENTION, documents=n) for n in (1, 4))
    assert whole.kind == "attention" and whole.flops == 2 * 2 * 32 * 8192**2 * 128
    assert packed.flops == whole.flops / 4 and packed.bytes == whole.bytes
    assert packed.seconds == pytest.approx(whole.seconds / 4)
