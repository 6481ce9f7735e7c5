"""Which way of pruning a context is best at what? Policies, tasks and budgets under one contract."""
