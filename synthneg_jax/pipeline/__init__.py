"""One module per stage; each reads the files of earlier stages and writes its own."""
