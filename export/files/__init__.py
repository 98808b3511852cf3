"""The files of a checkpoint: what is in them and where, in whatever format they are."""
