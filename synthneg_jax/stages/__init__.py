"""One module for each verb of the pipeline; each reads the files of earlier stages and writes its own."""
