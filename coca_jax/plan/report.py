"""Plans as text for a terminal, and as an exit status."""

from __future__ import annotations

from collections.abc import Sequence

from coca_jax.plan.compiled import GIB
from coca_jax.plan.estimate import Plan

EXIT_TOO_LARGE, EXIT_UNKNOWN = 3, 4


def status(plans: Sequence[Plan]) -> int:
    """Exit status: 0 if a plan fits, EXIT_TOO_LARGE if all are too large, otherwise EXIT_UNKNOWN."""
    if any(p.fits for p in plans):
        return 0
    return EXIT_TOO_LARGE if all(p.missing_gib for p in plans) else EXIT_UNKNOWN


def figure(value: float) -> str:
    """Format a number: thousands without decimals, three decimals below, two significant digits for tiny ones."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if value >= 0.01 or not value else f"{value:.1e}"


def choice(plan: Plan) -> str:
    """Mesh, microbatches and remat policies of a plan on one line."""
    replica, fsdp, tensor = plan.mesh
    mesh = f"mesh replica={replica} fsdp={fsdp} tensor={tensor}"
    if plan.topology.slices > 1:  # the values of the configuration keys
        replica, fsdp, _ = plan.slice_mesh
        mesh += f" (in each slice replica={replica} fsdp={fsdp})"
    image, text = plan.c.model.image.remat, plan.c.model.text.remat
    remat = image if image == text else f"{image} (image), {text} (text)"
    return f"{mesh}, microbatches={plan.c.microbatches}, remat {remat}"


def page(plan: Plan, name: str) -> str:
    """All figures of one plan."""
    topology, m = plan.topology, plan.measured
    lines = [
        f"{name} on {topology}, {topology.chips:,} chips",
        choice(plan),
        f"batch {plan.c.batch_size:,}, {plan.c.batch_size / topology.chips:g} images per chip; {plan.c.steps:,} steps",
        "",
        _verdict(plan),
        *(f"  {size / GIB:9.3f}  {kind}" for kind, size in m.memory.items() if size),
    ]
    executed = m.executed_flops * topology.chips
    lines += ["", "Operations per step, all chips", f"  {plan.model_flops / 1e15:9.2f}  PFLOP of the model"]
    if executed:
        lines.append(
            f"  {executed / 1e15:9.2f}  PFLOP executed, including recomputation and optimizer: "
            f"{executed / plan.model_flops:.2f} times the model's"
        )
    lines += [f"  not counted: {', '.join(m.uncounted)}"] if m.uncounted else []
    if m.error:
        return "\n".join(lines)
    lines += ["", "Sent per chip and step"]
    lines += [f"  {size / 1e9:9.3f}  GB {kind}" for kind, size in m.collectives.items() if size]
    lines += [f"  {m.exposed / 1e9:9.3f}  GB of these while the chip waits for them"]
    lines += [f"  ({m.unknown_loops} loops of unknown length counted as one iteration)"] if m.unknown_loops else []
    seconds = plan.seconds
    assert plan.step_seconds and plan.mfu and plan.hours
    rate = plan.c.batch_size / plan.step_seconds
    lines += [
        "",
        f"ESTIMATE, not a measurement (matrix products at {plan.efficiency:.0%} of the peak; see docs/planner.md)",
        f"  {figure(seconds['products']):>9}  s matrix products",
        f"  {figure(seconds['memory_apart']):>9}  s other operations, {m.hbm_apart / 1e9:.1f} GB read and written",
        f"  {figure(seconds['memory']):>9}  s memory traffic in total, {m.hbm / 1e9:.1f} GB",
        f"  {figure(seconds['interconnect_overlapped']):>9}  s interconnect, overlapped",
        f"  {figure(seconds['interconnect_exposed']):>9}  s interconnect, waited for",
        f"  {figure(plan.step_seconds):>9}  s per step: {rate:,.0f} images/s, {rate / topology.chips:.1f} per chip; "
        f"MFU {plan.mfu:.1%}",
        f"  {figure(plan.hours):>9}  hours for {plan.c.steps:,} steps: {figure(plan.hours * topology.chips)} "
        "chip-hours",
        "",
        f"compiled in {m.compile_seconds:.0f} s",
    ]
    return "\n".join(lines)


def _verdict(plan: Plan) -> str:
    limit = f"{plan.topology.chip.usable_gib:g} GiB that a program may use on a {plan.topology.chip.name} chip"
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
            if not p.missing_gib:  # timeout, or the compiler failed
                what, why = "not compiled", p.measured.error
            lines.append(f"  {what}: {choice(p)}: {why}")
    return "\n".join(lines)
