"""The whole training step against steps written as the official code runs them."""
