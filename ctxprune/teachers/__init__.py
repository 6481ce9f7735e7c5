"""Who teaches a scorer what keys are worth? One teacher per file; the language model itself stays as it is.

future_attention and edge_gradient give targets, `fit` makes the policy's networks rank like them; reward lets an agent
try; soft_mask lets the loss itself decide.
"""
