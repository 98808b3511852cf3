"""One file a verb. Each imports heavy packages inside its function, so that `--help` comes at once."""
