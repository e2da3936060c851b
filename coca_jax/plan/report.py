"""Plans as text for a terminal, and as an exit status."""

from __future__ import annotations

from collections.abc import Sequence

from coca_jax.plan.compiled import GIB
from coca_jax.plan.estimate import Plan

EXIT_TOO_LARGE, EXIT_NOT_KNOWN = 3, 4


def status(plans: Sequence[Plan]) -> int:
    """What to exit with: 0, EXIT_TOO_LARGE, or EXIT_NOT_KNOWN where none is known to fit and one of them might."""
    if any(p.fits for p in plans):
        return 0
    return EXIT_TOO_LARGE if all(p.missing_gib for p in plans) else EXIT_NOT_KNOWN


def figure(value: float) -> str:
    """Three digits behind the point, none of what is large; of what is tiny the first two that count."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if value >= 0.01 or not value else f"{value:.1e}"


def choice(plan: Plan) -> str:
    """The mesh, microbatches and remat policies of a plan, on one line."""
    replica, fsdp, tensor = plan.mesh
    mesh = f"mesh replica={replica} fsdp={fsdp} tensor={tensor}"
    if plan.topology.slices > 1:  # what the keys are set to
        replica, fsdp, _ = plan.mesh_of_a_slice
        mesh += f" (in each slice replica={replica} fsdp={fsdp})"
    image, text = plan.c.model.image.remat, plan.c.model.text.remat
    remat = image if image == text else f"{image} (image), {text} (text)"
    return f"{mesh}, microbatches={plan.c.microbatches}, remat {remat}"


def page(plan: Plan, name: str) -> str:
    """All that is known of one plan."""
    topology, m = plan.topology, plan.measured
    lines = [
        f"{name} on {topology}, {topology.chips:,} chips",
        choice(plan),
        f"batch {plan.c.batch_size:,}, {plan.c.batch_size / topology.chips:g} images a chip; {plan.c.steps:,} steps",
        "",
        _verdict(plan),
        *(f"  {size / GIB:9.3f}  {kind}" for kind, size in m.memory.items() if size),
    ]
    executed = m.executed_flops * topology.chips
    lines += ["", "Operations a step, all chips", f"  {plan.model_flops / 1e15:9.2f}  PFLOP of the model"]
    if executed:
        lines.append(
            f"  {executed / 1e15:9.2f}  PFLOP computed: recomputation and optimiser included, "
            f"{executed / plan.model_flops:.2f} times the model's"
        )
    lines += [f"  not counted: {', '.join(m.uncounted)}"] if m.uncounted else []
    if m.error:
        return "\n".join(lines)
    lines += ["", "Sent by a chip in a step"]
    lines += [f"  {size / 1e9:9.3f}  GB {kind}" for kind, size in m.collectives.items() if size]
    lines += [f"  {m.exposed / 1e9:9.3f}  GB of these while the chip waits"]
    lines += [f"  ({m.unknown_loops} loops of unknown length counted as one round)"] if m.unknown_loops else []
    seconds = plan.seconds
    assert plan.step_seconds and plan.mfu and plan.hours
    rate = plan.c.batch_size / plan.step_seconds
    lines += [
        "",
        f"ESTIMATE, not a measurement (matrix products at {plan.efficiency:.0%} of the peak; see docs/planner.md)",
        f"  {figure(seconds['products']):>9}  s matrix products",
        f"  {figure(seconds['memory_apart']):>9}  s other operations, {m.hbm_apart / 1e9:.1f} GB read and written",
        f"  {figure(seconds['memory']):>9}  s memory in all, {m.hbm / 1e9:.1f} GB",
        f"  {figure(seconds['interconnect_overlapped']):>9}  s interconnect beside them",
        f"  {figure(seconds['interconnect_exposed']):>9}  s interconnect that is waited for",
        f"  {figure(plan.step_seconds):>9}  s a step: {rate:,.0f} images/s, {rate / topology.chips:.1f} a chip; "
        f"MFU {plan.mfu:.1%}",
        f"  {figure(plan.hours):>9}  hours for {plan.c.steps:,} steps: {figure(plan.hours * topology.chips)} "
        "chip-hours",
        "",
        f"compiled in {m.compile_seconds:.0f} s",
    ]
    return "\n".join(lines)


def _verdict(plan: Plan) -> str:
    limit = f"{plan.topology.chip.usable_gib:g} GiB that a {plan.topology.chip.name} chip has for a program"
    if plan.fits:
        return f"FITS: {plan.hbm_gib:.2f} of the {limit}"
    if plan.missing_gib:
        return (
            f"DOES NOT FIT: {plan.hbm_gib:.2f} GiB is {plan.missing_gib:.2f} GiB more than the {limit}. "
            f"Try: {'; '.join(plan.advice())}"
        )
    return f"NOT COMPILED: {plan.measured.error}"


def table(plans: Sequence[Plan]) -> str:
    """Plans that fit, fastest first, then those that do not, with the reason."""
    fitting = sorted((p for p in plans if p.fits), key=lambda p: p.step_seconds or 0.0)
    lines = []
    if fitting:
        lines.append("  s/step    MFU  HBM GiB  chip-hours  (estimates; fastest first)")
    for p in fitting:
        assert p.step_seconds and p.mfu and p.hours
        step, cost = figure(p.step_seconds), figure(p.hours * p.topology.chips)
        lines.append(f"{step:>8}  {p.mfu:5.1%}  {p.hbm_gib:7.2f}  {cost:>10}  {choice(p)}")
    for p in plans:
        if not p.fits:
            what, why = ("does not fit", f"{p.missing_gib:.2f} GiB too large")
            if not p.missing_gib:  # too slow, or the compiler failed
                what, why = "not compiled", p.measured.error
            lines.append(f"  {what}: {choice(p)}: {why}")
    return "\n".join(lines)
