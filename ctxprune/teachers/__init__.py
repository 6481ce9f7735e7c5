"""Who teaches a scorer what keys are worth? One teacher per file; all but dms leave the language model as it is.

future_attention and edge_gradient give targets, `fit` makes the policy's networks rank like them; reward lets an agent
try, bandit a choice of budgets, what they keep priced by latency if one likes; soft_mask lets the loss itself decide,
dms too, and trains the model along with its heads' decisions.
"""
