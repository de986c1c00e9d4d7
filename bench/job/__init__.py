"""The training job: data-parallel over MPI, with the time of every phase."""
