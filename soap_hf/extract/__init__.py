"""Clean features of whole data sets, in files. The door is `extraction`."""
