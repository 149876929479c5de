"""Numbers from arrays and callables. Nothing here knows a model, a file or a data set."""
