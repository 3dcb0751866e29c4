"""Studies: hyperparameter searches over training runs."""
