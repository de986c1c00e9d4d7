"""What experiments of many runs share: the grid, what is kept of the runs, findings."""
