"""The experiments of three papers, each in a package of its own."""
