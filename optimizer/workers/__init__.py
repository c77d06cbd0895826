"""Who evaluates recipes: this process, or Ray actors."""
