from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest

from coca_jax.plan import hlo

# The type of the fixture in tests/conftest.py.
RunPython = Callable[..., subprocess.CompletedProcess[str]]

# Shortened output of a TPU compiler: a loop of 5 iterations, a count given only in its condition. It contains a
# reduce-scatter expressed as an all-reduce in a fusion, and an all-gather that starts in one fusion and ends in
# another. S(1) is the chip's scratch memory.
TPU = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%add (x.1: bf16[], y.1: bf16[]) -> bf16[] {
  %x.1 = bf16[] parameter(0)
  %y.1 = bf16[] parameter(1)
  ROOT %sum.1 = bf16[] add(%x.1, %y.1)
}

%all-reduce-scatter.1 (input.1: bf16[256,512]) -> bf16[64,512] {
  %input.1 = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.1 = bf16[256,512]{1,0:T(8,128)(2,1)} all-reduce(%input.1), channel_id=7, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  %zero.1 = s32[] constant(0)
  ROOT %dynamic-slice.1 = bf16[64,512]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %zero.1, %zero.1), dynamic_slice_sizes={64,512}
}

%start (p.1: bf16[64,512]) -> (bf16[64,512], bf16[256,512]) {
  %p.1 = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.1), channel_id=9, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  ROOT %call.1 = (bf16[64,512]{1,0}, bf16[256,512]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (p.2: bf16[64,512], q.2: bf16[256,512]) -> bf16[256,512] {
  %p.2 = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %q.2 = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %all-gather.2 = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.2), channel_id=9, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  ROOT %call.2 = bf16[256,512]{1,0:S(1)} custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%layer (stack.1: f32[5,1024], at.1: s32[]) -> f32[1024] {
  %stack.1 = f32[5,1024]{1,0} parameter(0)
  %at.1 = s32[] parameter(1)
  %zero.2 = s32[] constant(0)
  %dynamic-slice.2 = f32[1,1024]{1,0} dynamic-slice(%stack.1, %at.1, %zero.2), dynamic_slice_sizes={1,1024}
  ROOT %bitcast.1 = f32[1024]{0} bitcast(%dynamic-slice.2)
}

%body (state.1: (s32[], f32[5,1024])) -> (s32[], f32[5,1024]) {
  %state.1 = (s32[], /*index=1*/f32[5,1024]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %layers.1 = f32[5,1024]{1,0:T(8,128)} get-tuple-element(%state.1), index=1
  %one.1 = f32[1024]{0:T(1024)S(1)} fusion(%layers.1, %i.1), kind=kLoop, calls=%layer
  %gradient.1 = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} custom-call(%one.1), custom_call_target="AllocateBuffer"
  %scattered.1 = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} fusion(%gradient.1), kind=kCustom, calls=%all-reduce-scatter.1
  %started.1 = (bf16[64,512]{1,0:S(1)}, bf16[256,512]{1,0:S(1)}) fusion(%scattered.1), kind=kCustom, calls=%start
  %a.1 = bf16[64,512]{1,0:S(1)} get-tuple-element(%started.1), index=0
  %b.1 = bf16[256,512]{1,0:S(1)} get-tuple-element(%started.1), index=1
  %ended.1 = bf16[256,512]{1,0:S(1)} fusion(%a.1, %b.1), kind=kCustom, calls=%done
  %unit.1 = s32[] constant(1)
  %next.1 = s32[]{:S(6)} add(%i.1, %unit.1)
  ROOT %tuple.1 = (s32[], f32[5,1024]{1,0:T(8,128)}) tuple(%next.1, %layers.1)
}

%condition (state.2: (s32[], f32[5,1024])) -> pred[] {
  %limit.1 = s32[]{:T(128)} constant(5)
  %state.2 = (s32[], f32[5,1024]{1,0:T(8,128)}) parameter(0)
  %i.2 = s32[] get-tuple-element(%state.2), index=0
  ROOT %lt.1 = pred[] compare(%i.2, %limit.1), direction=LT
}

ENTRY %main (x.2: f32[5,1024]) -> f32[5,1024] {
  %x.2 = f32[5,1024]{1,0:T(8,128)} parameter(0)
  %start.1 = s32[] constant(0)
  %initial.1 = (s32[], f32[5,1024]{1,0:T(8,128)}) tuple(%start.1, %x.2)
  %loop.1 = (s32[], f32[5,1024]{1,0:T(8,128)}) while(%initial.1), condition=%condition, body=%body
  %result.1 = f32[5,1024]{1,0:T(8,128)} get-tuple-element(%loop.1), index=1
  %everywhere.1 = f32[5,1024]{1,0:T(8,128)} all-reduce(%result.1), channel_id=11, replica_groups=mesh['a'=2,'b'=4] {'a','b'}, to_apply=%add
  %moved.1 = (f32[5,1024]{1,0}, f32[5,1024]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%everywhere.1), channel_id=12, source_target_pairs={{0,1},{1,0},{2,2},{3,3}}
  ROOT %arrived.1 = f32[5,1024]{1,0} collective-permute-done(%moved.1)
}
"""  # noqa: E501


def test_traffic_of_a_tpu_program_is_counted() -> None:
    traffic = hlo.traffic(TPU, 8)
    full, array = 256 * 512 * 2, 5 * 1024 * 4
    assert traffic.collectives == {
        "reduce-scatter": 5 * full * 3 / 4,
        "all-gather": 5 * full * 3 / 4,  # the one that appears twice
        "all-reduce": 2 * array * 7 / 8,
        "collective-permute": array / 2,  # half of the chips keep their data
        "all-to-all": 0.0,
    }
    assert traffic.exposed == 5 * full * 3 / 4 + 2 * array * 7 / 8
    assert traffic.unknown_loops == 0
    # One layer of the stack per iteration, the counter (4 + 4; the sum is elsewhere), then both ends of the last two.
    assert traffic.hbm == 5 * (1024 * 4 + 4 + 4) + 2 * array + 2 * array == sum(traffic.hbm_of.values())
    assert traffic.hbm_apart == 5 * (1024 * 4 + 4 + 4)  # without the collectives' traffic
    scattered = "%scattered.1 = bf16[64,512]{1,0:T(8,128)(2,1)"
    assert TPU.count(scattered + "S(1)}") == 1
    in_hbm = hlo.traffic(TPU.replace(scattered + "S(1)}", scattered + "}"), 8)
    assert in_hbm.hbm > traffic.hbm and in_hbm.hbm_apart == traffic.hbm_apart


# A kernel's metadata spans several lines, one of which starts like the end of a computation. Shortened.
PRODUCTS = """\
HloModule jit_step, is_scheduled=true

