"""What figures share: the page, the looks of methods, and the figure of `ring.bench`."""
