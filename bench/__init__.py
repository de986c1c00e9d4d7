"""The experiments: data, models, training loops, figures, and the commands that people run."""

from bench.common.optional_packages import say_what_is_missing

say_what_is_missing()
