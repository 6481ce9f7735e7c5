"""What can a person run? One module per verb; the only importers of hydra, ray, deepspeed, wandb and matplotlib."""