%inner (p.1: bf16[64,128], q.1: bf16[128,32]) -> bf16[64,32] {
  %p.1 = bf16[64,128]{1,0} parameter(0)
  %q.1 = bf16[128,32]{1,0} parameter(1)
  ROOT %convolution.1 = bf16[64,32]{1,0} convolution(%p.1, %q.1), dim_labels=bf_io->bf
}

%outer (p.2: bf16[64,128], q.2: bf16[128,32]) -> bf16[64,32] {
  %p.2 = bf16[64,128]{1,0} parameter(0)
  %q.2 = bf16[128,32]{1,0} parameter(1)
  %product.1 = bf16[64,32]{1,0} fusion(%p.2, %q.2), kind=kOutput, calls=%inner
  ROOT %minus.1 = bf16[64,32]{1,0} negate(%product.1)
}

ENTRY %main (a.1: bf16[64,128], b.1: bf16[128,32]) -> bf16[64,32] {
  %a.1 = bf16[64,128]{1,0} parameter(0)
  %b.1 = bf16[128,32]{1,0} parameter(1)
  %kernel.1 = bf16[64,128]{1,0} custom-call(%a.1), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256}"
}}, metadata={op_name="attention"}, backend_config={"flag_configs":[]}
  %product.2 = bf16[64,32]{1,0} fusion(%kernel.1, %b.1), kind=kOutput, calls=%outer, backend_config={"window_config":{"estimated_cycles":"123"}}
  ROOT %sum.1 = bf16[64,32]{1,0} add(%product.2, %product.2), backend_config={"window_config":{"estimated_cycles":"77"}}
}
"""  # noqa: E501


def test_products_are_counted_separately_and_kernel_metadata_does_not_end_the_program() -> None:
    traffic = hlo.traffic(PRODUCTS, 1)
    assert traffic.product_cycles == 123
    a, b, result = 64 * 128 * 2, 128 * 32 * 2, 64 * 32 * 2
    assert traffic.hbm_of == {"tpu_custom_call": 2 * a, "fusion": a + b + result, "add": 3 * result}
    assert traffic.hbm_apart == 3 * result


def test_the_workspace_of_a_library_call_is_not_traffic() -> None:
    call = "(bf16[64,32]{1,0}, s8[33554432]{0}) custom-call(%a.1, %b.1)"
    text = f"""HloModule step

ENTRY %main (a.1: bf16[64,128], b.1: bf16[128,32]) -> (bf16[64,32], s8[33554432]) {{
  %a.1 = bf16[64,128]{{1,0}} parameter(0)
  %b.1 = bf16[128,32]{{1,0}} parameter(1)
  ROOT %product.1 = {call}, custom_call_target="__cublas$lt$matmul"
}}
"""
    assert hlo.traffic(text, 1).hbm_of == {"__cublas$lt$matmul": 2 * (64 * 128 + 128 * 32 + 64 * 32)}


def test_loops_of_unknown_length_are_counted() -> None:
    traffic = hlo.traffic(TPU.replace("direction=LT", "direction=NE"), 8)
    assert traffic.unknown_loops == 1
    assert traffic.collectives["all-gather"] == 256 * 512 * 2 * 3 / 4


def test_text_without_an_entry_is_rejected() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.traffic("HloModule nothing\n", 1)


def compile_on_cpus() -> None:
    """Runs with 8 devices: a scan that gathers each layer's kernel, a sum over some devices, a permutation."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    from coca_jax import sharding

    mesh = sharding.make_mesh((2, 4, 1))

    def local(x: jax.Array, kernels: jax.Array) -> jax.Array:
        def layer(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
            return x @ jax.lax.all_gather(kernel, "fsdp", tiled=True), None

        x = jax.lax.scan(layer, x, kernels)[0]
        return jax.lax.ppermute(jax.lax.psum(x, "fsdp"), "replica", [(0, 1), (1, 0)])

    specs = (P(("replica", "fsdp")), P(None, "fsdp"))
    function = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("replica"), check_vma=False))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((32, 64), (6, 64, 64))]
    text = function.lower(*shapes).compile().as_text()
    print(json.dumps(hlo.traffic(text, 8).collectives))


def test_collectives_of_a_cpu_program_are_counted(run_python: RunPython) -> None:
    found = json.loads(run_python(compile_on_cpus).stdout)
    assert found["all-gather"] == 6 * (64 * 64 * 4) * 3 / 4
    assert found["all-reduce"] == 2 * (4 * 64 * 4) * 3 / 4
    assert found["collective-permute"] == 4 * 64 * 4
    assert found["reduce-scatter"] == found["all-to-all"] == 0
