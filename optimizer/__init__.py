"""The search: ask Optuna, merge in place, score, tell, front. `optimizer.run.open_run` reads what a search left.

Nothing is imported here, so that the command line's help comes at once.
"""
