"""How good a candidate is: lm-eval tasks to per-item outcomes (harness, engine) to objectives (objectives)."""
