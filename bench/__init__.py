"""The experiments: data, models, training loops, figures, and the commands that people run."""
