"""What all commands need: launching, workers, command lines, files of results, statistics, texts."""
