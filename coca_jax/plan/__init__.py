"""What a training run needs, before it runs: memory, operations, traffic, time. See docs/planner.md.

python -m coca_jax.plan --config=configs/coca_giant.py --topology=v4:8x16x16
"""
