"""The shipped sample of Fashion-MNIST and the script that made it."""
