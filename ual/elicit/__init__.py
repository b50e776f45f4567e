"""`ual elicit`: rows in, rows with an uncertainty and its evidence out."""
