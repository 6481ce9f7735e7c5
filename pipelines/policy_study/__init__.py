"""Which way to prune keeps most answers? `sweep experiment=policies`: small models that know a task, every method at
equal budgets, one table. What runs is in run.py; this file stays empty of imports, for configs are read without torch.
"""
