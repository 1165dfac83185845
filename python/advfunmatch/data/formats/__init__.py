"""The forms in which data sets are published: one file a family, each a function from `Wanted` to `Contents`."""
