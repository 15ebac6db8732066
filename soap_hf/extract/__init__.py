"""Clean features of whole data sets, in files. The door is `extraction`."""

from ..compat import need

need("datasets", "Writing features", "fit")
